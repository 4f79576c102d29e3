"""How many bits have to flip, at worst, until half of a metric is gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from hf_parcor.corruptions import Quantization, WorstBitFlips
from hf_parcor.evaluation.identity.provenance import described, library_versions, model_name
from hf_parcor.evaluation.losses import Batch, Loss, model_loss
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.passes.gradients import corrupted_model
from hf_parcor.evaluation.placement.reach import Reach, target_of
from hf_parcor.evaluation.placement.replicas import whole_model
from hf_parcor.evaluation.trials import checked_metrics, number_of
from hf_parcor.functional.vectors import numel
from hf_parcor.indicators.loss_over_data import LossOverData
from hf_parcor.model_state import BufferSnapshot, devices_of, evaluation_mode, undone
from hf_parcor.overriding import undoing_left
from hf_parcor.randomness import RandomStates, random_states_kept
from hf_parcor.records.flips import FlipRecord
from hf_parcor.records.metric_info import info_of


@undoing_left()
def measure_flips_to_break(
    model: nn.Module,
    metric: Callable[[nn.Module], Mapping[str, float]],
    batches: Iterable[Batch] | None = None,
    *,
    of: str | Quantization | None = None,
    search: str = "gradient",
    candidates: int = 10,
    search_batches: int | None = 1,
    most: int = 100,
    chance: float = 0.0,
    metric_name: str | None = None,
    greater_is_better: bool | None = None,
    loss: Loss = model_loss,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    module_types: Any = None,
    layers: int | Iterable[int] | None = None,
    progress: bool = True,
) -> FlipRecord:
    """Flip the worst bits (`WorstBitFlips`) one after the other until half of the metric above chance is gone.

    ::

        min {n : m(n) <= chance + (m_clean − chance)/2},    or, of a loss,    min {n : m(n) >= 2 m_clean}

    where m(n) is the metric after n flips; a metric that is not finite counts as broken. Set `chance` to what guessing
    reaches, for example 0.5 for two equally frequent classes. With the default, 0, the threshold is half of the clean
    metric, as in `epsilon_at_half`, and with two classes a broken model may never fall that low.

    Each flip costs one step of `WorstBitFlips` and one run of the metric. The search is greedy: an attacker may need
    fewer flips. The model is restored to the last bit, also after an exception.

    Args:
        model: Any PyTorch model, bare or under DistributedDataParallel.
        metric: `metric(model)` returns numbers by name.
        batches: Data for the search along gradients. By default, those of the metric, if it has any.
        of: As in `WorstBitFlips`.
        search: As in `WorstBitFlips`.
        candidates: As in `WorstBitFlips`.
        search_batches: How many batches the search uses; `batches` in `WorstBitFlips`.
        most: After how many flips to give up.
        chance: The metric that guessing reaches.
        metric_name: Which of the metric's numbers to use. By default, its primary one, or else the first.
        greater_is_better: Whether a large metric is good. By default, what the metric states, or its name says.
        loss: `loss(model, batch)` returns the mean loss of a batch. By default, the model's own loss.
        target_modules: As in `CorruptionEvaluator`. By default, all parameters that can be trained.
        exclude_modules: As in `select_parameters`.
        module_types: As in `select_parameters`.
        layers: As in `select_parameters`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As in `WorstBitFlips`; the search needs batches and there are none; the metric has no number of
            that name; or the clean metric is no better than chance.

    Examples:
        >>> import torch
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 0.25)
        >>> total = lambda m: {"total": float(m.weight.detach().sum())}
        >>> record = measure_flips_to_break(
        ...     model, total, search="data-free", most=1, greater_is_better=True, progress=False
        ... )
        >>> record.values, record.flips
        ((1.0, 0.5), 1)
    """
    corruption = WorstBitFlips(most, of, search, candidates, search_batches)
    target = target_of(target_modules, exclude_modules, module_types, layers)
    model = whole_model(model)
    selection = Reach(model, gradients=corruption.uses_gradients).select(**target)
    if batches is None and isinstance(metric, BatchMetric):
        batches = metric.batches
    source = None
    if corruption.uses_gradients:
        if batches is None:
            raise ValueError(f"batches: expected data for {corruption}, got None; pass batches=, such as a DataLoader")
        source = LossOverData(model, selection.parameters, batches, loss).gradients

    buffers, random_states = BufferSnapshot(model.modules()), RandomStates(devices_of(model))

    def measured() -> Mapping[str, float]:
        with evaluation_mode(model), buffers.undone(), random_states_kept(devices_of(model)):
            random_states.put_back()  # the search may have drawn numbers
            return {name: number_of(value) for name, value in checked_metrics(metric(model)).items()}

    clean = measured()
    name = metric_name or getattr(metric, "primary_metric", None) or next(iter(clean))
    if name not in clean:
        raise ValueError(f"metric_name: expected one of {', '.join(clean)}, got {name!r}; name one of these")
    if greater_is_better is None:
        greater_is_better = info_of(metric, name, [clean[name]]).greater_is_better
    record = FlipRecord(
        model=model_name(model),
        target=described(target),
        parameters=numel(list(selection.parameters.values())),
        settings=corruption.settings(),
        metric=name,
        greater_is_better=greater_is_better,
        chance=chance,
        clean=clean[name],
        data="" if source is None else source.data(),
        versions=library_versions(),
        notes=selection.notes,
    )
    if not record.is_sound:
        raise ValueError(
            f"chance: expected a clean {name} that is finite, and better than chance or above 0, got {clean[name]:g} "
            f"with chance {chance:g}; there is nothing to lose"
        )
    with (
        evaluation_mode(model),
        undone(model),
        tqdm(total=most, desc=f"worst flips until {name} {record.threshold:.3g}", disable=not progress) as bar,
    ):
        for values in corruption.walk(selection.parameters, source):
            buffers.put_back()  # the search runs the model, too
            if values:
                with corrupted_model(model, selection.parameters, values):
                    found = measured()[name]
            else:
                found = clean[name]
            bar.update(min(len(record.values), 1))  # the first is that of no flip
            record = record.after_another(found if math.isfinite(found) else math.nan)
            bar.set_postfix_str(f"{found:.3g}")
            if record.flips is not None:
                break
    return record
