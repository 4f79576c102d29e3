"""Paper 1's Tables 1 and 2 on a dependency parser: random against gradient-based corruption, plain and defended.

    python -m scripts.reproduce_parser --data FOLDER --output scripts/results/parser

FOLDER holds `en_ewt-ud-train.conllu.gz` and `en_ewt-ud-dev.conllu.gz` of UD English EWT. Each arm is trained with each
seed by `examples/train_parser.py`; finished runs are kept, so an interrupted campaign goes on. The output folder gets
a record for each run, and `table.md`: mean ± sample standard deviation over seeds, and Student's t-tests of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_parcor.records import EvaluationRecord
from hf_parcor.records.evaluation import CorruptionRecord
from hf_parcor.statistics import MeanAndSpread, student_t_test
from scripts.campaigns import (
    PLAIN,
    Arm,
    Run,
    begin,
    campaign_parser,
    l2,
    mean_and_deviation,
    measured_once,
    of_run,
    of_study,
    over_runs,
    over_seeds,
    run_example,
    tables,
    write_table,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_parser.py"
EPSILON = 0.1
"""The radius of the defense in L2: where a plain parser begins to suffer along the gradient, see Table 2."""
ARMS = {
    "plain": PLAIN,
    "multi_step_risk-1": Arm("K = 1, ACRT", l2("multi_step_risk", EPSILON, "--defense_steps", "1")),
}

# Table 1 has five decades in L∞; a vector of k = 600,000 weights of size ε is about 800 ε long, one of 100 is 10 ε.
STRENGTHS = {
    ("inf", None): (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    ("inf", 100): (1e-2, 1e-1, 1.0, 1e1, 1e2),
    ("2", None): (1e-2, 1e-1, 1.0, 1e1, 1e2),
    ("2", 100): (1e-2, 1e-1, 1.0, 1e1, 1e2),
}
TABLE_2 = (0.05, 0.2, 0.5)
"""Radii of L2 between these decades, at which all arms are compared, as in Table 2."""


def words(kind: str, p: str, top_n: int | None, strengths: Sequence[float]) -> str:
    """Return corruptions as the flag `--corruptions` takes them."""
    most = "" if top_n is None else f",top_n={top_n}"
    return f"{kind}={','.join(map(str, strengths))}:norm={p}{most}"


PAIRS = [(p, top_n, strength) for (p, top_n), strengths in STRENGTHS.items() for strength in strengths]
CORRUPTIONS = [
    *(words(kind, p, top_n, [strength]) for p, top_n, strength in PAIRS for kind in ("random", "gradient")),
    words("gradient", "2", None, TABLE_2),
    "gaussian=0.01,0.1",
    "quantization=8,6,4",
]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = campaign_parser(__doc__, ARMS, "runs/parser", "the CoNLL-U files")
    parser.add_argument("--train-sentences", type=int, default=2000)
    parser.add_argument("--dev-sentences", type=int, default=300)
    options = begin(parser)
    options.work = of_study(options.work, options.train_sentences)
    return options


def measure(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""

    def example(folder: Path) -> None:
        trained = (folder / "train_results.json").exists()  # killed while it was measured
        settings = {
            "train_file": options.data / "en_ewt-ud-train.conllu.gz",
            "validation_file": options.data / "en_ewt-ud-dev.conllu.gz",
            "max_train_samples": options.train_sentences,
            "max_eval_samples": options.dev_sentences,
            "dropout": 0.2,
            "per_device_train_batch_size": 256,  # at paper 1's 1,024 these few steps end before it has learned much
            "num_train_epochs": 3,
            **of_run(run, folder),
            "save_strategy": "no",
            "logging_steps": 20,
            **({"model_name_or_path": folder} if trained else {"do_train": True}),
        }
        flags = ["--do_eval", *run.arm.flags, "--corruptions", *CORRUPTIONS]
        run_example([EXAMPLE], settings, *flags, threads=options.threads)

    return measured_once(options, run, example)


def per_cent(rows: Sequence[CorruptionRecord]) -> str:
    """Return the UAS over seeds."""
    return mean_and_deviation([100 * row.mean("uas") for row in rows], 1)


def table_1(records: Sequence[EvaluationRecord]) -> str:
    """Return paper 1's Table 1 for the parser: both corruptions side by side, and whether they differ by chance."""
    lines = ["| constraint | random | gradient-based | difference | t |", "|:--|--:|--:|--:|--:|"]
    rows = list(zip(*(record.corruptions for record in records), strict=True))
    for index, (p, top_n, strength) in enumerate(PAIRS):
        random, proposed = rows[2 * index : 2 * index + 2]
        differences = [
            100 * (one.mean("uas") - other.mean("uas")) for one, other in zip(random, proposed, strict=True)
        ]
        spread = MeanAndSpread.from_values(differences)
        test = student_t_test(over_seeds(list(random), "uas"), over_seeds(list(proposed), "uas"))
        most = "k" if top_n is None else str(top_n)
        lines.append(
            f"| {'L∞' if p == 'inf' else 'L2'}, n = {most}, ε = {strength:g} | {per_cent(random)} | "
            f"{per_cent(proposed)} | {spread.mean:+.1f} | {test.t:.1f}{'*' if test.is_significant() else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the table."""
    options = parse_options()
    trained = over_runs(measure, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    if options.arms:
        return
    plain = trained["plain"]
    text = (
        f"UD English EWT, {options.train_sentences} training sentences, 3 epochs, batch 256, dropout 0.2; UAS in per "
        f"cent of the first {options.dev_sentences} dev sentences without punctuation, {len(options.seeds)} seeds "
        f"({', '.join(map(str, options.seeds))}), mean ± sample standard deviation; k = {plain[0].parameters:,} to "
        f"{max(record.parameters for record in plain):,} weights.\n\n"
        f"## Table 1: random against gradient-based corruption, plain parser\n\n"
        f"No corruption: {per_cent([record.clean for record in plain])}. Difference: how much lower the "
        "gradient-based one is; t: Student's test with pooled variance "
        f"(df = {2 * (len(options.seeds) - 1)}), * p < 0.05, one-sided, not corrected for the number of rows.\n\n"
        f"{table_1(plain)}\n"
        f"## Table 2: corruption-resistant training\n\nK = 1 in L2, ε = {EPSILON}, which is ACRT with α = 1/2.\n\n"
        f"{tables(trained, ARMS, costs=True, metric='uas')}"
    )
    write_table(options.output, text)


if __name__ == "__main__":
    main()
