"""What does not depend on the parameters that are corrupted: sought once for all their trials, and tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_parcor.distributed.processes import ALONE, MeasuringProcesses
from hf_parcor.evaluation.embeddings import is_of_texts
from hf_parcor.evaluation.losses import model_loss
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.outputs import called, own_batch
from hf_parcor.evaluation.passes.gradients import corrupted_model, trainable, unpublished
from hf_parcor.evaluation.placement.replicas import all_batches
from hf_parcor.injection import Device, Pieces, corrupted, obstacle
from hf_parcor.model_state import BufferSnapshot, devices_of, undone
from hf_parcor.prefix import (
    TRIED_PASSES,
    FailuresAsPrefixErrors,
    NothingToReuse,
    PrefixError,
    PrefixReuse,
    before_calls,
    check_results,
    distance,
    leaves_of,
    outputs_of,
    plan_prefix,
    plan_prefixes_of_values,
    recording_together,
)
from hf_parcor.randomness import random_states_kept

logger = logging.get_logger(__name__)

_Parameters = Mapping[str, nn.Parameter]
_SAVED = 0.5  # of a run that a prefix saves, where groups lie anywhere in a model
RUNS_TO_PLAN = 4 + TRIED_PASSES  # of one batch, for the measurements of one group; a test counts them
RUNS_TO_PLAN_ASCENTS = 3 + TRIED_PASSES  # for its ascents, most of them backward too


class PrefixSearch:
    """Seeks, for each of several groups of parameters, its prefix: what does not depend on it, and need run only once.

    A measurement may run the model in another way than an ascent does, so each has its own. It is sought, which takes
    a few runs of the model, when it is first asked for: a sweep that is killed often still gets on. There is none
    where seeking it takes as many runs as it saves, or, after saying why, where all of the model must run.

    Args:
        model: The model, in evaluation mode.
        metric: What is measured; its first batch is tried.
        batches: What ascents walk through; the first is tried, if it is a mapping of keyword arguments for the model.
        groups: What is corrupted, each by itself.
        trials: How many trials of each group are measured.
        steps: How many steps all ascents of each group take.
        shared: The indices of the groups whose measurements may share a prefix, in their order.
        limit: Of groups with so many trials in all, prefixes of measurements are sought together.
        memory: How many bytes the bits of corrupted weights may take; those of one group are held in any case.
        processes: Those that measure together.
        saved_on: Where the bits of corrupted weights are kept; None for their own device.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: BatchMetric,
        batches: Iterable[Any],
        groups: Sequence[_Parameters],
        *,
        trials: Sequence[int],
        steps: Sequence[int],
        shared: Iterable[int],
        limit: int,
        memory: int,
        processes: MeasuringProcesses = ALONE,
        saved_on: Device = None,
    ) -> None:
        self._model, self._metric, self._batches, self._groups = model, metric, batches, groups
        self._trials, self._steps, self._memory = trials, steps, memory
        self._processes, self._saved_on = processes, saved_on
        self._of_ascents: dict[int, PrefixReuse | None] = {}
        self._of_measurements: dict[int, PrefixReuse | None] = {}
        self._together: dict[int, list[int]] = {}  # for each, those that are sought with it
        own = set(model.parameters())
        some: list[int] = []
        for index in shared:
            if not own.issuperset(groups[index].values()):  # offloaded: no telling when it is used
                continue
            if sum(trials[one] for one in [*some, index]) > limit:
                some = []
            some.append(index)
            self._together[index] = some

    def of_ascents(self, index: int) -> PrefixReuse | None:
        """Return what does not depend on a group when the model's loss and its gradient are computed."""
        if index not in self._of_ascents:
            self._of_ascents[index] = self._seek_of_ascents(self._groups[index], self._steps[index])
        return self._of_ascents[index]

    def of_measurements(self, index: int) -> PrefixReuse | None:
        """Return what does not depend on a group when a batch is measured, a generation say; all processes ask."""
        if index in self._together and index not in self._of_measurements:
            some = self._together[index]
            found = {}
            if self._pays(some):
                with undone(self._model):
                    found = self._seek_of_measurements(some)
            # What is measured together must be the same everywhere, also where a rounding decides.
            agreed = set.intersection(*self._processes.gather(set(found)))
            self._of_measurements |= {one: found[one] if one in agreed else None for one in some}
        return self._of_measurements.get(index)

    def _seek_of_ascents(self, group: _Parameters, steps: int) -> PrefixReuse | None:
        if _SAVED * steps / self._processes.count <= RUNS_TO_PLAN_ASCENTS:  # each process climbs whole ascents
            return None
        model, batch = self._model, next(iter(self._batches), None)
        if not isinstance(batch, Mapping):
            return None
        try:
            with trainable(group.values()):
                return plan_prefix(model, group, lambda: _answers(model, batch), trained=group)
        except NothingToReuse:
            pass
        except PrefixError as error:
            _say("ascent", [str(error)])
        return None

    def _pays(self, some: Sequence[int]) -> bool:
        """Whether seeking prefixes of measurements together takes fewer runs than they save."""
        trials = sum(self._trials[index] for index in some)  # also those that are done: as if anew
        batches = length_hint(self._metric.batches) / self._processes.count  # 0 where it is not known
        further = len(some) - 1  # for each, it takes a run that begins behind its prefix
        saved = _SAVED * (further / len(some) if further else 1)  # of several in a row, the first saves nothing
        return not 0 < saved * trials * batches <= RUNS_TO_PLAN + (1 - _SAVED) * further

    def _seek_of_measurements(self, some: Sequence[int]) -> dict[int, PrefixReuse]:
        """Return what is found for some groups.

        The runs that watch the model, and see whether it repeats itself, are the same for all of them. For each there
        is one more, from where its prefix ends.
        """
        batch = next(iter(all_batches(self._metric.batches)), None)
        if batch is None:
            return {}
        groups = {index: self._groups[index] for index in some}
        run = partial(self._everything_found, batch)
        try:
            prefixes, reasons, found = plan_prefixes_of_values(self._model, groups, run)
            with FailuresAsPrefixErrors():
                reasons += self._try_out(prefixes, run, found) if prefixes else []
        except PrefixError as error:
            if isinstance(error, _UsedEarlyError) and len(some) > 1:  # which group?
                return {key: one for index in some for key, one in self._seek_of_measurements([index]).items()}
            prefixes, reasons = {}, [str(error)]
        _say("measurement", reasons)
        return prefixes

    def _everything_found(self, batch: Any) -> list[Any]:
        """Return what the metric found and what the model did: what is missing there may be rounded away in a loss."""
        with random_states_kept(devices_of(self._model)), outputs_of(self._model) as found:
            result = self._metric.of_batch(self._model, batch)
        return [*found, *leaves_of(result)]

    def _try_out(
        self, prefixes: dict[int, PrefixReuse], run: Callable[[], list[Any]], expected: Sequence[Any]
    ) -> list[str]:
        """Check that runs which reuse a prefix find what full ones find; prefixes that fail leave the mapping.

        That no prefix depends on the group that it is for shows in a run in which each group has other weights until
        the first module that holds it is called. That nothing behind a cut depends on more than the prefix hands on
        shows where all before it is replayed, after a run at other weights has overwritten what modules may have left
        behind.

        Args:
            prefixes: By the index of their group, in the order in which the groups come in.
            run: Runs the model on one batch.
            expected: What a run found.

        Returns:
            Why some cannot be reused.

        Raises:
            PrefixError: None can: two runs differ, or a buffer moves.
            _UsedEarlyError: A group is used before its start, it is unknown which one.
        """
        buffers = BufferSnapshot(self._model.modules())
        reasons: list[str] = []
        try:
            again = run()
            if buffers.moved():
                raise PrefixError("a buffer of the model moves when it is measured")
            apart = distance(again, expected)
            check_results("result", 0.0, apart)
            for some in self._disjoint(prefixes):
                try:
                    with FailuresAsPrefixErrors(), self._other_until_called(some):
                        found = distance(run(), again)
                    check_results("result", found, apart)
                except PrefixError as error:
                    raise _UsedEarlyError(str(error)) from error
            with recording_together(list(prefixes.values())):
                run()
            early = self._early(*next(iter(prefixes.items())))
            with corrupted_model(self._model, early, _other_than(early), self._saved_on):
                run()
            # From the last on: what a trial computes was not yet computed, at these weights, for those that follow.
            deepest_first = list(reversed(prefixes))
            for index in [*deepest_first[:1], *deepest_first]:  # what is wrong from the second replay on
                if index in prefixes:
                    try:
                        with FailuresAsPrefixErrors(), prefixes[index].replaying():
                            found = distance(run(), again)
                        check_results("result", found, apart)
                    except PrefixError as error:
                        reasons.append(str(error))
                        prefixes.pop(index).forget()
        finally:
            for prefix in prefixes.values():
                prefix.forget()
        return reasons

    def _disjoint(self, prefixes: dict[int, PrefixReuse]) -> Iterator[list[tuple[PrefixReuse, _Parameters]]]:
        """Yield as many as the memory for their bits admits; a weight of several belongs to the last to come in."""
        seen: set[int] = set()
        some: list[tuple[PrefixReuse, _Parameters]] = []
        taken = 0
        for index, prefix in reversed(prefixes.items()):
            weights = {name: weight for name, weight in self._groups[index].items() if id(weight) not in seen}
            seen |= {id(weight) for weight in weights.values()}
            size = sum(weight.nbytes for weight in weights.values())
            if some and taken + size > self._memory:
                yield some
                some, taken = [], 0
            if weights:
                some.append((prefix, weights))
                taken += size
        if some:
            yield some

    @contextmanager
    def _other_until_called(self, some: Iterable[tuple[PrefixReuse, _Parameters]]) -> Iterator[None]:
        """Let groups have other weights inside a block, each until the first of its prefix's starts is called."""
        with unpublished(self._model), ExitStack() as corruptions, ExitStack() as hooks:
            for prefix, weights in some:
                corruption = corruptions.enter_context(ExitStack())
                corruption.enter_context(corrupted(weights, _ones(weights), saved_on=self._saved_on))
                for module in prefix.starts:
                    before_calls(hooks, module, partial(_close, corruption))
            yield

    def _early(self, index: int, prefix: PrefixReuse) -> dict[str, Tensor]:
        """Return weights of a prefix, then of its group, as many as the memory for their bits admits, at least one."""
        left = self._memory
        some: dict[str, Tensor] = {}
        inside = [one for module in prefix.prefix for one in module.parameters() if obstacle(one) is None]
        for weight in dict.fromkeys([*inside, *self._groups[index].values()]):
            left -= weight.nbytes
            if some and left < 0:
                break
            some[str(len(some))] = weight  # a name that is made up
        return some


class _UsedEarlyError(PrefixError):
    """Some weights are used before a module that holds them is called."""


def _other_than(weights: Mapping[str, Tensor]) -> Pieces:
    """Return 1 − w for each weight w: a normalization behind it takes away neither the sign nor, of zeros, the one."""
    return Pieces(((name, 1 - weight.detach()) for name, weight in weights.items()), replaces=True)


def _ones(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a one for each weight, in no memory."""
    return {name: torch.ones((), dtype=w.dtype, device=w.device).expand(w.shape) for name, w in weights.items()}


def _close(stack: ExitStack, module: nn.Module, arguments: Any) -> None:
    stack.close()


def _answers(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return what a model returns for its own copy of a batch, or, of texts to embed, the loss."""
    own = own_batch(batch, model)
    return {"loss": model_loss(model, own)} if is_of_texts(batch) else called(model, own)


def _say(what: str, reasons: Iterable[str]) -> None:
    for reason in dict.fromkeys(reasons):
        logger.warning(f"Every {what} runs all of the model: {reason}. The numbers are right; it takes longer.")
