"""What each format costs each part of a model: estimates from one backward pass over the data, and measurements."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_parcor.arguments import check_count
from hf_parcor.corruptions.catalogue import catalogue_name
from hf_parcor.distributed.fsdp import class_of
from hf_parcor.distributed.processes import ALONE, MeasuringProcesses
from hf_parcor.evaluation.identity.fingerprint import fingerprint_of_weights
from hf_parcor.evaluation.identity.provenance import library_versions, model_name, task_of
from hf_parcor.evaluation.losses import Batch, Loss, model_loss
from hf_parcor.evaluation.measurement import MEMORY, Measurement, Metric
from hf_parcor.evaluation.metrics import BatchMetric, NotFiniteError, WithDivergence
from hf_parcor.evaluation.metrics.loss import LossMetric
from hf_parcor.evaluation.metrics.over_batches import AroundMetric
from hf_parcor.evaluation.passes.gradients import DatasetGradients
from hf_parcor.evaluation.placement.memory import check_free, too_little
from hf_parcor.evaluation.placement.reach import Reach
from hf_parcor.evaluation.placement.replicas import whole_model
from hf_parcor.functional.vectors import numel
from hf_parcor.indicators.estimators import hessian_diagonal
from hf_parcor.indicators.format_scores import GradientOverData, each_batch, needed_memory, score_groups
from hf_parcor.indicators.loss_over_data import LossOverData
from hf_parcor.indicators.matrix_groups import (
    FEWEST_DIMENSIONS,
    FORMATS,
    Format,
    checked_formats,
    fits,
    matrix_groups,
    mean_bits,
)
from hf_parcor.injection import Device, check_weights, forget_derived
from hf_parcor.model_state import BufferSnapshot, evaluation_mode
from hf_parcor.overriding import undoing_left
from hf_parcor.records.data import EvaluationData
from hf_parcor.records.metric_info import MetricInfo, stated_by
from hf_parcor.records.sensitivity import DIVERGENCE, FISHER, FormatScore, SensitivityRecord, WeightGroup, some_of
from hf_parcor.targets.kinds import linear_modules


@undoing_left()
def sensitivity(
    model: nn.Module,
    metric: Metric | Iterable[Batch],
    formats: Sequence[Format] = FORMATS,
    groups: Mapping[str, str | Collection[str]] | str | None = None,
    *,
    batches: Iterable[Batch] | None = None,
    budget: int | None = None,
    probes: int = 0,
    seed: int = 0,
    loss: Loss = model_loss,
    memory: int = MEMORY,
    metric_info: Mapping[str, MetricInfo] | None = None,
    progress: bool = True,
    saved_on: Device = None,
    evaluated_on: EvaluationData | None = None,
    task: str = "",
    checkpoint: str | Path | None = None,
) -> SensitivityRecord:
    """Score every group of weights in every format, and measure the most promising ones.

    Let δ = Q(w) − w, g be the gradient of the mean loss, and F the mean over items of the squared gradient. One
    backward pass over the data gives the scores, in units of the loss::

        first_order     gᵀδ
        fisher          ½ Σ_i F_i δ_i²                          as NVIDIA's AutoQuantize weighs errors
        fit             ½ Σ_tensors mean(F) ‖δ‖²                as in FIT, one weight a tensor
        second_order    gᵀδ + ½ Σ_i H_ii δ_i²                   with `probes`, by Hutchinson's diagonal

    Then metrics are measured with one group at a time in one format, and all other weights unchanged. `budget` limits
    this to the cells with the largest Fisher scores. With a `BatchMetric`, the divergence is measured too
    (`WithDivergence`): how far the model's answers are from those of the unchanged model. Only matrices are quantized,
    as tools do it: biases and norms stay. The weights are restored to the last bit, also after an exception.

    Groups that the data do not use, such as the layers for images where the data are texts, are left out of the
    record, and so stay as they are in every recipe: nothing is found out about them. `unused` names them.

    Memory beside the model: two float32 sums as large as the groups (three with `probes`), and the gradient of one
    batch. Without `probes`, if there is only one batch or an accelerator has less free memory than that, scores are
    added up batch by batch. Then only the gradient is held, in the dtype of the weights: 2 bytes for each 16-bit
    weight instead of 10. The weights are rounded to every format once a batch, which may take longer than the pass. If
    there is no memory for that either, an error is raised before the pass.

    Under `torchrun` batches are spread over all processes in the pass and in measurements, but not for `probes`.

    Args:
        model: Any PyTorch model, bare or under DistributedDataParallel.
        metric: `metric(model)` returns numbers by name; or batches alone, for their mean loss.
        formats: `Quantization` and `FloatQuantization` objects. Default `FORMATS`. A format that does not fit a group,
            for example groups of 32 in a matrix of 48 columns, is left out there, and noted.
        groups: Which weights get one format together: a mapping from names to targets, as for a `LayerProbe`, for
            example from `by_module`, `by_layer` or `by_kind`; or "layers", "kinds", "modules" or "adapters", without
            the groups that cannot be corrupted, which are noted, and with a weight that several groups share in the
            first of them. By default, each linear module is a group, without output layers, which tools leave out
            too, and without the output projection of `nn.MultiheadAttention`, which tools cannot quantize.
        batches: Data for the pass. By default, those of the metric if it is a `BatchMetric`.
        budget: How many cells are measured: all by default, none for 0. A larger budget goes on from the checkpoint of
            a smaller one.
        probes: Hessian-vector products for the second order. Default 0, for none.
        seed: First seed of the probes.
        loss: `loss(model, batch)` returns the mean loss of a batch. If the metric is not a `BatchMetric` and has no
            "loss", this one is measured too, as "loss".
        memory: As in `CorruptionEvaluator`.
        metric_info: As in `CorruptionEvaluator`.
        progress: Whether to show progress bars.
        saved_on: As in `CorruptionEvaluator`.
        evaluated_on: As in `CorruptionEvaluator`.
        task: As in `CorruptionEvaluator`.
        checkpoint: As in `CorruptionEvaluator.evaluate`. After an interruption, measured cells are kept; the pass is
            repeated.

    Raises:
        ValueError: There are no formats, or two are the same, or none fits a group; a weight is in two groups; no
            group has a matrix; there are no batches; too little memory is free (`NotEnoughMemoryError`); the unchanged
            model gives NaN or infinities (`NotFiniteError`); or as in `CorruptionEvaluator.evaluate`.
        TypeError: Something is not a `Quantization` or `FloatQuantization`.

    Examples:
        >>> from hf_parcor import Quantization
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> for weight, values in zip(model.parameters(), ([[1.0, 0.4], [0.0, 1.0]], [[1.0, 0.2]]), strict=True):
        ...     weight.data = torch.tensor(values)
        >>> record = sensitivity(
        ...     model,
        ...     [torch.eye(2)],
        ...     [Quantization(2, "channel")],
        ...     {"first": "0", "second": "1"},
        ...     loss=lambda m, x: m(x).square().mean() / 2,
        ...     progress=False,
        ... )
        >>> for cell in record.cells:
        ...     print(
        ...         f"{cell.group}: {cell.scores['first_order']:.3f} estimated, {record.drop(cell, 'loss'):.3f} true"
        ...     )
        first: -0.120 estimated, -0.080 true
        second: -0.060 estimated, -0.050 true
    """
    check_count("seed", seed, minimum=0)
    check_count("probes", probes, minimum=0)
    if budget is not None:
        check_count("budget", budget, minimum=0)
    formats = checked_formats(formats)
    model = whole_model(model)
    metric, batches = metric_and_batches(metric, batches, loss)
    selected, notes = matrix_groups(Reach(model), formats, groups)
    together = {name: weight for group in selected.values() for name, weight in group.items()}
    check_weights(together)
    if budget != 0 and isinstance(metric, BatchMetric):
        metric = WithDivergence(metric, model)
    diagonal = hessian_diagonal(LossOverData(model, together, batches, loss), probes, seed) if probes else None
    processes = MeasuringProcesses.launched()
    forget_derived()
    buffers = BufferSnapshot(model.modules()).undone()
    with evaluation_mode(model), buffers, torch.random.fork_rng(devices=[]), torch.no_grad():
        shown = progress and processes.index == 0
        source = DatasetGradients(model, together, batches, loss, progress=shown, processes=processes)
        little = bool(too_little(needed_memory(together, sums=2)))
        thrifty = not probes and (len(source) == 1 or any(processes.gather(little)))
        if thrifty:
            check_free(needed_memory(together, sums=0), "the gradient of a batch", _score_less)
        parts = each_batch(source) if thrifty else [GradientOverData.of(source, diagonal)]
        cells = score_groups(selected, formats, parts, processes if thrifty else ALONE)
        reached = set().union(*processes.gather(source.reached))
    _check_finite([cell.scores[FISHER] for cell in cells])
    notes += _unfit(selected, formats, cells)
    promising = sorted(cells, key=_least_risky_last)[:budget]
    places = {(cell.group, cell.format) for cell in promising}
    wanted = frozenset(
        (at, index)
        for at, group in enumerate(selected)
        for index, one in enumerate(formats)
        if (group, str(one)) in places
    )
    measurement = Measurement(
        model,
        metric,
        batches,
        loss,
        reuse_prefix=True,
        memory=memory,
        metric_info=metric_info,
        progress=progress,
        saved_on=saved_on,
    )
    weights = fingerprint_of_weights(model)
    of_clean = metric.clean if isinstance(metric, WithDivergence) else None
    kept = checkpoint if budget != 0 else None  # without a divergence it would be that of another run
    clean, data, rows = measurement.run(selected, formats, 1, 0, weights, kept, wanted, of_clean)
    found = {(group, row.label): row for group, of_group in zip(selected, rows, strict=True) for row in of_group}
    measured = {place: {name: row.mean(name) for name in row.metrics} for place, row in found.items()}
    cells = [replace(cell, measured=measured.get((cell.group, cell.format), {})) for cell in cells]
    unchanged = {name: clean.mean(name) for name in clean.metrics}
    unused = _unused(selected, reached, cells, unchanged)
    selected = {label: group for label, group in selected.items() if label not in unused}
    together = {name: weight for group in selected.values() for name, weight in group.items()}
    linear, chosen = set(linear_modules(model)), set(together.values())
    return SensitivityRecord(
        model=model_name(model),
        groups=_recorded(model, selected),
        formats=_described(formats),
        cells=tuple(cell for cell in cells if cell.group not in unused),
        clean=unchanged,
        metric=_shown(metric, list(clean.metrics)),
        metric_info=measurement.infos([clean, *found.values()]),
        parameters=numel(list(model.parameters())),
        outside=tuple(
            name
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or module in linear)
            and module._parameters.get("weight") not in chosen  # as an attribute, it may be computed, and counted
        ),
        loaded_part=_loaded_part(model),
        kept_in_float=_kept_in_float(model),
        unused=unused,
        kinds=_kinds(model, together.values()),
        data=data,
        weights=weights,
        evaluated_on=evaluated_on,
        task=task or task_of(model),
        versions=library_versions(),
        notes=(
            *notes,
            *_without_scores([cell for cell in cells if cell.group not in unused]),
            *measurement.notes,
            *(f"{group} in {label}: {note}" for (group, label), row in found.items() for note in row.notes),
        ),
    )


def _score_less(device: torch.device, needed: int) -> str:
    return (
        "score fewer groups at a time (groups, or --target-modules), each with a call of its own, or spread the model "
        "over several devices (device_map)"
    )


def _check_finite(scores: Sequence[float]) -> None:
    if scores and not any(map(math.isfinite, scores)):
        raise NotFiniteError(
            "model: expected finite gradients of the loss, got "
            f"{'NaN' if any(map(math.isnan, scores)) else 'infinity'} in every part, with the weights as they are; "
            "look for NaN among the weights, or load them in another precision (dtype='float32')"
        )


def _least_risky_last(cell: FormatScore) -> float:
    score = cell.scores[FISHER]
    return -math.inf if math.isnan(score) else -score


def unscored(
    model: nn.Module,
    formats: Sequence[Format] = FORMATS,
    groups: Mapping[str, str | Collection[str]] | str | None = None,
) -> SensitivityRecord:
    """Return the groups and formats of `sensitivity` and their bits, without scores: the model is not run.

    Args:
        model: As in `sensitivity`.
        formats: As in `sensitivity`.
        groups: As in `sensitivity`.

    Raises:
        ValueError: As in `sensitivity`.
        TypeError: As in `sensitivity`.
    """
    formats = checked_formats(formats)
    model = whole_model(model)
    selected, notes = matrix_groups(Reach(model), formats, groups)
    cells = [
        FormatScore(label, str(one), mean_bits(one, weights), {})
        for label, weights in selected.items()
        for one in formats
        if fits(one, weights)
    ]
    return SensitivityRecord(
        model_name(model),
        _recorded(model, selected),
        _described(formats),
        tuple(cells),
        clean={},
        metric="",
        notes=(*notes, *_unfit(selected, formats, cells)),
    )


def _recorded(model: nn.Module, selected: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, WeightGroup]:
    """Return groups as records keep them."""
    holders = _holders(model, {name: weight for group in selected.values() for name, weight in group.items()})
    return {
        label: WeightGroup(
            {name: weight.numel() for name, weight in group.items()},
            sum(8 * one.dtype.itemsize * one.numel() for one in group.values()) / numel(list(group.values())),
            {name: holders[name] for name in group},
        )
        for label, group in selected.items()
    }


def _described(formats: Sequence[Format]) -> dict[str, dict[str, Any]]:
    """Return formats as records keep them, by their labels."""
    return {str(one): {"corruption": catalogue_name(one), "settings": one.settings()} for one in formats}


def _kinds(model: nn.Module, together: Iterable[nn.Parameter]) -> dict[str, tuple[int, int]]:
    """Return by the class of what holds matrices how many of these modules have one in a group, and how many are."""
    within: dict[str, tuple[int, int]] = {}
    chosen = set(together)
    for module in model.modules():
        matrices = [one for one in module.parameters(recurse=False) if one.ndim >= FEWEST_DIMENSIONS]
        if matrices:
            count, of = within.get(type(module).__name__, (0, 0))
            within[type(module).__name__] = (count + any(one in chosen for one in matrices), of + 1)
    return within


def metric_and_batches(metric: Any, batches: Iterable[Batch] | None, loss: Loss) -> tuple[Metric, Iterable[Batch]]:
    """Return what `sensitivity` measures, and the data that gradients are taken on.

    Raises:
        ValueError: There are no batches.
    """
    if not callable(metric):
        return LossMetric(metric, loss), metric if batches is None else batches
    if isinstance(metric, BatchMetric):
        return metric, metric.batches if batches is None else batches
    if batches is None:
        raise ValueError(
            "batches: expected data for the backward pass, got None; pass batches=, such as a DataLoader, or a metric "
            "that is made of batches"
        )
    return _WithLoss(metric, LossMetric(batches, loss)), batches


class _WithLoss(AroundMetric):
    """A metric, and the mean loss where it has none."""

    def __init__(self, metric: Metric, loss: LossMetric) -> None:
        super().__init__(metric)
        self._loss = loss

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        found = dict(self._metric(model))
        return found if "loss" in found else {**found, **self._loss(model)}

    def identity(self) -> Mapping[str, Any]:
        """Return what is called."""
        return {"metric": self._metric, "loss": self._loss}

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the metric says, or that a loss is to be small."""
        return stated_by(self._metric, name) or self._loss.info_of(name)


