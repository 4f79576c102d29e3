"""The checks for GPUs, tried out on the CPU with small shapes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from hf_parcor import SAM
from scripts import gpu_checks
from scripts.gpu_checks import L2, Row, Setting

ROOT = Path(__file__).parents[2]
IN_FULL = ["precision", "restored", "prefix", "same_as_cpu", "synchronizations", "compiled", "spread"]
MEASURED = ["bert_base", "decoder", "bf16_weights", "evaluation_7b", "scores", "sweep"]
RUN_HERE = [*IN_FULL, *MEASURED]


@pytest.mark.slow
def test_every_check_that_a_cpu_can_run_holds(tmp_path):
    """All but two ranks, below, and two processes, which test_benchmark_distributed.py has."""
    assert {*RUN_HERE, "two_ranks", "two_processes"} == set(gpu_checks.CHECKS)
    command = [sys.executable, "-m", "scripts.gpu_checks", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path), "--only", *RUN_HERE],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert {name for name, found in checks.items() if found["status"] == "skipped"} == {"synchronizations"}
    assert (tmp_path / "summary.txt").read_text() == done.stdout


@pytest.fixture
def forked_ranks(monkeypatch):
    """Let ranks be forked from a process that has imported the libraries: each that is spawned imports them anew."""
    multiprocessing.set_forkserver_preload(["transformers.trainer", "hf_parcor.trainers"])
    monkeypatch.setattr(gpu_checks, "spawn", partial(start_processes, start_method="forkserver"))


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path, forked_ranks):
    rows = gpu_checks.two_ranks(Setting("cpu", True, str(tmp_path)))
    assert len(rows) == 4
    assert all(row.holds for row in rows)


def test_the_checks_end_before_the_shell_ends_them():
    """Else the record of the last check is lost; imports come before the first one, and all stays under 9 minutes."""
    ended = re.search(r"timeout --kill-after (\d+) (\d+)", (ROOT / "scripts/gpu_checks.sh").read_text())
    kill, shell = map(int, ended.groups())
    assert shell >= gpu_checks.TOTAL + 25
    assert shell + kill < 9 * 60
    assert all(seconds <= gpu_checks.TOTAL for _, seconds in gpu_checks.CHECKS.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_checks.py", "--output", str(tmp_path / "none")])
    assert gpu_checks.main() == 2
    assert "expected a GPU, got none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("value", "limit", "holds"), [(1, None, True), (1, 1, True), (2, 1, False), (float("nan"), 1, False)]
)
def test_a_row_holds_up_to_its_limit(value, limit, holds):
    assert Row("a", value, limit).holds is holds


def test_a_wrong_step_fails(monkeypatch, tmp_path):
    """Another radius than the one by hand."""
    monkeypatch.setattr(gpu_checks, "risk", lambda steps: SAM(L2))
    assert not all(row.holds for row in gpu_checks.precision(Setting("cpu", True, str(tmp_path))))


@pytest.mark.slow
def test_memory_of_bf16_weights_is_counted(tmp_path):
    """Saved bits and the sum of the gradients take 2 bytes of each weight, each."""
    rows = gpu_checks.bf16_weights(Setting("cpu", True, str(tmp_path)))
    assert all(row.value >= 4 for row in rows)


@pytest.mark.slow
def test_ranks_that_die_fail_the_check_and_leave_where_they_were(tmp_path, monkeypatch, forked_ranks):
    monkeypatch.setattr(gpu_checks, "train_on_rank", die_on_rank)
    monkeypatch.setattr(gpu_checks, "joined_training", lambda *_, **__: [])
    monkeypatch.setattr(gpu_checks, "ENGINES", {"DDP": {}})
    (row,) = gpu_checks.two_ranks(Setting("cpu", True, str(tmp_path)))
    assert not row.holds
    assert "SIGSEGV" in row.what
    assert any("die_on_rank" in path.read_text() for path in tmp_path.glob("DDP-*.txt"))


def die_on_rank(rank, setting, folder, engine):
    gpu_checks.watched_rank(setting, engine, rank)
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("page", ["scripts/README.md", "hf_parcor/defenses/README.md"])
def test_pages_say_what_a_part_of_the_batch_cost_on_a_gpu(page):
    record = json.loads((ROOT / "scripts/results/gpu/checks.json").read_text(encoding="utf-8"))
    rows = [row for check in record["checks"].values() for row in check.get("rows", [])]
    medians = [row["value"] for row in rows if "⅛ of the batch: ratio to stock, median" in row["what"]]
    assert f"{min(medians):.1f} to {max(medians):.1f}" in (ROOT / page).read_text(encoding="utf-8")
