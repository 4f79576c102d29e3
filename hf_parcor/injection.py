"""Write corruptions into weights and restore their exact bits; no other module writes weights.

Weights come back by copying saved bits, never by subtracting what was added: `w + a − a` leaves up to a tenth of
the float32 weights of a model changed in their last bit.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from hf_parcor.arguments import check_norm_order
from hf_parcor.distributed.dtensors import alike, local_part, local_parts, one_vector, spread_alike, total
from hf_parcor.functional.vectors import chunks, clones, vector_norm, vector_norm_of_unit_scale


def obstacle(weight: Tensor) -> str | None:
    """Return why a tensor's numbers cannot be corrupted, to be read after "is" or "are"; None where they can.

    Examples:
        >>> obstacle(torch.ones(2)), obstacle(torch.ones(2, dtype=torch.int8)), obstacle(torch.ones(2, device="meta"))
        (None, 'int8', 'on the meta device, as what is offloaded')
    """
    if isinstance(weight, DTensor):
        weight = local_part(weight)
    kind = type(weight)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # which says itself what a write or a view means
        return f"of the class {kind.__name__}, no plain numbers"
    if weight.is_meta:
        return "on the meta device, as what is offloaded"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return str(weight.dtype).removeprefix("torch.")
    if weight.layout != torch.strided:
        return f"{str(weight.layout).removeprefix('torch.')} tensors"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference mode, which forbids writes outside of it"
    return None


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse an empty selection, weights that cannot be corrupted, and weights that stand under two names."""
    check_mapping("weights", weights, "select_parameters(model, ...) returns one")
    if not weights:
        raise ValueError("weights: expected at least one tensor, got none; select parameters first")
    names: dict[int, str] = {}
    for name, weight in weights.items():
        found = obstacle(weight)
        if found is not None:
            raise TypeError(
                f"{name}: expected a floating-point weight of 16 bits or more in plain memory, got one that is "
                f"{found}; leave it out of the selection, or load the model without quantization and offloading"
            )
        address = local_part(weight).data_ptr()  # 0 for tensors without memory of their own
        if address and names.setdefault(address, name) != name:
            raise ValueError(
                f"{name}: expected every weight under one name, got that of {names[address]} again; "
                "tied weights are one weight: leave one of the names out"
            )


def check_mapping(what: str, given: object, advice: str) -> None:
    """Refuse what is no mapping."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected tensors by name, got {type(given).__name__}; {advice}")


def check_corruption(weights: Mapping[str, Tensor], corruption: Mapping[str, Tensor]) -> None:
    """Refuse names and shapes that do not belong to the weights."""
    check_mapping("corruption", corruption, "call a corruption on the parameters to get one")
    for name, change in corruption.items():
        if name not in weights:
            near = difflib.get_close_matches(name, weights, n=3) or list(weights)[:3]
            raise ValueError(
                f"corruption: expected names of the {len(weights)} selected parameters, got {name!r}; "
                f"the nearest are {', '.join(near)}"
            )
        if not isinstance(change, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(change).__name__}; pass torch.as_tensor(...)")
        if change.shape != weights[name].shape:
            raise ValueError(
                f"{name}: expected a corruption of shape {tuple(weights[name].shape)}, got {tuple(change.shape)}; "
                "make it from the weights that it is for"
            )
        if not spread_alike(change, weights[name]):
            raise ValueError(
                f"{name}: expected a corruption that is sharded over the ranks as its weight is, got another layout; "
                "make it from the weights that it is for"
            )


def forget_derived() -> None:
    """Let PyTorch forget what it keeps that was computed from weights, so that the next pass computes it anew.

    An outer `torch.autocast` keeps its casts of weights, and `parametrize.cached()` the tensors that it makes from
    them: neither notices a write in place, and the latter not even that it was made without a graph. Both are emptied
    also where autocast is off at the moment, for the model may turn it on again; that costs less than a microsecond.

    Not reached, because nothing tells of them: copies that a model makes of its own weights, such as a merged
    adapter's (unmerge it first), weights that a compiler folded into constants (`torch._inductor.config.freezing`,
    `torch.jit.freeze`) or repacked for a kernel, and stacked copies made for `torch.func`. Without freezing,
    `torch.compile` reads weights at each call, and so do the older hooks of `weight_norm` and `spectral_norm`.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()


@dataclass(frozen=True)
class CorruptionNorm:
    """The size of a corruption: `asked` as it was computed, `realised` as the weights could represent it."""

    asked: Tensor
    realised: Tensor


@dataclass(frozen=True)
class CorruptionSize:
    """How many weights a corruption changed, and its realised L2 norm."""

    changed: int
    norm: float