def _shown(metric: Metric, names: Sequence[str]) -> str:
    """Return which number to look at: the metric's primary one, or its first that is no loss, or the loss."""
    primary = getattr(metric, "primary_metric", None)
    own = [name for name in names if name != DIVERGENCE]
    return str(primary) if primary in names else next((name for name in own if name != "loss"), own[0])


def _unfit(groups: Collection[str], formats: Sequence[Format], cells: Sequence[FormatScore]) -> Iterator[str]:
    """Yield a sentence on each format that does not fit all groups."""
    fit = {(cell.group, cell.format) for cell in cells}
    for label in map(str, formats):
        without = [group for group in groups if (group, label) not in fit]
        if without:
            yield f"{label} does not fit {some_of(without)}, whose rows are no whole number of blocks"


def _unused(
    groups: Mapping[str, Collection[str]],
    reached: Set[str],
    cells: Sequence[FormatScore],
    clean: Mapping[str, float],
) -> tuple[str, ...]:
    """Return the groups that the loss does not depend on, and that change nothing which was measured.

    The loss may not depend on what it is detached from, which a measurement tells; where nothing was measured, nothing
    is known. If the loss depends on nothing at all, that says nothing of a group.
    """
    changing = {cell.group for cell in cells if any(clean.get(name) != value for name, value in cell.measured.items())}
    unused = [label for label, names in groups.items() if label not in changing and reached.isdisjoint(names)]
    return tuple(unused) if len(unused) < len(groups) else ()


