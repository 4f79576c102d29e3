"""The corruption constraint of both papers (Definition 1), as one frozen object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_parcor.arguments import check_norm_order, check_radius, check_top_n, known_elsewhere_as


@known_elsewhere_as(rho="epsilon={}")
@dataclass(frozen=True, kw_only=True)
class CorruptionConstraint:
    r"""The set of allowed corruptions `S = {a : ‖a‖_p ≤ ε, ‖a‖₀ ≤ n}` of the selected parameters.

    All selected parameters are one vector of length k: ε bounds the corruption of all of them together, not of each
    tensor. Sharpness-aware minimisation calls ε *rho*.

    Args:
        p: Order of the norm, `1 ≤ p ≤ ∞`. Default 2. `float("inf")` bounds each weight by itself.
        epsilon: Radius ε ≥ 0, in the units of the weights. 0 allows no corruption.
        top_n: The largest number n of corrupted entries. Default None: no limit.

    Raises:
        ValueError: `p < 1`, `epsilon < 0` or infinite, `top_n < 1`, or a NaN.
        TypeError: `p` or `epsilon` is not a number, or `top_n` is not a whole number.

    Examples:
        >>> CorruptionConstraint(epsilon=0.1)
        CorruptionConstraint(p=2.0, epsilon=0.1, top_n=None)
        >>> print(CorruptionConstraint(p=math.inf, epsilon=5e-4, top_n=100))
        L∞ ε=0.0005 n=100
    """

    p: float = field(
        default=2.0,
        metadata={
            "help": "order p of the corruption constraint's norm, from 1 to inf; 2 or inf where steps may leave it",
            "flag": "norm",
        },
    )
    epsilon: float = field(
        metadata={"help": "radius of the corruption constraint, in units of the weights (SAM: rho); 0 for none"}
    )
    top_n: int | None = field(
        default=None, metadata={"help": "the largest number of corrupted entries; not set for no limit"}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_norm_order(self.p))
        object.__setattr__(self, "epsilon", check_radius("epsilon", self.epsilon))
        object.__setattr__(self, "top_n", check_top_n(self.top_n))

    def __str__(self) -> str:
        """Return the papers' way of writing it, for tables and plots."""
        norm = "∞" if math.isinf(self.p) else f"{self.p:g}"
        limit = "" if self.top_n is None else f" n={self.top_n}"
        return f"L{norm} ε={self.epsilon:g}{limit}"


def check_constraint(constraint: object) -> None:
    """Refuse what is no constraint, such as a bare radius."""
    if not isinstance(constraint, CorruptionConstraint):
        raise TypeError(
            f"constraint: expected a CorruptionConstraint, got {constraint!r}; pass CorruptionConstraint(epsilon=...)"
        )
