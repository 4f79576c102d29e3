"""The defended training step, for any subclass of `transformers.Trainer`."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_parcor.defenses import Defense, check_defense
from hf_parcor.distributed.fsdp import drop_gathered, is_sharded, renewed
from hf_parcor.distributed.processes import check_all_joined
from hf_parcor.prefix import PrefixReuse
from hf_parcor.targets import find_input_embedding, select_trainable
from hf_parcor.training.callbacks import CollapseCallback, IdleDefenseCallback, StepLog
from hf_parcor.training.checkpoints import DefendedSteps, loading_all, save_defense, warn_of_another_defense
from hf_parcor.training.checks import (
    check_trained,
    refuse_what_cannot_work,
    trained_beside,
)
from hf_parcor.training.config import DefenseConfig
from hf_parcor.training.passes import TrainerPasses
from hf_parcor.training.step_runner import StepRunner
from hf_parcor.training.training_args import DefenseSettings

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ParameterDefenseMixin(_Base):
    """Makes any Trainer defend its parameters. Put it before the Trainer's class among the bases.

    `training_step` runs the Trainer's own step, the stock step, once for each pass of the defense, at corrupted
    weights, with a factor on the loss of `compute_loss`. Accumulation, label smoothing, mixed precision, clipping and
    Trainers of other libraries keep working, because none of their code is replaced, and a subclass may override any
    method. If the defense does nothing (`epsilon=0`, `steps=0`, before its start epoch), the step is the stock step,
    bit for bit.

    On several processes (DDP), each corrupts its weights for its own batch; with `sync_perturbation` all use one
    corruption, for the joined batch. Gradients are reduced once for all passes of a step.

    Beside the stock `loss`, which is the risk, it logs `loss_clean` (first pass), `loss_corrupted` (last pass; for
    `CorruptionRisk` the mean over its corruptions), `sharpness` (their difference), and the norm of the last
    corruption as asked for (`corruption_norm_asked`) and as realised (`corruption_norm`). What a Trainer counts and
    averages itself, such as TRL's `num_tokens` and `entropy`, is that of the first pass.

    The other methods that it overrides call the stock method and add to it: `log` the losses of the passes,
    `floating_point_ops` their operations, and `save_model` and `_push_from_checkpoint` the file `defense_config.json`.
    `_inner_training_loop` and `_load_best_model` read from it how the weights were trained; the latter and
    `_load_from_checkpoint` load weights too that were saved under other names than the model's, as those of ViT are.

    Args:
        *args: For the Trainer.
        defense: What a step minimises. A `DefenseConfig`, for example from `DefenseConfig.from_pretrained`, also
            gives the targets. None takes the `--defense_*` flags of `args`, or `DEFAULT_DEFENSE` without them.
        target_modules: Which modules to defend, as in `select_parameters`. None takes the flag of `args`, or all
            trainable parameters.
        exclude_modules: Which of these not to defend, as in `select_parameters`. None takes the flag of `args`.
        layers: Defend only these layers, as in `select_parameters`. None takes the flag of `args`.
        reuse_prefix: Whether what is computed before the first defended parameter runs only once for all passes of a
            step; see `PrefixReuse`. None takes the flag of `args`, or True. If the model cannot be cut, each pass runs
            it whole, and a warning says why.
        **kwargs: For the Trainer.

    Raises:
        ValueError: A flag in `args`, or a `DefenseConfig`, contradicts an argument; the targets match nothing, a
            frozen parameter whose gradient is needed, or one that a corruption refuses; the optimizer updates inside
            `backward`; the step would be wrong under the engine, such as DeepSpeed, or `ddp_static_graph`; the defense
            perturbs inputs without an input embedding or under DataParallel; or it differentiates twice with
            `torch_compile` or reentrant checkpoints.
        TypeError: `defense` is neither a `Defense` nor a `DefenseConfig`, a setting is of another type, nothing can be
            written into a defended parameter, or, when a class is made, the Trainer's class stands before the mixin.
        ProcessError: Several processes were launched but did not join each other. A `RuntimeError`.

    Examples:
        >>> from transformers import Trainer
        >>> class ParameterDefenseTrainer(ParameterDefenseMixin, Trainer):
        ...     pass
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(ParameterDefenseMixin):
            raise TypeError(
                f"{cls.__name__}: expected ParameterDefenseMixin before the Trainer among the bases, got it behind, "
                f"where nothing would be defended; write class {cls.__name__}(ParameterDefenseMixin, ...)"
            )

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
        if defense is not None and not isinstance(defense, DefenseConfig):
            check_defense(defense)
        super().__init__(*args, **kwargs)
        check_all_joined(self.accelerator.num_processes)
        targets = {"target_modules": target_modules, "exclude_modules": exclude_modules, "layers": layers}
        self._parameter_defense = _TrainerDefense(self, DefenseSettings(self.args, defense, targets, reuse_prefix))

    @property
    def defense(self) -> Defense | None:
        """What a step minimises; None for the stock step. Assigning another one takes effect at the next step."""
        return self._parameter_defense.defense

    @defense.setter
    def defense(self, defense: Defense | None) -> None:
        self._parameter_defense.change(self, defense)

    @property
    def defense_config(self) -> DefenseConfig | None:
        """The defense, its targets, and how many steps of the model it has defended; None for the stock step."""
        return self._parameter_defense.config(self.model)

    @property
    def _defense_values(self) -> dict[str, Any] | None:
        # Weights that this Trainer has not trained were defended as the file beside them says, whatever is set here.
        origin = self._parameter_defense.steps.origin(self.model)
        if origin is not None:
            return dict(origin)
        return None if self.defense_config is None else self.defense_config.to_dict()

    @property
    def shared_prefix(self) -> PrefixReuse | None:
        """What the passes of a step share; None before the first defended step, or if each pass runs all."""
        return self._parameter_defense.runner.shared_prefix

    def defended_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the defense corrupts, by name."""
        return self._parameter_defense.parameters(self.model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch: the stock step, once for each pass of the defense.

        Returns:
            The risk, detached and scaled for accumulation as the stock step scales its loss.
        """
        defense = self.defense
        if defense is None or not defense.is_active(self.state.epoch or 0.0, self.state.global_step):
            self._parameter_defense.count_stock_step(self)
            return super().training_step(model, inputs, num_items_in_batch)
        # A schedule-free optimizer moves the weights when it enters training: not between two passes.
        enter_training = getattr(self.optimizer, "train", None)
        if callable(enter_training):
            enter_training()
        passes = TrainerPasses(self, super().training_step, defense, model, inputs, num_items_in_batch)
        return self._parameter_defense.run(self, passes)

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Count the operations of all passes of the last step."""
        return int(super().floating_point_ops(inputs) * self._parameter_defense.cost)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the losses of the passes and the norm of the corruption beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **self._parameter_defense.log.read(self.accelerator)}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it the defense as `defense_config.json`."""
        self._parameter_defense.save(self, output_dir)  # first, since the stock method may also push
        super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The stock method copies only the files that it knows into the folder that it pushes.
        if self.args.hub_strategy != HubStrategy.END:
            self._parameter_defense.save(self, None)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *model: Any) -> None:
        # The Trainer of sentence-transformers takes no model here.
        given = next((one for one in model if one is not None), self.model)
        with loading_all(self, given, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *model)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if self.model is None or folder is None:
            super()._load_best_model()
            return
        with loading_all(self, self.model, folder):
            super()._load_best_model()
        self._parameter_defense.steps.take_from(folder, self.model)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Every start of a run comes here; a hyperparameter search has set flags by now, and others froze parameters.
        self._parameter_defense.begin_run(self, kwargs.get("resume_from_checkpoint"))
        return super()._inner_training_loop(*args, **kwargs)


