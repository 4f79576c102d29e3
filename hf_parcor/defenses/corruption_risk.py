"""The risk under any corruption: quantization-aware, noise-aware, bit-error training, and the worst direction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hf_parcor.arguments import check_radius, check_real
from hf_parcor.corruptions import Corruption, GradientCorruption, MultiStepCorruption, WorstBitFlips
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.defenses.defense import Defense
from hf_parcor.defenses.step import DefendedStep
from hf_parcor.functional.vectors import clones

# What a corruption that is searched along many gradients is defended against by.
_INSTEAD: Mapping[type[Corruption], str] = {
    MultiStepCorruption: "defend against it by MultiStepRisk",
    WorstBitFlips: "train at random ones, BitFlips(rate=1e-4, of='int8'), or at those of search='data-free'",
}


@dataclass(frozen=True)
class CorruptionRisk(Defense):
    r"""Minimise the loss at the clean weights and at corrupted ones, with the corruptions that evaluators measure.

    .. math:: c \, L(w, \theta; B) + \frac{1 - c}{m} \sum_{j=1}^{m} L(w \oplus \text{corruption}_j, \theta; B)

    The gradient is taken at the corrupted weights and goes to w as it is. For replacements that is the
    straight-through estimator (Bengio et al., 2013): with `Quantization` this is quantization-aware training (Jacob et
    al., CVPR 2018), with `BitFlips` random bit-error training (Stutz et al., MLSys 2021; of integer codes: flips of
    float32 exponents make NaN of all weights within a few steps). With `GaussianNoise` it is
    noise-injection training for analog hardware (Joshi et al., Nature Communications 2020), with a clean weight of ½
    mixed as in random weight perturbation (Li et al., TMLR 2024).

    What is random is drawn anew for each micro-batch, on the device of the weights, with a seed from PyTorch's global
    generator of the CPU, which checkpoints keep.

    A `GradientCorruption` among them is chosen on this batch's gradient at w, as in `ACRT`, whose risk is that of
    `CorruptionRisk(GradientCorruption(S), clean_weight=1 - alpha)`. So one model can be trained for the worst
    direction and for 4 bits at once, in three passes: the clean one serves both.

    Corruptions that need no gradient need none of the selected parameters, which may be frozen: an adapter is trained
    to survive what becomes of the weights under it, with `target_modules=["base_layer"]`. With `merge_adapters` that
    is what becomes of the merged weights: `Q(W + BA)` where Q rounds, whose gradient goes to A and B. Noise there is
    that of Flat-LoRA (Li et al., ICML 2025).

    Args:
        corruption: One corruption or several; of those that use gradients `GradientCorruption` alone. For
            several steps there is `MultiStepRisk`, and for the worst bit flips training at random ones of integer
            codes, or at those of `search="data-free"`.
        clean_weight: c, in [0, 1]. Default ½, which was measured to keep the model without corruption; 0 saves a pass
            and is what quantization-aware and noise-injection training do.
        draw_one: Of several corruptions, take one at each micro-batch, drawn at random, instead of all: the same risk
            on average. Default False.
        ramp_epochs: Over so many epochs from `start_epoch` on, the strength grows from none to all of it, linearly;
            that of `Quantization` from 16 bits down, one by one. `FloatQuantization` has none. Default 0, all of it
            at once.
        merge_adapters: Corrupt the selected weights under LoRA adapters as they will be after `merge_and_unload`.
            Default False: as they are, with the adapters in full precision beside them.
        sync_perturbation: On several processes, one corruption for all, drawn by the first, and along the gradient of
            the batches of all. Default False: each process has its own. Shards of one model always have one.
        start_epoch: Until this epoch training is the stock one. Default 0.
        interval: Defend every so many optimizer steps. Default 1.

    Raises:
        TypeError: Something is no corruption.
        ValueError: There is none; `clean_weight` outside [0, 1]; a corruption needs more than the gradient at w; or
            one has no strength to ramp up.

    Examples:
        >>> from hf_parcor import CorruptionConstraint, GaussianNoise, Quantization
        >>> CorruptionRisk(Quantization(4)).passes, CorruptionRisk(GaussianNoise(0.02), clean_weight=0).passes
        (2, 1)
        >>> worst = GradientCorruption(CorruptionConstraint(epsilon=0.1))
        >>> CorruptionRisk([worst, Quantization(4)], clean_weight=1 / 3).passes
        3
    """

    corruption: Corruption | Collection[Corruption] = field(
        metadata={
            "help": "what to corrupt the weights by in training, as words of `hf-parcor evaluate --corruptions`: "
            "quantization=4, gaussian=0.02",
            "flag_type": list[str] | None,
            "from_flag": partial(read_corruptions, flag="--defense-corruption"),
        }
    )
    clean_weight: float = field(
        default=0.5, kw_only=True, metadata={"help": "weight of the loss at the clean weights"}
    )
    draw_one: bool = field(
        default=False, kw_only=True, metadata={"help": "take one of the corruptions at each micro-batch, at random"}
    )
    ramp_epochs: float = field(
        default=0.0, kw_only=True, metadata={"help": "let the strength grow over so many epochs from the start on"}
    )
    merge_adapters: bool = field(
        default=False,
        kw_only=True,
        metadata={"help": "corrupt weights under LoRA adapters as they will be when the adapters are merged"},
    )
    sync_perturbation: bool = field(
        default=False,
        kw_only=True,
        metadata={"help": "on several processes, find one corruption for the batches of all of them"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.corruption,) if isinstance(self.corruption, Corruption) else self.corruption
        if not isinstance(given, Collection) or not all(isinstance(one, Corruption) for one in given):
            raise TypeError(
                f"corruption: expected Corruption objects, got {self.corruption!r}; pass Quantization(4), say"
            )
        if not given:
            raise ValueError("corruption: expected at least one, got none; pass Quantization(4), say")
        object.__setattr__(self, "corruption", tuple(given))
        for one in self.corruptions:
            if one.uses_gradients and not isinstance(one, GradientCorruption):
                raise ValueError(
                    "corruption: expected corruptions that need no gradient, or GradientCorruption, got "
                    f"{one}; {_INSTEAD.get(type(one), 'take one of these')}"
                )
        if not 0 <= check_real("clean_weight", self.clean_weight, "0 <= clean_weight <= 1") <= 1:
            raise ValueError(
                f"clean_weight: expected 0 <= clean_weight <= 1, got {self.clean_weight}; 0 is no clean pass"
            )
        if check_radius("ramp_epochs", self.ramp_epochs) > 0:
            for one in self.corruptions:
                one.weakened(0.5)

    @property
    def corruptions(self) -> tuple[Corruption, ...]:
        """The corruptions, also where there is one."""
        return self.corruption if isinstance(self.corruption, tuple) else ()

    @property
    def uses_gradients(self) -> bool:
        """Whether a corruption is chosen along the gradient."""
        return any(one.uses_gradients for one in self.corruptions)

    @property
    def merges_adapters(self) -> bool:
        """As `merge_adapters`."""
        return self.merge_adapters

    @property
    def passes(self) -> int:
        """One for each corruption, or for the one that is drawn, and one at the clean weights if that is needed."""
        return self.first_pass_is_clean + self._corrupted_passes

    @property
    def _corrupted_passes(self) -> int:
        if self.clean_weight == 1:
            return 0
        return 1 if self.draw_one else len(self.corruptions)

    @property
    def p(self) -> float:
        """That of the constraint, if all corruptions have one with the same; else 2."""
        orders = {getattr(getattr(one, "constraint", None), "p", 2.0) for one in self.corruptions}
        return orders.pop() if len(orders) == 1 else 2.0

    @property
    def is_stock(self) -> bool:
        """Whether the clean loss has all of the weight, or no corruption any strength."""
        return self.clean_weight == 1 or all(one.changes_nothing for one in self.corruptions)

    @property
    def why_stock(self) -> str:
        """The weight of the clean loss, or the corruptions that change nothing."""
        return "clean_weight=1" if self.clean_weight == 1 else f"corruption={', '.join(map(str, self.corruptions))}"

    def corrupted_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the mean over the corruptions."""
        return torch.stack(list(losses[self.first_pass_is_clean :])).mean(0)

    @property
    def first_pass_is_clean(self) -> bool:
        """Whether there is a pass at the clean weights: it has a weight, or corruptions need its gradient."""
        return self.clean_weight > 0 or self.uses_gradients

    def minimize(self, step: DefendedStep) -> None:
        """Run the clean pass, and one at each corruption."""
        weight = (1 - self.clean_weight) / self._corrupted_passes

        def clean(loss: Tensor) -> Tensor:
            return self.clean_weight * loss

        def corrupted(loss: Tensor) -> Tensor:
            return weight * loss

        chosen = list(self.corruptions)
        if self.draw_one:
            chosen = [chosen[step.draw(len(chosen), shared=self.sync_perturbation)]]
        if self.clean_weight > 0:
            step.backward(clean)
        elif self.uses_gradients:
            step.probe()
        # Along the gradient first: the sum of the passes is going to be made in its memory.
        chosen.sort(key=lambda one: not one.uses_gradients)
        gradients = self._gradients(step) if self.uses_gradients else None
        strength = self._share_of_strength(step.epoch)
        for one in chosen:
            one = one if strength == 1 else one.weakened(strength)
            step.corrupt(one, gradients, shared=self.sync_perturbation, p=self.p)
            step.backward(corrupted)

    def _gradients(self, step: DefendedStep) -> Mapping[str, Tensor]:
        gradients, ours = step.gradients(self.sync_perturbation)
        if ours or sum(one.uses_gradients for one in self.corruptions) == 1:
            return gradients
        return dict(zip(gradients, clones(list(gradients.values())), strict=True))

    def _share_of_strength(self, epoch: float) -> float:
        if self.ramp_epochs == 0:
            return 1.0
        return min(1.0, max(0.0, epoch - self.start_epoch) / self.ramp_epochs)
