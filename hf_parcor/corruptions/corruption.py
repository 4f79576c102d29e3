"""What a corruption is: numbers in, numbers out; it knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self, final

import torch
from torch import Tensor

from hf_parcor.injection import Pieces, Replacement, check_weights


class GradientSource(Protocol):
    """Gradients of a loss with respect to the weights that are corrupted; the model stays on its side.

    Corruptions call it under `torch.no_grad()`: it enables gradients for itself.
    """

    def __len__(self) -> int:
        """Return the number of batches, ⌈|D|/|B|⌉."""
        ...

    def over_data(self) -> Mapping[str, Tensor]:
        """Return the gradient of the mean loss over all data, at the weights as they are."""
        ...

    def on_next_batch(self, corruption: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the gradient of the next batch's loss at `w + a`; after the last batch comes the first.

        In any floating-point dtype: what is computed from it is computed in float32 at least.
        """
        ...

    def gradient_at(self, values: Mapping[str, Tensor], batches: int | None = None) -> Mapping[str, Tensor]:
        """Return the gradient of the mean loss over the first batches, all by default, with new values of weights.

        Args:
            values: New values by name; weights that are absent stay as they are.
            batches: How many of the batches; None for all.
        """
        ...

    def loss_at(self, values: Mapping[str, Tensor], batches: int | None = None) -> float:
        """Return the mean loss over the first batches with new values of weights, as `gradient_at`."""
        ...


class Strength(NamedTuple):
    """How the strength of a kind of corruption is told.

    Attributes:
        setting: The setting that is the strength.
        unit: What an axis of strengths is called.
        shown: One strength in a table, with `{}` for the number.
        weakest: Where a ramp begins. Default 0, which corrupts nothing.
    """

    setting: str
    unit: str
    shown: str
    weakest: float = 0.0


RADIUS = Strength("epsilon", "radius ε", "ε={}")
"""The strength of corruptions that a constraint bounds."""


OPTION = {"told": "where it is not the default"}
"""Metadata of a field that `Corruption.settings` leaves out where it has its default, as records from before it do."""


