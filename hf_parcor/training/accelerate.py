"""The defended step for training loops that are written with Accelerate, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_parcor.arguments import check_count, check_real
from hf_parcor.batches import first_examples, private_copy
from hf_parcor.defenses import Defense, Objective, check_defense
from hf_parcor.distributed.ddp import data_parallel
from hf_parcor.distributed.fsdp import drop_gathered, is_sharded
from hf_parcor.distributed.processes import check_all_joined
from hf_parcor.injection import CorruptionNorm
from hf_parcor.model_state import modules_of
from hf_parcor.prefix import PrefixReuse
from hf_parcor.targets import find_input_embedding, select_trainable
from hf_parcor.training.callbacks import IdleLoop
from hf_parcor.training.checks import check_trained, refuse_engines, trained_beside
from hf_parcor.training.passes import Passes, scaled
from hf_parcor.training.step_runner import StepRunner


@dataclass(frozen=True)
class DefendedLoss:
    """The losses of one defended micro-batch. All tensors are detached; reading them waits for the device.

    Attributes:
        risk: What was minimised.
        clean: The loss of the first pass.
        corrupted: The loss of the last pass; for `CorruptionRisk` the mean over its corruptions.
        norm: The norm of the last corruption, as asked for and as realised.
        defended: Whether the defense was active. If not, the three losses are equal, and the norm is 0.
    """

    risk: Tensor
    clean: Tensor
    corrupted: Tensor
    norm: CorruptionNorm
    defended: bool


class DefendedBackward:
    """Replaces `accelerator.backward(loss)` in a training loop, with the defense's risk in place of the loss.

    Create it once, before the loop, because its first step finds out which part of the model all passes can share (see
    `PrefixReuse`).

    `loss_fn` and `accelerator.backward` run once for each pass, at corrupted weights. Afterwards the weights have
    their exact bits again, also after an exception, and the gradient of the risk has been added to each `.grad`. The
    optimizer steps as always. Buffers, such as BatchNorm's running statistics, change as in one step at the clean
    weights, also those of other models that the Accelerator prepared. It works inside `accelerator.accumulate(model)`
    and with mixed precision. Under DDP only the last pass reduces gradients, and each process corrupts along the
    gradient of its own batch, or with `sync_perturbation` along that of all batches. Under FSDP2 every pass reduces
    gradients, and all corrupt along the gradient of all batches.

    Args:
        accelerator: The loop's Accelerator.
        defense: What is minimised.
        model: As `accelerator.prepare` returned it. What else gets a gradient from the loss, such as a second model,
            must be in an optimizer that the Accelerator prepared.
        parameters: What is defended, as `select_parameters(accelerator.unwrap_model(model), ...)` returns it; None for
            all trainable parameters.
        reuse_prefix: Whether what is computed before the first defended parameter runs only once for all passes of a
            step. Default True. If the model cannot be cut there, each pass runs all of it, and a warning says why.

    Raises:
        ValueError: `parameters` is empty; a parameter is not of this model, is frozen while its gradient is needed, or
            is one that a corruption refuses; or the step would be silently wrong under the engine, such as DeepSpeed,
            Megatron-LM and FSDP1.
        TypeError: An argument is of the wrong type, such as the name of a target instead of parameters; or nothing
            can be written into a parameter, such as a complex one.
        ProcessError: Several processes were launched but did not join each other. A `RuntimeError`.

    Examples:
        >>> from hf_parcor import ACRT, CorruptionConstraint
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> backward = DefendedBackward(Accelerator(cpu=True), ACRT(CorruptionConstraint(epsilon=0.5)), model)
        >>> loss = backward(lambda batch: model(batch).square().sum(), torch.ones(1, 1))
        >>> [loss.clean.item(), loss.corrupted.item(), loss.risk.item()]
        [1.0, 2.25, 1.625]
        >>> model.weight.item(), model.weight.grad.item()
        (1.0, 2.5)
    """

    def __init__(
        self,
        accelerator: Accelerator,
        defense: Defense,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter] | None = None,
        *,
        reuse_prefix: bool = True,
    ) -> None:
        _check_arguments(accelerator, defense, model, parameters)
        check_all_joined(accelerator.num_processes)
        self._accelerator, self._defense, self._model = accelerator, defense, model
        self._whole = accelerator.unwrap_model(model, keep_torch_compile=False)
        refuse_engines(accelerator, self._whole, defense)
        if is_sharded(self._whole):
            drop_gathered(self._whole)
        self._selected = _selected(self._whole, parameters)
        check_trained(self._selected, defense)
        self._embedding = find_input_embedding(self._whole) if defense.perturbs_inputs else None
        self._runner = StepRunner(reuse_prefix=reuse_prefix)

    @property
    def shared_prefix(self) -> PrefixReuse | None:
        """What the passes of a step share; None before the first defended step, or if each pass runs all."""
        return self._runner.shared_prefix

    def __call__(
        self,
        loss_fn: Callable[..., Tensor],
        batch: Any = None,
        *,
        epoch: float | None = None,
        step: int | None = None,
    ) -> DefendedLoss:
        """Run one micro-batch.

        Args:
            loss_fn: Computes the mean loss of this micro-batch, for example `lambda: model(**batch).loss`. Except for
                dropout, it must be the same function of the weights at each call.
            batch: The argument of `loss_fn`, if it takes the batch, as in `lambda batch: model(**batch).loss`. Each
                pass gets its own containers and tensors, or the part that `batch_share` asks for.
            epoch: Number of epochs done, also a fraction. Needed for a `start_epoch` or `ramp_epochs` of the defense.
            step: Number of optimizer steps done. Needed for an `interval` of the defense.

        Returns:
            The risk and the losses, not divided by the accumulation steps. If the defense is not active (for example
            before its start epoch), all are the plain loss, and `defended` is False. If no step of a loop was
            defended, or no defended parameter ever had a gradient, a warning follows when its Accelerator is deleted.

        Raises:
            ValueError: `epoch` or `step` is missing or negative; `batch` is missing although the defense has a
                `batch_share`; the model holds other parameters than before; a hook takes a gradient inside
                `backward`; or processes share a corruption with `sync_perturbation` inside `join_uneven_inputs`.
            TypeError: `loss_fn` is a loss instead of a function, or does not return a scalar tensor.
        """
        defense = self._defense
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn: expected a function that computes the loss, since it runs once for each pass, got "
                f"{_kind(loss_fn)}; pass for example lambda: model(**batch).loss"
            )
        if defense.splits_batch and batch is None:
            raise ValueError(
                "batch: expected the batch for a defense with batch_share below 1, got None; call "
                "backward(loss_fn, batch) with a loss_fn that takes it, or set batch_share to 1"
            )
        wrapper = data_parallel(self._model)
        if wrapper is not None and wrapper._join_config.enable and getattr(defense, "sync_perturbation", False):
            raise ValueError(
                "sync_perturbation: expected False inside join_uneven_inputs (PyTorch's Join), got True; a process "
                "without a batch left finds no corruption with the others, which would wait for it: leave it out, or "
                "the block, since Accelerate makes batches even by itself"
            )
        active = _is_active(defense, epoch, step)
        if not active:
            IdleLoop.of(self._accelerator).count(defense, active=False, epoch=epoch)
            loss = _checked(loss_fn() if batch is None else loss_fn(batch))
            self._accelerator.backward(loss)
            loss = loss.detach()
            none = torch.zeros((), device=loss.device)
            return DefendedLoss(loss, loss, loss, CorruptionNorm(none, none), defended=False)
        if is_sharded(self._whole):
            drop_gathered(self._whole)
        passes = _LoopPasses(self._accelerator, defense, self._model, loss_fn, batch)
        _check_held(passes.modules, self._selected)
        # Found anew, since a loop may unfreeze more and more.
        others = trained_beside(self._selected.values(), passes.modules, self._accelerator._optimizers)
        defended, norm = self._runner.run(passes, self._selected, others, self._embedding, epoch=epoch or 0.0)
        assert norm is not None, "it is measured unless told otherwise"
        used = not defense.uses_gradients or any(one.grad is not None for one in self._selected.values())
        unused = "" if used else next(iter(self._selected))
        IdleLoop.of(self._accelerator).count(defense, active=True, epoch=epoch, unused=unused)
        corrupted = defense.corrupted_loss(defended.losses)
        return DefendedLoss(defended.risk, defended.losses[0], corrupted, norm, defended=True)


def defended_backward(
    accelerator: Accelerator,
    defense: Defense,
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter] | None = None,
    *,
    batch: Any = None,
    epoch: float | None = None,
    step: int | None = None,
) -> DefendedLoss:
    """Run one defended micro-batch: all its passes, which add the gradient of the risk to each `.grad`.

    Arguments, return value and errors are those of `DefendedBackward`, which also finds out what passes can share;
    here each pass runs the whole model.

    Examples:
        >>> from hf_parcor import SAM, CorruptionConstraint
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> defense = SAM(CorruptionConstraint(epsilon=0.5))
        >>> loss = defended_backward(
        ...     Accelerator(cpu=True), defense, model, lambda: model(torch.ones(1, 1)).square().sum()
        ... )
        >>> loss.risk.item(), model.weight.grad.item()
        (2.25, 3.0)
    """
    backward = DefendedBackward(accelerator, defense, model, parameters, reuse_prefix=False)
    return backward(loss_fn, batch, epoch=epoch, step=step)


def _check_arguments(accelerator: object, defense: object, model: object, parameters: object) -> None:
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"accelerator: expected an Accelerator, got {_kind(accelerator)}; the arguments are accelerator, defense, "
            "model, loss_fn"
        )
    check_defense(defense)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected what accelerator.prepare returned for it, got {_kind(model)}; pass the model"
        )
    if parameters is not None and not (
        isinstance(parameters, Mapping) and all(isinstance(value, nn.Parameter) for value in parameters.values())
    ):
        asked = repr(parameters) if isinstance(parameters, str) else _kind(parameters)
        raise TypeError(
            f"parameters: expected names and parameters, got {asked}; pass "
            "select_parameters(accelerator.unwrap_model(model), ...), or nothing for all that are trained; a batch "
            "goes in batch="
        )
    if parameters is not None and not parameters:
        raise ValueError(
            "parameters: expected at least one, got an empty mapping; leave it out to defend all that are trained"
        )


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"


def _is_active(defense: Defense, epoch: float | None, step: int | None) -> bool:
    if epoch is not None and check_real("epoch", epoch, "the epochs done, 0 or more") < 0:
        raise ValueError(f"epoch: expected the epochs done, 0 or more, got {epoch}; count from 0")
    if step is not None:
        check_count("step", step, minimum=0)
    if epoch is None:
        for name in ("start_epoch", "ramp_epochs"):
            if getattr(defense, name, 0) > 0:
                raise ValueError(
                    f"epoch: expected the epochs done, for a defense with {name}={getattr(defense, name)}, got None; "
                    "pass epoch="
                )
    if step is None and defense.interval > 1:
        raise ValueError(
            f"step: expected the optimizer steps done, for a defense with interval={defense.interval}, got None; pass "
            "step="
        )
    return defense.is_active(epoch or 0.0, step or 0)


def _selected(model: nn.Module, parameters: Mapping[str, nn.Parameter] | None) -> dict[str, nn.Parameter]:
    if parameters is None:
        return select_trainable(model)
    _check_held(modules_of(model), parameters)
    return dict(parameters)


def _check_held(modules: Iterable[nn.Module], parameters: Mapping[str, nn.Parameter]) -> None:
    known = {id(parameter) for module in modules for parameter in module._parameters.values()}
    strange = [name for name, parameter in parameters.items() if id(parameter) not in known]
    if strange:
        raise ValueError(
            f"parameters: expected those of the model, got {len(strange)} others such as {strange[0]!r}; select them "
            "from accelerator.unwrap_model(model), after accelerator.prepare, and make a new DefendedBackward where "
            "the model was given others, as by load_state_dict(assign=True)"
        )


class _LoopPasses(Passes):
    """The passes of a step of a loop: its own loss, sent backward by Accelerate."""

    def __init__(
        self,
        accelerator: Accelerator,
        defense: Defense,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Any,
    ) -> None:
        super().__init__(accelerator, defense, model, [one for one in accelerator._models if one is not model])
        self._loss_fn = loss_fn
        self._as_given = private_copy(batch)

    def prepare(self) -> None:
        """Do nothing: the loop has prepared the batch."""

    def _run(self, objective: Objective, index: int, share: float) -> Tensor:
        with self._reducing_at_the_end(index):
            batch = () if self._as_given is None else (private_copy(first_examples(self._as_given, share)),)
            value = scaled(self.accelerator, objective, _checked(self._loss_fn(*batch)))
            self.accelerator.backward(value)
        return value.detach()


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn: expected a scalar tensor, got {found}; return the mean loss of the batch")
    return loss
