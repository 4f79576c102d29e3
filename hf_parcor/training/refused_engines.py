"""Engines that train on many devices, and ways to split a model over them, which a defended step cannot use."""

from __future__ import annotations

from transformers import Trainer

from hf_parcor.defenses import Defense

_INSTEAD = "use DDP (torchrun, accelerate launch) or FSDP2 (fsdp=True), or defense='none'"


def refuse_engines(trainer: Trainer, defense: Defense) -> None:
    """Check how the Trainer spreads the model against the defense.

    Raises:
        ValueError: DeepSpeed, FSDP1 or XLA's FSDP; tensor, context or sequence parallelism; a model sharded or
            offloaded when it was loaded; or FSDP2 with a compiled model, or with a defense that differentiates twice.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "deepspeed: expected none with a defense, got DeepSpeed, whose engine updates inside backward: each pass "
            f"of a step would be an update of its own; {_INSTEAD}"
        )
    if trainer.is_fsdp_xla_enabled:
        raise ValueError(
            f"fsdp_config: expected FSDP2 of PyTorch with a defense, got XLA's FSDP, which is not tested; {_INSTEAD}"
        )
    _refuse_split_models(trainer)
    if trainer.is_fsdp_enabled:
        _refuse_under_fsdp(trainer, defense)


def _refuse_split_models(trainer: Trainer) -> None:
    split = trainer.accelerator.parallelism_config
    for name, kind in (("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(split, name, None) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config.{name}: expected 1 with a defense, got {size}; the defended step is not tested "
                f"with {kind} parallelism, and could be silently wrong: {_INSTEAD}"
            )
    model = trainer.model
    # Not every release of Transformers has the first of these.
    if getattr(trainer, "is_distributed_loading_by_transformers", False) or (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "model: expected one that was loaded whole, got one that from_pretrained sharded (tp_plan or "
            f"distributed_config); the defended step is not tested there: load it without, and {_INSTEAD}"
        )
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if places & {"disk", "meta"} or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"device_map: expected no offloaded part with a defense, got {sorted(map(str, places))}; what is "
            "offloaded comes back without its corruption: load the model onto devices alone"
        )


def _refuse_under_fsdp(trainer: Trainer, defense: Defense) -> None:
    version = trainer.accelerator.state.fsdp_plugin.fsdp_version
    if version != 2:
        raise ValueError(
            f"fsdp_config: expected version 2 with a defense, got {version}, which hides the weights in flat buffers; "
            "set fsdp_config={'version': 2} or accelerate's fsdp_version: 2"
        )
    if trainer.args.torch_compile:
        raise ValueError(
            "torch_compile: expected False for a defense under FSDP2, got True; the two are not tested together: "
            "leave it out"
        )
    if defense.differentiates_twice:
        raise ValueError(
            f"defense: expected one that differentiates once under FSDP2, got {type(defense).__name__}; the gathered "
            "weights are gone when its second derivative needs them: use ACRT, which is the same to first order"
        )
