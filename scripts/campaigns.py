"""What campaigns share: ways to train, as flags of the examples; runs and what is noted of them; a table's cell."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_parcor.defenses import Defense
from hf_parcor.statistics import MeanAndSpread
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
        path.write_text(json.dumps(runs, indent=2, sort_keys=True) + "\n")


def machine(threads: int) -> str:
    """Name what a run was trained on."""
    if torch.cuda.is_available():
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
