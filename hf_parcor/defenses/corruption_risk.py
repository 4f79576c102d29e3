"""The risk under any corruption: quantization-aware, noise-aware, bit-error training, and the worst direction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hf_parcor.arguments import check_not_negative, check_share
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
    r"""Minimises a mixture of the clean loss and the loss under any corruptions that an evaluator can measure.

    .. math:: c \, L(w, \theta; B) + \frac{1 - c}{m} \sum_{j=1}^{m} L(w \oplus \text{corruption}_j, \theta; B)

    The gradient is taken at the corrupted weights and applied to w unchanged. For corruptions that replace weights,
    this is the straight-through estimator (Bengio et al., 2013). With `Quantization` it is quantization-aware training
    (Jacob et al., CVPR 2018). With `BitFlips` it is random bit-error training (Stutz et al., MLSys 2021); flip bits of
    integer codes, because flips of float32 exponents make all weights NaN within a few steps. With `GaussianNoise` it
    is noise-injection training for analog hardware (Joshi et al., Nature Communications 2020); a `clean_weight` of ½
    mixes the losses as in random weight perturbation (Li et al., TMLR 2024).

    A `GradientCorruption` is chosen on this batch's gradient at w, so that
    `CorruptionRisk(GradientCorruption(S), clean_weight=1 - alpha)` has the risk of `ACRT`. One model can be trained
    for the worst direction and for 4 bits at once, in three passes, because both share the clean pass.

    Corruptions that need no gradient can be applied to frozen parameters. So an adapter can be trained to withstand
    corruptions of the weights under it, with `target_modules=["base_layer"]`. With `merge_adapters`, the merged
    weights are corrupted: a quantization Q gives `Q(W + BA)`, and the gradient goes to A and B. With noise this is
    Flat-LoRA (Li et al., ICML 2025).

    Random corruptions are drawn anew for each micro-batch, on the device of the weights, with a seed from PyTorch's
    global CPU generator, which checkpoints keep.

    Args:
        corruption: One or several; of those that use gradients, only `GradientCorruption`. For several steps there is
            `MultiStepRisk`. For the worst bit flips, take random flips of integer codes, or `search="data-free"`.
        clean_weight: c, in [0, 1]. Default ½, which was measured to keep the quality without corruption. 0 saves a
            pass, as quantization-aware and noise-injection training do.
        draw_one: Whether each micro-batch takes one corruption at random, the same risk on average. Default False.
        ramp_epochs: Number of epochs, from `start_epoch` on, in which the strength grows linearly from none to its
            full value; for `Quantization` from 16 bits down, one by one. `FloatQuantization` has no strength.
            Default 0: full strength at once.
        merge_adapters: Whether to corrupt the selected weights under LoRA adapters as they will be after
            `merge_and_unload`. Default False: as they are, with the adapters beside them in full precision.
        sync_perturbation: Whether several processes use one corruption: the first process draws it, and a
            `GradientCorruption` follows the gradient over the batches of all. Default False: each process has its own.
            Processes that hold shards of one model always use one.
        start_epoch: Take stock steps until this epoch. Default 0.
        interval: Defend every `interval`-th optimizer step. Default 1.

    Raises:
        TypeError: Something in `corruption` is not a `Corruption`.
        ValueError: There is no corruption; `clean_weight` is outside [0, 1]; a corruption needs more than the gradient
            at w; or a corruption has no strength that `ramp_epochs` could increase.

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
        check_share("clean_weight", self.clean_weight, "0 is no clean pass")
        if check_not_negative("ramp_epochs", self.ramp_epochs, "pass 0 for full strength at once") > 0:
            for one in self.corruptions:
                one.weakened(0.5)

    @property
    def corruptions(self) -> tuple[Corruption, ...]:
        """The corruptions as a tuple, also if there is only one."""
        return self.corruption if isinstance(self.corruption, tuple) else ()

    @property
    def uses_gradients(self) -> bool:
        """Whether any corruption is chosen along the gradient."""
        return any(one.uses_gradients for one in self.corruptions)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Let each corruption check the weights."""
        for one in self.corruptions:
            one.check(weights)

    @property
    def merges_adapters(self) -> bool:
        """The setting `merge_adapters`."""
        return self.merge_adapters

    @property
    def passes(self) -> int:
        """One for each corruption, or for the one that is drawn, and one at the clean weights if necessary."""
        return self.first_pass_is_clean + self._corrupted_passes

    @property
    def _corrupted_passes(self) -> int:
        if self.clean_weight == 1:
            return 0
        return 1 if self.draw_one else len(self.corruptions)

    @property
    def p(self) -> float:
        """The p of the corruptions' constraints if all of them have the same, else 2."""
        orders = {getattr(getattr(one, "constraint", None), "p", 2.0) for one in self.corruptions}
        return orders.pop() if len(orders) == 1 else 2.0

    @property
    def is_stock(self) -> bool:
        """Whether `clean_weight` is 1, or no corruption changes anything."""
        return self.clean_weight == 1 or all(one.changes_nothing for one in self.corruptions)

    @property
    def why_stock(self) -> str:
        """As text, the weight of the clean loss if that is 1, else the corruptions."""
        return "clean_weight=1" if self.clean_weight == 1 else f"corruption={', '.join(map(str, self.corruptions))}"

    def corrupted_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the mean loss over the corruptions."""
        return torch.stack(list(losses[self.first_pass_is_clean :])).mean(0)

    @property
    def first_pass_is_clean(self) -> bool:
        """Whether there is a pass at the clean weights, because its loss has a weight or its gradient is needed."""
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
