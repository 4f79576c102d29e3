"""Does training for what will happen to the weights help? SST-2, every arm under every quantizer, noise and flips.

    python -m scripts.deploy_sst2 --model MODEL --data FOLDER --output runs/deploy-small
    python -m scripts.deploy_sst2 --model MODEL --data FOLDER --size full --jobs 16 --output runs/deploy-full

Each arm is trained with each seed, as in `reproduce_sst2.py`, and measured by `examples/train_sst2.py` under what is
named below. The output folder gets a record for each run and, if the plain arm is among them, `table.md`: mean ±
sample standard deviation over seeds, and Student's t of each arm against the plain one. Finished runs are kept, so an
interrupted campaign goes on. The full size, for a GPU, has more arms and more corruptions: those of paper 2, and what
others would train with. `--measured formats` measures in more of the formats that people deploy instead, and
`--measured pruning` with weights that are zero, where some arms are trained for that; models in the `--work` folder
are not trained anew.
"""

from __future__ import annotations

import argparse

from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.records import EvaluationRecord
from scripts.campaigns import ONE_STEP, PLAIN, Arm, Run, l2, over_runs, risk, tables, write_table
from scripts.reproduce_sst2 import ARMS as DEFENSES
from scripts.reproduce_sst2 import measure
from scripts.sst2_runs import SIZES, above_tables, campaign_of_sizes, measured_under, peer, started

DEPLOYED = {
    "plain": PLAIN,
    "half-4-bits": Arm("half 4 bits", risk(0.5, "quantization=4")),
    "worst-and-4-bits": Arm("worst direction, 4 bits", risk(1 / 3, "gradient=0.1", "quantization=4")),
    "half-4-bits-channel": Arm("half 4 bits a channel", risk(0.5, "quantization=4:per=channel")),
    "4-bits": Arm("4 bits alone", risk(0.0, "quantization=4")),
    "noise": Arm("noise alone", risk(0.0, "gaussian=0.02")),
    **{name: DEFENSES[name] for name in ("multi_step_risk-1", "sam-half")},
}
MORE = {
    "torchao": peer("torchao's QAT, 4 bits a channel", "torchao"),
    "4-bits-channel": Arm("4 bits a channel alone", risk(0.0, "quantization=4:per=channel")),
    "all-three": Arm("worst direction, 4 bits, noise", risk(1 / 4, "gradient=0.1", "quantization=4", "gaussian=0.02")),
    "half-noise": Arm("half noise", risk(0.5, "gaussian=0.02")),
    **{name: DEFENSES[name] for name in ("multi_step_risk-2", "multi_step_risk-3", "sam")},
    **{
        f"epsilon-{epsilon}": Arm(f"K = 1, ε = {epsilon}", l2("multi_step_risk", epsilon, "--defense_steps", "1"))
        for epsilon in (0.05, 0.2, 0.5)
    },
    "last_layer": Arm("K = 1, last layer", [*ONE_STEP, "--defense_target_modules", "last-encoder-layer"]),
    "awp-late": Arm("AWP ε/2, late", l2("awp", 0.05, "--defense_start_epoch", "1")),
    "penalty": Arm("gradient penalty", ["--defense", "gradient_penalty", "--defense_weight", "0.05"]),
    "looksam": peer("LookSAM ε/2", "looksam", 0.05),
    "momentum": peer("along the momentum, ε/2", "momentum", 0.05),
}
PRUNED = {
    "plain": PLAIN,
    "multi_step_risk-1": DEFENSES["multi_step_risk-1"],
    "half-pruned": Arm("half 60 % pruned", risk(0.5, "pruning=0.6")),
    "half-2-of-4": Arm("half 2:4 pruned", risk(0.5, "pruning=0.5:per=4")),
}
ARMS = DEPLOYED | MORE | PRUNED
CORRUPTIONS = [
    "gradient=0.1,0.2",
    "gaussian=0.01,0.02",
    "quantization=8,6,5,4,3",
    "quantization=5,4,3:per=channel",
    "quantization=4,3:per=32",
    "float-quantization=fp8_e4m3,mxfp4,nf4",
    "bit-flips=1e-7",
    "worst-bit-flips=1,3:of=int8,candidates=5",
]
# The same and what the papers have beside it.
MORE_CORRUPTIONS = [
    "random=20",
    "gradient=0.05,0.1,0.2,0.5",
    "gradient=2e-4,5e-4:norm=inf",
    "multi-step=0.1,0.2",
    "multi-step=2e-4:norm=inf",
    "uniform=0.02,0.04",
    *CORRUPTIONS[1:-2],
    "bit-flips=1e-8,1e-7",
    CORRUPTIONS[-1],
]
# Beside the quantizers above: other numbers of bits, codes with a zero point, other floats.
FORMATS = [
    "quantization=8,6,5,4:symmetric=false",
    "quantization=8,6:per=channel",
    "quantization=4,3:per=channel,symmetric=false",
    "quantization=8,6,5:per=32",
    "quantization=4,3:per=32,symmetric=false",
    "float-quantization=fp8_e5m2,nvfp4",
]

PRUNING = ["pruning=0.3,0.5,0.6,0.7", "pruning=0.5:per=4", "pruning=0.5:per=channel", "gradient=0.1", "quantization=4"]
INSTEAD = {"formats": FORMATS, "pruning": PRUNING}


def measure_all(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train one model and measure it under all corruptions, unless its record is there already."""
    return measure(
        options, run, "--corruptions", *(MORE_CORRUPTIONS if options.size is SIZES["full"] else CORRUPTIONS)
    )


def measure_instead(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train one model and measure it under what is named instead, unless its record is there already."""
    return measured_under(options, run, read_corruptions(INSTEAD[options.measured]))


def main() -> None:
    """Run what is missing, and write the table."""
    parser = campaign_of_sizes(__doc__, ARMS, "runs/deploy")
    parser.add_argument("--measured", choices=INSTEAD, help="what is measured instead; in a folder of its own")
    options = started(parser)
    usual = PRUNED if options.measured == "pruning" else DEPLOYED | MORE if options.size is SIZES["full"] else DEPLOYED
    named = options.arms or usual
    arms = {name: ARMS[name] for name in named}
    records = over_runs(measure_instead if options.measured else measure_all, "runs", options, arms)
    if "plain" not in named:  # nothing to compare with
        return
    above = above_tables(options, "the arm is no better than the plain one")
    write_table(options.output, f"{above}{tables(records, ARMS, costs=True)}")


if __name__ == "__main__":
    main()
