"""Paper 2, sections 5.2 and 5.3, on a small BERT: SST-2 plain, with each defense, and with the last layer defended.

    python -m scripts.reproduce_sst2 --model MODEL --data FOLDER --output scripts/results/sst2

MODEL is a folder or a name on the Hub, FOLDER holds `train_sentences.tsv.gz` and `dev.tsv.gz`. Each arm is trained
with each seed by `examples/train_sst2.py`; finished runs are kept, so an interrupted campaign goes on. The output
folder gets a record for each run, and `table.md` with two comparisons, of defenses and of targets: mean ± sample
standard deviation over seeds, and the Student t-tests of paper 2, Appendix C. As in its Table 6, the models of the
second comparison are also corrupted in their last layer alone.
"""

from __future__ import annotations

import argparse

from hf_parcor import CorruptionConstraint, GradientCorruption
from hf_parcor.records import EvaluationRecord
from scripts.campaigns import ONE_STEP, PLAIN, Arm, Run, l2, measured_once, over_runs, tables, write_table
from scripts.sst2_runs import above_tables, evaluator_of, parse_options, train

ARMS = {
    "plain": PLAIN,
    "sam": Arm("SAM", l2("sam", 0.1)),
    "sam-half": Arm("SAM ε/2", l2("sam", 0.05)),
    "awp-late": Arm("AWP ε/2, late", l2("awp", 0.05, "--defense_start_epoch", "0.5")),
    "multi_step_risk-1": Arm("K = 1, ACRT", ONE_STEP),
    "multi_step_risk-2": Arm("K = 2", l2("multi_step_risk", 0.1, "--defense_steps", "2")),
    "multi_step_risk-3": Arm("K = 3", l2("multi_step_risk", 0.1, "--defense_steps", "3")),
    "last_layer": Arm(
        "K = 1, last layer",
        # With full passes, as it was first measured: a shared prefix keeps one dropout mask, which is another run.
        [*ONE_STEP, "--defense_target_modules", "last-encoder-layer", "--defense_reuse_prefix", "false"],
    ),
}
DEFENSES = [name for name in ARMS if name != "last_layer"]
TARGETS = ["plain", "multi_step_risk-1", "last_layer"]


def measure(options: argparse.Namespace, run: Run, *more: str) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already; `more` are flags for the example."""
    flags = ["--do_eval", "--corruption_trials", str(options.size.trials), *more]
    return measured_once(options, run, lambda folder: train(options, run, *flags))


def corrupt_last_layer(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Corrupt only the last layer of a trained model, unless its record is there already."""
    path = options.output / f"{run.file_name}-corrupt-last-layer.json"
    if not path.exists():
        corruptions = [
            GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in (0.1, 0.2, 0.5, 1)
        ]
        evaluator = evaluator_of(options, options.work / run.file_name, target_modules="last-encoder-layer")
        evaluator.evaluate(corruptions).save(path)
    return EvaluationRecord.load(path)


def main() -> None:
    """Run what is missing, and write the table."""
    options = parse_options(__doc__, ARMS, "runs/sst2")
    trained = over_runs(measure, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    if options.arms:
        return
    targets = {name: ARMS[name] for name in TARGETS}
    last_layer = over_runs(corrupt_last_layer, "last layer corrupted", options, targets)
    text = (
        f"{above_tables(options, 'the defended arm is no better', more='; defenses in L2, ε = 0.1')}"
        f"## Defenses\n\n{tables({arm: trained[arm] for arm in DEFENSES}, ARMS, costs=True)}\n"
        f"## Targets\n\nAll parameters corrupted:\n\n{tables({arm: trained[arm] for arm in TARGETS}, ARMS)}\n"
        f"Only the last layer corrupted:\n\n{tables(last_layer, ARMS)}"
    )
    write_table(options.output, text)


if __name__ == "__main__":
    main()
