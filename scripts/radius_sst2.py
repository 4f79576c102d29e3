"""Does a small radius help without corruption, and a large one harm? SST-2 under one step of growing ε.

    python -m scripts.radius_sst2 --model MODEL --data FOLDER --output scripts/results/radius

Paper 1 calls the accuracy without corruption about a unimodal function of the radius that one trains with, and paper 2
(Influence of ε) finds the same of BLEU. Each radius is trained with each seed by `examples/train_sst2.py`, and
measured as it is and in the worst direction; finished runs are kept, so an interrupted campaign goes on. The output
folder gets a record for each run, and `table.md`.
"""

from __future__ import annotations

import argparse

from hf_parcor.records import EvaluationRecord
from scripts.campaigns import PLAIN, Arm, Run, l2, over_runs, tables, write_table
from scripts.reproduce_sst2 import measure
from scripts.sst2_runs import above_tables, parse_options

RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
ARMS = {
    "plain": PLAIN,
    **{f"epsilon-{radius:g}": Arm(f"ε = {radius:g}", l2("acrt", radius)) for radius in RADII},
}


def measure_all(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train one model and measure it, unless its record is there already."""
    return measure(options, run, "--corruptions", "gradient=0.1")


def main() -> None:
    """Run what is missing, and write the table."""
    options = parse_options(__doc__, ARMS, "runs/sst2", seeds=5)
    records = over_runs(measure_all, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    if options.arms:
        return
    above = above_tables(options, "the defended arm is no better", more="; ACRT in L2, α = ½")
    write_table(options.output, f"{above}{tables(records, ARMS)}")


if __name__ == "__main__":
    main()
