"""Whether the passes of a Trainer's steps can share the part of the model that is not corrupted.

Under FSDP2, gradients are reduced in every pass, also where the Trainer's loop defers that to the last micro-batch:
FSDP2 would keep whole gradients until then, out of reach. They are means over ranks, so the corruption is that of the
joined batch. A prefix that the passes share is computed at the first and at the last of them: all passes run to their
end, as FSDP2 expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from hf_parcor.defenses import Defense
from hf_parcor.distributed.ddp import sending_no_buffers, wrapped_by
from hf_parcor.distributed.fsdp import is_sharded, on_shards
from hf_parcor.prefix import (
    COMPILED_AS_ONE,
    FailuresAsPrefixErrors,
    NothingToReuse,
    PrefixError,
    PrefixReuse,
    RecomputedPrefix,
    check_some_is_left,
    find_prefix,
    find_rows,
    is_compiled,
    plan_prefix,
    try_prefix,
)
from hf_parcor.targets.kinds import find_input_embedding
from hf_parcor.training.passes import Passes

logger = logging.get_logger(__name__)

_Plan = TypeVar("_Plan", bound=PrefixReuse)


def find_shared_prefix(passes: Passes, selected: Mapping[str, nn.Parameter], devices: int = 1) -> PrefixReuse | None:
    """Return the prefix that later passes reuse; None, after saying why, where each pass must run all of the model.

    All processes decide the same; each tries it out on its own batch, so all must call this at once.

    Args:
        passes: Those of the first step, on whose batch it is tried out.
        selected: The defended parameters.
        devices: How many devices DataParallel splits the batch over.
    """
    model, defense = passes.model, passes.defense
    alone = wrapped_by(model) or model

    def found() -> PrefixReuse:
        _check(defense, model, selected, devices)
        passes.prepare()  # before the model is watched: a training step sets its mode
        watch, trial, agree = passes.watch, passes.trial, partial(_agree, alone)
        with sending_no_buffers(model):
            if is_sharded(alone):
                return plan_prefix_on_shards(alone, selected, watch, trial, agree, defense.passes)
            return agree(lambda: plan_prefix(alone, selected, watch, trial, passes=defense.passes, sparing=True))

    return _unless_it_fails(alone, found)


def with_rows(passes: Passes, prefix: PrefixReuse) -> PrefixReuse | None:
    """Return a prefix that passes over a part of the batch can reuse too; None, after saying why, if they cannot.

    As it is, where no rows show, since the part of the batch is all of it on some process, and it is no question yet.

    Args:
        passes: Those of a step, on whose batch it is tried out.
        prefix: What all of its passes reuse.
    """
    defense, alone = passes.defense, wrapped_by(passes.model) or passes.model
    share = min(defense.share_of_batch(index) for index in range(defense.passes))
    passes.prepare()
    count, examples = passes.rows_of(share)
    if any(gather_object([count == examples])):
        return prefix

    def tried() -> PrefixReuse:
        with FailuresAsPrefixErrors():
            find_rows(
                prefix,
                alone,
                count,
                examples,
                run_whole=passes.trial_as_is,
                run_part=partial(passes.trial_as_is, share=share),
                run_repeated=partial(passes.trial_of_repeated, share=share),
            )
        return prefix

    with sending_no_buffers(passes.model):
        return _unless_it_fails(alone, lambda: _agree(alone, tried))


def _unless_it_fails(model: nn.Module, find: Callable[[], PrefixReuse]) -> PrefixReuse | None:
    """Return what is found; None, after saying why, if passes cannot share it."""
    try:
        return find()
    except NothingToReuse:
        return None
    except PrefixError as error:
        hint = _REENTRANT if _has_reentrant_checkpoints(model) else ""
        logger.warning(
            f"Every pass runs all of the model: {error}{hint}. Training is right, but slower than it could be; "
            "reuse_prefix=False silences this."
        )
        return None


_REENTRANT = (
    "; reentrant checkpoints, which compute without a graph what others collect inside of them, such as router "
    'logits, may be why: pass gradient_checkpointing_kwargs={"use_reentrant": False}'
)


def _has_reentrant_checkpoints(model: nn.Module) -> bool:
    """Say whether Transformers checkpoints layers of a model in the way that computes them without a graph first."""
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )
    return any(isinstance(one, partial) and bool(one.keywords.get("use_reentrant")) for one in functions)


def _agree(model: nn.Module, make: Callable[[], _Plan]) -> _Plan:
    """Return the plan if every process makes the same on its own batch.

    Raises:
        PrefixError: One makes another, or none.
    """
    try:
        plan = make()
    except PrefixError as error:
        gather_object([([], str(error))])  # the others wait
        raise
    names = {module: name for name, module in model.named_modules()}
    cut = [names[module] for module in plan.prefix]
    everyone: list[tuple[list[str], str]] = gather_object([(cut, "")])
    for index, (other, reason) in enumerate(everyone):
        if not other:
            raise PrefixError(f"{reason} (on process {index})")
        if other != cut:
            raise PrefixError(f"process {index} would cut it at another place")
    return plan


def _check(defense: Defense, model: nn.Module, selected: Mapping[str, nn.Parameter], devices: int) -> None:
    if defense.passes == 1:
        raise NothingToReuse("there is one pass")
    if defense.perturbs_inputs:
        raise NothingToReuse("the inputs differ from pass to pass")
    if devices > 1:
        raise PrefixError("the prefix is not reused under DataParallel")
    alone = wrapped_by(model) or model
    compiled = [module for module in model.modules() if is_compiled(module)]
    if any(alone in module.modules() for module in compiled):
        # Where nothing comes before what is defended, compiling in parts would not help.
        check_some_is_left(alone, selected)
        with suppress(ValueError):
            check_some_is_left(find_input_embedding(alone), selected)
        raise PrefixError(COMPILED_AS_ONE)
    if is_sharded(model) and defense.splits_batch:
        # It is recorded in the first pass and computed again in the last, of which one sees a part of the batch.
        raise PrefixError("the prefix of a model that is sharded is not reused by passes over a part of the batch")
    if is_sharded(model) and getattr(getattr(alone, "config", None), "output_router_logits", False):
        # Their gradient reaches the gate when FSDP2 has freed its weights.
        raise PrefixError("the prefix of a mixture of experts that is sharded is not reused with router losses")
    if is_sharded(model) and compiled:
        raise PrefixError("the prefix of a model that is sharded and compiled is not reused")


def suffix_share(model: nn.Module, prefix: PrefixReuse) -> float:
    """Return which share of the parameters, without embeddings, later passes still compute with.

    Transformers estimates operations from the same parameters.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    sizes = {id(p): p.numel() for p in model.parameters() if id(p) not in embeddings}
    reused = {id(p) for module in prefix.prefix for p in module.parameters()}
    return sum(size for key, size in sizes.items() if key not in reused) / max(1, sum(sizes.values()))


