"""Whether the passes of a Trainer's steps can share the part of the model that is not corrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_parcor.defenses import Defense
from hf_parcor.prefix import NothingToReuse, PrefixError, PrefixReuse, plan_prefix
from hf_parcor.sharding import is_sharded
from hf_parcor.training.data_parallel import sending_no_buffers, wrapped_by
from hf_parcor.training.passes import Passes
from hf_parcor.training.sharded import plan_prefix_on_shards

logger = logging.get_logger(__name__)
_Plan = TypeVar("_Plan", bound=PrefixReuse)


def find_shared_prefix(
    trainer: Trainer,
    defense: Defense,
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    passes: Passes,
) -> PrefixReuse | None:
    """Return the prefix that later passes reuse; None, after saying why, where each pass must run all of the model.

    All processes decide the same; each tries it out on its own batch, so all must call this at once.

    Args:
        trainer: The Trainer.
        defense: What its steps minimise.
        model: The model as the Trainer wrapped it.
        selected: The defended parameters.
        passes: Those of the first step, on whose batch it is tried out.
    """
    alone = wrapped_by(model) or model
    try:
        _check(trainer, defense, model)
        passes.prepare()  # before the model is watched: a training step sets its mode
        names = {module: name for name, module in alone.named_modules()}
        with sending_no_buffers(model):
            if is_sharded(alone):
                return plan_prefix_on_shards(
                    alone, selected, passes.watch, passes.trial, lambda make: _agree(names, make), defense.passes
                )
            return _agree(
                names, lambda: plan_prefix(alone, selected, passes.watch, passes.trial, passes=defense.passes)
            )
    except NothingToReuse:
        return None
    except PrefixError as error:
        logger.warning(
            f"Every pass runs all of the model: {error}. Training is right, but slower than it could be; "
            "reuse_prefix=False silences this."
        )
        return None


def _agree(names: Mapping[nn.Module, str], make: Callable[[], _Plan]) -> _Plan:
    """Return the plan if every process makes the same on its own batch.

    Raises:
        PrefixError: One makes another, or none.
    """
    try:
        plan = make()
    except PrefixError as error:
        gather_object([([], str(error))])  # the others wait
        raise
    cut = [names[module] for module in plan.prefix]
    everyone: list[tuple[list[str], str]] = gather_object([(cut, "")])
    for index, (other, reason) in enumerate(everyone):
        if not other:
            raise PrefixError(f"{reason} (on process {index})")
        if other != cut:
            raise PrefixError(f"process {index} would cut it at another place")
    return plan


def _check(trainer: Trainer, defense: Defense, model: nn.Module) -> None:
    if defense.passes == 1:
        raise NothingToReuse("there is one pass")
    if defense.perturbs_inputs:
        raise NothingToReuse("the inputs differ from pass to pass")
    if defense.splits_batch:
        raise PrefixError("passes over a part of the batch cannot reuse what was computed for all of it")
    if trainer.args.n_gpu > 1:
        raise PrefixError("the prefix is not reused under DataParallel")
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
