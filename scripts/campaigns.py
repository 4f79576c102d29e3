"""What campaigns share: their flags, ways to train, runs side by side and what is noted of them, tables over seeds."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_parcor.defenses import Defense
from hf_parcor.records import CorruptionRecord, EvaluationRecord
from hf_parcor.statistics import Alternative, MeanAndSpread, student_t_test
from hf_parcor.strict_json import replace_text
from hf_parcor.training import DefenseArguments, build_defense


@dataclass(frozen=True)
class Arm:
    """One way to train: what tables call it, its flags, and what Python runs with them if not the example."""

    label: str
    flags: list[str]
    program: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def arguments(self) -> DefenseArguments:
        """The flags as arguments."""
        parser = HfArgumentParser(DefenseArguments)  # type: ignore[arg-type]
        (arguments,) = parser.parse_args_into_dataclasses(self.flags)
        return arguments

    @property
    def defense(self) -> Defense | None:
        """The defense, None for the plain arm."""
        return build_defense(self.arguments)


def l2(defense: str, epsilon: float, *more: str) -> list[str]:
    """Return the flags of a defense in the L2 norm."""
    return ["--defense", defense, "--defense_norm", "2", "--defense_epsilon", str(epsilon), *more]


def risk(clean_weight: float, *words: str) -> list[str]:
    """Return the flags of the risk under corruptions."""
    return ["--defense", "corruption", "--defense_corruption", *words, "--defense_clean_weight", f"{clean_weight:.4g}"]


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where trained models are measured."""

PLAIN = Arm("plain", ["--defense", "none"])
ONE_STEP = l2("multi_step_risk", 0.1, "--defense_steps", "1")


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed."""

    name: str
    arm: Arm
    seed: int

    @property
    def file_name(self) -> str:
        """The name of its files."""
        return f"{self.name}-seed{self.seed}"


def campaign_parser(
    description: str | None, arms: Iterable[str] | None, work: str, data: str, seeds: int = 3
) -> ArgumentParser:
    """Return the command line of a campaign, as far as all have it.

    Args:
        description: The docstring of the script.
        arms: The names of its arms; None for a single one, with a single seed.
        work: The folder for models and logs, unless told.
        data: What the folder with data holds.
        seeds: How many, unless told.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"the folder with {data}")
    parser.add_argument("--output", type=Path, required=True, help="the folder for records and the table")
    parser.add_argument("--work", type=Path, default=Path(work), help="the folder for models and logs")
    if arms is None:
        parser.add_argument("--seeds", type=int, nargs=1, default=[1], metavar="SEED", help="default: 1")
        parser.set_defaults(jobs=1)
        return parser
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 1 + seeds)))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=arms,
        help="only run these, in this order; no table is drawn that needs all",
    )
    return parser


def begin(parser: ArgumentParser) -> Namespace:
    """Read the command line, and share the cores among jobs."""
    options = parser.parse_args()
    # One thread each: a process that waits for its other thread gains nothing from a busy core.
    options.threads = max(1, (os.cpu_count() or 1) // options.jobs)
    torch.set_num_threads(options.threads)
    return options


def of_study(work: Path, *parts: str | int | Path | None) -> Path:
    """Return the folder for the models of one study among those that a folder of work has.

    Args:
        work: The folder for all of them.
        *parts: What tells studies apart, in so far as their models differ, and what these began with; None for what
            was not changed.
    """
    return work / "-".join(str(part).strip("/").replace("/", "-") for part in parts if part is not None)


def run_example(
    program: Sequence[str | Path], settings: Mapping[str, Any], *flags: str, threads: int | None = None
) -> None:
    """Run an example in a process of its own.

    Args:
        program: What Python runs: its path, or `-m` and a module.
        settings: Flags by name, without dashes, and their values.
        *flags: More, as they are.
        threads: On how many threads; None for as many as PyTorch takes.
    """
    words = (part for name, value in settings.items() for part in (f"--{name}", str(value)))
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *map(str, program), *words, *flags], check=True, env={**os.environ, **limit})


