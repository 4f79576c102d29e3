"""What a translation study is: how its models are trained, defended and corrupted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from campaigns.arms import PLAIN, Arm

from hf_parcor import (
    CorruptionConstraint,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Quantization,
    UniformNoise,
)
from hf_parcor.corruptions import Corruption

INFINITY = math.inf


@dataclass(frozen=True)
class Strengths:
    """The rows of Table 1: radii of each adversarial corruption, σ, b, and bits."""

    multi_l2: Sequence[float]
    multi_max: Sequence[float]
    multi_top: Sequence[float]
    gradient_l2: Sequence[float]
    gradient_max: Sequence[float]
    gaussian: Sequence[float]
    uniform: Sequence[float]
    bits: Sequence[int]


@dataclass(frozen=True)
class Study:
    """One translation data set: how it is trained, defended and corrupted.

    Args:
        title: What tables call it.
        languages: From which, to which.
        files: Those of `train`, `validation` and `test`: a table, `NAME.tsv.gz`, with a column for each language, or
            the stem of two files of lines, `STEM.LANGUAGE`, or that and `.gz`.
        training: Flags of `examples/train_translation.py`, by name.
        epochs: Epochs in all.
        start_epoch: Where the defenses start.
        average: The model is the mean of so many of the last checkpoints.
        max_norm: ε and K of the proposed defense, in the maximum norm.
        l2: ε and K of the best one in L2.
        last_layer: ε and K of the one of the last decoder layer.
        variants: ε of ACRT (SAM) and of AWP, in the maximum norm.
        awp_start: Where AWP starts.
        strengths: Those of Table 1.
        multi_step_of_table_3: Two radii of multi-step corruptions in the maximum norm.
        whole: How Table 6 corrupts the whole model.
        last: How it corrupts the last decoder layer.
        layers: How Figure 3 corrupts each layer.
        max_new_tokens: The longest translation.
        tokenized: Whether the texts are tokenised already.
        lowercase: Whether tokenised BLEU is of lower-cased text.
    """

    title: str
    languages: tuple[str, str]
    files: tuple[str, str, str]
    training: dict[str, Any]
    epochs: int
    start_epoch: int
    average: int
    max_norm: tuple[float, int]
    l2: tuple[float, int]
    last_layer: tuple[float, int]
    variants: tuple[float, float]
    awp_start: int
    strengths: Strengths
    multi_step_of_table_3: tuple[float, float]
    whole: Sequence[Corruption]
    last: Sequence[Corruption]
    layers: Corruption
    max_new_tokens: int = 200
    tokenized: bool = True
    lowercase: bool = False

    def defended(self, label: str, epsilon: float, steps: int, *more: str, norm: str = "inf") -> Arm:
        """Return an arm with the multi-step risk."""
        return Arm(label, self._flags("multi_step_risk", norm, epsilon, "--defense_steps", str(steps), *more))

    def _flags(self, defense: str, norm: str, epsilon: float, *more: str, start: int | None = None) -> list[str]:
        start_epoch = self.start_epoch if start is None else start
        constraint = ["--defense_norm", norm, "--defense_epsilon", f"{epsilon:g}"]
        return ["--defense", defense, *constraint, *more, "--defense_start_epoch", str(start_epoch)]

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms, by name."""
        epsilon, steps = self.max_norm
        acrt, awp = self.variants
        found = {
            "plain": PLAIN,
            "defended": self.defended("all layers", epsilon, steps),
            "last-layer": self.defended(
                "last decoder layer", *self.last_layer, "--defense_target_modules", "last-decoder-layer"
            ),
            "acrt": Arm("ACRT", self._flags("sam", "inf", acrt)),
            "awp": Arm("AWP", self._flags("awp", "inf", awp, "--defense_steps", "2", start=self.awp_start)),
            "l2": self.defended("L2", *self.l2, norm="2"),
        }
        for count in (1, 2, 3):
            if count != steps:
                found[f"steps-{count}"] = self.defended(f"K = {count}", epsilon, count)
            random = "--defense_random_start", "true"
            found[f"random-{count}"] = self.defended(f"K = {count}, random", epsilon, count, *random)
        for count in (1, 2):
            for share in (2 / 3, 4 / 3):
                radius = share * epsilon
                found[f"steps-{count}-epsilon-{radius:.2g}"] = self.defended(f"ε = {radius:.2g}", radius, count)
        return found

    @property
    def table_1(self) -> list[Corruption]:
        """The corruptions of Table 1, in its order."""
        s = self.strengths
        return [
            *(MultiStepCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in s.multi_l2),
            *(MultiStepCorruption(CorruptionConstraint(p=INFINITY, epsilon=epsilon)) for epsilon in s.multi_max),
            *map(worst_hundred, s.multi_top),
            *gradient_l2(*s.gradient_l2),
            *(GradientCorruption(CorruptionConstraint(p=INFINITY, epsilon=epsilon)) for epsilon in s.gradient_max),
            *(GaussianNoise(std) for std in s.gaussian),
            *(UniformNoise(bound) for bound in s.uniform),
            *(Quantization(bits) for bits in s.bits),
        ]

    @property
    def table_3(self) -> list[Corruption]:
        """The corruptions of Table 3, in its order."""
        constraints = [CorruptionConstraint(p=INFINITY, epsilon=epsilon) for epsilon in self.multi_step_of_table_3]
        return [*map(MultiStepCorruption, constraints), Quantization(7), Quantization(6)]


def worst_hundred(epsilon: float) -> MultiStepCorruption:
    """Return the multi-step corruption of at most 100 entries by at most ε each."""
    return MultiStepCorruption(CorruptionConstraint(p=INFINITY, epsilon=epsilon, top_n=100))


def gradient_l2(*radii: float) -> list[Corruption]:
    """Return gradient-based corruptions in L2."""
    return [GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in radii]
