"""Write corruptions into weights and restore their exact bits; no other module writes weights.

Weights come back by copying saved bits, never by subtracting what was added: `w + a − a` leaves up to a tenth of
the float32 weights of a model changed in their last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from hf_parcor.arguments import check_norm_order
from hf_parcor.devices import host_of, in_float64
from hf_parcor.distributed.dtensors import (
    ShardedVector,
    alike,
    local_part,
    local_parts,
    one_vector,
    total,
)
from hf_parcor.functional.norms import norms_of_each, vector_norm, vector_norm_of_unit_scale
from hf_parcor.functional.vectors import add_multiple_, chunks, clones, widened, write_sums_
from hf_parcor.injection.corruptible import Device, check_corruption, check_device, check_mapping, check_weights
from hf_parcor.injection.forms import Multiple, Pieces, Replacement, in_bundles
from hf_parcor.overriding import undo_at_end


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


def is_swallowed(asked: float, realised: float) -> bool:
    """Say whether weights that are too narrow for a corruption took a norm that is not as asked, by over a tenth.

    Examples:
        >>> is_swallowed(1.0, 0.95), is_swallowed(1.0, 0.8)
        (False, True)
    """
    return abs(realised - asked) > 0.1 * asked


@dataclass(frozen=True)
class CorruptionSize:
    """How many weights a corruption changed, and its realised L2 norm.

    Attributes:
        changed: The weights that differ.
        norm: L2, of what they really took.
        asked: L2, of what was to be added to them, where weights are narrower than float32 and the corruption was
            written with `p=2`, or exists as a whole; else `norm`.
    """

    changed: int
    norm: float
    asked: float = field(default=math.nan, compare=False)


class Injection:
    """A corruption of some weights that can be moved step by step, and withdrawn to the last bit.

    The weights themselves hold `w + a`; only the saved bits of `w` cost memory, and they are taken when the first
    corruption is written. One that is written once, tensor by tensor (`write`), costs nothing beside. Where it moves
    (`displace`), weights narrower than float32 swallow small steps, so for them (only) `a` is kept in float32.

    Of weights that are sharded over ranks (DTensors) each rank writes and saves its own shards; norms and counts are
    those of the whole vector, and equal on all ranks.

    Whatever fails while weights are written, an interrupt too, the saved bits are put back before it is raised.

    Weights stay where they are in memory. With `w + a` in tensors of its own, and a pointer that is set and set back,
    a defended step would move 16 bytes a weight less, of 32 with one corruption step and 96 with two. But whoever
    holds the address would go on with the clean weights, and nobody would notice: the flat shards that FSDP2 gathers
    from, captured CUDA graphs, and what a model keeps of its own, such as a view. Of these, addresses cannot be found.
    (DDP, AdamW, fused too, tied weights and compiled models without CUDA graphs hold parameters, and would not mind.)

    A model may give a parameter other memory all the same: the routers of Switch Transformers in bfloat16 cast
    themselves to float32 when they are first called. What is there at the first write is corrupted, and what is there
    at the end gets the saved bits as well, in its own dtype.

    After each write, what PyTorch keeps that was computed from the weights before is forgotten (see
    `forget_derived`).

    Args:
        weights: Floating-point tensors by name; they are written in place.
        saved_on: Where the saved bits are kept, such as "cpu", in pinned memory where there is CUDA; None, the
            default, for each weight's own device.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: There is no tensor, or one stands under two names; or no such device.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, saved_on: Device = None) -> None:
        check_weights(weights)
        self._saved_on = check_device("saved_on", saved_on)
        self._take_memory(weights)
        self._forget()

    def _take_memory(self, weights: Mapping[str, Tensor]) -> None:
        """Find out where the weights are."""
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        exact: list[str] = []
        narrow: list[str] = []
        for name, weight in weights.items():
            (narrow if weight.dtype.itemsize < 4 else exact).append(name)
        names = exact + narrow
        self._all_exact, self._all_narrow = range(len(exact)), range(len(exact), len(names))
        self._places = dict(zip(names, range(len(names)), strict=True))
        self._vector = one_vector([self._weights[name] for name in names])
        self._now = [weights[name] for name in names]  # the tensors themselves, whatever memory they have

    def _moved(self, places: Iterable[int]) -> list[int]:
        """Return which weights have other memory by now than is written."""
        return [
            place
            for place in places
            if not isinstance(self._now[place], DTensor)
            and self._now[place].data_ptr() != self._vector[place].data_ptr()
        ]

    def _follow(self) -> None:
        if not self._active and self._moved(range(len(self._vector))):
            self._take_memory({name: self._now[place] for name, place in self._places.items()})

    def _forget(self) -> None:
        self._active = False
        self._saved: dict[int, Tensor] = {}  # by the place in the vector
        self._corruption: dict[str, Tensor] = {}
        self._asked: _Asked | None = None

    @property
    def is_active(self) -> bool:
        """Whether something was written, and not restored since."""
        return self._active

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self._active = True
            yield
            forget_derived()
        except BaseException:
            self.restore()
            raise

    def _save(self, places: Iterable[int]) -> None:
        """Save the bits of weights that are not saved yet."""
        new = [place for place in places if place not in self._saved]
        weights = [self._vector[place] for place in new]
        copies = clones(weights) if self._saved_on is None else [_copy_on(self._saved_on, w) for w in weights]
        self._saved.update(zip(new, copies, strict=True))

    def _with_saved(self, operation: Callable[..., object], places: Iterable[int]) -> None:
        """Apply a batched operation to weights and their saved bits, brought near one by one if they are kept afar."""
        saved = [place for place in places if place in self._saved]
        for some in [saved] if self._saved_on is None else [[place] for place in saved]:
            weights = [self._vector[place] for place in some]
            bits = [self._saved[place].to(self._vector[place].device) for place in some]
            _foreach(operation, weights, bits)

    @torch.no_grad()
    def displace(
        self,
        update: Mapping[str, Tensor] | Pieces | Multiple,
        project: Callable[[list[Tensor]], None] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        """Move the corruption: `a ← Π(a + u)`, and write `w + a`.

        Args:
            update: `u` by name; names that are absent are not moved, though the projection may still shrink them. Of
                pieces only one is held at a time, where they are added to an `a`.
            project: Π, overwrites the list of all tensors of `a` with its projection; None for none.
            keep: Whether the tensors of `u` may be kept, and overwritten later: nobody else needs them.

        Raises:
            ValueError: A name or a shape does not belong to the weights; nothing is written then, or it is restored.
            RuntimeError: The weights were written by `write`, and not restored since.
            TypeError: A `Multiple` of narrow weights, which hold no `a` to be moved later.
        """
        self._follow()
        factor: Tensor | None = None
        if isinstance(update, Multiple):
            factor, update = update.factor, update.direction
            if self._all_narrow:
                raise TypeError(
                    "displace: expected tensors for weights narrower than float32, got a Multiple; write it"
                )
        pieces = update if isinstance(update, Pieces) and self._corruption else Pieces(())
        update = {} if pieces is update else update.whole() if isinstance(update, Pieces) else update
        check_corruption(self._weights, update)
        if self._active and not self._corruption:
            raise RuntimeError("displace: expected weights not written before, got written ones; restore() first")
        with self._writing():
            self._save(self._all_exact)
            self._save(self._all_narrow)
            first = not self._corruption
            moved = list(update)
            if first:
                self._corruption = {
                    name: self._first_of_narrow(weight, update.get(name), keep) if self._is_narrow(name) else weight
                    for name, weight in self._weights.items()
                }
                moved = [name for name in update if not self._is_narrow(name)]
            direct = first and project is None  # w + u, with no need of a by itself
            # Else weights of full precision hold a itself while it moves: no second buffer.
            if not first:
                self._with_saved(torch._foreach_sub_, self._all_exact)
            elif not direct:
                _foreach(torch._foreach_zero_, [self._vector[place] for place in self._all_exact])
            _foreach(
                torch._foreach_add_ if factor is None else partial(add_multiple_, factor=factor),
                local_parts([self._corruption[name] for name in moved]),
                local_parts([update[name] for name in moved]),
            )
            for bundle in in_bundles(pieces):
                check_corruption(self._weights, bundle)
                moving = local_parts([self._corruption[name] for name in bundle])
                torch._foreach_add_(moving, local_parts(list(bundle.values())))
                del bundle
            if project is not None:
                project(list(self._corruption.values()))
            if not direct:
                self._with_saved(torch._foreach_add_, self._all_exact)
            self._write_narrow()

    def _write_narrow(self) -> None:
        """Write `w + a` into weights that hold a rounded sum, those with bits kept afar one by one."""
        every = list(zip(self._all_narrow, self._wide(), strict=True))
        for some in [every] if self._saved_on is None else [[one] for one in every]:
            weights = [self._vector[place] for place, _ in some]
            saved = [self._saved[place].to(self._vector[place].device) for place, _ in some]
            write_sums_(weights, [corruption for _, corruption in some], saved)
            del saved

    def _is_narrow(self, name: str) -> bool:
        return self._places[name] in self._all_narrow

    @staticmethod
    def _first_of_narrow(weight: Tensor, update: Tensor | None, keep: bool) -> Tensor:
        if update is None:
            return torch.zeros_like(weight, dtype=torch.float32)
        return update if keep and update.dtype == torch.float32 else update.to(torch.float32, copy=True)

    def _wide(self) -> list[Tensor]:
        return local_parts(
            [self._corruption[name] for name, place in self._places.items() if place in self._all_narrow]
        )

    @torch.no_grad()
    def write(self, corruption: Mapping[str, Tensor] | Pieces | Multiple, p: float | None = None) -> None:
        """Write a corruption of the weights as they were before any was written: `w + a`, or a replacement.

        Tensor by tensor, small ones together: the bits of each are saved just before it is written, and no `a` is
        kept. What was written before and is not named now is put back.

        Args:
            corruption: What to add to the weights, by name, or a `Replacement`; or either of them as `Pieces`; or a
                `Multiple`, which is written in one pass.
            p: Of pieces that are added to weights narrower than float32, and of a `Multiple`, the order of the norm
                that `withdraw` will be asked for; None, the default, if it will not.

        Raises:
            ValueError: A name or a shape does not belong to the weights, or `p` is below 1 or NaN. Nothing is written
                then; of pieces, what was is put back.
            RuntimeError: The weights were displaced, and not restored since.
        """
        self._follow()
        p = None if p is None else check_norm_order(p)
        bundles: Iterable[Mapping[str, Tensor]]
        factor = None
        if isinstance(corruption, Pieces):
            replaces, asked = corruption.replaces, _Asked(p, None)
            bundles = map(self._checked, in_bundles(corruption))
        elif isinstance(corruption, Multiple):
            replaces, asked, factor = False, _Asked(p, None, corruption.norm), corruption.factor
            bundles = [self._checked(corruption.direction)]
        else:
            replaces, asked = isinstance(corruption, Replacement), _Asked(p, corruption)
            bundles = in_bundles(self._checked(corruption).items())  # all of it, before any is written
        if self._corruption:
            raise RuntimeError("write: expected weights not displaced before, got displaced ones; restore() first")
        self._asked = None if replaces else asked
        with self._writing():
            earlier = set(self._saved)
            for bundle in bundles:
                self._write_together(bundle, replaces, factor)
                earlier.difference_update(self._places[name] for name in bundle)
                del bundle
            self._put_back(earlier)
            for place in earlier:
                del self._saved[place]

    def _checked(self, corruption: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        check_corruption(self._weights, corruption)
        return corruption

    def _write_together(self, bundle: Mapping[str, Tensor], replaces: bool, factor: Tensor | None) -> None:
        places = [self._places[name] for name in bundle]
        self._put_back(places)
        self._save(place for place in places if place in self._all_exact)
        self._save(place for place in places if place in self._all_narrow)
        weights = [self._vector[place] for place in places]
        pieces = [
            piece if piece.device == weight.device and not piece.requires_grad else piece.detach().to(weight.device)
            for piece, weight in zip(local_parts(list(bundle.values())), weights, strict=True)
        ]
        if replaces:
            _foreach(torch._foreach_copy_, weights, pieces)
            return
        if factor is not None:
            add_multiple_(weights, pieces, factor)
            return
        exact = [index for index, place in enumerate(places) if place in self._all_exact]
        _foreach(torch._foreach_add_, [weights[index] for index in exact], [pieces[index] for index in exact])
        narrow = [index for index, place in enumerate(places) if place in self._all_narrow]
        wide = widened([pieces[index] for index in narrow], torch.float32)
        write_sums_([weights[index] for index in narrow], wide, [weights[index] for index in narrow])
        if self._asked is not None:
            self._asked.see([places[index] for index in narrow], wide)

    @torch.no_grad()
    def size(self) -> CorruptionSize:
        """Count the weights that differ from the saved ones, and measure by how much; waits for the device."""
        if not self._active:
            return CorruptionSize(0, 0.0, 0.0)
        counts, parts = self._changes(careful=False)
        realised = _norm_of_norms(parts)
        if not realised.isfinite():
            counts, parts = self._changes(careful=True)
            realised = _norm_of_norms(parts)
        asked = realised
        if self._all_narrow and self._asked is not None and (self._asked.kept is not None or self._asked.p == 2):
            of_narrow = self._asked.norms(2, self._places, self._all_narrow)
            told = [of_narrow.get(place, part) for place, part in enumerate(parts)]
            asked = _norm_of_norms(alike(self._vector, told)) if self._asked.whole is None else self._asked.whole
        return CorruptionSize(int(total(counts, _sum)), float(realised), float(asked))

    def _changes(self, *, careful: bool) -> tuple[list[Tensor], list[Tensor]]:
        none = torch.tensor(0, device="cpu"), torch.tensor(0.0, dtype=torch.float64, device="cpu")
        changes = [
            _change(weight, self._saved[place], careful=careful) if place in self._saved else none
            for place, weight in enumerate(self._vector)
        ]
        counts, norms = zip(*changes, strict=True)
        return alike(self._vector, list(counts)), alike(self._vector, list(norms))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the saved bits back and free them; nothing to do is fine."""
        try:
            self._restore()
        finally:  # once more, where an interrupt came on the way: else there is nothing to do
            self._restore()

    def _restore(self) -> None:
        if self._active:
            self._put_back(place for place in self._saved if place in self._all_exact)
            self._put_back(place for place in self._saved if place in self._all_narrow)
            forget_derived()
            self._forget()

    def _put_back(self, places: Iterable[int]) -> None:
        # The last first: of weights that overlap in memory, the second was saved when the first was written already.
        saved = [place for place in places if place in self._saved][::-1]
        _foreach(
            torch._foreach_copy_, [self._vector[place] for place in saved], [self._saved[place] for place in saved]
        )
        for place in self._moved(saved):
            self._now[place].copy_(self._saved[place])

    @torch.no_grad()
    def withdraw(self, p: float) -> CorruptionNorm:
        """Restore, and return the `L_p` norm of the corruption as asked and as the weights really took it.

        Raises:
            ValueError: `p` is below 1 or NaN, or another than that of the `write`, and pieces are gone.
        """
        p = check_norm_order(p)
        if not self._active:
            return CorruptionNorm(torch.zeros(()), torch.zeros(()))
        asked_of_narrow = {} if self._asked is None else self._asked.norms(p, self._places, self._all_narrow)
        try:
            self._with_saved(torch._foreach_sub_, self._all_exact)
            self._with_saved(torch._foreach_sub_, self._all_narrow)
            found = [w if place in self._saved else w.new_empty(0) for place, w in enumerate(self._vector)]
            realised = vector_norm_of_unit_scale(alike(self._vector, found), p)
            asked = realised
            if self._corruption and self._all_narrow:
                exact = [self._vector[place] for place in self._all_exact]
                asked = vector_norm_of_unit_scale(alike(self._vector, [*exact, *self._wide()]), p)
            elif asked_of_narrow:
                parts = [asked_of_narrow.get(place, part) for place, part in enumerate(found)]
                asked = vector_norm_of_unit_scale(alike(self._vector, parts), p)
            elif self._asked is not None and self._asked.whole is not None and self._asked.p == p:
                asked = self._asked.whole.to(realised)
        finally:
            self.restore()
        return CorruptionNorm(asked, realised)


@dataclass(frozen=True)
class _Asked:
    """The norms of what was to be added to narrow weights, of which these hold a rounded sum.

    Attributes:
        p: The order that is measured as pieces pass; None for none.
        kept: The corruption, where its owner has all of it anyway.
        whole: Its norm, where that was known before it was written.
        seen: The norm of each piece, by the weight's place.
    """

    p: float | None
    kept: Mapping[str, Tensor] | None
    whole: Tensor | None = None
    seen: dict[int, Tensor] = field(default_factory=dict)

    def see(self, places: Sequence[int], pieces: Sequence[Tensor]) -> None:
        """Measure pieces."""
        if self.kept is None and self.p is not None:
            self.seen.update(zip(places, norms_of_each(pieces, self.p), strict=True))

    def norms(self, p: float, places: Mapping[str, int], narrow: Container[int]) -> dict[int, Tensor]:
        """Return the `L_p` norm of what was to be added to each narrow weight, by its place."""
        if self.kept is not None:
            named = {places[name]: local_part(change) for name, change in self.kept.items()}
            return {place: vector_norm([change], p) for place, change in named.items() if place in narrow}
        if p != self.p and narrow:
            raise ValueError(
                f"p: expected {self.p}, the order of the norm that was measured while pieces were written, got {p:g}; "
                f"pass p={p:g} to write"
            )
        return self.seen


def _copy_on(device: torch.device, weight: Tensor) -> Tensor:
    pinned = device.type == "cpu" and weight.device.type == "cuda"  # from where it comes back at the speed of the bus
    return torch.empty_like(weight, device=device, pin_memory=pinned).copy_(weight)


def _change(weight: Tensor, before: Tensor, *, careful: bool) -> tuple[Tensor, Tensor]:
    """Return how many entries differ, and the L2 norm of the difference in float64.

    Args:
        weight: As it is.
        before: As it was.
        careful: Whether there may be NaN in both, which are equal here, or infinities; else the norm is NaN then.
    """
    counts, norms = [], []
    for now, kept in zip(chunks([weight.contiguous()]), chunks([before.contiguous()]), strict=True):
        then = kept.to(now.device)
        differs = now != then
        host = host_of(now.device)
        difference = in_float64(now) - then.to(host)
        norm = torch.linalg.vector_norm(difference)
        if careful or now.dtype == torch.float64:  # else squares stay inside the range
            differs &= ~(now.isnan() & then.isnan())
            norm = vector_norm([difference.masked_fill_(~differs.to(host), 0)])  # of what is infinite in both, too
        counts.append(differs.sum())
        norms.append(norm)
    if len(norms) == 1:
        return counts[0], norms[0]
    return torch.stack(counts).sum(), vector_norm([torch.stack(norms)])


def _norm_of_norms(norms: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of a vector from those of its parts; they are few numbers, which the caller reads."""
    if isinstance(norms, ShardedVector):
        return vector_norm(norms)
    return vector_norm([torch.stack([in_float64(norm).cpu() for norm in norms])])


def _sum(counts: list[Tensor]) -> Tensor:
    return torch.stack([count.cpu() for count in counts]).sum()


def _foreach(operation: Callable[..., object], first: list[Tensor], *others: list[Tensor]) -> None:
    if first:
        operation(first, *others)


@contextmanager
def corrupted(
    parameters: Mapping[str, Tensor],
    corruption: Mapping[str, Tensor] | Pieces,
    *,
    saved_on: Device = None,
    p: float | None = None,
) -> Iterator[Injection]:
    """Corrupt weights inside a `with` block; their exact bits are restored after it, also after an exception.

    Args:
        parameters: Weights by name, as `select_parameters` returns them.
        corruption: Tensors to add to the weights, by name (a weight without a tensor stays as it is), or a
            `Replacement` with new values. `Pieces` of either, as `Corruption.pieces` returns them, are written one
            after the other. Sums are computed in float32, and rounded once to the weight's own precision.
        saved_on: The device that keeps the weights' bits in the meantime, such as "cpu". Default: each weight's own.
        p: With `Pieces`, the order of the norm that `withdraw` will be asked for; see `Injection.write`.

    Yields:
        The injection. Its `withdraw(p)` ends the corruption early, and returns the norm as asked for and as realised.

    Raises:
        ValueError: A name or a shape does not belong to the parameters, no name is given, or a weight has two names.
            Nothing is written then.
        TypeError: A named weight is not floating point, or a value is not a tensor. Nothing is written then.

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
    touched = parameters
    if not isinstance(corruption, Pieces):
        check_corruption(parameters, corruption)
        touched = {name: parameters[name] for name in corruption}
        if not touched:
            raise ValueError("corruption: expected at least one tensor, got none; corrupt at least one parameter")
    injection = Injection(touched, saved_on=saved_on)
    try:
        with ExitStack() as block:
            undo_at_end(block, injection.restore)
            injection.write(corruption, p)
            yield injection
    finally:  # once more, where an interrupt came just before
        injection.restore()
