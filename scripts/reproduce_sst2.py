"""Paper 2, sections 5.2 and 5.3, on a small BERT: SST-2 plain, with each defense, and with the last layer defended.

    python scripts/reproduce_sst2.py --model MODEL --data FOLDER --output scripts/results/sst2

MODEL is a folder or a name on the Hub, FOLDER holds `train_sentences.tsv.gz` and `dev.tsv.gz`. Each arm is trained
with each seed by `examples/train_sst2.py`; finished runs are kept, so an interrupted campaign goes on. The output
folder gets a record for each run, and `table.md` with two comparisons, of defenses and of targets: mean ± sample
standard deviation over seeds, and the Student t-tests of paper 2, Appendix C. As in its Table 6, the models of the
second comparison are also corrupted in their last layer alone.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_parcor import CorruptionConstraint, CorruptionEvaluator, GradientCorruption
from hf_parcor.evaluation import ClassificationMetric, CorruptionRecord, EvaluationRecord
from hf_parcor.statistics import MeanAndSpread, student_t_test
from hf_parcor.training import DefenseArguments, build_defense

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_sst2.py"
RECORDING = threading.Lock()


@dataclass(frozen=True)
class Arm:
    """One way to train: what tables call it, and its flags."""

    label: str
    flags: list[str]

    @property
    def passes(self) -> int:
        """Forward and backward passes of a training step."""
        parser = HfArgumentParser(DefenseArguments)  # type: ignore[arg-type]
        (arguments,) = parser.parse_args_into_dataclasses(self.flags)
        defense = build_defense(arguments)
        return 1 if defense is None else defense.passes


def l2(defense: str, epsilon: float, *more: str) -> list[str]:
    """Return the flags of a defense in the L2 norm."""
    return ["--defense", defense, "--defense_norm", "2", "--defense_epsilon", str(epsilon), *more]


ONE_STEP = l2("multi_step_risk", 0.1, "--defense_steps", "1")
ARMS = {
    "plain": Arm("plain", ["--defense", "none"]),
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


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.arm}-seed{self.seed}"


def flags(options: argparse.Namespace, run: Run, folder: Path) -> list[str]:
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
        "seed": run.seed,
        "output_dir": folder,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "corruption_trials": 1,  # the seeds of training are the trials
    }
    settings = (part for name, value in fixed.items() for part in (f"--{name}", str(value)))
    return ["--do_train", "--do_eval", *settings, *ARMS[run.arm].flags]


def train(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""
    record_path = options.output / f"{run.name}.json"
    if not record_path.exists():
        folder = options.work / run.name
        started = time.monotonic()
        subprocess.run(
            [sys.executable, str(EXAMPLE), *flags(options, run, folder)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
        seconds = time.monotonic() - started
        training = json.loads((folder / "train_results.json").read_text())
        if training["train_collapsed"]:
            print(f"{run.name} shows signs of collapse: it is kept, and marked in runs.json")
        EvaluationRecord.load(folder / "robustness.json").save(record_path)
        with RECORDING:
            runs_path = options.output / "runs.json"
            runs = json.loads(runs_path.read_text()) if runs_path.exists() else {}
            runs[run.name] = {
                "collapsed": bool(training["train_collapsed"]),
                "train_seconds": training["train_runtime"],
                "seconds": round(seconds, 1),
                "train_samples": training["train_samples"],
                "machine": f"{platform.machine()}, {options.threads} of {os.cpu_count()} cores",
                "flags": ARMS[run.arm].flags,
            }
            runs_path.write_text(json.dumps(runs, indent=2, sort_keys=True) + "\n")
    return EvaluationRecord.load(record_path)


def corrupt_last_layer(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Corrupt only the last layer of a trained model, unless its record is there already."""
    record_path = options.output / f"{run.name}-corrupt-last-layer.json"
    if not record_path.exists():
        torch.set_num_threads(options.threads)
        folder = options.work / run.name
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


def tables(records: dict[str, list[EvaluationRecord]], costs: bool = False) -> str:
    """Return two tables: mean ± deviation of each arm, and the t-values of each defended arm against the plain one."""
    labels = [ARMS[arm].label for arm in records]
    accuracies = [f"| accuracy (%) | {' | '.join(labels)} |", f"|:--|{'--:|' * len(labels)}"]
    if costs:
        accuracies.append(f"| passes a step | {' | '.join(str(ARMS[arm].passes) for arm in records)} |")
    values = [f"| t: defended ≤ plain | {' | '.join(labels[1:])} |", f"|:--|{'--:|' * len(labels[1:])}"]
    for index, first in enumerate(records["plain"][0].rows()):
        cells = [over_seeds([record.rows()[index] for record in of_arm]) for of_arm in records.values()]
        tests = [student_t_test(cell, cells[0]) for cell in cells[1:]]
        marks = ["", *("*" if test.is_significant() else "" for test in tests)]
        shown = [f"{c.mean:.1f} ± {c.standard_deviation:.1f}{mark}" for c, mark in zip(cells, marks, strict=True)]
        accuracies.append(f"| {first.label} | {' | '.join(shown)} |")
        values.append(f"| {first.label} | {' | '.join(f'{test.t:.2f}' for test in tests)} |")
    return "\n".join([*accuracies, "", *values]) + "\n"


def over_runs(
    measure: Callable[[argparse.Namespace, Run], EvaluationRecord],
    title: str,
    options: argparse.Namespace,
    arms: list[str],
) -> dict[str, list[EvaluationRecord]]:
    """Measure these arms with every seed, several side by side."""
    runs = [Run(arm, seed) for seed in options.seeds for arm in arms]
    records: dict[str, list[EvaluationRecord]] = {arm: [] for arm in arms}
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda run: measure(options, run), runs)
        for run, record in zip(runs, tqdm(done, desc=title, total=len(runs)), strict=True):
            records[run.arm].append(record)
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
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only train these, in this order, and draw no table")
    parser.add_argument("--train-samples", type=int, default=2048)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    # One thread each: a process that waits for its other thread gains nothing from a busy core.
    options.threads = max(1, (os.cpu_count() or 1) // options.jobs)
    trained = over_runs(train, "runs", options, options.arms or list(ARMS))
    if options.arms:
        return
    last_layer = over_runs(corrupt_last_layer, "last layer corrupted", options, TARGETS)
    text = (
        f"SST-2 dev accuracy over {len(options.seeds)} seeds ({', '.join(map(str, options.seeds))}), mean ± sample "
        f"standard deviation; {options.train_samples} training sentences, 1 epoch, batch 32, learning rate 2e-4; "
        "defenses in L2, ε = 0.1.\n"
        "t: Student's test with pooled variance of the hypothesis that the defended arm is no better "
        f"(df = {2 * (len(options.seeds) - 1)}); * p < 0.05, one-sided, not corrected for the number of rows.\n\n"
        f"## Defenses\n\n{tables({arm: trained[arm] for arm in DEFENSES}, costs=True)}\n"
        f"## Targets\n\nAll parameters corrupted:\n\n{tables({arm: trained[arm] for arm in TARGETS})}\n"
        f"Only the last layer corrupted:\n\n{tables(last_layer)}"
    )
    (options.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
