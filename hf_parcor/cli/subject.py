"""What is measured: a model, its task, and the data, as the flags name them."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_parcor.cli.sources import windows_of
from hf_parcor.cli.terminal import refused, tell
from hf_parcor.errors import InputError, nearest
from hf_parcor.evaluation import BatchMetric, LmEvalMetric
from hf_parcor.records import EvaluationData
from hf_parcor.tasks import Encoding, Processed, Rows, Task, check_head, load_pretrained, task_named, task_of
from hf_parcor.tasks.adapters import Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from hf_parcor.corruptions import Interpolation

GGUF = ".gguf"


@dataclass(frozen=True)
class Subject:
    """A model and the data that it is measured on.

    Attributes:
        model: On its device.
        metric: What measures the model; most often it has the data.
        batches: Data for the loss that gradients are taken of, where the metric has none; else None.
        shown: Returns which of the numbers that the metric found is to be reported.
        data: What records call the data.
        task: The Hub's name of the task.
        told: Flags that a record has to name: those that say how it was loaded; the metric, where its numbers may be
            called otherwise (of a local folder the end of its path); and of lm-eval, whose gradients are of other
            data, these.
    """

    model: Any
    metric: BatchMetric | LmEvalMetric
    batches: Any
    shown: Callable[[Mapping[str, Any]], str]
    data: EvaluationData
    task: str
    told: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, *, progress: bool, saved_on: Any = None) -> dict[str, Any]:
        """Return what all that measures the subject takes beside model and metric, by name.

        Args:
            progress: Whether to show progress.
            saved_on: Where the bits of corrupted weights are kept; None for their own device.
        """
        return {
            "progress": progress,
            "saved_on": saved_on,
            "evaluated_on": self.data,
            "task": self.task,
            "batches": self.batches,
        }


def load_subject(arguments: argparse.Namespace, rows: Rows, given: Mapping[str, str]) -> Subject:
    """Return what the flags of `add_subject`, `add_loading` and `add_running` name.

    Args:
        arguments: These flags.
        rows: All rows of the data.
        given: The columns that the flags name, by role.

    Raises:
        InputError: There is no such model, column, metric or device, or they do not fit together.
    """
    device = None if arguments.device_map else find_device(arguments.device)
    rows = rows.first(arguments.limit)
    task, columns = find_task(arguments, rows, given)
    origin = origin_of(arguments)
    check_head(task, arguments.model, **origin)
    with warnings.catch_warnings(), _no_bar_of_loading() if arguments.quiet else nullcontext():
        warnings.filterwarnings("ignore", ".*device_map keys do not match")  # refused below
        model = task.load_model(arguments.model, **origin, **_loading_of(arguments))
    model.config._name_or_path = arguments.model  # of an adapter, Transformers keeps the name of its base
    if device is None:
        _check_map(arguments.device_map, model)
    else:
        model = model.to(device)
    processor = task.load_processor(arguments.model, **origin)
    processed = prepared(arguments, task, model, processor)
    subject = measured(task, processed, rows, columns, arguments.batch_size, arguments.metric)
    return replace(subject, told={**arguments.told, **subject.told})


def other_models(arguments: argparse.Namespace, subject: Subject) -> list[Interpolation]:
    """Return the corruptions by weights of other models that `--towards` and `--shares` ask for.

    Args:
        arguments: Those of `add_corruptions`, `add_loading` and `add_running`.
        subject: What they are to replace the weights of.

    Raises:
        InputError: There is no such model, or it has another head.
    """
    from hf_parcor.corruptions.interpolation import Interpolation, OtherWeights

    named = arguments.towards or ()
    short = {name: Path(name).name if Path(name).exists() else name for name in named}
    found = []
    for name in named:
        with _no_bar_of_loading() if arguments.quiet else nullcontext():
            weights = OtherWeights(_weights_of(name, arguments, subject))
        label = short[name] if len(set(short.values())) == len(named) else name
        with refused(ValueError):
            found += [Interpolation(share, weights, label) for share in arguments.shares or (1.0,)]
    return found


def _weights_of(name: str, arguments: argparse.Namespace, subject: Subject) -> Mapping[str, Tensor]:
    """Return the weights of another model by name: of a GGUF file in floating point, of an adapter merged.

    Those that its files lack, which Transformers draws at random, are left out; and those that are tied in what is
    measured, and not in the other model.
    """
    from transformers import PreTrainedModel

    from hf_parcor.corruptions.interpolation import dequantized

    if Path(name).suffix == GGUF:
        kind, file = type(subject.model), Path(name)
        of_file = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        loader = SimpleNamespace(
            __name__=kind.__name__, from_pretrained=lambda _, **settings: kind.from_pretrained(**of_file, **settings)
        )
        tells = True
        loaded = load_pretrained("towards", loader, name, dtype=arguments.dtype, output_loading_info=tells)
    else:
        name, revision = _with_revision(name)
        task = task_named(subject.task)
        origin = {"revision": revision, "trust_remote_code": arguments.trust_remote_code}
        check_head(task, name, **origin)
        tells = isinstance(subject.model, PreTrainedModel) and Adapter.found(name, revision) is None
        settings = {**origin, "dtype": arguments.dtype, "output_loading_info": tells}
        loaded = task.load_model(name, to_train=True, **settings)
    model, lacked = (loaded[0], loaded[1]["missing_keys"]) if tells else (loaded, ())
    if hasattr(model, "merge_and_unload"):  # an adapter, around what it belongs to
        model = model.merge_and_unload()
    weights = {key: weight for key, weight in model.state_dict().items() if key not in lacked}
    for tied in _tied(subject.model):
        there = [key for key in tied if key in weights]
        if any(not dequantized(weights[there[0]]).equal(dequantized(weights[key])) for key in there[1:]):
            tell(f"{name} has several weights for {' = '.join(there)}, which is one here, and is left out")
            weights = {key: weight for key, weight in weights.items() if key not in there}
    return weights


def _tied(model: Any) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _with_revision(name: str) -> tuple[str, str]:
    """Return the name of a model, and its revision, which stands behind an @: "main" if there is none, or a folder.

    Raises:
        InputError: None of them stands there.

    Examples:
        >>> _with_revision("me/model@v1"), _with_revision("me/model")
        (('me/model', 'v1'), ('me/model', 'main'))
    """
    before, at, revision = name.rpartition("@")
    if not at or Path(name).exists():
        return name, "main"
    if not before or not revision:
        raise InputError(f"--towards: expected NAME@REVISION, got {name!r}; write both, or the name alone")
    return before, revision


@contextmanager
def _no_bar_of_loading() -> Iterator[None]:
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def origin_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return which version of a model is loaded, and whether it may bring code, as `from_pretrained` takes it."""
    return {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}


