"""The trace of the Hessian of a loss over data, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_parcor.evaluation.gradients import Batch, trainable
from hf_parcor.functional import inner_product, random_signs
from hf_parcor.functional.arguments import check_count
from hf_parcor.indicators.estimate import Estimate
from hf_parcor.indicators.loss import LossOverData


def hessian_trace(loss: LossOverData, probes: int = 16, seed: int = 0) -> Estimate:
    r"""Estimate tr(H) of the mean loss over the data with respect to the selected parameters.

    ::

        tr(H) = E[vᵀ H v],    v_i = ±1 with probability ½ each

    H v is the gradient of gᵀv, by double backward. Each batch's graph is built once for all probes, and freed before
    the next; a probe is drawn again for each batch, so memory holds one of them. The error falls with the number of
    probes, `√(2 Σ_{i≠j} H_ij² / probes)`: a diagonal H is exact with one.

    Fused attention kernels have no second derivative: PyTorch's plain one runs meanwhile. An own kernel that a model
    brings along (flash-attention, cuDNN's recurrent layers) has to be turned off, or its error is raised.

    Args:
        loss: The loss over data.
        probes: How many v; 0 for none.
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
            for probe, form in enumerate(_quadratic_forms(loss, batch, range(seed, seed + probes))):
                forms[probe] += share * form
    return Estimate(tuple(forms))


def _quadratic_forms(loss: LossOverData, batch: Batch, seeds: Sequence[int]) -> list[float]:
    """Return vᵀHv of the mean loss of one batch for the probe of each seed."""
    parameters = list(loss.parameters.values())
    forms = []
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), trainable(parameters):
        gradient = torch.autograd.grad(loss.gradients.loss_on(batch), parameters, create_graph=True, allow_unused=True)
        for seed in seeds:
            signs = random_signs(parameters, torch.Generator().manual_seed(seed))
            along = [sign.to(parameter.dtype) for sign, parameter in zip(signs, parameters, strict=True)]
            forms.append(float(inner_product(along, _product(gradient, along, parameters))))
    return forms


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
