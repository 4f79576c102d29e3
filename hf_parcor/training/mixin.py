"""The defended training step, for any subclass of `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_parcor.defenses import DefendedStep, Defense
from hf_parcor.distributed.ddp import reduction_of
from hf_parcor.distributed.fsdp import drop_gathered, is_sharded
from hf_parcor.distributed.processes import ProcessGroup, check_all_joined
from hf_parcor.overriding import end_overriding
from hf_parcor.prefix import PrefixReuse
from hf_parcor.targets import find_input_embedding, select_trainable
from hf_parcor.training.arguments import DefenseSettings
from hf_parcor.training.callbacks import CollapseCallback, IdleDefenseCallback, StepLog
from hf_parcor.training.checkpoints import DefendedSteps, save_defense, warn_of_another_defense
from hf_parcor.training.checks import (
    check_trained,
    refuse_updates_inside_backward,
    refuse_what_cannot_work,
    trained_beside,
)
from hf_parcor.training.config import DefenseConfig
from hf_parcor.training.passes import Passes
from hf_parcor.training.shared_prefix import find_shared_prefix, on_shards, renewed, suffix_share

logger = logging.get_logger(__name__)

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

    On several processes (DDP) each corrupts its weights for its own batch, or all of them for the joined batch if the
    defense has `sync_perturbation`; gradients are reduced once for all passes of a step.

    With the stock `loss`, which is the risk, it logs `loss_clean` (at the first pass), `loss_corrupted` (at the last
    pass), `sharpness` (their difference) and the norm of the last corruption, asked and realised. What a Trainer
    counts and averages itself, such as TRL's `num_tokens` and `entropy`, is that of the first pass.

    Args:
        *args: For the Trainer.
        defense: What a step minimises. None reads it from `args` if these have the `--defense_*` flags, else takes
            `DEFAULT_DEFENSE`. A `DefenseConfig`, of `DefenseConfig.from_pretrained` say, gives the targets as well.
        target_modules: Which modules to defend, as in `select_parameters`. None reads it from `args`, else takes all
            trainable parameters.
        exclude_modules: Which of these not to defend, as in `select_parameters`. None reads it from `args`.
        layers: Which layers alone, as in `select_parameters`. None reads it from `args`.
        reuse_prefix: Whether what is computed before the first defended parameter is run once for all passes of a
            step; see `PrefixReuse`. None reads it from `args`, else True. A model that cannot be cut is run whole in
            each pass, and a warning says why.
        **kwargs: For the Trainer.

    Raises:
        ValueError: A flag in `args`, or a `DefenseConfig`, says something else than the argument beside it; the
            targets match nothing or a frozen parameter; the optimizer updates inside `backward`; or the defense
            perturbs the inputs, and the model has no input embedding or is split over devices by DataParallel; or it
            differentiates twice, and `torch_compile` or reentrant checkpointing cannot; or `ddp_static_graph`.
        TypeError: `defense` is neither a `Defense` nor a `DefenseConfig`.
        ProcessError: Several processes were launched and did not join each other. A `RuntimeError`.

    Examples:
        >>> from transformers import Trainer
        >>> class ParameterDefenseTrainer(ParameterDefenseMixin, Trainer):
        ...     pass
    """

    def __init__(
        self,
        *args: Any,
        defense: Defense | DefenseConfig | None = None,
        target_modules: str | Collection[str] | None = None,
        exclude_modules: str | Collection[str] | None = None,
        layers: int | Collection[int] | None = None,
        reuse_prefix: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if defense is not None and not isinstance(defense, (Defense, DefenseConfig)):
            raise TypeError(f"defense: expected a Defense such as MultiStepRisk(...), got {defense!r}; pass an object")
        super().__init__(*args, **kwargs)
        check_all_joined(self.accelerator.num_processes)
        targets = {"target_modules": target_modules, "exclude_modules": exclude_modules, "layers": layers}
        self._settings = DefenseSettings(self.args, defense, targets, reuse_prefix)
        self._cost = 1.0
        self._step_log = StepLog()
        self._steps_behind = DefendedSteps()
        self._watched: set[type[TrainerCallback]] = set()
        self._take_settings()

    def _take_settings(self) -> None:
        self.defense = self._settings.defense(self.args)
        self._selection = self._settings.selection(self.args)
        self._check_settings()
        self._settings.accept(self.args)

    def _check_settings(self) -> None:
        self._selected: tuple[nn.Module, bool, dict[str, nn.Parameter]] | None = None
        self._prefix: tuple[dict[str, nn.Parameter], Defense, PrefixReuse | None] | None = None
        self._buffers_move = True  # until one step has shown that they do not
        self._suffix_share = 1.0  # of what a pass computes, where later passes share the rest
        if self.defense is not None:
            refuse_what_cannot_work(self, self.defense)
            if self.model is not None:
                self.defended_parameters()
                self._input_embedding()
            self._watch()

    def _watch(self) -> None:
        """Add the callbacks of a defended run, once in a Trainer's life: what was removed stays removed."""
        if self.defense is None:
            return
        callbacks: list[TrainerCallback] = [IdleDefenseCallback(self._step_log)]
        if not self.defense.is_stock:
            callbacks.append(CollapseCallback())
        for callback in callbacks:
            if type(callback) not in self._watched:
                self._watched.add(type(callback))
                if not any(isinstance(known, type(callback)) for known in self.callback_handler.callbacks):
                    self.add_callback(callback)

    @property
    def defense_config(self) -> DefenseConfig | None:
        """The defense and its targets, and how many steps of the model it has defended; None for the stock step."""
        config = self._defense_settings
        return None if config is None else self._steps_behind.counted(self.model, config)

    @property
    def _defense_settings(self) -> DefenseConfig | None:
        return None if self.defense is None else DefenseConfig(self.defense, **self._selection)

    @property
    def _defense_values(self) -> dict[str, Any] | None:
        # Weights that this Trainer has not trained were defended as the file beside them says, whatever is set here.
        origin = self._steps_behind.origin(self.model)
        if origin is not None:
            return dict(origin)
        return None if self.defense_config is None else self.defense_config.to_dict()

    def defended_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the defense corrupts, by name."""
        model = self.model
        if model is None:
            raise ValueError("model: expected a model, got None; pass model= or model_init=")
        sharded = is_sharded(model)
        # A hyperparameter search replaces the model, and FSDP2 the parameters inside it.
        if self._selected is None or self._selected[0] is not model:
            if sharded:
                drop_gathered(model)
            self._selected = (model, sharded, check_trained(select_trainable(model, **self._selection)))
        elif self._selected[1] is not sharded:
            self._selected = (model, sharded, renewed(self._selected[2], model))
        return self._selected[2]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch: the stock step, once for each pass of the defense.

        Returns:
            The risk, detached and scaled for accumulation as the stock step scales its loss.
        """
        for interrupted in (self, model):
            end_overriding(interrupted)
        defense = self.defense
        if defense is None or not defense.is_active(self.state.epoch or 0.0, self.state.global_step):
            self._cost = 1.0
            self._count_step(None)
            return super().training_step(model, inputs, num_items_in_batch)
        # A schedule-free optimizer moves the weights when it enters training: not between two passes.
        enter_training = getattr(self.optimizer, "train", None)
        if callable(enter_training):
            enter_training()

        sharded = is_sharded(model)
        if sharded:
            drop_gathered(model)
        selected = self.defended_parameters()
        others = trained_beside(selected.values(), model, self.optimizer)
        refuse_updates_inside_backward([*selected.values(), *others])
        passes = Passes(self, super().training_step, defense, model, inputs, num_items_in_batch)
        prefix = self._find_shared_prefix(defense, model, selected, passes)
        passes.share(prefix)
        # A forward pass more of the prefix than in a stock step costs a third of it.
        forwards = 0 if prefix is None else prefix.forwards - 1
        self._cost = 1 + (defense.cost - 1) * self._suffix_share + forwards * (1 - self._suffix_share) / 3
        if not defense.first_pass_is_stock and self._buffers_move:
            self._buffers_move = passes.move_buffers()
            self._cost += self._buffers_move / 3
        run_pass = on_shards(passes, model) if sharded else passes
        with DefendedStep(
            selected,
            run_pass,
            defense.passes,
            others,
            embedding=self._input_embedding(),
            prefix=prefix,
            reduction=reduction_of(model),
            # Gradients of shards are means over all processes already.
            processes=ProcessGroup() if self.accelerator.num_processes > 1 and not sharded else None,
        ) as step:
            defense.minimize(step)
            norm = step.withdraw(defense.order)
        self._step_log.add(step, norm, ends_step=self.accelerator.sync_gradients)
        # Where nothing had a gradient, nothing was corrupted.
        corrupted = len(self._step_log.without_gradient) < self._step_log.selected
        self._count_step(self._defense_settings if corrupted else None)
        return step.risk

    def _count_step(self, config: DefenseConfig | None) -> None:
        if self.accelerator.sync_gradients and self.model is not None:
            self._steps_behind.add(self.model, config)

    def _input_embedding(self) -> nn.Module | None:
        if self.defense is None or self.model is None or not self.defense.perturbs_inputs:
            return None
        return find_input_embedding(self.model)

    @property
    def shared_prefix(self) -> PrefixReuse | None:
        """What the passes of a step share; None before the first defended step, or where each runs all."""
        return self._prefix[2] if self._prefix else None

    def _find_shared_prefix(
        self, defense: Defense, model: nn.Module, selected: dict[str, nn.Parameter], passes: Passes
    ) -> PrefixReuse | None:
        if not self._settings.reuses_prefix(self.args):
            return None
        if self._prefix is None or self._prefix[0] is not selected or self._prefix[1] is not defense:
            prefix = find_shared_prefix(self, defense, model, selected, passes)
            self._prefix = (selected, defense, prefix)
            self._suffix_share = 1.0 if prefix is None else suffix_share(model, prefix)
        return self.shared_prefix

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Count the operations of all passes of the last step."""
        return int(super().floating_point_ops(inputs) * self._cost)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, beside the training loss, what the defense knows for free."""
        if "loss" in logs:
            logs = {**logs, **self._step_log.read(self.accelerator)}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it the defense as `defense_config.json`."""
        self._save_defense(output_dir)  # first, since the stock method may also push
        super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The stock method copies only the files that it knows into the folder that it pushes.
        if self.args.hub_strategy != HubStrategy.END:
            self._save_defense(None)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_defense(self, output_dir: str | None) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.output_dir or "."
            save_defense(folder, self.defense_config, self._steps_behind.origin(self.model))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.model is not None and self.state.best_model_checkpoint is not None:
            self._steps_behind.take_from(self.state.best_model_checkpoint, self.model)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Every start of a run comes here; a hyperparameter search has set flags by now, and others froze parameters.
        if self._settings.changed(self.args):
            self._take_settings()
        else:
            self._check_settings()
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None:
            warn_of_another_defense(checkpoint, self._defense_settings)
            if self.model is not None:
                self._steps_behind.take_from(checkpoint, self.model)
        chosen = any(target is not None for target in self._selection.values())
        self._step_log.begin(self.defense, chosen=chosen)
        return super()._inner_training_loop(*args, **kwargs)
