"""An embedding model, fine-tuned plain, defended in the worst direction, and for 2 bits: what a search still finds.

    python -m scripts.defend_embeddings --model MODEL --data FOLDER --output scripts/results/embeddings --jobs 2

MODEL is a folder or a name on the Hub of a model of sentence-transformers, FOLDER holds `train.tsv.gz`, `dev.tsv.gz`
and `test.tsv.gz` of Tatoeba English-German. The texts are paraphrases as in `scripts.which_bits`: every fourth pair is
measured on, and of the others those that share no sentence with them are trained on. Each arm is trained with each
seed by `examples/train_embeddings.py`; finished runs are kept, so an interrupted campaign goes on. The output folder
gets a record for each run, `runs.json`, and `table.md`: mean ± sample standard deviation over seeds, and Student's
t-tests.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from hf_parcor.records import EvaluationRecord
from scripts.campaigns import (
    ONE_STEP,
    PLAIN,
    Arm,
    Run,
    begin,
    campaign_parser,
    measured_once,
    of_run,
    of_study,
    over_runs,
    risk,
    run_example,
    tables,
    write_table,
)
from scripts.which_bits import paraphrases

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_embeddings.py"
PER_CHANNEL = "per=channel,code-range=full"
ARMS = {
    "plain": PLAIN,
    "multi_step_risk-1": Arm("K = 1", ONE_STEP),
    "quantization-2": Arm("for 2 bits", risk(0.5, f"quantization=2:{PER_CHANNEL}")),
}
CORRUPTIONS = ["gradient=0.1,0.2", "gaussian=0.02", "quantization=4,3", f"quantization=4,3,2:{PER_CHANNEL}"]
METRIC = "cosine_ndcg@10"
EPOCHS, BATCH, LEARNING_RATE = 2, 64, 5e-5


def write_pairs(folder: Path, data: Path) -> dict[str, int]:
    """Write the pairs to train and to measure on, unless they are there; return how many there are of each."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = paraphrases(data)
    held_out = pairs[::4]
    known = {sentence for pair in held_out for sentence in pair.values()}
    parts = {"train": [pair for pair in pairs if known.isdisjoint(pair.values())], "test": held_out}
    for name, rows in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["anchor", "positive"])
            writer.writeheader()
            writer.writerows(rows)
    return {name: len(rows) for name, rows in parts.items()}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = campaign_parser(__doc__, ARMS, "runs/embeddings", "the files of Tatoeba")
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    options = begin(parser)
    options.work = of_study(options.work, options.model)
    return options


def measure(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""

    def example(folder: Path) -> None:
        settings = {
            "model_name_or_path": options.model,
            "train_file": options.work / "train.csv",
            "validation_file": options.work / "test.csv",
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": 10,
            **of_run(run, folder),
            "save_strategy": "no",
            "logging_steps": 10,
        }
        flags = ["--do_train", "--do_eval", *run.arm.flags, "--corruptions", *CORRUPTIONS]
        run_example([EXAMPLE], settings, *flags, threads=options.threads)

    return measured_once(options, run, example)


def main() -> None:
    """Run what is missing, and write the table."""
    options = parse_options()
    counts = write_pairs(options.work, options.data)
    trained = over_runs(measure, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    if options.arms:
        return
    seeds = ", ".join(map(str, options.seeds))
    text = (
        f"{Path(options.model).name} fine-tuned on {counts['train']:,} pairs of English paraphrases ({EPOCHS} epochs, "
        f"batches of {BATCH}, learning rate {LEARNING_RATE:g}), and searched: {counts['test']:,} other pairs, each "
        f"first sentence among all second ones. nDCG@10 in per cent, seeds {seeds}, mean ± sample standard "
        "deviation; * where Student's t says better than plain with p < 0.05 "
        f"(df = {2 * (len(options.seeds) - 1)}), one-sided, not corrected for the number of rows.\n\n"
        f"{tables(trained, ARMS, costs=True, metric=METRIC)}"
    )
    write_table(options.output, text)


if __name__ == "__main__":
    main()