class _TrainerDefense:
    """All that the mixin keeps in a Trainer, under one name.

    It does not keep the Trainer: that cycle would hold a model, and its memory, until the next garbage collection.

    Attributes:
        settings: Where the defense comes from.
        defense: What a step minimises; None for the stock step.
        runner: Runs the defended steps.
        log: What the defended steps leave behind.
        steps: How many steps the model has behind it.
        cost: What the last step cost, in stock steps.
    """

    def __init__(self, trainer: Trainer, settings: DefenseSettings) -> None:
        self.settings = settings
        self.log = StepLog()
        self.steps = DefendedSteps()
        self.cost = 1.0
        self._watched: set[type[TrainerCallback]] = set()
        self.defense = settings.defense(trainer.args)
        self._take_settings(trainer)

    def _take_settings(self, trainer: Trainer) -> None:
        self._selection = self.settings.selection(trainer.args)
        self._begin_anew(trainer)
        self.settings.accept(trainer.args)

    def _begin_anew(self, trainer: Trainer) -> None:
        """Forget what was selected and shared, and check the settings again: both may have changed."""
        self._selected: tuple[nn.Module, bool, dict[str, nn.Parameter]] | None = None
        self.runner = StepRunner(devices=trainer.args.n_gpu)
        if self.defense is not None:
            refuse_what_cannot_work(trainer, self.defense)
            if trainer.model is not None:
                self.parameters(trainer.model)
                self._input_embedding(trainer.model)
            self._watch(trainer, self.defense)

    def change(self, trainer: Trainer, defense: Defense | None) -> None:
        """Take another defense from the next step on."""
        if defense is not None:
            check_defense(defense)
            refuse_what_cannot_work(trainer, defense)
            if trainer.model is not None:
                check_trained(self.parameters(trainer.model), defense)
        self.defense = defense

    def _watch(self, trainer: Trainer, defense: Defense) -> None:
        """Add the callbacks of a defended run, once in a Trainer's life: what was removed stays removed."""
        callbacks: list[TrainerCallback] = [IdleDefenseCallback(self.log)]
        if not defense.is_stock:
            callbacks.append(CollapseCallback())
        for callback in callbacks:
            if type(callback) not in self._watched:
                self._watched.add(type(callback))
                if not any(isinstance(known, type(callback)) for known in trainer.callback_handler.callbacks):
                    trainer.add_callback(callback)

    def begin_run(self, trainer: Trainer, checkpoint: str | os.PathLike[str] | bool | None) -> None:
        """Read flags that changed, and go on from a checkpoint."""
        changed = self.settings.changed(trainer.args)
        if "defense" in changed:  # else the one that was assigned of late stays
            # A search leaves the flags of its last trial, which may be of another defense.
            self.defense = self.settings.defense(trainer.args, strict=False)
        if changed:
            self._take_settings(trainer)
        else:
            self._begin_anew(trainer)
        if isinstance(checkpoint, (str, os.PathLike)):
            checkpoint = os.fspath(checkpoint)
            warn_of_another_defense(checkpoint, self._uncounted_config())
            if trainer.model is not None:
                self.steps.take_from(checkpoint, trainer.model)
        chosen = any(target is not None for target in self._selection.values())
        self.log.begin(self.defense, chosen=chosen)

    def config(self, model: nn.Module | None) -> DefenseConfig | None:
        """Return the defense, its targets, and how many steps of a model it has defended; None for the stock step."""
        config = self._uncounted_config()
        return None if config is None else self.steps.counted(model, config)

    def _uncounted_config(self) -> DefenseConfig | None:
        return None if self.defense is None else DefenseConfig(self.defense, **self._selection)

    def parameters(self, model: nn.Module | None) -> dict[str, nn.Parameter]:
        """Return the parameters that the defense corrupts, by name."""
        if model is None:
            raise ValueError("model: expected a model, got None; pass model= or model_init=")
        sharded = is_sharded(model)
        # A hyperparameter search replaces the model, and FSDP2 the parameters inside it.
        if self._selected is None or self._selected[0] is not model:
            if sharded:
                drop_gathered(model)
            selected = select_trainable(model, **self._selection)
            if self.defense is not None:
                check_trained(selected, self.defense)
            self._selected = (model, sharded, selected)
        elif self._selected[1] is not sharded:
            self._selected = (model, sharded, renewed(self._selected[2], model))
        return self._selected[2]

    def _input_embedding(self, model: nn.Module | None) -> nn.Module | None:
        if self.defense is None or model is None or not self.defense.perturbs_inputs:
            return None
        return find_input_embedding(model)

    def run(self, trainer: Trainer, passes: TrainerPasses) -> Tensor:
        """Run one defended micro-batch, and return the risk."""
        if is_sharded(passes.model):
            drop_gathered(passes.model)
        selected = self.parameters(trainer.model)
        others = trained_beside(selected.values(), passes.modules, filter(None, [trainer.optimizer]))
        self.runner.reuse_prefix = self.settings.reuses_prefix(trainer.args)
        step, norm = self.runner.run(
            passes,
            selected,
            others,
            self._input_embedding(trainer.model),
            epoch=trainer.state.epoch or 0.0,
            measure_norm=self.log.wants_norm,
        )
        self.cost = self.runner.cost
        self.log.add(step, passes.defense, norm, ends_step=trainer.accelerator.sync_gradients)
        # Where nothing had a gradient, nothing was corrupted.
        corrupted = len(self.log.without_gradient) < self.log.selected
        self._count(trainer, self._uncounted_config() if corrupted else None)
        return step.risk

    def count_stock_step(self, trainer: Trainer) -> None:
        """Count a micro-batch that is not defended."""
        self.cost = 1.0
        self._count(trainer, None)

    def _count(self, trainer: Trainer, config: DefenseConfig | None) -> None:
        if trainer.accelerator.sync_gradients and trainer.model is not None:
            self.steps.add(trainer.model, config)

    def save(self, trainer: Trainer, folder: str | None) -> None:
        """Save the defense beside a model."""
        if trainer.args.should_save:
            folder, origin = folder or trainer.args.output_dir or ".", self.steps.origin(trainer.model)
            save_defense(folder, self.config(trainer.model), origin)
