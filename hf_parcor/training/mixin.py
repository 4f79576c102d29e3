"""The defended training step, for any subclass of `transformers.Trainer`."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.defenses import DefendedStep, Defense, MultiStepRisk, Objective
from hf_parcor.targets import find_input_embedding, select_trainable
from hf_parcor.training.arguments import DefenseArguments, build_defense
from hf_parcor.training.books import books_closed
from hf_parcor.training.collapse import CollapseCallback
from hf_parcor.training.overriding import overriding
from hf_parcor.training.running_statistics import frozen_running_statistics
from hf_parcor.training.step_log import StepLog
from hf_parcor.training.trained import check_trained, trained_beside

logger = logging.get_logger(__name__)

DEFAULT_DEFENSE = MultiStepRisk(CorruptionConstraint(p=2.0, epsilon=0.1), steps=1)
_UPDATES_INSIDE_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ParameterDefenseMixin(_Base):
    """Makes any Trainer defend its parameters: put it before the Trainer's class among the bases.

    Only `training_step` changes: it runs the stock step once for each pass of the defense, at corrupted weights,
    with the loss that `compute_loss` returns weighted. Accumulation, label smoothing, mixed precision, clipping and
    other people's Trainers keep working, since nothing of them is written again, and a subclass may override what it
    likes. Where the defense does nothing (`steps=0`, `epsilon=0`, before its start epoch) the step is the stock one,
    bit for bit.

    With the stock `loss`, which is the risk, it logs `loss_clean` (at the first pass), `loss_corrupted` (at the last
    pass), `sharpness` (their difference) and the norm of the last corruption, asked and realised. What a Trainer
    counts and averages itself, such as TRL's `num_tokens` and `entropy`, is that of the first pass.

    Args:
        *args: For the Trainer.
        defense: What a step minimises. None reads it from `args` if these have the `--defense_*` flags, else takes
            `DEFAULT_DEFENSE`.
        target_modules: Which modules to defend, as in `select_parameters`. None reads it from `args`, else takes all
            trainable parameters.
        **kwargs: For the Trainer.

    Raises:
        ValueError: The targets match nothing or a frozen parameter; the optimizer updates inside `backward`; or the
            defense perturbs the inputs, and the model has no input embedding or is split over devices by DataParallel.
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
        self._cost = 1.0
        self._step_log = StepLog()
        if defense is not None:
            self._refuse_what_cannot_work()
            if self.model is not None:
                self.defended_parameters()
                self._input_embedding()
            self.add_callback(CollapseCallback())

    def defended_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the defense corrupts, by name."""
        model = self.model
        if model is None:
            raise ValueError("model: expected a model, got None; pass model= or model_init=")
        # A hyperparameter search replaces the model.
        if self._selected is None or self._selected[0] is not model:
            self._selected = (model, check_trained(select_trainable(model, **self._selection)))
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
        stock_step, compute_loss, prepare_inputs = super().training_step, self.compute_loss, self._prepare_inputs
        prepared: list[Any] = []

        def prepare_once(batch: Any) -> Any:
            # A Trainer may augment or generate here: all passes are to see the same batch.
            if not prepared:
                prepared.append(prepare_inputs(batch))
            return copy.copy(prepared[0])  # compute_loss pops the labels

        def run_pass(objective: Objective, index: int) -> Tensor:
            def compute_objective(*args: Any, **kwargs: Any) -> Any:
                result = compute_loss(*args, **kwargs)
                if isinstance(result, tuple):
                    return (objective(result[0]), *result[1:])
                return objective(result)

            with ExitStack() as stack:
                stack.enter_context(overriding(self, compute_loss=compute_objective, _prepare_inputs=prepare_once))
                if index:
                    stack.enter_context(frozen_running_statistics(model))
                    stack.enter_context(books_closed(self))
                return stock_step(model, copy.copy(inputs), num_items_in_batch)

        selected = self.defended_parameters()
        others = trained_beside(selected.values(), model, self.optimizer)
        self._cost = defense.cost
        with DefendedStep(selected, run_pass, defense.passes, others, self._input_embedding()) as step:
            defense.minimize(step)
            norm = step.withdraw(defense.order)
        self._step_log.add(step, norm, ends_step=self.accelerator.sync_gradients)
        return step.risk

    def _input_embedding(self) -> nn.Module | None:
        if self.defense is None or self.model is None or not self.defense.perturbs_inputs:
            return None
        return find_input_embedding(self.model)

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Count the operations of all passes of the last step."""
        return int(super().floating_point_ops(inputs) * self._cost)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, beside the training loss, what the defense knows for free."""
        if "loss" in logs:
            logs = {**logs, **self._step_log.read(self.accelerator)}
        super().log(logs, *args, **kwargs)

    def _refuse_what_cannot_work(self) -> None:
        if self.defense is not None and self.defense.perturbs_inputs and self.args.n_gpu > 1:
            raise ValueError(
                f"expected one device a process for a defense that perturbs the inputs, got {self.args.n_gpu} under "
                "DataParallel; start one process a device (torchrun, accelerate launch)"
            )
        optimizer = OptimizerNames(self.args.optim)
        if optimizer in _UPDATES_INSIDE_BACKWARD or "layerwise" in optimizer.value:
            raise ValueError(
                f"optim: expected an optimizer that updates after backward, got {optimizer.value!r}; it would update "
                "at corrupted weights, once a pass: choose another, or defense='none'"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            engine = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(
                f"expected one process or DDP, got {engine}; the defended step is not tested there and would be "
                "silently wrong: train without it, or with DDP"
            )
