"""Paper 2, section 5.3, on a small BERT: SST-2 plain, all parameters defended, the last layer defended.

    python scripts/reproduce_sst2.py --model MODEL --data FOLDER --output scripts/results/sst2

MODEL is a folder or a name on the Hub, FOLDER holds `train_sentences.tsv.gz` and `dev.tsv.gz`. Each arm is trained
with each seed by `examples/train_sst2.py`; finished runs are kept, so an interrupted campaign goes on. The output
folder gets a record for each run, `table.md` with mean ± sample standard deviation over seeds, and the Student
t-tests of paper 2, Appendix C. As in its Table 6, the trained models are also corrupted in their last layer alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_parcor import CorruptionConstraint, CorruptionEvaluator, GradientCorruption
from hf_parcor.evaluation import ClassificationMetric, CorruptionRecord, EvaluationRecord
from hf_parcor.statistics import MeanAndSpread, student_t_test

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_sst2.py"
DEFENDED = ["--defense", "multi_step_risk", "--defense_norm", "2", "--defense_epsilon", "0.1", "--defense_steps", "1"]
RECORDING = threading.Lock()
ARMS = {
    "plain": ["--defense", "none"],
    "defended": DEFENDED,
    "last layer": [*DEFENDED, "--defense_target_modules", "last-encoder-layer"],
}


def flags(options: argparse.Namespace, arm: str, seed: int, folder: Path) -> list[str]:
    """Return the example's flags for one run."""
    fixed = {
        "model_name_or_path": options.model,
        "train_file": str(options.data / "train_sentences.tsv.gz"),
        "validation_file": str(options.data / "dev.tsv.gz"),
        "max_train_samples": options.train_samples,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 2e-4,  # at 5e-5 the 64 steps end before this small model has learned anything
        "num_train_epochs": 1,
        "seed": seed,
        "output_dir": folder,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "corruption_trials": 1,  # the seeds of training are the trials
    }
    return [
        "--do_train",
        "--do_eval",
        *(part for name, value in fixed.items() for part in (f"--{name}", str(value))),
    ] + ARMS[arm]


def run(options: argparse.Namespace, arm: str, seed: int) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""
    name = f"{arm.replace(' ', '_')}-seed{seed}"
    record_path = options.output / f"{name}.json"
    if not record_path.exists():
        folder = options.work / name
        started = time.monotonic()
        # One thread each: a process that waits for its other thread gains nothing from a busy core.
        threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
        subprocess.run(
            [sys.executable, str(EXAMPLE), *flags(options, arm, seed, folder)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        seconds = time.monotonic() - started
        training = json.loads((folder / "train_results.json").read_text())
        if training["train_collapsed"]:
            print(f"{name} shows signs of collapse: it is kept, and marked in runs.json")
        EvaluationRecord.load(folder / "robustness.json").save(record_path)
        with RECORDING:
            runs_path = options.output / "runs.json"
            runs = json.loads(runs_path.read_text()) if runs_path.exists() else {}
            runs[name] = {
                "collapsed": bool(training["train_collapsed"]),
                "train_seconds": training["train_runtime"],
                "seconds": round(seconds, 1),
                "train_samples": training["train_samples"],
                "machine": f"{platform.machine()}, {threads} of {os.cpu_count()} cores",
                "flags": ARMS[arm],
            }
            runs_path.write_text(json.dumps(runs, indent=2, sort_keys=True) + "\n")
    return EvaluationRecord.load(record_path)


def corrupt_last_layer(options: argparse.Namespace, arm: str, seed: int) -> EvaluationRecord:
    """Corrupt only the last layer of a trained model, unless its record is there already."""
    name = f"{arm.replace(' ', '_')}-seed{seed}"
    record_path = options.output / f"{name}-corrupt-last-layer.json"
    if not record_path.exists():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
        folder = options.work / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with gzip.open(options.data / "dev.tsv.gz", "rt", encoding="utf-8") as file:
            rows = sorted((line.rstrip("\n").split("\t") for line in list(file)[1:]), key=lambda row: len(row[0]))
        batches = []
        for start in range(0, len(rows), 64):
            texts, labels = zip(*rows[start : start + 64], strict=True)
            batch = tokenizer(list(texts), truncation=True, max_length=128, padding=True, return_tensors="pt")
            batches.append({**batch, "labels": torch.tensor([int(label) for label in labels])})
        evaluator = CorruptionEvaluator(
            model, ClassificationMetric(batches), batches, target_modules="last-encoder-layer", progress=False
        )
        corruptions = [
            GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in (0.1, 0.2, 0.5, 1.0)
        ]
        evaluator.evaluate(corruptions).save(record_path)
    return EvaluationRecord.load(record_path)


def over_seeds(rows: list[CorruptionRecord]) -> MeanAndSpread:
    """Return accuracy in per cent over seeds; trials of one seed count as their mean."""
    return MeanAndSpread.from_values([100 * row.mean("accuracy") for row in rows])


def table(records: dict[str, list[EvaluationRecord]]) -> str:
    """Return the table: mean ± deviation for each arm, and t-tests of each defended arm against the plain one."""
    arms = list(records)
    lines = [
        f"| accuracy (%) | {' | '.join(arms)} | {' | '.join(f't: {arm} ≤ plain' for arm in arms[1:])} |",
        f"|:--|{'--:|' * (2 * len(arms) - 1)}",
    ]
    for index, first in enumerate(records["plain"][0].rows()):
        cells = {arm: over_seeds([record.rows()[index] for record in records[arm]]) for arm in arms}
        shown = [f"{cell.mean:.1f} ± {cell.standard_deviation:.1f}" for cell in cells.values()]
        tests = [student_t_test(cells[arm], cells["plain"]) for arm in arms[1:]]
        shown += [f"{test.t:.2f}{'*' if test.is_significant() else ''}" for test in tests]
        lines.append(f"| {first.label} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def over_cells(
    measure: Callable[[argparse.Namespace, str, int], EvaluationRecord], title: str, options: argparse.Namespace
) -> dict[str, list[EvaluationRecord]]:
    """Measure every arm with every seed, several side by side."""
    cells = [(arm, seed) for seed in options.seeds for arm in ARMS]
    records: dict[str, list[EvaluationRecord]] = {arm: [] for arm in ARMS}
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda cell: measure(options, *cell), cells)
        for (arm, _), record in zip(cells, tqdm(done, desc=title, total=len(cells)), strict=True):
            records[arm].append(record)
    return records


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the SST-2 files")
    parser.add_argument("--output", type=Path, required=True, help="the folder for records and the table")
    parser.add_argument("--work", type=Path, default=Path("runs/sst2"), help="the folder for models and logs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--train-samples", type=int, default=2048)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    trained = over_cells(run, "runs", options)
    last_layer = over_cells(corrupt_last_layer, "last layer corrupted", options)
    text = (
        f"SST-2 dev accuracy over {len(options.seeds)} seeds ({', '.join(map(str, options.seeds))}), mean ± sample "
        f"standard deviation; {options.train_samples} training sentences, 1 epoch, batch 32, learning rate 2e-4.\n"
        "t: Student's test with pooled variance of the hypothesis that the defended arm is no better "
        f"(df = {2 * (len(options.seeds) - 1)}); * p < 0.05, one-sided, not corrected for the number of rows.\n\n"
        f"All parameters corrupted:\n\n{table(trained)}\nOnly the last layer corrupted:\n\n{table(last_layer)}"
    )
    (options.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
