"""An example script, run as a program in this process."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def run_example(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the `main` of a script with these arguments."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    importlib.import_module(script.stem).main()


def run_here(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the programs that a module of scripts would start run in this process, which has imported everything."""

    def run(command: list[str], check: bool, env: dict[str, str]) -> None:
        assert command[0] == sys.executable
        assert check
        assert {name: value for name, value in env.items() if name != "OMP_NUM_THREADS"}.items() <= os.environ.items()
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
