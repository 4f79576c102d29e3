"""Δ_ave in two ways: by the trace of the Hessian, and by the loss under random corruptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_parcor.arguments import check_count
from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions import RandomCorruption
from hf_parcor.evaluation.losses import Batch
from hf_parcor.evaluation.passes.gradients import trainable
from hf_parcor.functional import inner_product, random_signs, vector_norm
from hf_parcor.indicators.loss_over_data import LossOverData
from hf_parcor.records.indicators import Estimate


def hessian_trace(loss: LossOverData, probes: int = 16, seed: int = 0) -> Estimate:
    r"""Estimate tr(H) of the mean loss over the data with respect to the selected parameters.

    ::

        tr(H) = E[vᵀ H v],    v_i = ±1 with probability ½ each

    H v is the gradient of gᵀv, by double backward. Each batch's graph is built once for all probes, and freed before
    the next batch. A probe is drawn again for each batch, so memory holds only one. The error falls with the number of
    probes, `√(2 Σ_{i≠j} H_ij² / probes)`: for a diagonal H one probe is exact.

    Fused attention kernels have no second derivative, so PyTorch's plain kernel is used meanwhile. Turn off other
    kernels of the model that have none (flash-attention, cuDNN's recurrent layers); otherwise their error is raised.

    Args:
        loss: The loss over data.
        probes: The number of probes v; 0 for none.
        seed: Probe j draws from a CPU generator seeded `seed + j`, so that a seed means the same on every device.

    Returns:
        vᵀHv of each probe, in units of the loss per squared unit of the parameters.

    Raises:
        ValueError: `probes < 0`.
        RuntimeError: Something in the model has no second derivative.

    Examples:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> ten_squares = LossOverData(
        ...     model, dict(model.named_parameters()), [torch.eye(3)], lambda m, x: 5 * m(x).square().sum()
        ... )
        >>> hessian_trace(ten_squares, probes=2).values
        (30.0, 30.0)
    """
    check_count("probes", probes, minimum=0)
    forms = [0.0] * probes
    if not probes:
        return Estimate(())
    with loss.measuring():
        for batch, share in loss.gradients.shares():
            for probe, (along, product) in enumerate(_products(loss, batch, range(seed, seed + probes))):
                forms[probe] += share * float(inner_product(along, product))
    return Estimate(tuple(forms))


def hessian_diagonal(loss: LossOverData, probes: int = 16, seed: int = 0) -> dict[str, Tensor]:
    r"""Estimate the diagonal of H of the mean loss over the data, by name.

    ::

        H_ii = E[v_i (H v)_i],    v_i = ±1 with probability ½ each

    The sum of its entries is the mean of `hessian_trace` with the same probes and seed. Cost, errors and limits are
    the same too.

    Args:
        loss: The loss over data.
        probes: The number of probes v, one or more.
        seed: As in `hessian_trace`.

    Raises:
        ValueError: `probes < 1`.
        RuntimeError: Something in the model has no second derivative.

    Examples:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> squares = LossOverData(
        ...     model, dict(model.named_parameters()), [torch.eye(3)], lambda m, x: 5 * m(x).square().sum()
        ... )
        >>> hessian_diagonal(squares, probes=1)
        {'weight': tensor([[10., 10., 10.]])}
    """
    check_count("probes", probes)
    wide = {name: torch.promote_types(one.dtype, torch.float32) for name, one in loss.parameters.items()}
    diagonal = {name: torch.zeros_like(one, dtype=wide[name]) for name, one in loss.parameters.items()}
    with loss.measuring():
        for batch, share in loss.gradients.shares():
            for pair in _products(loss, batch, range(seed, seed + probes)):
                for found, along, product in zip(diagonal.values(), *pair, strict=True):
                    found.addcmul_(along.to(found.dtype), product.detach().to(found.dtype), value=share / probes)
    return diagonal


def _products(loss: LossOverData, batch: Batch, seeds: Sequence[int]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield v and H v of the mean loss of one batch, for the probe of each seed."""
    parameters = list(loss.parameters.values())
    with sdpa_kernel(SDPBackend.MATH), trainable(parameters):
        gradient = torch.autograd.grad(loss.gradients.loss_on(batch), parameters, create_graph=True, allow_unused=True)
        for seed in seeds:
            signs = random_signs(parameters, torch.Generator().manual_seed(seed))
            along = [sign.to(parameter.dtype) for sign, parameter in zip(signs, parameters, strict=True)]
            yield along, _product(gradient, along, parameters)


def _product(
    gradient: Sequence[Tensor | None], vector: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Return H v, the gradient of gᵀv; zero where the loss does not use a parameter, or only linearly."""
    curved = [(part, along) for part, along in zip(gradient, vector, strict=True) if part is not None and part.grad_fn]
    if not curved:
        return [torch.zeros_like(parameter) for parameter in parameters]
    parts, along = zip(*curved, strict=True)
    product = torch.autograd.grad(parts, parameters, along, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(parameter) if part is None else part
        for part, parameter in zip(product, parameters, strict=True)
    ]


@dataclass(frozen=True)
class RandomLossChanges:
    """How random corruptions ã of one constraint changed a loss.

    Attributes:
        changes: L(w + ã) − L(w) of each draw.
        first_order: ãᵀg of each draw.
        square_norms: ‖ã‖₂² of each draw; ε² for p = 1 and 2, ε²n for p = ∞ and n corrupted weights.
    """

    changes: Estimate
    first_order: Estimate
    square_norms: Estimate

    @property
    def beyond_first_order(self) -> Estimate:
        """Δ_ave: the changes minus their first-order part, whose mean is zero.

        ã and −ã are equally likely, so E[ãᵀg] = 0: subtracting ãᵀg keeps the mean and removes most of the spread.
        """
        pairs = zip(self.changes.values, self.first_order.values, strict=True)
        return Estimate(tuple(change - part for change, part in pairs))


def random_loss_changes(
    loss: LossOverData, constraint: CorruptionConstraint, draws: int = 16, seed: int = 0
) -> RandomLossChanges:
    """Measure the loss over the data under several random corruptions.

    Args:
        loss: The loss over data.
        constraint: The set S; `RandomCorruption` draws from its boundary.
        draws: The number of corruptions; each costs a forward pass over the data.
        seed: Draw t comes from a CPU generator seeded `seed + t`, like trial t of a `CorruptionEvaluator`.

    Raises:
        ValueError: `draws < 1`.
        TypeError: `constraint` is not a `CorruptionConstraint`.
    """
    check_count("draws", draws)
    corruption = RandomCorruption(constraint)
    gradient = loss.gradient()
    changes, first_order, square_norms = [], [], []
    for draw in range(seed, seed + draws):
        chosen = corruption(loss.parameters, generator=torch.Generator().manual_seed(draw))
        changes.append(loss.change(chosen))
        first_order.append(float(inner_product([*chosen.values()], [gradient[name] for name in chosen])))
        square_norms.append(float(vector_norm([*chosen.values()])) ** 2)
    return RandomLossChanges(Estimate(tuple(changes)), Estimate(tuple(first_order)), Estimate(tuple(square_norms)))
