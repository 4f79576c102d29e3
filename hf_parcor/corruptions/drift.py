"""Drift of conductances over time, as in phase-change memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.arguments import check_not_negative, check_positive
from hf_parcor.corruptions.corruption import Corruption, GradientSource, Strength, named_pieces
from hf_parcor.functional.noise import conductance_drift
from hf_parcor.injection import Pieces


@dataclass(frozen=True)
class ConductanceDrift(Corruption):
    """Decays each selected weight by a power of time: `w_i ((t + t_0) / t_0)^(−ν_i)`, `ν_i = |N(nu_mean, nu_std²)|`.

    A weight stands for a conductance, or for the difference of two conductances, one of which is zero. Conductances of
    phase-change memory drift as `g(t) = g(t_0) (t / t_0)^(−ν)`, each with its own exponent. Times are measured as in
    aihwkit's `PCMLikeNoiseModel`, which fits the exponents to the conductances (Nandakumar et al., ICECS 2019, IEEE
    document 8964852). The defaults are its mean and deviation at the largest conductance; at small conductances it has
    up to 0.1 and 0.045. Not included are programming and read noise (`GaussianNoise` relative to the tensor is close
    to them), and global drift compensation, which multiplies all weights of a tile by one number.

    Args:
        seconds: Time t ≥ 0 since the end of programming, in seconds.
        nu_mean: Mean of the exponent, ≥ 0.
        nu_std: Standard deviation of the exponent from device to device, ≥ 0.
        t_0: Time of the first read of the conductance, in seconds after programming, > 0.

    Raises:
        ValueError: A number is out of its range.

    Examples:
        >>> day = ConductanceDrift(86_400, nu_std=0.0)
        >>> day({"w": torch.tensor([1.0, -0.5])})  # (86 420 / 20)^−0.049
        {'w': tensor([ 0.6635, -0.3318])}
        >>> print(day)
        drift t=86400 s (ν=0.049±0)
    """

    seconds: float
    nu_mean: float = 0.049
    nu_std: float = 0.008
    t_0: float = 20.0
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "conductance drift"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("seconds", "seconds since programming t", "t={} s"),)

    def __post_init__(self) -> None:
        for name in ("seconds", "nu_mean", "nu_std"):
            object.__setattr__(self, name, check_not_negative(name, getattr(self, name), "pass 0 for none"))
        object.__setattr__(self, "t_0", check_positive("t_0", self.t_0))

    def __str__(self) -> str:
        first_read = "" if self.t_0 == ConductanceDrift.t_0 else f", t₀={self.t_0:g} s"
        return f"drift t={self.seconds:g} s (ν={self.nu_mean:g}±{self.nu_std:g}{first_read})"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        ratio = (self.seconds + self.t_0) / self.t_0
        decayed = conductance_drift(list(weights.values()), ratio, self.nu_mean, self.nu_std, generator)
        return Pieces(named_pieces(weights, decayed), replaces=True)