def plan_prefix_on_shards(
    model: nn.Module,
    selected: Mapping[str, Tensor],
    run: Callable[[], Any],
    run_pass: Callable[[Callable[[Any], Tensor]], Any],
    agree: Callable[[Callable[[], RecomputedPrefix]], RecomputedPrefix],
    passes: int,
) -> RecomputedPrefix:
    """Return the prefix that the passes of a step share on a sharded model, tried out.

    Args:
        model: The model as the Trainer wrapped it.
        selected: The parameters that later passes corrupt.
        run: Runs the model on one batch.
        run_pass: As in `try_prefix`.
        agree: Returns what a function makes, if it makes the same on all processes; else raises a `PrefixError`.
        passes: How many passes are going to share it.

    Raises:
        PrefixError: The model cannot be cut, or not at the same place on all processes.
        RuntimeError: A pass of the trial broke off, and this release of PyTorch cannot bring FSDP2 out of the middle
            of it; others can, and it is a `PrefixError`.
    """

    def found() -> RecomputedPrefix:
        with _brought_to_an_end(model):
            return find_prefix(model, selected, on_shards(run, model), RecomputedPrefix)

    # All must cut alike before they try: each pass waits for what the others gather.
    prefix = agree(found)

    def tried() -> RecomputedPrefix:
        with _brought_to_an_end(model), FailuresAsPrefixErrors():
            try_prefix(prefix, model, selected, on_shards(run_pass, model), passes=passes, in_step=True)
        return prefix

    return agree(tried)


@contextmanager
def _brought_to_an_end(model: nn.Module) -> Iterator[None]:
    """End a pass that broke off under FSDP2, on all processes alike, so that the next can begin.

    Raises:
        RuntimeError: This release of PyTorch cannot.
    """
    try:
        yield
    except Exception as error:
        # What is found out after a pass has no cause in one.
        if isinstance(error, PrefixError) and error.__cause__ is None:
            raise
        reset = getattr(model, "reset_iter_state", None)  # since PyTorch 2.13
        if reset is None:
            raise RuntimeError(
                f"reuse_prefix: expected a model whose passes can share what they compute, got {error!r}; "
                "pass reuse_prefix=False"
            ) from error
        reset()
        raise
