"""An example script, run as a program in this process."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from trainings import QUIET
from transformers import Trainer

from hf_parcor import PublishingMixin
from hf_parcor.cards import ModelFacts

# A run in short, every step of it logged.
TRAINS_AND_MEASURES = {**QUIET, "do_train": True, "do_eval": True, "logging_steps": 1}


def run_example(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the `main` of a script with these arguments."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    importlib.import_module(script.stem).main()


def run_with(script: Path, settings: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a script with the settings of a file; return the folder of its output."""
    output = Path(settings["output_dir"])
    path = output.with_suffix(".json")
    path.write_text(json.dumps(settings), encoding="utf-8")
    run_example(script, [str(path)], monkeypatch)
    return output


def steps_logged(output: Path) -> list[dict[str, float]]:
    """Return what a run logged of its steps."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]


def pushes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], ModelFacts | None]]:
    """Return a list that will have the weights of each push to the Hub, and what their card says of robustness."""
    pushes = []

    def push(trainer: Any, *_: Any, **__: Any) -> None:
        weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        pushes.append((weights, trainer.robustness_facts()))

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(Trainer, "push_in_progress", None, raising=False)
    monkeypatch.setattr(PublishingMixin, "push_to_hub", push)
    return pushes


@contextmanager
def ending_well() -> Iterator[None]:
    """Let a program end without an error."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise


def run_here(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the programs that a module of scripts would start run in this process, which has imported everything."""

    def run(command: list[str], check: bool, env: dict[str, str]) -> None:
        assert command[0] == sys.executable
        assert check
        assert {name: value for name, value in env.items() if name != "OMP_NUM_THREADS"}.items() <= os.environ.items()
        if command[1] == "-m":
            monkeypatch.setattr(sys, "argv", command[2:])
            with ending_well():
                runpy.run_module(command[2], run_name="__main__")
            return
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
