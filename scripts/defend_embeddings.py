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
import json
from pathlib import Path

from hf_parcor.records import EvaluationRecord
from hf_parcor.strict_json import replace_text
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
    over,
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


def write_pairs(folder: Path, data: Path) -> None:
    """Write the pairs to train and to measure on, as `train.tsv` and `test.tsv`."""
    pairs = paraphrases(data)
    held_out = pairs[::4]
    known = {sentence for pair in held_out for sentence in pair.values()}
    for name, rows in (("train", [pair for pair in pairs if known.isdisjoint(pair.values())]), ("test", held_out)):
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        replace_text(folder / f"{name}.tsv", "\n".join(lines) + "\n")


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
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_pairs(folder.parent, options.data)
        settings = {
            "model_name_or_path": options.model,
            "train_file": folder.parent / "train.tsv",
            "validation_file": folder.parent / "test.tsv",
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
    trained = over_runs(measure, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    if options.arms:
        return
    runs = json.loads((options.output / "runs.json").read_text(encoding="utf-8"))
    count = next(iter(runs.values()))["train_samples"]
    text = (
        f"Fine-tuned on {count:,} pairs of English paraphrases ({EPOCHS} epochs, batches of {BATCH}, learning rate "
        f"{LEARNING_RATE:g}), and searched: every fourth pair, each first sentence among all second ones. nDCG@10 in "
        f"per cent, {over(options.seeds)}.\n\n{tables(trained, ARMS, costs=True, metric=METRIC)}"
    )
    write_table(options.output, text)


if __name__ == "__main__":
    main()