_WRITING = threading.Lock()


def note_run(output: Path, work: Path, run: Run, threads: int, **details: Any) -> None:
    """Write into `runs.json` how a run was trained, how long that took, and what else is to be known of it.

    Args:
        output: The folder of `runs.json`.
        work: The folder with the run's own, in which the example left `train_results.json`.
        run: The run.
        threads: On how many threads it was trained.
        **details: What else is to be known, or known better.
    """
    training = json.loads((work / run.file_name / "train_results.json").read_text())
    if training["train_collapsed"]:
        print(f"{run.file_name} shows signs of collapse: it is kept, and marked in runs.json")
    with _WRITING:
        path = output / "runs.json"
        runs = json.loads(path.read_text()) if path.exists() else {}
        runs[run.file_name] = {
            "collapsed": bool(training["train_collapsed"]),
            "train_seconds": training["train_runtime"],
            "train_samples": training["train_samples"],
            "machine": machine(threads),
            "flags": [*run.arm.program, *run.arm.flags],
            **details,
        }
        replace_text(path, json.dumps(runs, indent=2, sort_keys=True) + "\n")


def measured_once(options: Namespace, run: Run, example: Callable[[Path], object]) -> EvaluationRecord:
    """Return the record of a run; one that is not there yet is trained and measured, kept, and noted in `runs.json`.

    Args:
        options: Those of a campaign.
        run: What is trained and measured.
        example: Called with the run's folder, runs an example that leaves `robustness.json` there.
    """
    path: Path = options.output / f"{run.file_name}.json"
    if not path.exists():
        started, folder = time.monotonic(), options.work / run.file_name
        example(folder)
        EvaluationRecord.load(folder / "robustness.json").save(path)
        note_run(options.output, options.work, run, options.threads, seconds=round(time.monotonic() - started, 1))
    return EvaluationRecord.load(path)


def of_run(run: Run, folder: Path) -> dict[str, Any]:
    """Return the settings of an example that follow from the run: its seed everywhere, and its folder."""
    return {
        "seed": run.seed,
        "corruption_seed": run.seed,
        "corruption_trials": 1,  # the seeds of training are the trials
        "output_dir": folder,
        "report_to": "none",
    }


def write_table(output: Path, text: str) -> None:
    """Write `table.md`, and print it."""
    replace_text(output / "table.md", text)
    print(text)


def machine(threads: int) -> str:
    """Name what a run was trained on."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {threads} of {os.cpu_count()} cores"


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return mean ± sample standard deviation, or the single value.

    Examples:
        >>> mean_and_deviation([1.0, 2.0], 2), mean_and_deviation([1.5], 1)
        ('1.50 ± 0.71', '1.5')
    """
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    spread = MeanAndSpread.from_values(values)
    return f"{spread.mean:.{digits}f} ± {spread.standard_deviation:.{digits}f}"


def marked(
    values: Sequence[float], plain: Sequence[float], digits: int, better: Alternative = Alternative.GREATER
) -> str:
    """Return the mean of an arm over seeds, with a star where Student's t-test says better than the plain arm.

    Examples:
        >>> marked([3.0, 3.1, 3.2], [1.0, 1.1, 1.2], 1), marked([3.0], [1.0], 1)
        ('3.1 ± 0.1*', '3.0')
    """
    tested = len(values) > 1 and student_t_test(values, plain, better).is_significant()
    return mean_and_deviation(values, digits) + ("*" if tested else "")


def over(seeds: Sequence[int]) -> str:
    """Return what a page says of the seeds that it is about, and of its stars.

    Examples:
        >>> over([1]), over([1, 2]).split(", mean")[0]
        ('seed 1', 'seeds 1, 2')
    """
    listed = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        return f"seed {listed}"
    return (
        f"seeds {listed}, mean ± sample standard deviation; * where Student's t says better than plain with p < 0.05 "
        f"(df = {2 * (len(seeds) - 1)}), one-sided, for each row by itself"
    )


