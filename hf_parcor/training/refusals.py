"""Settings under which a defended step would be silently wrong, refused when the Trainer is made."""

from __future__ import annotations

from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_parcor.defenses import Defense
from hf_parcor.training.refused_engines import INSTEAD, refuse_engines

_UPDATES_INSIDE_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)


def refuse_what_cannot_work(trainer: Trainer, defense: Defense) -> None:
    """Check the Trainer's settings against the defense; one that is the stock step runs under all of them.

    Raises:
        ValueError: The optimizer updates inside `backward`; an engine or a way to split the model that the step would
            be silently wrong with; the defense perturbs the inputs, and DataParallel splits them; or it
            differentiates twice, and FSDP2, a compiled backward or a reentrant checkpoint cannot.
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
            f"fsdp_config: expected FSDP2 of PyTorch with a defense, got XLA's FSDP, which is not tested; {INSTEAD}"
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
