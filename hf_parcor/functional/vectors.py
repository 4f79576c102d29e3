"""A list of tensors seen as one long vector: copies, scaling, sums.

Nothing is concatenated, and nothing waits for the device: sizes stay zero-dimensional tensors.
A function whose name ends in `_` overwrites the tensors that it is given, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hf_parcor.devices import has_launches
from hf_parcor.distributed.dtensors import ShardedVector, local_parts

INTEGER_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""The dtype that holds the bit patterns of one of so many bytes."""
_CHUNK = 1 << 20  # entries worked on at a time: less than 100 MiB of scratch, whatever the size of the model
_ORDINARY_FACTOR = (2.0**-100, 2.0**100)  # float32 holds them, with digits to spare
_ALONE = 1 << 20  # entries of a tensor that is worth a launch by itself: one that moves 8 MB


def working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that norms are computed in: float64 if any tensor has it, else float32."""
    return torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32


def working_copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return fresh copies in float32 (float64 stays), so that low precision swallows nothing."""
    dtype = working_dtype(tensors)
    return _copies([torch.empty_like(tensor, dtype=dtype) for tensor in tensors], tensors)


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return bit-for-bit copies, all written by one batched call."""
    return _copies([torch.empty_like(tensor) for tensor in tensors], tensors)


def _copies(copies: list[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(local_parts(copies), local_parts(tensors))
    return copies


def widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in this dtype: copies of those of another one, written by one batched call, and the others."""
    wide = list(tensors)
    narrow = [place for place, tensor in enumerate(tensors) if tensor.dtype != dtype]
    given = [tensors[place] for place in narrow]
    for place, copy in zip(narrow, _copies([torch.empty_like(one, dtype=dtype) for one in given], given), strict=True):
        wide[place] = copy
    return wide


def numel(tensors: Sequence[Tensor]) -> int:
    """Return `k`, the number of entries of the vector."""
    return tensors.entries if isinstance(tensors, ShardedVector) else sum(tensor.numel() for tensor in tensors)


def chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the vector piece by piece: flat views of contiguous tensors, small enough to work on copies."""
    for tensor in tensors:
        yield from torch.split(tensor.view(-1), _CHUNK)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a dense tensor, as a buffer."""
    here = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = here.reshape(-1)
    if flat.stride(0) != 1:  # of one number or none, as an empty array of NumPy, which is contiguous all the same
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


TOGETHER = 1 << 22  # entries that one batched call takes of a vector in turn: 16 MiB in float32, and a tensor beyond
_TIMES_WHERE_LAUNCHES_COST = 4


def together_on(device: torch.device) -> int:
    """Return how many entries a batched call takes of a vector in turn: more where a call costs something."""
    return TOGETHER * (_TIMES_WHERE_LAUNCHES_COST if has_launches(device) else 1)


def one_by_one(tensors: Iterable[list[Tensor]]) -> Iterator[Tensor]:
    """Yield tensors that come some at a time, and hold none while the next are made."""
    for some in tensors:
        some.reverse()
        while some:
            yield some.pop()
        del some


def in_turn(tensors: Sequence[Tensor], together: int | None = None) -> Iterator[list[int]]:
    """Yield the places of tensors that are worked on together: small ones up to so many entries, and one beyond.

    Examples:
        >>> list(in_turn([torch.empty(size) for size in (10, 10, 2**22, 10)]))
        [[0, 1, 2], [3]]
    """
    places: list[int] = []
    entries = 0
    for place, tensor in enumerate(tensors):
        places.append(place)
        entries += tensor.numel()
        if entries >= (together or together_on(tensor.device)):
            yield places
            places, entries = [], 0
    if places:
        yield places


