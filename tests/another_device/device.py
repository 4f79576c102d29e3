"""Builds the device of `device.cpp`, and tells PyTorch of it: what a GPU refuses can be tried where there is none."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "another"
COMPILER = shutil.which("c++")


def library() -> Path:
    """Return the compiled device, kept beside the environment for this PyTorch: it takes ten seconds to compile."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    path = Path(sys.prefix) / "another_device" / f"{key}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # others may compile it, too
        folders = [*(f"-I{one}" for one in include_paths()), *(f"-L{one}" for one in library_paths())]
        command = [str(COMPILER), "-shared", "-fPIC", "-std=c++20", "-O1", "-w", *folders, str(SOURCE)]
        subprocess.run([*command, "-o", str(unfinished), "-ltorch_cpu", "-lc10"], check=True)
        unfinished.replace(path)
    return path


def _index(device: Any) -> int:
    """Return the number of a device, or -1 for the current one."""
    if device is None or isinstance(device, int):
        return -1 if device is None else device
    index = torch.device(device).index
    return -1 if index is None else index


class _Device(ModuleType):
    """What PyTorch asks of `torch.another`, as of `torch.cuda`."""

    _initialized = True
    Stream, Event = torch.Stream, torch.Event

    def __getattr__(self, name: str) -> Any:
        answers = {"device_count": 2, "is_available": True, "is_initialized": True}
        if name in answers:
            return lambda: answers[name]
        raise AttributeError(name)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device: object = None) -> torch.Stream:
        return torch.accelerator.current_stream()

    def stream(self, stream: torch.Stream) -> torch.Stream:
        return stream

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def device(self, device: object) -> AbstractContextManager[object]:
        index = _index(device)
        return nullcontext() if index < 0 else torch.accelerator.device_index(index)

    def set_device(self, device: object) -> None:
        torch.accelerator.set_device_index(_index(device))

    def manual_seed_all(self, seed: int) -> None:
        torch.ops.another.seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.ops.another.get_state(_index(device))

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.ops.another.set_state(state, _index(device))

    def _is_in_bad_fork(self) -> bool:
        return False


def register() -> torch.device:
    """Load the device into this process, for good."""
    torch.ops.load_library(str(library()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Device(f"torch.{NAME}"))
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


def cases_on(device: str, cases: Sequence[Any], elsewhere: Sequence[Any]) -> Sequence[Any]:
    """Return what ranks try: on the CPU everything, elsewhere the cases in which it may matter where tensors are."""
    return cases if device == "cpu" else elsewhere


def cases_here(cases: Sequence[Any], elsewhere: Sequence[Any]) -> Sequence[Any]:
    """Return what the ranks of this process try, as `cases_on` its device."""
    return cases_on(rank_device().type, cases, elsewhere)


def rank_device() -> torch.device:
    """Return where the tensors of this process belong: on what its ranks were started for, or on the CPU."""
    return torch.device(os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu"))


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model, which takes tied weights apart on a device that is not PyTorch's own."""
    model.to(device).tie_weights()
    return model
