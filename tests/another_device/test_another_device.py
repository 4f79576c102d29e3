"""Everything on a device that is not the CPU, but has its kernels: what a GPU would refuse is seen without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from another_device.device import COMPILER
from another_device.program import CHECKS, NOT_SPREAD

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed"),
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Return what went wrong, by check and kind of device, in a process of its own, which has it to its end."""
    found = tmp_path_factory.mktemp("another_device") / "problems.json"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "another_device.program", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["as a GPU", "without float64", "on two devices"])
def test_the_numbers_are_those_of_the_cpu(kind, problems, subtests):
    for check in [name for name in CHECKS if kind != "on two devices" or name not in NOT_SPREAD]:
        with subtests.test(check=check):
            assert problems[check][kind] == ""
