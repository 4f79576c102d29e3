"""Any task of lm-eval, EleutherAI's evaluation harness, as a metric."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_parcor.evaluation.identity.fingerprint import fingerprint
from hf_parcor.evaluation.outputs import share_not_finite
from hf_parcor.model_state import devices_of
from hf_parcor.overriding import override
from hf_parcor.randomness import random_states_kept, seed_the_cpu
from hf_parcor.records.metric_info import POINTS, SHARE, MetricInfo

_SHARES = ("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match", "f1", "em")
_POINTS = ("bleu", "chrf", "ter")
_SEED = 1234  # of lm-eval's own command line, for the examples in a prompt
_DEFAULT_FILTER = "none"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class LmEvalMetric:
    """The numbers of tasks of lm-eval: ARC, HellaSwag, MMLU, LAMBADA, GSM8K, or your own in a YAML file.

    Tasks are loaded once. Each measurement wraps the model in lm-eval's `HFLM` and calls `lm_eval.evaluate`, as
    `lm_eval.simple_evaluate` does, but without its search for all tasks and its report on the machine. Numbers are
    named `task/metric`, or `task/metric,filter` for a filter other than lm-eval's default.

    An answer counts as wrong if a likelihood is NaN or +∞, or if all are −∞; lm-eval would take the first choice then.
    The share of these documents is `predictions_not_finite`. This holds for likelihoods, not for generated texts.

    The metric has no batches with a loss: for corruptions along a gradient, pass `batches=` to `CorruptionEvaluator`,
    `LayerProbe` or `sensitivity`. Use text similar to that of the task, because the gradient is that of the model's
    loss on these batches, not of the task: the corruption is the worst for the loss, and is measured by the task.

    Args:
        tasks: Names of tasks, groups or tags, tasks as lm-eval configures them, or `Task` objects; one or several.
        tokenizer: The model's tokenizer. It is copied, because lm-eval gives it a padding token.
        limit: The number of documents of each task, from its first; a share of them if below 1. By default, all.
        num_fewshot: Examples in a prompt. By default, as many as each task says. They are the same for every
            corruption.
        batch_size: Default 1; "auto" tries what fits.
        primary_metric: The number to look at. By default, the first that the first task lists.
        include_path: A folder with your own tasks; those of lm-eval are then unknown. By default, those of lm-eval.
        model_settings: Other arguments of `HFLM`, such as `max_length` and `add_bos_token`.
        progress: Whether lm-eval shows its progress bars.
        **settings: Other arguments of `lm_eval.evaluate`, such as `apply_chat_template` and `system_instruction`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: There are no tasks, or a name is unknown.
    """

    def __init__(
        self,
        tasks: str | Mapping[str, Any] | Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: float | None = None,
        num_fewshot: int | None = None,
        batch_size: int | str = 1,
        primary_metric: str | None = None,
        include_path: str | Path | None = None,
        model_settings: Mapping[str, Any] | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        found = _library()
        named = list(tasks) if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
        if not named:
            raise ValueError("tasks: expected at least one, got none; name one, such as 'arc_easy'")
        with random_states_kept():
            self._loaded = _loaded(
                named,
                found.tasks.TaskManager(
                    include_path=None if include_path is None else str(include_path),
                    include_defaults=include_path is None,
                ),
            )
        if num_fewshot is not None:
            for task in self._tasks.values():
                if task.get_config("num_fewshot") != 0:  # lm-eval keeps a 0 that a task says, too
                    task.set_config(key="num_fewshot", value=num_fewshot)
        for task in self._tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        self._tokenizer = copy.deepcopy(tokenizer)
        self._limit = limit if limit is None or limit < 1 else int(limit)  # 5.0 is 5 for lm-eval, and in records
        self._batch_size, self._primary, self._progress = batch_size, primary_metric, progress
        self._model_settings = dict(model_settings or {})
        if settings.get("apply_chat_template"):  # as `simple_evaluate` and the command of lm-eval do, not `evaluate`
            settings.setdefault("fewshot_as_multiturn", True)
        self._settings = settings

    @property
    def _tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._loaded["tasks"]
        return tasks

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks, including those in groups and tags."""
        return list(self._tasks)

    @property
    def primary_metric(self) -> str:
        """The number to look at."""
        if self._primary is not None:
            return self._primary
        name, task = next(iter(self._tasks.items()))
        filters = [one.name for one in getattr(task, "_filters", ())] or [_DEFAULT_FILTER]
        return _named(name, f"{next(iter(task.higher_is_better()))},{filters[0]}")

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what a task states about its number; None if nothing."""
        of_task, _, metric = name.rpartition("/")
        metric = metric.partition(",")[0]
        groups: Mapping[str, Any] = self._loaded.get("groups") or {}
        tasks = groups[of_task].get_all_tasks() if of_task in groups else filter(None, [self._tasks.get(of_task)])
        said = {task.higher_is_better().get(metric) for task in tasks} - {None}
        if len(said) != 1:
            return None
        unit = SHARE if metric in _SHARES else POINTS if metric in _POINTS else ""
        return MetricInfo(bool(said.pop()), unit)

    @property
    def notes(self) -> tuple[str, ...]:
        """The versions of lm-eval and of each task, and the numbers of documents and examples, for the record."""
        limit = "all documents" if self._limit is None else f"at most {self._limit:g} documents of each"
        if self._limit is not None and self._limit < 1:
            limit = f"{self._limit:.0%} of the documents of each"
        tasks = ", ".join(
            f"{name} (version {task.VERSION}, {task.get_config('num_fewshot')} examples)"
            for name, task in self._tasks.items()
        )
        return (f"lm-eval {_version()}, {limit}: {tasks}.",)

    def identity(self) -> dict[str, Any]:
        """Return the tasks with their documents, and all settings except those of the machine."""
        return {
            "lm_eval": _version(),
            "tasks": {name: fingerprint([str(sorted(_plain(task)))]) for name, task in self._tasks.items()},
            "documents": {name: fingerprint(self._documents(task)) for name, task in self._tasks.items()},
            "limit": self._limit,
            "model_settings": self._model_settings,
            "settings": self._settings,
            "tokenizer": self._tokenizer,
        }

    def _documents(self, task: Any) -> Iterator[Any]:
        """Return the documents that count, as JSON says them."""
        count = len(task.eval_docs)
        if self._limit is not None:
            count = math.ceil(count * self._limit) if self._limit < 1 else int(self._limit)
        return (str(document) for document in islice(task.eval_docs, count))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the numbers of all tasks and groups, by `task/metric`.

        Raises:
            TypeError: The model has no configuration, so it is not one of Transformers.
            ValueError: No task returned a number.
        """
        library = _library()
        from lm_eval.models.huggingface import HFLM

        config: Any = getattr(model, "config", None)
        if config is None:
            raise TypeError(f"model: expected one of Transformers, got {type(model).__name__} without a configuration")
        with (
            torch.no_grad(),
            random_states_kept(devices_of(model)),
            contextlib.nullcontext() if self._progress else contextlib.redirect_stderr(io.StringIO()),
            _guarded(self._tasks.values()) as guards,
        ):
            seed_the_cpu(_SEED)
            for task in self._tasks.values():
                task.set_fewshot_seed(seed=_SEED)
            language_model = HFLM(
                pretrained=model, tokenizer=self._tokenizer, batch_size=self._batch_size, **self._model_settings
            )
            found = library.evaluate(
                lm=language_model,
                task_dict=self._loaded,
                limit=self._limit,
                bootstrap_iters=0,
                log_samples=False,
                **self._settings,
            )
        metrics = {
            _named(task, key): float(value)
            for task, of_task in found["results"].items()
            for key, value in of_task.items()
            if "," in key and "_stderr," not in key and isinstance(value, Real)
        }
        if not metrics:
            raise ValueError(f"tasks: expected numbers of {', '.join(self._tasks)}, got none; name other tasks")
        return {**metrics, **share_not_finite(sum(one.lost for one in guards), sum(one.calls for one in guards))}


