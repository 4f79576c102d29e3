"""Models that FSDP2 shards over ranks: what a defended step needs there.

Gradients are reduced in every pass, also where the Trainer's loop defers that to the last micro-batch: FSDP2 would
keep whole gradients until then, out of reach. They are means over ranks, so the corruption is that of the joined
batch. A prefix that the passes share is computed at the first and at the last of them: all passes run to their end, as
FSDP2 expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_parcor.defenses import Objective
from hf_parcor.prefix import PrefixError, RecomputedPrefix, failures_as_prefix_errors, find_prefix, try_prefix
from hf_parcor.sharding import drop_gathered, reducing

_CHECKPOINTED = "_checkpoint_wrapped_module."  # in names, where FSDP's activation checkpointing wraps modules


def renewed(names: Iterable[str], model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that stand under the names which they had before FSDP2 took the model."""
    drop_gathered(model)
    now = {name.replace(_CHECKPOINTED, ""): parameter for name, parameter in model.named_parameters()}
    return {name: now[name] for name in names}


def on_shards(run_pass: Callable[[Objective, int], Tensor], model: nn.Module) -> Callable[[Objective, int], Tensor]:
    """Return the pass of a defended step for a sharded model.

    Args:
        run_pass: Runs forward and backward of pass k, as `DefendedStep` takes it.
        model: The model as the Trainer wrapped it.
    """

    def run_on_shards(objective: Objective, index: int) -> Tensor:
        with reducing(model):
            return run_pass(objective, index)

    return run_on_shards


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

    def watched() -> Any:
        with reducing(model):
            return run()

    def reduced(objective: Callable[[Any], Tensor]) -> Any:
        with reducing(model):
            return run_pass(objective)

    def found() -> RecomputedPrefix:
        with _brought_to_an_end(model):
            return find_prefix(model, selected, watched, RecomputedPrefix)

    # All must cut alike before they try: each pass waits for what the others gather.
    prefix = agree(found)

    def tried() -> RecomputedPrefix:
        with _brought_to_an_end(model), failures_as_prefix_errors():
            try_prefix(prefix, model, selected, reduced, passes=passes, in_step=True)
        return prefix

    return agree(tried)


@contextmanager
def _brought_to_an_end(model: nn.Module) -> Iterator[None]:
    """Bring FSDP2 out of the middle of a pass that broke off, on all processes alike, so that the next can begin.

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
