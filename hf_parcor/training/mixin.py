"""The defended training step, for any subclass of `transformers.Trainer`."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.defenses import DefendedStep, Defense, MultiStepRisk, Objective
from hf_parcor.targets import select_trainable
from hf_parcor.training.arguments import DefenseArguments, build_defense
from hf_parcor.training.collapse import CollapseCallback
from hf_parcor.training.refusals import refuse_what_cannot_work
from hf_parcor.training.running_statistics import frozen_running_statistics
from hf_parcor.training.step_log import StepLog

logger = logging.get_logger(__name__)

DEFAULT_DEFENSE = MultiStepRisk(CorruptionConstraint(p=2.0, epsilon=0.1), steps=1)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ParameterDefenseMixin(_Base):
    """Makes any Trainer defend its parameters: put it before the Trainer's class among the bases.

    Only `training_step` changes: it runs the stock step once for each pass of the defense, at corrupted weights,
    with the loss weighted. Accumulation, label smoothing, mixed precision, clipping and other people's Trainers keep
    working, since nothing of them is written again. Where the defense does nothing (`steps=0`, `epsilon=0`, before
    its start epoch) the step is the stock one, bit for bit.

    With the stock `loss`, which is the risk, it logs `loss_clean` (at the first pass), `loss_corrupted` (at the last
    pass), `sharpness` (their difference) and the norm of the last corruption, asked and realised.

    Args:
        *args: For the Trainer.
        defense: What a step minimises. None reads it from `args` if these have the `--defense_*` flags, else takes
            `DEFAULT_DEFENSE`.
        target_modules: Which modules to defend, as in `select_parameters`. None reads it from `args`, else takes all
            trainable parameters.
        **kwargs: For the Trainer.

    Raises:
        ValueError: The targets match nothing or a frozen parameter; the optimizer updates inside `backward`; or the
            defense differentiates twice, and `torch_compile` or reentrant checkpointing cannot.
        TypeError: `defense` is not a `Defense`.

    Examples:
        >>> class ParameterDefenseTrainer(ParameterDefenseMixin, Trainer):
        ...     pass
    """

    def __init__(
        self,
        *args: Any,
        defense: Defense | None = None,
        target_modules: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if defense is not None and not isinstance(defense, Defense):
            raise TypeError(f"defense: expected a Defense such as MultiStepRisk(...), got {defense!r}; pass an object")
        super().__init__(*args, **kwargs)
        flags = self.args if isinstance(self.args, DefenseArguments) else None
        if defense is None:
            defense = DEFAULT_DEFENSE if flags is None else build_defense(flags)
        self.defense = defense
        self._selection: dict[str, Any] = {
            "target_modules": target_modules,
            "exclude_modules": None if flags is None else flags.defense_exclude_modules,
            "layers": None if flags is None else flags.defense_layers,
        }
        if target_modules is None and flags is not None:
            self._selection["target_modules"] = flags.defense_target_modules
        self._selected: tuple[nn.Module, dict[str, nn.Parameter]] | None = None
        self._objective: Objective | None = None
        self._cost = 1.0
        self._step_log = StepLog()
        if defense is not None:
            refuse_what_cannot_work(self, defense)
            if self.model is not None:
                self.defended_parameters()
            self.add_callback(self._step_log)
            self.add_callback(CollapseCallback())

    def defended_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the defense corrupts, by name."""
        model = self.model
        if model is None:
            raise ValueError("model: expected a model, got None; pass model= or model_init=")
        # A hyperparameter search replaces the model.
        if self._selected is None or self._selected[0] is not model:
            self._selected = (model, _trained(select_trainable(model, **self._selection)))
        return self._selected[1]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch: the stock step, once for each pass of the defense.

        Returns:
            The risk, detached and scaled for accumulation as the stock step scales its loss.
        """
        defense = self.defense
        if defense is None or not defense.is_active(self.state.epoch or 0.0):
            self._cost = 1.0
            return super().training_step(model, inputs, num_items_in_batch)
        stock_step = super().training_step
        # A schedule-free optimizer moves the weights when it enters training: not between two passes.
        enter_training = getattr(self.optimizer, "train", None)
        if callable(enter_training):
            enter_training()

        def run_pass(objective: Objective, index: int) -> Tensor:
            self._objective = objective
            # compute_loss pops the labels, so each pass gets its own shallow copy.
            own_inputs = copy.copy(inputs)
            with frozen_running_statistics(model) if index else nullcontext():
                return stock_step(model, own_inputs, num_items_in_batch)

        selected = self.defended_parameters()
        chosen = {id(parameter) for parameter in selected.values()}
        others = (p for p in model.parameters() if p.requires_grad and id(p) not in chosen)
        self._cost = defense.cost
        try:
            with DefendedStep(selected, run_pass, defense.passes, others) as step:
                defense.minimize(step)
                norm = step.withdraw(defense.order)
        finally:
            self._objective = None
        self._step_log.add(step, norm, ends_step=self.accelerator.sync_gradients)
        return step.risk

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor | Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the stock loss; inside a pass of the defense, what the pass minimises."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self._objective is None:
            return result
        if isinstance(result, tuple):
            return (self._minimized(self._objective, result[0]), *result[1:])
        return self._minimized(self._objective, result)

    def _minimized(self, objective: Objective, loss: Tensor) -> Tensor:
        scaler = self.accelerator.scaler
        if scaler is None:
            return objective(loss)
        # An objective may differentiate the loss itself, and in float16 that inner gradient needs the scale too:
        # without it a penalty's gradient was off by 90 %. Objectives are homogeneous, so the scale comes out again.
        scale: Tensor = scaler.scale(loss.new_ones(()))
        return objective(loss * scale) / scale

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Count the operations of all passes of the last step."""
        return int(super().floating_point_ops(inputs) * self._cost)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, beside the training loss, what the defense knows for free."""
        if "loss" in logs:
            logs = {**logs, **self._step_log.read(self.accelerator)}
        super().log(logs, *args, **kwargs)


def _trained(selected: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    frozen = [name for name, parameter in selected.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"target_modules: expected trainable parameters, got {len(frozen)} frozen ones such as {frozen[0]!r}; "
            "a defense needs their gradient: unfreeze them, or exclude them with exclude_modules"
        )
    return selected
