"""The defended step for training loops that are written with Accelerate, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_parcor.arguments import check_count, check_real
from hf_parcor.defenses import DefendedStep, Defense, Objective
from hf_parcor.distributed.ddp import wrapped_by
from hf_parcor.distributed.fsdp import drop_gathered, is_sharded
from hf_parcor.distributed.processes import ProcessGroup, check_all_joined
from hf_parcor.injection import CorruptionNorm
from hf_parcor.model_state import StepBuffers, devices_of
from hf_parcor.randomness import random_states_kept
from hf_parcor.targets import find_input_embedding, select_trainable
from hf_parcor.training.callbacks import IdleLoop
from hf_parcor.training.checks import check_trained, refuse_engines, refuse_updates_inside_backward, trained_beside
from hf_parcor.training.passes import scaled
from hf_parcor.training.shared_prefix import on_shards


@dataclass(frozen=True)
class DefendedLoss:
    """What one defended micro-batch found; all tensors are detached, and reading them waits for the device.

    Attributes:
        risk: What was minimised.
        clean: The loss at the first pass.
        corrupted: The loss at the last pass.
        norm: The norm of the last corruption, asked and realised.
        defended: Whether the defense was active; else the three losses are one, and the norm is 0.
    """

    risk: Tensor
    clean: Tensor
    corrupted: Tensor
    norm: CorruptionNorm
    defended: bool


def defended_backward(
    accelerator: Accelerator,
    defense: Defense,
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter] | None = None,
    *,
    epoch: float | None = None,
    step: int | None = None,
) -> DefendedLoss:
    """Do what `accelerator.backward(loss_fn())` does, with the defense's risk in place of the loss.

    `loss_fn` and `accelerator.backward` run once for each pass, at corrupted weights. Then the weights have their
    exact bits back, also after an exception, and each `.grad` holds what it held before plus the gradient of the risk;
    the optimizer steps as always. It works inside of `accelerator.accumulate(model)`, under mixed precision, and under
    DDP, where only the last pass reduces gradients and each process corrupts along the gradient of its own batch, or
    with `sync_perturbation` along that of all. Under FSDP2 every pass reduces gradients, and all processes corrupt
    along that of all. Buffers, such as BatchNorm's running statistics, move as in one step at the clean weights.

    Args:
        accelerator: That of the loop.
        defense: What is minimised.
        model: As `accelerator.prepare` returned it. It has all parameters that are trained.
        loss_fn: `loss_fn()` computes the mean loss of this micro-batch, such as `lambda: model(**batch).loss`. It must
            be the same function of the weights at each call, but for dropout.
        parameters: What is defended, as `select_parameters(accelerator.unwrap_model(model), ...)` returns it; None for
            all trainable parameters.
        epoch: How many epochs are done, a fraction is fine; for a defense with a `start_epoch`.
        step: How many optimizer steps are done; for a defense with an `interval`.

    Returns:
        The risk and the losses, not divided by the accumulation steps. Where the defense is not active (before its
        start epoch, say) all of them are the plain loss, and `defended` is False. A loop that ends without having
        been defended once says so in a warning, when its Accelerator goes.

    Raises:
        ValueError: `epoch` or `step` is missing or negative, `parameters` is empty, the defense sees parts of the
            batch only, a parameter is frozen or not of this model, a hook takes a gradient inside `backward`, or an
            engine runs the model that the step would be silently wrong with, such as DeepSpeed, Megatron-LM and FSDP1.
        TypeError: An argument is of the wrong type, such as a loss instead of a function, or the name of a target
            instead of parameters; or `loss_fn` returned no scalar tensor.
        ProcessError: Several processes were launched and did not join each other. A `RuntimeError`.

    Examples:
        >>> from hf_parcor import ACRT, CorruptionConstraint
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> defense = ACRT(CorruptionConstraint(epsilon=0.5))
        >>> loss = defended_backward(
        ...     Accelerator(cpu=True), defense, model, lambda: model(torch.ones(1, 1)).square().sum()
        ... )
        >>> [loss.clean.item(), loss.corrupted.item(), loss.risk.item()]
        [1.0, 2.25, 1.625]
        >>> model.weight.item(), model.weight.grad.item()
        (1.0, 2.5)
    """
    _check_arguments(accelerator, defense, model, loss_fn, parameters)
    check_all_joined(accelerator.num_processes)
    whole = accelerator.unwrap_model(model)
    refuse_engines(accelerator, whole, defense)
    if defense.splits_batch:
        raise ValueError(
            "defense: expected batch_share=1, got a smaller one; loss_fn computes the loss of the whole batch"
        )
    active = _is_active(defense, epoch, step)
    IdleLoop.of(accelerator).count(defense, active=active, epoch=epoch)
    passes = _Passes(accelerator, defense.passes if active else 1, model, loss_fn)
    if not active:
        loss = passes(lambda loss: loss, 0)
        return DefendedLoss(loss, loss, loss, CorruptionNorm(torch.zeros(()), torch.zeros(())), defended=False)

    sharded = is_sharded(whole)
    if sharded:
        drop_gathered(whole)
    run_pass = on_shards(passes, whole) if sharded else passes
    selected = _selected(whole, parameters)
    others = trained_beside(selected.values(), model, None)
    refuse_updates_inside_backward([*selected.values(), *others])
    embedding = find_input_embedding(whole) if defense.perturbs_inputs else None
    processes = ProcessGroup() if accelerator.num_processes > 1 and not sharded else None
    if not defense.first_pass_is_stock:
        passes.move_buffers()
    with DefendedStep(selected, run_pass, defense.passes, others, embedding, processes=processes) as defended:
        defense.minimize(defended)
        norm = defended.withdraw(defense.order)
    return DefendedLoss(defended.risk, defended.losses[0], defended.losses[-1], norm, defended=True)


def _check_arguments(accelerator: object, defense: object, model: object, loss_fn: object, parameters: object) -> None:
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"accelerator: expected an Accelerator, got {_kind(accelerator)}; the arguments are accelerator, defense, "
            "model, loss_fn"
        )
    if not isinstance(defense, Defense):
        raise TypeError(f"defense: expected a Defense such as MultiStepRisk(...), got {defense!r}; pass an object")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected what accelerator.prepare returned for it, got {_kind(model)}; pass the model"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn: expected a function that computes the loss, since it runs once for each pass, got "
            f"{_kind(loss_fn)}; pass for example lambda: model(**batch).loss"
        )
    if parameters is not None and not (
        isinstance(parameters, Mapping) and all(isinstance(value, nn.Parameter) for value in parameters.values())
    ):
        asked = repr(parameters) if isinstance(parameters, str) else _kind(parameters)
        raise TypeError(
            f"parameters: expected names and parameters, got {asked}; pass "
            "select_parameters(accelerator.unwrap_model(model), ...), or nothing for all that are trained"
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
    if epoch is None and defense.start_epoch > 0:
        raise ValueError(
            f"epoch: expected the epochs done, for a defense with start_epoch={defense.start_epoch}, got None; pass "
            "epoch="
        )
    if step is None and defense.interval > 1:
        raise ValueError(
            f"step: expected the optimizer steps done, for a defense with interval={defense.interval}, got None; pass "
            "step="
        )
    return defense.is_active(epoch or 0.0, step or 0)


def _selected(model: nn.Module, parameters: Mapping[str, nn.Parameter] | None) -> dict[str, nn.Parameter]:
    if parameters is None:
        return check_trained(select_trainable(model))
    known = {id(parameter) for parameter in model.parameters()}
    strange = [name for name, parameter in parameters.items() if id(parameter) not in known]
    if strange:
        raise ValueError(
            f"parameters: expected those of the model, got {len(strange)} others such as {strange[0]!r}; select them "
            "from accelerator.unwrap_model(model), after accelerator.prepare"
        )
    return check_trained(dict(parameters))


class _Passes:
    """`passes(objective, index)` runs the loop's own forward and backward with this objective."""

    def __init__(self, accelerator: Accelerator, passes: int, model: nn.Module, loss_fn: Callable[[], Tensor]) -> None:
        self._accelerator, self._passes, self._model, self._loss_fn = accelerator, passes, model, loss_fn
        self._buffers = StepBuffers(model, wrapped=wrapped_by(model))

    def move_buffers(self) -> None:
        """Run the model forward at its own weights, where the first pass is not to move the buffers."""
        if next(self._model.buffers(), None) is not None:
            with self._buffers.moving(), self._unreduced(True), random_states_kept(devices_of(self._model)):
                self._loss_fn()

    def __call__(self, objective: Objective, index: int) -> Tensor:
        with self._buffers.of_pass(index), self._unreduced(index < self._passes - 1):
            loss = self._loss_fn()
            if not isinstance(loss, Tensor) or loss.ndim:
                found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"loss_fn: expected a scalar tensor, got {found}; return the mean loss of the batch")
            value = scaled(self._accelerator, objective, loss)
            self._accelerator.backward(value)
        return value.detach()

    def _unreduced(self, wanted: bool) -> AbstractContextManager[None]:
        if not wanted or is_sharded(self._model):
            return nullcontext()
        context: AbstractContextManager[None] = self._accelerator.no_sync(self._model)
        return context