def on_each(numbers: Sequence[Tensor], operation: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return what an operation that goes entry by entry makes of zero-dimensional tensors, those of a device at once.

    Examples:
        >>> on_each([torch.tensor(1.0), torch.tensor(2.0)], torch.neg)
        [tensor(-1.), tensor(-2.)]
    """
    results = list(numbers)
    for places in places_by_kind(numbers).values():
        found = operation(torch.stack([numbers[place] for place in places])).unbind()
        for place, result in zip(places, found, strict=True):
            results[place] = result
    return results


_Batched = Callable[[list[Tensor], Tensor], Sequence[Tensor] | None]


class Factor:
    """A factor that vectors are scaled by in turn: what is made of it for a device and a dtype is made once.

    Args:
        value: A zero-dimensional tensor in float64, ≥ 0.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._made: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._root: Tensor | None = None

    def root(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return `√f`."""
        if self._root is None:
            self._root = self.value.sqrt()
        return self._kept("root", self._root, device, dtype)

    def is_used(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return 1, or 0 where f is 0."""
        return self._kept("is_used", self.value, device, dtype)

    def _kept(self, name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = name, device, dtype
        if key not in self._made:
            value = value if name == "root" else value != 0
            self._made[key] = value.to(device=device, dtype=dtype)
        return self._made[key]


def _by_kind(
    operation: _Batched, tensors: Sequence[Tensor], operand: Tensor | Callable[[torch.device, torch.dtype], Tensor]
) -> list[Tensor]:
    """Return the results of a batched operation; of one in place, the tensors."""
    results = list(tensors)
    for (device, dtype), places in places_by_kind(tensors).items():
        # An operand of another dtype than the tensors would be sent to each of them by a kernel of its own.
        here = operand.to(device=device, dtype=dtype) if isinstance(operand, Tensor) else operand(device, dtype)
        found = operation([tensors[place] for place in places], here)
        for place, result in zip(places, found or (), strict=False):
            results[place] = result
    return results


def places_by_kind(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Return the places of the tensors of each device and dtype: a batched call takes those of one."""
    found = [(tensor.device, tensor.dtype) for tensor in tensors]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {kind: [] for kind in found}
    if len(kinds) == 1:
        return {found[0]: list(range(len(found)))}
    for place, kind in enumerate(found):
        kinds[kind].append(place)
    return kinds


def divide_(tensors: Sequence[Tensor], divisor: Tensor) -> None:
    """Divide every tensor, in place, by a zero-dimensional divisor: where its inverse would leave the range."""
    _by_kind(torch._foreach_div_, tensors, divisor)


def scaled(tensors: list[Tensor], factor: Tensor | Factor, *, overwrite: bool = False) -> list[Tensor]:
    """Return `factor · v`; a factor of 0 gives 0.0 everywhere, NaN and ∞ too.

    The factor may be one that float32 cannot hold, as that of a tiny or huge vector: then it is `√factor` twice.

    Args:
        tensors: `v`.
        factor: A zero-dimensional tensor in float64, ≥ 0; it stays on its device. Where all is on the CPU it is read,
            since nobody waits there: a factor of 1 costs nothing then, and an ordinary one a single multiplication.
            A `Factor` where several vectors are scaled by it.
        overwrite: Write over `v`, and return it; else what is returned is new.

    Examples:
        >>> scaled([torch.tensor([1.5, -1e-45])], torch.tensor(2e44, dtype=torch.float64))
        [tensor([       inf, -0.2803])]
        >>> scaled([torch.tensor([1.5, float("nan"), float("inf")])], torch.tensor(0.0))
        [tensor([0., 0., 0.])]
    """
    factor = factor if isinstance(factor, Factor) else Factor(factor)
    if any(tensor.device.type != "cpu" for tensor in [*tensors, factor.value]):
        return _scaled_unread(tensors, factor, overwrite=overwrite)
    value = float(factor.value)
    if value == 0:
        if not overwrite:
            return [torch.zeros_like(tensor) for tensor in tensors]
        if tensors:
            torch._foreach_zero_(tensors)
        return tensors
    factors = [value] if _ORDINARY_FACTOR[0] < value < _ORDINARY_FACTOR[1] else 2 * [math.sqrt(value)]
    if not overwrite and tensors:
        tensors = list(torch._foreach_mul(tensors, factors.pop()))
    for remaining in factors:
        if remaining != 1 and tensors:
            torch._foreach_mul_(tensors, remaining)
    return tensors


def _scaled_unread(tensors: list[Tensor], factor: Factor, *, overwrite: bool) -> list[Tensor]:
    """Do as `scaled` does, by a factor whose value must not be waited for.

    `NaN · 0` is NaN. But the bit pattern of a float, read as an integer, times 0 is the pattern of 0.0, and times 1
    itself.
    """
    products = _by_kind(torch._foreach_mul_ if overwrite else torch._foreach_mul, tensors, factor.root)
    _by_kind(torch._foreach_mul_, [_bits(product) for product in products], factor.is_used)
    _by_kind(torch._foreach_mul_, products, factor.root)
    return products


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGER_OF_SIZE[tensor.dtype.itemsize])


def scale_each_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Overwrite each tensor with `f_l v_l`, its own factor, as `scaled` does.

    Args:
        tensors: `v_l`; of DTensors each rank scales its part.
        factors: Of each a zero-dimensional tensor in float64, ≥ 0, on the device of the tensor, if that has float64.

    Examples:
        >>> tensors = [torch.tensor([1.0, 2.0]), torch.tensor([float("nan")])]
        >>> scale_each_(tensors, [torch.tensor(3.0).double(), torch.tensor(0.0).double()])
        >>> tensors
        [tensor([3., 6.]), tensor([0.])]
    """
    for (device, _), places in places_by_kind(tensors).items():
        here = local_parts([tensors[place] for place in places])
        of_each = [factors[place] for place in places]
        if has_launches(device):
            _scale_each_unread_(here, of_each)
            continue
        for tensor, factor in zip(here, of_each, strict=True):
            scaled([tensor], factor, overwrite=True)


def _scale_each_unread_(tensors: list[Tensor], factors: Sequence[Tensor]) -> None:
    """Do as `scale_each_` does with tensors of one device and dtype, by factors that must not be waited for."""
    device, dtype, together = tensors[0].device, tensors[0].dtype, torch.stack(list(factors))
    roots = together.sqrt().to(device, dtype).unbind()
    used = (together != 0).to(device, INTEGER_OF_SIZE[dtype.itemsize]).unbind()
    torch._foreach_mul_(tensors, roots)
    torch._foreach_mul_([_bits(tensor) for tensor in tensors], used)
    torch._foreach_mul_(tensors, roots)


def add_multiple_(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Tensor) -> None:
    """Overwrite `w` with `w + f·v`; with `f = 0` it stays, whatever v holds, NaN too.

    Each sum is computed in float32 at least and rounded to the dtype of w. Nothing is made beside where w and v are
    alike, on CUDA in 32 bits or less, elsewhere in no less. On CUDA a factor beyond float32 is the largest it holds.

    Args:
        tensors: `w`.
        others: `v`, of the shapes of w; only read.
        factor: A zero-dimensional tensor in float64, ≥ 0. On CUDA it stays on its device; one on a CPU is read.

    Examples:
        >>> weights = [torch.tensor([1.0, 2.0])]
        >>> add_multiple_(weights, [torch.tensor([4.0, -4.0])], torch.tensor(0.5).double())
        >>> weights
        [tensor([3., 0.])]
    """
    value = float(factor) if factor.device.type == "cpu" else math.nan
    if value == 0:
        return
    ordinary = _ORDINARY_FACTOR[0] < value < _ORDINARY_FACTOR[1]
    rest: list[int] = []
    for (device, dtype), places in places_by_kind(tensors).items():
        unread = device.type in ("cuda", "meta") and dtype != torch.float64
        at_once = unread or (ordinary and dtype.itemsize >= 4)  # in 16 bits f would be rounded to them
        alike = [place for place in places if _alike(tensors[place], others[place])] if at_once else []
        if len(alike) < len(places):
            rest += sorted({*places} - {*alike})
        filled = [place for place in alike if tensors[place].numel()]
        pair = [tensors[place] for place in filled], [others[place] for place in filled]
        if filled and unread:
            _add_multiple_unread_(*pair, factor.to(device))
        elif filled:
            torch._foreach_add_(*pair, alpha=value)
    known = Factor(factor)
    for some in in_turn([others[place] for place in rest]):
        places = [rest[index] for index in some]
        parts = scaled(working_copy([others[place] for place in places]), known, overwrite=True)
        weights = [tensors[place] for place in places]
        write_sums_(weights, parts, weights)
        del parts


def _alike(first: Tensor, second: Tensor) -> bool:
    """Say whether two tensors lie in memory in the same way, without gaps."""
    same = first.dtype == second.dtype and first.device == second.device and first.stride() == second.stride()
    images = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    return same and (first.is_contiguous() or images)


def _add_multiple_unread_(tensors: list[Tensor], others: list[Tensor], factor: Tensor) -> None:
    """Do as `add_multiple_` does with tensors that are alike, by a factor whose value must not be waited for.

    Of PyTorch's kernels that of the optimizer SGD alone takes a factor from the device, adds what it multiplies in the
    same pass, and does nothing at all where another number on the device says so.
    """
    rate = factor.clamp(max=torch.finfo(torch.float32).max).float()
    torch._fused_sgd_(
        tensors,
        others,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=-rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=(rate == 0).float(),
    )


def write_sums_(tensors: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Overwrite tensors with `a + b`, computed in the wider dtype and rounded once; b may be what is overwritten.

    A CPU makes wide copies of narrow operands, hence chunks; elsewhere small tensors are widened, added and rounded by
    three batched calls, and a large one, which is worth a launch, by one that needs no copy.

    Args:
        tensors: What is written.
        first: `a`, of the same shapes, in float32 at least.
        second: `b`, of the same shapes.

    Examples:
        >>> weights = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16)]
        >>> write_sums_(weights, [torch.tensor([0.25, 2.0**-20])], weights)
        >>> weights
        [tensor([1.2500, 2.0000], dtype=torch.bfloat16)]
    """
    small = []
    for place, (tensor, a, b) in enumerate(zip(tensors, first, second, strict=True)):
        launched = has_launches(tensor.device)
        if launched and tensor.numel() < _ALONE:
            small.append(place)
        elif launched or tensor.dtype == a.dtype or not _all_contiguous(tensor, a, b):
            torch.add(a, b, out=tensor)
        else:
            for part, of_a, of_b in zip(chunks([tensor]), chunks([a]), chunks([b]), strict=True):
                torch.add(of_a, of_b, out=part)
    _write_small_sums_(*([tensors[place] for place in small] for tensors in (tensors, first, second)))


def _all_contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _write_small_sums_(tensors: list[Tensor], first: list[Tensor], second: list[Tensor]) -> None:
    for places in in_turn(tensors):
        sums = working_copy([second[place] for place in places])
        torch._foreach_add_(sums, [first[place] for place in places])
        torch._foreach_copy_([tensors[place] for place in places], sums)
        del sums
