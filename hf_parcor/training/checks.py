"""Refuse what would make a defended step silently wrong: settings, engines, hooks, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_parcor.defenses import Defense
from hf_parcor.injection import check_weights


def _instead_of(setting: str) -> str:
    """Say which three lines make FSDP2 of what a setting asked for."""
    return (
        f"in the arguments take out {setting}, and set fsdp=True and fsdp_config={{'version': 2}}, which is FSDP2 "
        "(with Accelerate's file distributed_type: FSDP, and fsdp_version: 2 in its fsdp_config, as in "
        "examples/accelerate_configs/fsdp2.yaml); or use DDP, or train without a defense"
    )


def refuse_engines(accelerator: Accelerator, model: nn.Module | None, defense: Defense) -> None:
    """Check how Accelerate spreads the model against the defense; one that is the stock step runs on all engines.

    Raises:
        ValueError: DeepSpeed, Megatron-LM or FSDP1; tensor, context or sequence parallelism; a model sharded or
            offloaded when it was loaded; or FSDP2 with a compiled model, or with a defense that differentiates twice.
    """
    if defense.is_stock:
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "deepspeed: expected none with a defense, got DeepSpeed, whose engine updates inside backward: each pass "
            f"of a step would be an update of its own; {_instead_of('deepspeed=')}"
        )
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError(
            "accelerator: expected DDP or FSDP2 with a defense, got Megatron-LM, which is not tested; "
            f"{_instead_of('what asks for Megatron-LM')}"
        )
    _refuse_split_models(accelerator, model)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        _refuse_under_fsdp(accelerator, defense)


def _refuse_split_models(accelerator: Accelerator, model: nn.Module | None) -> None:
    split = accelerator.parallelism_config
    for name, kind in (("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(split, name, None) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config.{name}: expected 1 with a defense, got {size}; the defended step is not tested "
                f"with {kind} parallelism, and could be silently wrong; {_instead_of('parallelism_config=')}"
            )
    # Not every release of Transformers has the first of these.
    if getattr(model, "is_distributed_loading_by_transformers", False) or (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "model: expected one that was loaded whole, got one that from_pretrained sharded (tp_plan or "
            f"distributed_config); the defended step is not tested there: load it without; to shard it, "
            f"{_instead_of('parallelism_config=')}"
        )
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if places & {"disk", "meta"} or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"device_map: expected no offloaded part with a defense, got {sorted(map(str, places))}; what is "
            "offloaded comes back without its corruption: load the model onto devices alone"
        )


def _refuse_under_fsdp(accelerator: Accelerator, defense: Defense) -> None:
    version = accelerator.state.fsdp_plugin.fsdp_version
    if version != 2:
        raise ValueError(
            f"fsdp_config: expected version 2 with a defense, got {version}, which hides the weights in flat buffers; "
            "set fsdp_config={'version': 2} or accelerate's fsdp_version: 2"
        )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(
            f"torch_compile: expected no compiled model for a defense under FSDP2, got one by {backend.value}; the "
            "two are not tested together: leave it out"
        )
    if defense.differentiates_twice:
        raise ValueError(
            f"defense: expected one that differentiates once under FSDP2, got {type(defense).__name__}; the gathered "
            "weights are gone when its second derivative needs them: use ACRT, which is the same to first order"
        )


_UPDATES_INSIDE_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)


def refuse_what_cannot_work(trainer: Trainer, defense: Defense) -> None:
    """Check the Trainer's settings against the defense; one that is the stock step runs under all of them.

    Raises:
        ValueError: The optimizer updates inside `backward`; an engine or a way to split the model that the step would
            be silently wrong with; the defense perturbs the inputs, and DataParallel splits them; it differentiates
            twice, and FSDP2, a compiled backward or a reentrant checkpoint cannot; or its passes see a part of a
            batch that has all preferred texts before all others.
    """
    if defense.is_stock:
        return
    optimizer = OptimizerNames(trainer.args.optim)
    if optimizer in _UPDATES_INSIDE_BACKWARD or "layerwise" in optimizer.value:
        raise ValueError(
            f"optim: expected an optimizer that updates after backward, got {optimizer.value!r}; it would update "
            "at corrupted weights, once a pass: choose another, or defense='none'"
        )
    if trainer.is_fsdp_xla_enabled:
        raise ValueError(
            "fsdp_config: expected FSDP2 of PyTorch with a defense, got XLA's FSDP, which is not tested; "
            f"{_instead_of('xla')}"
        )
    refuse_engines(trainer.accelerator, trainer.model, defense)
    if trainer.args.ddp_static_graph and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "ddp_static_graph: expected False, got True; DDP would take the first of several backward passes for the "
            "whole step: leave it out"
        )
    if defense.perturbs_inputs and trainer.args.n_gpu > 1:
        raise ValueError(
            f"expected one device a process for a defense that perturbs the inputs, got {trainer.args.n_gpu} under "
            "DataParallel; start one process a device (torchrun, accelerate launch)"
        )
    if defense.differentiates_twice:
        _refuse_a_backward_without_derivative(trainer.args)
    if defense.splits_batch:
        _refuse_pairs(trainer.data_collator)


def _refuse_a_backward_without_derivative(args: TrainingArguments) -> None:
    if args.torch_compile and args.torch_compile_backend != "eager":
        raise ValueError(
            "torch_compile_backend: expected 'eager' for a defense that differentiates twice, got "
            f"{args.torch_compile_backend!r}, whose compiled backward has no derivative: choose 'eager', "
            "torch_compile=False, or another defense"
        )
    settings = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(settings, dict) and settings.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs: expected use_reentrant=False for a defense that differentiates twice, got "
            "True, whose backward has no derivative: set it to False, or choose another defense"
        )


def _refuse_pairs(collator: object) -> None:
    name = type(getattr(collator, "data_collator", collator)).__name__  # of a Trainer's that removes columns
    if "Preference" in name and "Unpaired" not in name:
        raise ValueError(
            f"batch_share: expected 1 with TRL's {name}, got less; it puts all preferred texts before all others, so "
            "that a part of its batch has other pairs: defend every n-th step instead (interval=n)"
        )


# They average gradients over processes, which is the same for the sum of all passes as for each of them.
_AVERAGE = ("torch.nn.parallel.distributed", "transformers.trainer")


def refuse_updates_inside_backward(parameters: Iterable[nn.Parameter]) -> None:
    """Check that nothing takes a gradient as soon as backward brings it: a pass of a defended step is not all of it.

    A hook that runs after a gradient was accumulated is refused whatever it does, but for those with which PyTorch and
    Transformers average gradients; a hook that runs before is refused if it holds an optimizer, as LOMO's do.

    Args:
        parameters: All parameters that are trained.

    Raises:
        ValueError: There is such a hook.

    Examples:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2))
        >>> handle = weight.register_post_accumulate_grad_hook(lambda weight: print(weight.grad))
        >>> refuse_updates_inside_backward([weight])
        Traceback (most recent call last):
        ...
        ValueError: ... register_post_accumulate_grad_hook ...
        >>> handle.remove()
        >>> refuse_updates_inside_backward([weight])
    """
    for parameter in parameters:
        # Read as attributes: most parameters have none of the three.
        after, before = parameter._post_accumulate_grad_hooks, parameter._backward_hooks
        if after or before or hasattr(parameter, "_in_backward_optimizers"):
            _refuse(parameter, (after or {}).values(), (before or {}).values())


def _refuse(parameter: nn.Parameter, after: Iterable[Any], before: Iterable[Any]) -> None:
    kind = "register_post_accumulate_grad_hook"
    found = [hook for hook in after if _function(hook).__module__ not in _AVERAGE]
    if not found:
        kind = "register_hook"
        found = [hook for hook in before if _holds_an_optimizer(hook)]
    if not found:
        kind = "_apply_optimizer_in_backward"
        found = list(getattr(parameter, "_in_backward_optimizers", []))
    if found:
        function = _function(found[0])
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise ValueError(
            "parameters: expected gradients that nobody takes before a defended step is done, got a hook by "
            f"{kind} ({function.__module__}.{name}) on one of shape "
            f"{tuple(parameter.shape)}; an optimizer there would update at corrupted weights, once a pass: take "
            "the hook away and let the optimizer step after backward, or train without a defense"
        )


def _function(hook: Any) -> Any:
    return _function(hook.func) if isinstance(hook, partial) else hook


def _holds_an_optimizer(hook: Callable[..., Any]) -> bool:
    return any(isinstance(held, Optimizer) for held in _held(hook))


def _held(hook: Any) -> Iterator[Any]:
    """Yield what a function can update: its object, what it closes over, and what is in dictionaries of these."""
    parts = [getattr(hook, "__self__", None), *getattr(hook, "__dict__", {}).values()]
    if isinstance(hook, partial):
        parts += [*hook.args, *hook.keywords.values()]
        yield from _held(hook.func)
    for cell in getattr(hook, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            parts.append(cell.cell_contents)
    yield from parts
    yield from chain.from_iterable(part.values() for part in parts if isinstance(part, Mapping))


def check_trained(selected: Mapping[str, nn.Parameter], defense: Defense) -> None:
    """Check the selected parameters, all of which must be trainable if the defense climbs along their gradients.

    Raises:
        TypeError: Nothing can be written into a parameter.
        ValueError: A parameter is frozen, or is not for this defense.
        NotImplementedError: A parameter is sharded in a way that is not for this defense.
    """
    loaded = {name: parameter for name, parameter in selected.items() if not parameter.is_meta}  # others may be later
    if loaded and not defense.is_stock:
        check_weights(loaded)
    defense.check(selected)
    if not defense.uses_gradients:
        return
    frozen = [name for name, parameter in selected.items() if not parameter.requires_grad]
    if frozen:
        adapted = any(".lora_A." in name for name in selected) and not all(".lora_" in name for name in frozen)
        adapters = "name the adapters alone (target_modules=['lora_A', 'lora_B'], with layers= those of some layers), "
        raise ValueError(
            f"target_modules: expected trainable parameters, got {len(frozen)} frozen ones such as {frozen[0]!r}; "
            f"this defense needs their gradient: {adapters if adapted else ''}unfreeze them, exclude them with "
            "exclude_modules, or train what is beside them with CorruptionRisk(Quantization(4)), say (--defense "
            "corruption), which needs none of theirs"
        )


def trained_beside(
    selected: Iterable[nn.Parameter], modules: Iterable[nn.Module], optimizers: Iterable[Optimizer]
) -> list[nn.Parameter]:
    """Return all other trainable parameters, each once: the model's, and those that only an optimizer holds.

    Losses may have parameters of their own, such as the classifier of a sentence-transformers' `SoftmaxLoss`, and
    those of a second model, as a generator's through its critic.

    Examples:
        >>> model, head = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
        >>> optimizer = Optimizer([*model.parameters(), *head.parameters()], defaults={})
        >>> others = trained_beside([model.weight], model.modules(), [optimizer])
        >>> [other is known for other, known in zip(others, (model.bias, head.weight))]
        [True, True]
    """
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    held = (module._parameters.values() for module in modules)  # read at once: model.parameters() walks again
    known = chain(*held, *(group["params"] for group in groups))
    trained = {id(parameter): parameter for parameter in known if parameter is not None and parameter.requires_grad}
    for parameter in selected:
        trained.pop(id(parameter), None)
    return list(trained.values())
