"""An example script, run as a program in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def run_example(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the `main` of a script with these arguments."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main()