def _loading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of `add_loading` say, as `from_pretrained` takes it.

    Raises:
        InputError: A device of the map is not here.
    """
    settings = {"dtype": arguments.dtype}
    if arguments.device_map is None:
        return settings
    if not isinstance(arguments.device_map, str):
        for device in dict.fromkeys(arguments.device_map.values()):
            if device != "disk":
                find_device(device, "--device-map")
    return {**settings, "device_map": arguments.device_map, "offload_folder": arguments.offload_folder}


def _check_map(device_map: Mapping[str, Any] | str, model: Any) -> None:
    """Refuse a map of other modules than the model's, or without some of them: Transformers leaves these on the CPU.

    Raises:
        InputError: It is such a map.
    """
    if isinstance(device_map, str):
        return
    weights = [name for name, _ in model.named_parameters()]
    modules = {name for name, _ in model.named_modules()}.union(weights)
    for name in device_map:
        if name not in modules:
            raise InputError(
                f"--device-map: expected modules of the model, got {name!r}{nearest(name, modules)}; mend its name"
            )
    for name in weights:
        if not any(part in ("", name) or name.startswith(f"{part}.") for part in device_map):
            raise InputError(f"--device-map: expected a device for every weight, got none for {name}; add its module")


def find_task(arguments: argparse.Namespace, rows: Rows, given: Mapping[str, str]) -> tuple[Task, dict[str, str]]:
    """Return the task that is asked for, or that the model is for, and its columns; say what was found.

    Raises:
        InputError: There is no such task, or the data lacks a column for it.
    """
    task = (
        task_named(arguments.task) if arguments.task else task_of(arguments.model, rows, given, **origin_of(arguments))
    )
    columns = task.find_columns(rows, given)
    found = ", ".join(f"{role} from column {column!r}" for role, column in columns.items())
    tell(f"{task.name}: {found}; {len(rows.entries)} rows")
    return task, columns


def measured(
    task: Task, processed: Processed, rows: Rows, columns: Mapping[str, str], batch_size: int, metric: str | None
) -> Subject:
    """Return a model with the batches of some rows, and the metric that is asked for or usual.

    Raises:
        InputError: The labels do not fit the model, or there is no such metric.
    """
    examples = task.examples(rows, columns, processed)
    batches = task.batches(examples, processed, batch_size)
    name, remark = (metric, "") if metric else task.usual_metric(processed, batches)
    if remark:
        tell(remark)
    with refused(ImportError):
        measuring = task.metric(name, processed, batches)
    if isinstance(measuring, LmEvalMetric):
        of_tasks = measuring.primary_metric
        data = EvaluationData(f"lm-eval: {', '.join(measuring.tasks)}")
        return Subject(
            processed.model,
            measuring,
            batches,
            lambda found: task.shown(of_tasks, found),
            data,
            task.name,
            {**rows.data.flags, "metric": name},
        )
    own = {} if name in task.metrics else {"metric": Path(name).name if Path(name).exists() else name}
    return Subject(processed.model, measuring, None, lambda found: task.shown(name, found), rows.data, task.name, own)


def prepared(arguments: argparse.Namespace, task: Task, model: Any, processor: Any) -> Processed:
    """Return a model and what prepares its inputs, as the flags say how text becomes tokens.

    Raises:
        InputError: A model of many languages is not told between which.
    """
    encoding = Encoding(
        arguments.max_length,
        arguments.prefix,
        arguments.source_lang,
        arguments.target_lang,
        arguments.box_format,
        *windows_of(arguments),
    )
    processed = Processed(model, processor, encoding)
    task.prepare(processed)
    return processed


def find_device(name: str | int | None, flag: str = "--device") -> Any:
    """Return a device that can hold tensors: that of the name, or by default the accelerator, or else the CPU.

    Of several processes each gets an accelerator of its own.

    Raises:
        InputError: There is no such device.
    """
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    by_default = "cpu" if kind is None else f"{kind.type}:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(by_default if name is None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{flag}: expected a device that is here, got {name!r} ({reason}); name cpu") from error
    return device
