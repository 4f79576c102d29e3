"""What corruptions along gradients need of a device beside the weights, and whether it is free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hf_parcor.corruptions import Corruption, MultiStepCorruption, WorstBitFlips
from hf_parcor.distributed.dtensors import local_part
from hf_parcor.functional.constrained_maximum import goes_in_turn

_GIB = 2**30


class NotEnoughMemoryError(ValueError):
    """A device has less free memory than a measurement needs; nothing was measured."""


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes are free on a device, those that PyTorch holds for later included; None if unknown."""
    memory = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    if memory is None or not hasattr(memory, "mem_get_info"):
        return None
    free, _ = memory.mem_get_info(device)
    return int(free + memory.memory_reserved(device) - memory.memory_allocated(device))


def needed_memory(
    groups: Sequence[Mapping[str, Tensor]],
    corruptions: Iterable[Corruption],
    saved_on: torch.device | None = None,
) -> dict[torch.device, int]:
    """Return how many bytes a measurement takes at least on each device, beside the weights, where it uses gradients.

    For each weight of two bytes: the gradient over the data is added up in float32 (4) from one of the weights' dtype
    (2), and kept for all closed forms (4) while the saved bits lie beside it (2); an ascent holds `a` in float32 (4),
    the saved bits (2) and a gradient (2), but one of one or two steps the saved bits (2) and a gradient for each (2).
    With `top_n`, or p other than 2 and ∞, a second vector in float32 is made (4). What has no constraint, such as the
    worst bit flips, takes gradients of its own (2), and in another format than that of the weights all new values (2)
    and saved bits (2). Activations and the graph come on top: how large they are depends on
    the batches.

    Args:
        groups: The weights that are corrupted together, by name.
        corruptions: What each group is measured under.
        saved_on: Where the saved bits are kept; None for each weight's own device.

    Examples:
        >>> from hf_parcor import CorruptionConstraint, GradientCorruption
        >>> weights = {"w": torch.zeros(1000, dtype=torch.bfloat16)}
        >>> needed_memory([weights], [GradientCorruption(CorruptionConstraint(epsilon=0.1))])
        {device(type='cpu'): 6000}
    """
    climbing = [one for one in corruptions if one.uses_gradients]
    ascents = [one for one in climbing if isinstance(one, MultiStepCorruption)]
    constrained = [one for one in climbing if hasattr(one, "constraint")]
    closed = [one for one in constrained if not isinstance(one, MultiStepCorruption)]
    everything = {id(weight): weight for group in groups for weight in group.values()}.values()
    needed: dict[torch.device, int] = {}
    for device in dict.fromkeys(weight.device for weight in everything):
        narrow, wide = _sizes(everything, device)
        kept = wide if closed else 0
        found = [kept + narrow] if closed else []
        for group in groups:
            gradient, vector = _sizes(group.values(), device)
            written = gradient if saved_on in (None, device) else 0
            found += [kept + gradient] if climbing else []
            rounded = any(isinstance(one, WorstBitFlips) and one.of is not None for one in climbing)
            found += [kept + 2 * gradient + written] if rounded else []
            found += [kept + max(written, 0 if _in_turn(one) else vector) for one in closed]
            for one in ascents:
                if one.remembered(group) is not None and one.steps is not None:
                    found.append(kept + one.steps * gradient + written)
                    continue
                found.append(kept + vector + gradient + max(written, 0 if _in_turn(one) else vector))
        if found:
            needed[device] = max(found)
    return needed


def check_memory(
    groups: Sequence[Mapping[str, Tensor]],
    corruptions: Sequence[Corruption],
    saved_on: torch.device | None = None,
) -> None:
    """Refuse a measurement that cannot succeed; where it is not known how much memory is free, nothing is refused.

    Args:
        groups: As in `needed_memory`.
        corruptions: As in `needed_memory`.
        saved_on: As in `needed_memory`.

    Raises:
        NotEnoughMemoryError: A device has less memory free than is needed. A `ValueError`.
    """

    def way_out(device: torch.device, needed: int) -> str:
        less = needed_memory(groups, corruptions, torch.device("cpu")).get(device, 0)
        elsewhere = f'saved_on="cpu" (then {less / _GIB:.2f} GiB), ' if less < needed else ""
        return (
            f"corrupt less at a time (target_modules, or the parts of a LayerProbe), {elsewhere}or offload other "
            "modules (device_map)"
        )

    needed = needed_memory(groups, corruptions, saved_on)
    check_free(needed, "the gradients and saved bits of what is corrupted", way_out)


def check_free(
    needed: Mapping[torch.device, int],
    purpose: str,
    way_out: Callable[[torch.device, int], str],
) -> None:
    """Refuse what needs more memory than a device has free, so far as it is known.

    Args:
        needed: Bytes beside the weights on each device.
        purpose: What they are for.
        way_out: Returns what to do, for a device and what is needed there.

    Raises:
        NotEnoughMemoryError: A device has less memory free than is needed. A `ValueError`.
    """
    for device, there in too_little(needed).items():
        size = needed[device]
        raise NotEnoughMemoryError(
            f"memory: expected at least {size / _GIB:.2f} GiB free on {device} beside the weights, for {purpose}, "
            f"got {there / _GIB:.2f} GiB; {way_out(device, size)}"
        )


def too_little(needed: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """Return what is free on each device that has less than is needed, so far as it is known."""
    there = {device: free_memory(device) for device in needed}
    return {device: size for device, size in there.items() if size is not None and size < needed[device]}


def _sizes(weights: Iterable[Tensor], device: torch.device) -> tuple[int, int]:
    """Return how many bytes the weights on a device take as they are, and in float32 at least."""
    here = [(local_part(weight).numel(), weight.itemsize) for weight in weights if weight.device == device]
    return sum(count * size for count, size in here), sum(count * max(4, size) for count, size in here)


def _in_turn(corruption: Corruption) -> bool:
    """Say whether the closed form is found tensor by tensor; what is not known is taken not to be."""
    constraint = getattr(corruption, "constraint", None)
    return constraint is not None and goes_in_turn(constraint.p, constraint.top_n)
