"""What devices can do: whether they have float64 and launches; and which one a process uses."""

from __future__ import annotations

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    """Say whether a device computes in float64: Apple's do not, nor do some of Intel's.

    Examples:
        >>> has_float64(torch.device("cpu")), has_float64(torch.device("mps"))
        (True, False)
    """
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def has_launches(device: torch.device) -> bool:
    """Say whether a call costs something there however little it does, so that it should take many tensors.

    Examples:
        >>> has_launches(torch.device("cpu")), has_launches(torch.device("cuda"))
        (False, True)
    """
    return device.type != "cpu"


def host_of(device: torch.device) -> torch.device:
    """Return where numbers in float64 that describe a tensor live: on its device, or on the CPU if that has none.

    Examples:
        >>> host_of(torch.device("cuda", 1)), host_of(torch.device("mps"))
        (device(type='cuda', index=1), device(type='cpu'))
    """
    return device if has_float64(device) else _CPU


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU if its device has none.

    Examples:
        >>> in_float64(torch.tensor([0.5], dtype=torch.bfloat16))
        tensor([0.5000], dtype=torch.float64)
    """
    return tensor.to(host_of(tensor.device)).double()  # in this order: no device is asked for what it has not


def accelerators_in_use() -> list[torch.device]:
    """Return the accelerator that this process computes on, if it has used one: nothing is started to find out."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or not getattr(torch.get_device_module(kind), "is_initialized", lambda: True)():
        return []
    return [torch.device(kind.type, torch.accelerator.current_device_index())]