_Measured = TypeVar("_Measured")


def over_runs(
    measure: Callable[[Namespace, Run], _Measured], title: str, options: Namespace, arms: Mapping[str, Arm]
) -> dict[str, list[_Measured]]:
    """Measure these arms with every seed, several side by side; one that fails does not stop the others.

    Raises:
        RuntimeError: Runs failed; when all others are done.
    """
    runs = [Run(name, arm, seed) for seed in options.seeds for name, arm in arms.items()]
    records: dict[str, list[_Measured]] = {name: [] for name in arms}
    failed: dict[str, BaseException] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        doing = {run.file_name: pool.submit(measure, options, run) for run in runs}
        for _ in tqdm(as_completed(doing.values()), desc=title, total=len(runs)):
            pass
    for run in runs:
        error = doing[run.file_name].exception()
        if error is None:
            records[run.name].append(doing[run.file_name].result())
        else:
            failed[run.file_name] = error
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed: {failed}; call again for them alone")
    return records


def finished(options: Namespace, arms: Mapping[str, Arm], ending: str = ".json") -> dict[str, Arm]:
    """Return the arms of which every seed has left its record, the file of a run's name and this ending."""
    return {
        name: arm
        for name, arm in arms.items()
        if all((options.output / f"{Run(name, arm, seed).file_name}{ending}").exists() for seed in options.seeds)
    }


def passes(arm: Arm) -> int:
    """Return how many forward and backward passes a training step takes."""
    return 1 if arm.defense is None else arm.defense.passes


def over_seeds(rows: list[CorruptionRecord], metric: str = "accuracy") -> MeanAndSpread:
    """Return a share in per cent over seeds; trials of one seed count as their mean."""
    return MeanAndSpread.from_values([100 * row.mean(metric) for row in rows])


def tables(
    records: dict[str, list[EvaluationRecord]],
    arms: Mapping[str, Arm],
    *,
    costs: bool = False,
    metric: str = "accuracy",
    better: Alternative = Alternative.GREATER,
) -> str:
    """Return two tables: mean ± deviation of each arm, and the t-values of each defended arm against the plain one.

    Of one seed there are neither deviations nor tests: one table, of its values.

    Args:
        records: The arms' records, one a seed, with "plain" first.
        arms: The arms by name.
        costs: Whether a row says how many passes a step takes.
        metric: A share, shown in per cent.
        better: Which values of it are.
    """
    labels = [arms[arm].label for arm in records]
    accuracies = [f"| {metric} (%) | {' | '.join(labels)} |", f"|:--|{'--:|' * len(labels)}"]
    if costs:
        accuracies.append(f"| passes a step | {' | '.join(str(passes(arms[arm])) for arm in records)} |")
    null = "≤" if better is Alternative.GREATER else "≥"
    values = [f"| t: defended {null} plain | {' | '.join(labels[1:])} |", f"|:--|{'--:|' * len(labels[1:])}"]
    alone = len(records["plain"]) == 1
    for index, first in enumerate(records["plain"][0].rows()):
        if alone:
            single = (f"{100 * record.rows()[index].mean(metric):.1f}" for (record,) in records.values())
            accuracies.append(f"| {first.label} | {' | '.join(single)} |")
            continue
        cells = [over_seeds([record.rows()[index] for record in of_arm], metric) for of_arm in records.values()]
        tests = [student_t_test(cell, cells[0], better) for cell in cells[1:]]
        marks = ["", *("*" if test.is_significant() else "" for test in tests)]
        shown = [f"{c.mean:.1f} ± {c.standard_deviation:.1f}{mark}" for c, mark in zip(cells, marks, strict=True)]
        accuracies.append(f"| {first.label} | {' | '.join(shown)} |")
        values.append(f"| {first.label} | {' | '.join(f'{test.t:.2f}' for test in tests)} |")
    return "\n".join(accuracies if alone else [*accuracies, "", *values]) + "\n"
