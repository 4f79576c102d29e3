"""Engines that train on many devices, and ways to split a model over them, which a defended step cannot use."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from hf_parcor.defenses import Defense

INSTEAD = "use DDP (torchrun, accelerate launch) or FSDP2 (fsdp=True, fsdp_version: 2), or train without a defense"


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
            f"of a step would be an update of its own; {INSTEAD}"
        )
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError(f"accelerator: expected DDP or FSDP2 with a defense, got Megatron-LM, not tested; {INSTEAD}")
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
                f"with {kind} parallelism, and could be silently wrong: {INSTEAD}"
            )
    # Not every release of Transformers has the first of these.
    if getattr(model, "is_distributed_loading_by_transformers", False) or (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "model: expected one that was loaded whole, got one that from_pretrained sharded (tp_plan or "
            f"distributed_config); the defended step is not tested there: load it without, and {INSTEAD}"
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