def _named(task: str, key: str) -> str:
    """Return the name of a number that lm-eval calls `metric,filter`."""
    metric, _, by = key.partition(",")
    return f"{task}/{metric}" if by == _DEFAULT_FILTER else f"{task}/{key}"


class _Guard:
    """`process_results` of a task, where a document without a finite likelihood is wrong.

    The first choice would be taken there, and may be right.

    Args:
        task: The task.
    """

    def __init__(self, task: Any) -> None:
        self._process, self._better = task.process_results, task.higher_is_better()
        self.calls = self.lost = 0

    def __call__(self, document: Any, results: Sequence[Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._process(document, results)
        self.calls += 1
        values = [value for value in map(_likelihood, results) if value is not None]
        finite = not any(math.isnan(value) or value == math.inf for value in values)
        if finite and (not values or max(values) > -math.inf):
            return found
        self.lost += 1
        return {metric: _wrong(value) if self._better.get(metric) else value for metric, value in found.items()}


def _wrong(value: Any) -> Any:
    """Return what a document adds to a number of which much is good, if its answer is wrong.

    That is 0; or, as F1 and Matthews' correlation need them, the right choice and another.
    """
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(choice, Integral) for choice in value):
        return value[0], int(not value[0])
    return 0.0 if isinstance(value, Real) else value


@contextmanager
def _guarded(tasks: Collection[Any]) -> Iterator[list[_Guard]]:
    """Put a guard into each task, and take it out again."""
    with contextlib.ExitStack() as block:
        guards = [_Guard(task) for task in tasks]
        for task, guard in zip(tasks, guards, strict=True):
            override(block, task, process_results=guard)
        yield guards


def _likelihood(result: Any) -> float | None:
    """Return the likelihood in what lm-eval keeps of a request; None in a text."""
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return float(first) if isinstance(first, Real) else None


def _loaded(tasks: Collection[Any], manager: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load(list(tasks))
    except KeyError as error:
        raise ValueError(
            f"tasks: expected names that lm-eval knows, got {', '.join(map(str, tasks))} ({error.args[0]}); see "
            "lm-eval ls tasks, or name the folder of your own with include_path="
        ) from error
    return found


def _plain(task: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings of a task, of functions without where they lie."""
    for name, value in dict(task.dump_config()).items():
        yield str(name), _ADDRESS.sub("", str(value))


def _version() -> str:
    return importlib.metadata.version("lm-eval")


def _library() -> Any:
    """Return lm-eval.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(
            f"tasks: expected lm-eval 0.4.13 or later, got none that can be imported ({error}); pip install "
            "'hf-parcor[lm-eval]'"
        ) from error
    return lm_eval