@dataclass(frozen=True)
class Corruption(ABC):
    """A rule that chooses a corruption of weights.

    Calling it checks the arguments, and returns the corruption by name: tensors to add to the weights, or a
    `Replacement` with their new values. `pieces` returns them one after the other, so that a large model can be
    corrupted without a second copy of it. Subclasses are frozen dataclasses of settings that define `_choose`.

    Attributes:
        title: Its kind, for the titles of plots and tables.
        strengths: The settings that say how strong it is. If there are several, the one that is given counts.
        rounding_decides: Whether the last bits of a loss may decide what is chosen, so that processes must agree.
        stochastic: Whether another seed gives another corruption, so that several trials make sense.
    """

    title: ClassVar[str] = ""
    strengths: ClassVar[tuple[Strength, ...]] = ()
    rounding_decides: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    @property
    def uses_gradients(self) -> bool:
        """Whether it needs a `GradientSource`. Subclasses may set it as a class variable."""
        return False

    def check(self, weights: Mapping[str, Tensor]) -> None:  # noqa: B027 (most can be applied to any weight)
        """Raise an error, before any weight is written, if it cannot be applied to these. By default it always can.

        Raises:
            ValueError: It cannot be applied to a weight.
            NotImplementedError: It cannot be applied to a weight because of its sharding.
        """

    @final
    @torch.no_grad()
    def __call__(
        self,
        weights: Mapping[str, Tensor],
        gradients: GradientSource | None = None,
        generator: torch.Generator | None = None,
    ) -> Mapping[str, Tensor]:
        """Choose the corruption of `weights`.

        Args:
            weights: Floating-point tensors by name, which form one vector. They are only read.
            gradients: Needed if `uses_gradients` is True.
            generator: Source of randomness if `stochastic` is True. None takes PyTorch's global generator.

        Raises:
            ValueError: There are no weights, or gradients are needed and missing.
            TypeError: A weight is not floating point.
        """
        chosen = self._checked(weights, gradients, generator)
        found = chosen.whole() if isinstance(chosen, Pieces) else chosen
        incomplete = found.keys() <= weights.keys() and list(found) != list(weights)  # other names the write refuses
        return _completed(found, weights) if incomplete else found

    @final
    @torch.no_grad()
    def pieces(
        self,
        weights: Mapping[str, Tensor],
        gradients: GradientSource | None = None,
        generator: torch.Generator | None = None,
    ) -> Pieces:
        """Choose the same corruption tensor by tensor, for `corrupted` or `Injection.write`.

        Each piece is computed when it is asked for, from its weight alone. Gradients, and norms of the whole vector,
        are computed before the first piece. A weight that stays as it is may have no piece.

        Args:
            weights: As for a call.
            gradients: As for a call.
            generator: As for a call. It is used until the last piece is computed.

        Raises:
            ValueError: As for a call.
            TypeError: As for a call.

        Examples:
            >>> from hf_parcor import Quantization
            >>> weights = {"a": torch.tensor([1.0, 0.2]), "b": torch.tensor([0.5])}
            >>> for name, values in Quantization(2).pieces(weights):
            ...     print(name, values)
            a tensor([1., 0.])
            b tensor([0.5000])
        """
        chosen = self._checked(weights, gradients, generator)
        if isinstance(chosen, Pieces):
            return chosen
        return Pieces.consuming(chosen if isinstance(chosen, Replacement) else dict(chosen))

    def _checked(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Mapping[str, Tensor] | Pieces:
        check_weights(weights)
        if self.uses_gradients and gradients is None:
            raise ValueError(
                f"gradients: expected a GradientSource for {type(self).__name__}, got None; "
                "pass one, or give the evaluator batches of data"
            )
        return self._choose(weights, gradients if self.uses_gradients else None, generator)

    @abstractmethod
    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Mapping[str, Tensor] | Pieces:
        """Return the corruption, a new mapping or, where each tensor can be made by itself, `Pieces`.

        The contract is already checked. Weights that stay as they are may be left out.
        """

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, for records, with the fields of a constraint among them.

        Settings marked as `OPTION` are left out if they have their default.

        Examples:
            >>> from hf_parcor import CorruptionConstraint, GradientCorruption
            >>> GradientCorruption(CorruptionConstraint(epsilon=0.1)).settings()
            {'p': 2.0, 'epsilon': 0.1, 'top_n': None}
        """
        plain: dict[str, Any] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.metadata == OPTION and value == setting.default:
                continue
            inner = is_dataclass(value) and not isinstance(value, type)
            plain.update(asdict(value) if inner else {setting.name: value})
        return plain

    @property
    def strength(self) -> tuple[Strength, float] | None:
        """The setting that says how strong it is, with its value; None if there is no such setting."""
        settings = self.settings()
        given = ((strength, settings.get(strength.setting)) for strength in self.strengths)
        return next(((strength, value) for strength, value in given if value is not None), None)

    @property
    def changes_nothing(self) -> bool:
        """Whether its strength is zero, so that every weight stays as it is."""
        known = self.strength
        return known is not None and known[1] == known[0].weakest == 0

    def weakened(self, share: float) -> Self:
        """Return the corruption at a share of its strength, for a ramp in training.

        Args:
            share: From 0 (the weakest) to 1. A strength that is a whole number is rounded, and at least 1.

        Raises:
            ValueError: It has no strength.

        Examples:
            >>> from hf_parcor import CorruptionConstraint, GaussianNoise, GradientCorruption, Quantization
            >>> print(GaussianNoise(0.02).weakened(0.5))
            Gaussian σ=0.01
            >>> print(
            ...     GradientCorruption(CorruptionConstraint(epsilon=0.1)).weakened(0.1), Quantization(4).weakened(0.5)
            ... )
            gradient-based L2 ε=0.01 10-bit quantization
        """
        if self.strength is None:
            raise ValueError(
                f"{self}: expected a corruption with a strength, to weaken it, got one without; leave out the ramp"
            )
        kind, value = self.strength
        return self.with_strength(kind.weakest + share * (value - kind.weakest))

    def with_strength(self, value: float) -> Self:
        """Return the same corruption at another strength. A whole number is rounded, and at least 1.

        Raises:
            ValueError: It has no strength, or does not allow this one.

        Examples:
            >>> from hf_parcor import Quantization
            >>> print(Quantization(4, per=32).with_strength(5))
            5-bit quantization per group of 32
        """
        if self.strength is None:
            raise ValueError(f"{self}: expected a corruption with a strength, got one without; make another one")
        kind, now = self.strength
        new = max(1, round(value)) if isinstance(now, int) else value
        for field in fields(self):
            part = getattr(self, field.name)
            if field.name == kind.setting:
                return replace(self, **{field.name: new})
            if is_dataclass(part) and not isinstance(part, type) and hasattr(part, kind.setting):
                return replace(self, **{field.name: replace(part, **{kind.setting: new})})
        raise AssertionError("a strength is a setting")

    @classmethod
    def kind(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the words for corruptions with these settings in plots and tables, for a `CorruptionKind`.

        Examples:
            >>> from hf_parcor import GaussianNoise
            >>> GaussianNoise.kind({"std": 0.1})
            {'title': 'Gaussian noise', 'strength': 'std', 'unit': 'standard deviation σ', 'shown': 'σ={}'}
        """
        title = cls.title or cls.__name__
        for strength in cls.strengths:
            if settings.get(strength.setting) is not None:
                return {"title": title, "strength": strength.setting, "unit": strength.unit, "shown": strength.shown}
        return {"title": title, "strength": None, "unit": "", "shown": ""}


def named(names: Iterable[str], tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, in the order of the names."""
    return dict(zip(names, tensors, strict=True))


def named_pieces(names: Iterable[str], tensors: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, one after the other; unlike `zip`, hold none while the next is made."""
    for name in names:
        yield name, next(tensors)


def _completed(found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a corruption of all weights from one of some: the others stay as they are."""
    if not isinstance(found, Replacement):
        return {name: found[name] if name in found else torch.zeros_like(one) for name, one in weights.items()}
    values = Replacement()
    for name, weight in weights.items():
        kept = found.get(name)
        values[name] = weight.detach().clone(memory_format=torch.contiguous_format) if kept is None else kept
    return values
