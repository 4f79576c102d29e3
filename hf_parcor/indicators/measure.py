"""Both indicators of a model on any constraints: one gradient over the data serves all of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_parcor.arguments import check_count
from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions import Corruption, GradientCorruption, MultiStepCorruption, RandomCorruption
from hf_parcor.evaluation.identity.provenance import described, library_versions, model_name
from hf_parcor.evaluation.losses import Batch, Loss, model_loss
from hf_parcor.evaluation.placement.reach import Reach, target_of
from hf_parcor.evaluation.placement.replicas import whole_model
from hf_parcor.functional import constrained_maximum_value, max_magnitude, vector_norm
from hf_parcor.functional.vectors import numel
from hf_parcor.indicators.estimators import hessian_trace, random_loss_changes
from hf_parcor.indicators.loss_over_data import LossOverData
from hf_parcor.injection import Pieces, corrupted, is_swallowed
from hf_parcor.overriding import undoing_left
from hf_parcor.records.indicators import ConstraintIndicators, IndicatorRecord


@undoing_left()
def measure_indicators(
    model: nn.Module,
    batches: Iterable[Batch],
    constraints: CorruptionConstraint | Sequence[CorruptionConstraint],
    *,
    loss: Loss = model_loss,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    module_types: Any = None,
    layers: int | Iterable[int] | None = None,
    steps: int | None = None,
    probes: int = 16,
    draws: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> IndicatorRecord:
    """Measure the largest and the average loss change, Δ_max and Δ_ave, on each constraint.

    The cost in passes over the data is a forward for the loss; a forward and a backward for the gradient; a forward
    and a backward for the trace, plus about two backwards for each probe; and for each constraint `draws + 1`
    forwards, and where p is 2 or ∞ one more and the multi-step ascent. The model is restored to the last bit, also
    after an exception.

    Args:
        model: Any PyTorch model, bare or under DistributedDataParallel.
        batches: A list, or a `DataLoader` that does not shuffle.
        constraints: The sets S, or one.
        loss: `loss(model, batch)` returns the mean loss of a batch. By default, the model's own loss.
        target_modules: As in `CorruptionEvaluator`. By default, all parameters that can be trained.
        exclude_modules: As in `select_parameters`.
        module_types: As in `select_parameters`.
        layers: As in `select_parameters`.
        steps: K of the multi-step corruption. By default, one pass over the data.
        probes: Hessian-vector products for the trace. Pass 0 if the model has no second derivative.
        draws: Random corruptions for each constraint.
        seed: First seed of both probes and random corruptions.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: Targets match nothing, or nothing that can be corrupted; there are no items; the batches can be
            walked through only once, or differ between walks; or a count is too small.
        TypeError: Something is not a `CorruptionConstraint`.

    Examples:
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 0.5)
        >>> record = measure_indicators(
        ...     model,
        ...     [torch.eye(4)],
        ...     [CorruptionConstraint(epsilon=0.1)],
        ...     loss=lambda m, x: m(x).square().sum() / 2,
        ...     progress=False,
        ... )
        >>> found = record.indicators[0]
        >>> print(f"{found.first_order:.4f} {found.gradient_based:.4f} {found.second_order.mean:.4f}")
        0.1000 0.1050 0.0050
        >>> print(f"{found.monte_carlo.mean:.4f} ± {found.monte_carlo.standard_error:.4f}")
        0.0050 ± 0.0000
    """
    for name, count, minimum in (("seed", seed, 0), ("probes", probes, 0), ("draws", draws, 1)):
        check_count(name, count, minimum)
    constraints = [constraints] if isinstance(constraints, CorruptionConstraint) else constraints
    corruptions = [(RandomCorruption(constraint), *_adversarial(constraint, steps)) for constraint in constraints]
    target = target_of(target_modules, exclude_modules, module_types, layers)
    model = whole_model(model)
    selection = Reach(model).select(**target)
    over_data = LossOverData(model, selection.parameters, batches, loss, progress=progress)
    data = over_data.gradients.data()
    gradient = list(over_data.gradient().values())
    notes = list(selection.notes)
    if not _is_finite(gradient):
        notes.append("the gradient over the data is not finite; nothing is corrupted along it")
    trace = hessian_trace(over_data, probes, seed)
    rows = []
    for at_random, along_gradient, multi_step in tqdm(corruptions, desc="constraints", disable=not progress):
        constraint = along_gradient.constraint
        drawn = random_loss_changes(over_data, constraint, draws, seed)
        rows.append(
            ConstraintIndicators(
                constraint=constraint,
                first_order=float(
                    constrained_maximum_value(gradient, constraint.p, constraint.epsilon, constraint.top_n)
                ),
                gradient_based=over_data.change(_chosen(along_gradient, over_data, seed)),
                multi_step=None if multi_step is None else over_data.change(_chosen(multi_step, over_data, seed)),
                second_order=trace.scaled(drawn.square_norms.mean / (2 * numel(gradient))),
                monte_carlo=drawn.beyond_first_order,
                random=drawn.changes,
            )
        )
        notes += [*_swallowed(over_data, [at_random, along_gradient], seed), *_below_rounding(over_data, rows[-1])]
    return IndicatorRecord(
        model=model_name(over_data.model),
        target=described(target),
        parameters=numel(gradient),
        loss=over_data.value(),
        gradient_norm=float(vector_norm(gradient)),
        hessian_trace=trace,
        indicators=tuple(rows),
        seed=seed,
        data=data,
        versions=library_versions(),
        notes=tuple(notes),
    )


def _adversarial(
    constraint: CorruptionConstraint, steps: int | None
) -> tuple[GradientCorruption, MultiStepCorruption | None]:
    """Return the corruptions that climb; the projection of the second has a closed form for p = 2 and ∞ alone."""
    along_gradient = GradientCorruption(constraint)
    return along_gradient, MultiStepCorruption(constraint, steps) if constraint.p in (2, math.inf) else None


def _chosen(corruption: Corruption, over_data: LossOverData, seed: int) -> Pieces:
    with over_data.measuring():
        over_data.gradients.restart()
        return corruption.pieces(over_data.parameters, over_data.gradients, torch.Generator().manual_seed(seed))


def _is_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.isfinite(max_magnitude(tensors)))


def _swallowed(over_data: LossOverData, corruptions: Sequence[Corruption], seed: int) -> Iterator[str]:
    """Yield a sentence on each corruption that weights narrower than float32 did not take as it was asked for."""
    if all(parameter.dtype.itemsize >= 4 for parameter in over_data.parameters.values()):
        return
    for corruption in corruptions:
        with corrupted(over_data.parameters, _chosen(corruption, over_data, seed), p=2.0) as injection:
            norm = injection.withdraw(2.0)
        asked, realised = float(norm.asked), float(norm.realised)
        if is_swallowed(asked, realised):
            yield (
                f"{corruption}: the weights took a norm of {realised:.3g} where {asked:.3g} was asked for; they are "
                "too narrow for it: measure in float32"
            )


def _below_rounding(over_data: LossOverData, row: ConstraintIndicators) -> Iterator[str]:
    """Yield a sentence if the average loss change under random corruptions is less than rounding can tell."""
    least = over_data.resolution()
    if abs(row.monte_carlo.mean) < least:
        yield (
            f"random {row.constraint}: a mean loss change of {row.monte_carlo.mean:.1e} is less than rounding, "
            f"{least:.1e} of a loss of {over_data.value():.3g}; take a larger ε, or a loss that is computed in float64"
        )
