"""What is noted of each run of a campaign, in `runs.json` beside its records."""

from __future__ import annotations

import json
import os
import platform
import threading
from pathlib import Path
from typing import Any

from campaigns.arms import Run

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
            "machine": f"{platform.machine()}, {threads} of {os.cpu_count()} cores",
            "flags": run.arm.flags,
            **details,
        }
        path.write_text(json.dumps(runs, indent=2, sort_keys=True) + "\n")
