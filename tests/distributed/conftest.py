"""Functions run on several gloo ranks, from one test."""

from __future__ import annotations

import multiprocessing
import pickle
import runpy
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from another_device.device import COMPILER, NAME, library
from torch import distributed

RANK_PROGRAM = Path(__file__).with_name("rank_program.py")
# What nearly every rank imports: a fork of what has it already costs nothing.
PRELOADED = [
    "pytest",
    "peft",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "torch.distributed.fsdp",
    "torch._dynamo.backends.common",
    "hf_parcor.cli.main",
    "hf_parcor.trainers",
    "hf_parcor.evaluation",
    "hf_parcor.translation",
    "example_program",
    "local_models",
    "trainings",
    "another_device.device",
]
GRACE = 60.0  # seconds that the other ranks get after one has failed, on a busy machine
USABLE = distributed.is_available() and distributed.is_gloo_available()


class RankError(AssertionError):
    """A rank raised, died or took too long; the message has what each one that did not finish printed last."""


@pytest.fixture(scope="session")
def run_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Return `run_on_ranks(function, world_size, *arguments, device="cpu", timeout=300)`: what each rank returned.

    The function stands at the top level of a test module, which each rank imports anew; fixtures and conftest are not
    there. It finds a gloo process group of `world_size` ranks, one thread and seed 0, and Accelerate on the device.
    Arguments and results are pickled: plain values and tensors, which come back on the CPU. Ranks are forked from a
    process that has imported the libraries, once for all tests, so that a call costs little more than its function.
    """
    if not USABLE or "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("expected gloo and a platform that forks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(
        function: Callable[..., Any], world_size: int, *arguments: Any, device: str = "cpu", timeout: float = 300.0
    ) -> list[Any]:
        folder, port = tmp_path_factory.mktemp("ranks"), _free_port()
        processes = []
        for rank in range(world_size):
            job = {
                "file": function.__code__.co_filename,
                "function": function.__name__,
                "arguments": pickle.dumps(arguments),
                "folder": str(folder),
                "rank": rank,
                "device": device,
                "world_size": world_size,
                "port": port,
            }
            processes.append(
                context.Process(target=runpy.run_path, args=(str(RANK_PROGRAM), {"JOB": job}, "__rank__"))
            )
        try:
            for process in processes:
                process.start()
            _wait_for(processes, timeout)
        finally:
            codes = _end(processes)
        if any(codes):
            raise RankError("\n".join(_report(folder, rank, code) for rank, code in enumerate(codes) if code))
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]

    return run


ON_DEVICES = [
    "cpu",
    pytest.param(
        NAME,
        marks=[pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")],
    ),
]


@pytest.fixture(scope="session", params=ON_DEVICES)
def device_of_ranks(request: pytest.FixtureRequest) -> str:
    """Return where ranks have their tensors: on the CPU, and on a device that is not the CPU, as GPUs are not."""
    if request.param == NAME:
        library()  # once, and not in each rank
    return str(request.param)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(processes: list[BaseProcess], timeout: float) -> None:
    """Return when all have ended, or some time after the first failure, or when the time is over."""
    deadline, failed = time.monotonic() + timeout, False
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        if not wait(running, timeout=max(0.0, deadline - time.monotonic())):
            return
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)


def _end(processes: list[BaseProcess]) -> list[int | None]:
    codes = []
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()
        codes.append(process.exitcode)
    return codes


def _report(folder: Path, rank: int, code: int | None) -> str:
    printed = folder / f"{rank}.output"
    last = printed.read_text(errors="replace")[-4000:] if printed.exists() else "nothing"
    return f"rank {rank} ended with {code} and printed:\n{last}"
