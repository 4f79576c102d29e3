"""Whether the passes of a Trainer's steps can share the part of the model that is not corrupted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_parcor.defenses import Defense
from hf_parcor.prefix import NothingToReuse, PrefixError, PrefixReuse, plan_prefix

logger = logging.get_logger(__name__)


def find_shared_prefix(
    trainer: Trainer,
    defense: Defense,
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    inputs: dict[str, Tensor | Any],
) -> PrefixReuse | None:
    """Return the prefix that later passes reuse; None, after saying why, where each pass must run all of the model.

    Args:
        trainer: The Trainer.
        defense: What its steps minimise.
        model: The model as the Trainer wrapped it.
        selected: The defended parameters.
        inputs: A batch to try it out on.
    """

    def run() -> Any:
        prepared = trainer._prepare_inputs(copy.copy(inputs))
        with trainer.compute_loss_context_manager():
            return model(**prepared)

    try:
        _check(trainer, defense, model)
        return plan_prefix(model, selected, run)
    except NothingToReuse:
        return None
    except PrefixError as error:
        logger.warning(
            f"Every pass runs all of the model: {error}. Training is right, but slower than it could be; "
            "reuse_prefix=False silences this."
        )
        return None


def _check(trainer: Trainer, defense: Defense, model: nn.Module) -> None:
    if defense.passes == 1:
        raise NothingToReuse("there is one pass")
    if defense.perturbs_inputs:
        raise NothingToReuse("the inputs differ from pass to pass")
    if any(defense.share_of_batch(index) != 1 for index in range(defense.passes)):
        raise PrefixError("passes over a part of the batch cannot reuse what was computed for all of it")
    if trainer.is_fsdp_enabled:
        raise PrefixError("FSDP2 frees gathered weights after each backward, and the prefix's is still to come")
    if trainer.accelerator.num_processes > 1 or trainer.args.n_gpu > 1:
        raise PrefixError("the prefix is not reused on several devices")
    if isinstance(model, torch._dynamo.OptimizedModule) or any(m._compiled_call_impl for m in model.modules()):
        raise PrefixError("a compiled model does not notice that a module is skipped")


def suffix_share(model: nn.Module, prefix: PrefixReuse) -> float:
    """Return which share of the parameters, without embeddings, later passes still compute with.

    Transformers estimates operations from the same parameters.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    sizes = {id(p): p.numel() for p in model.parameters() if id(p) not in embeddings}
    reused = {id(p) for module in prefix.prefix for p in module.parameters()}
    return sum(size for key, size in sizes.items() if key not in reused) / max(1, sum(sizes.values()))