class Injection:
    """A corruption of some weights that can be moved step by step, and withdrawn to the last bit.

    The weights themselves hold `w + a`; only the saved bits of `w` cost memory, and they are taken when the first
    corruption is written. Weights narrower than float32 swallow small corruptions, so for them (only) `a` is kept in
    float32 beside.

    Of weights that are sharded over ranks (DTensors) each rank writes and saves its own shards; norms and counts are
    those of the whole vector, and equal on all ranks.

    Whatever fails while weights are written, an interrupt too, the saved bits are put back before it is raised.

    Weights stay where they are in memory. With `w + a` in tensors of its own, and a pointer that is set and set back,
    a defended step would move 16 bytes a weight less, of 40 with one corruption step and 112 with two. But whoever
    holds the address would go on with the clean weights, and nobody would notice: the flat shards that FSDP2 gathers
    from, captured CUDA graphs, and what a model keeps of its own, such as a view. Of these, addresses cannot be found.

    After each write, what PyTorch keeps that was computed from the weights before is forgotten (see
    `forget_derived`).

    Args:
        weights: Floating-point tensors by name; they are written in place.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: There is no tensor, or one stands under two names.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        check_weights(weights)
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        exact = [weight for weight in self._weights.values() if not _is_narrow(weight)]
        narrow = [weight for weight in self._weights.values() if _is_narrow(weight)]
        self._vector = one_vector([*exact, *narrow])
        self._exact, self._narrow = self._vector[: len(exact)], self._vector[len(exact) :]
        self._forget()

    def _forget(self) -> None:
        self._active = False
        self._saved_exact: list[Tensor] = []
        self._saved_narrow: list[Tensor] = []
        self._corruption: dict[str, Tensor] = {}

    @property
    def is_active(self) -> bool:
        """Whether something was written, and not restored since."""
        return self._active

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            if not self._active:
                self._saved_exact = clones(self._exact)
                self._saved_narrow = clones(self._narrow)
                self._active = True
            yield
            forget_derived()
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def displace(
        self,
        update: Mapping[str, Tensor],
        project: Callable[[list[Tensor]], None] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        """Move the corruption: `a ← Π(a + u)`, and write `w + a`.

        Args:
            update: `u` by name; names that are absent are not moved, though the projection may still shrink them.
            project: Π, overwrites the list of all tensors of `a` with its projection; None for none.
            keep: Whether the tensors of `u` may be kept, and overwritten later: nobody else needs them.

        Raises:
            ValueError: A name or a shape does not belong to the weights; nothing is written then.
            RuntimeError: The weights were replaced, and not restored since.
        """
        check_corruption(self._weights, update)
        if self._active and not self._corruption:
            raise RuntimeError("displace: expected weights not replaced before, got replaced ones; restore() first")
        with self._writing():
            first = not self._corruption
            moved = list(update)
            if first:
                self._corruption = {
                    name: self._first_of_narrow(weight, update.get(name), keep) if _is_narrow(weight) else weight
                    for name, weight in self._weights.items()
                }
                moved = [name for name in update if not _is_narrow(self._weights[name])]
            direct = first and project is None  # w + u, with no need of a by itself
            # Else weights of full precision hold a itself while it moves: no second buffer.
            if not first:
                _foreach(torch._foreach_sub_, self._exact, self._saved_exact)
            elif not direct:
                _foreach(torch._foreach_zero_, self._exact)
            _foreach(
                torch._foreach_add_,
                local_parts([self._corruption[name] for name in moved]),
                local_parts([update[name] for name in moved]),
            )
            if project is not None:
                project(list(self._corruption.values()))
            if not direct:
                _foreach(torch._foreach_add_, self._exact, self._saved_exact)
            for weight, corruption, before in zip(self._narrow, self._wide(), self._saved_narrow, strict=True):
                torch.add(corruption, before, out=weight)  # a batched call would make a float32 copy of them all

    @staticmethod
    def _first_of_narrow(weight: Tensor, update: Tensor | None, keep: bool) -> Tensor:
        if update is None:
            return torch.zeros_like(weight, dtype=torch.float32)
        return update if keep and update.dtype == torch.float32 else update.to(torch.float32, copy=True)

    def _wide(self) -> list[Tensor]:
        return local_parts([self._corruption[name] for name, weight in self._weights.items() if _is_narrow(weight)])

    @torch.no_grad()
    def size(self) -> CorruptionSize:
        """Count the weights that differ from the saved ones, and measure by how much; waits for the device."""
        if not self._active:
            return CorruptionSize(0, 0.0)
        changed, parts = [], []
        for weight, before in zip(self._vector, self._all_saved(), strict=True):
            count, norm = _change(weight, before)
            changed.append(count)
            parts.append(norm)
        counts, norm = alike(self._vector, changed), vector_norm(alike(self._vector, parts))
        return CorruptionSize(int(total(counts, _sum)), float(norm))

    def _all_saved(self) -> list[Tensor]:
        return [*self._saved_exact, *self._saved_narrow]

    @torch.no_grad()
    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Write new values over the weights.

        Raises:
            ValueError: A name or a shape does not belong to the weights; nothing is written then.
            RuntimeError: The weights were displaced, and not restored since.
        """
        check_corruption(self._weights, values)
        if self._corruption:
            raise RuntimeError("replace: expected weights not displaced before, got displaced ones; restore() first")
        with self._writing():
            for name, value in values.items():
                local_part(self._weights[name]).copy_(local_part(value))

    def write(self, chosen: Mapping[str, Tensor]) -> None:
        """Write what a corruption chose: new values if it is a `Replacement`, else what to add."""
        if isinstance(chosen, Replacement):
            self.replace(chosen)
        else:
            self.displace(chosen, keep=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the saved bits back and free them; nothing to do is fine."""
        if self._active:
            try:
                _foreach(torch._foreach_copy_, self._exact, self._saved_exact)
            finally:  # an interrupt between the two must not leave half of the weights corrupted
                _foreach(torch._foreach_copy_, self._narrow, self._saved_narrow)
                forget_derived()
        self._forget()

    @torch.no_grad()
    def withdraw(self, p: float) -> CorruptionNorm:
        """Restore, and return the `L_p` norm of the corruption as asked and as the weights really took it.

        Raises:
            ValueError: `p` is below 1 or NaN.
        """
        p = check_norm_order(p)
        if not self._active:
            return CorruptionNorm(torch.zeros(()), torch.zeros(()))
        try:
            _foreach(torch._foreach_sub_, self._exact, self._saved_exact)
            _foreach(torch._foreach_sub_, self._narrow, self._saved_narrow)
            realised = vector_norm_of_unit_scale(self._vector, p)
            asked = realised
            if self._corruption and self._narrow:
                asked = vector_norm_of_unit_scale(alike(self._vector, [*self._exact, *self._wide()]), p)
        finally:
            self.restore()
        return CorruptionNorm(asked, realised)


def _is_narrow(weight: Tensor) -> bool:
    return weight.dtype.itemsize < 4


def _change(weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many entries differ, and the L2 norm of the difference in float64."""
    counts, norms = [], []
    for now, then in zip(chunks([weight.contiguous()]), chunks([before.contiguous()]), strict=True):
        same = (now == then) | (now.isnan() & then.isnan())
        counts.append((~same).sum())
        norms.append(vector_norm([(now.double() - then).masked_fill_(same, 0)]))
    return torch.stack(counts).sum(), vector_norm([torch.stack(norms)])


def _sum(counts: list[Tensor]) -> Tensor:
    return torch.stack([count.cpu() for count in counts]).sum()


def _foreach(operation: Callable[..., object], first: list[Tensor], *others: list[Tensor]) -> None:
    if first:
        operation(first, *others)


class Replacement(dict[str, Tensor]):
    """New values of weights, by name, where a difference would not do.

    Quantized weights and flipped bits are values: where an exponent bit flips, `w + (w' − w)` is not `w'` in floating
    point, and `w'` may be ∞ or NaN. Any other mapping of names to tensors is a corruption `a` to be added.
    """


@contextmanager
def corrupted(parameters: Mapping[str, Tensor], corruption: Mapping[str, Tensor]) -> Iterator[Injection]:
    """Corrupt weights inside a `with` block; after it, and after any exception in it, every bit is back.

    Args:
        parameters: Weights by name, as `select_parameters` returns them.
        corruption: What to add to them, by name (names that are absent stay as they are), or a `Replacement` with
            new values. It is computed in float32 and rounded once to the weight's own precision.

    Yields:
        The injection, whose `withdraw(p)` ends the corruption early and tells its realised norm.

    Raises:
        ValueError: A name or a shape does not belong to the parameters, no name is given, or one weight stands under
            two names; nothing is written then.
        TypeError: A named weight is not floating point, or something is no tensor; nothing is written then.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> with corrupted(dict(layer.named_parameters()), {"weight": torch.tensor([[0.5, 0.0]])}):
        ...     print(layer.weight.detach() - before)
        tensor([[0.5000, 0.0000]])
        >>> torch.equal(layer.weight, before)
        True
    """
    check_mapping("parameters", parameters, "select_parameters(model, ...) returns one")
    check_corruption(parameters, corruption)
    touched = {name: parameters[name] for name in corruption}
    if not touched:
        raise ValueError("corruption: expected at least one tensor, got none; corrupt at least one parameter")
    injection = Injection(touched)
    try:
        if isinstance(corruption, Replacement):
            injection.replace(corruption)
        else:
            devices = {name: weight.device for name, weight in touched.items()}
            injection.displace({name: change.detach().to(devices[name]) for name, change in corruption.items()})
        yield injection
    finally:
        injection.restore()