def _without_scores(cells: Sequence[FormatScore]) -> Iterator[str]:
    """Yield a sentence on the groups whose scores are all zero: of a gradient of zero, or of none, or of no error."""
    scored = {cell.group: False for cell in cells}
    for cell in cells:
        scored[cell.group] |= cell.scores["fit"] != 0  # NaN is a gradient
    without = [group for group, found in scored.items() if not found]
    if without:
        yield (
            f"all scores are 0 of {some_of(without)}: no format changes them, the loss has no slope there, or "
            "something behind them passes no gradient back; what is measured of them tells, and scores of 0 do not"
        )


def _holders(model: nn.Module, together: Mapping[str, nn.Parameter]) -> dict[str, dict[str, str]]:
    """Return by weight the modules that hold it, each with its class: what tools quantize depends on that."""
    found: dict[str, dict[str, str]] = {name: {} for name in together}
    names = {weight: name for name, weight in together.items()}
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight in names:
                place = f"{prefix}.{name}" if prefix else name
                kind = _class_name(module)
                if name != "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
                    kind += f" with {name}"  # of which its weight is computed
                found[names[weight]][place.removesuffix(".weight")] = kind
    return found


def _loaded_part(model: nn.Module) -> str:
    """Return the name of the model of Transformers in one of sentence-transformers; "" of all other models."""
    if class_of(model).__name__ != "SentenceTransformer":
        return ""
    return next((name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)), "")


def _kept_in_float(model: nn.Module) -> tuple[str, ...]:
    """Return the names, or patterns of them, that Transformers' quantizers add to those that they are told to skip."""
    loaded = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return tuple(sorted(loaded._keep_in_fp32_modules or ())) if loaded is not None else ()


def _class_name(module: nn.Module) -> str:
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return kind.__name__  # with those that PyTorch derives: they do not compute as a linear layer does
    base = next((one.__name__ for one in (nn.Linear, nn.Embedding) if isinstance(module, one)), None)
    return kind.__name__ if base is None else f"{kind.__name__}({base})"
