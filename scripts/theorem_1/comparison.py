"""Random corruptions of a trained model: the loss changes that are found, beside those that theory has."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel

from hf_parcor import CorruptionConstraint, GradientCorruption
from hf_parcor.functional import vector_norm
from hf_parcor.indicators import LossOverData, hessian_trace, random_loss_changes
from hf_parcor.statistics import QuantileWithInterval
from hf_parcor.theory import RandomCorruptionRatio, second_order_average_loss_change
from theorem_1.language_model import loss_of

PROBABILITIES = (0.9, 0.95, 0.995)  # those of the paper
THRESHOLDS = (1.0, 2.0, 3.0)  # in standard deviations
BLOCK = 16  # directions that are drawn at a time


def measure(model: GPT2LMHeadModel, rows: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the record holds of a trained model: first order, then real changes in float64 and float32."""
    model.double()
    precise = loss_of(model, rows, options.batch)
    gradient = torch.cat([part.reshape(-1) for part in precise.gradient().values()])
    alone = [float(vector_norm([*loss_of(model, row, 1).gradient().values()])) for row in torch.split(rows[:8], 1)]
    trace = hessian_trace(precise, options.probes, options.seed)
    record = {
        "parameters": len(gradient),
        "loss": precise.value(),
        "gradient_norm": float(gradient.norm()),
        "gradient_norm_of_single_rows": alone,
        "hessian_trace": {"mean": trace.mean, "standard_error": trace.standard_error, "probes": options.probes},
        "first_order": first_order(gradient, options),
    }
    runs = [(dtype, epsilon) for dtype in (torch.float64, torch.float32) for epsilon in options.epsilons]
    found = []
    for dtype, epsilon in tqdm(runs, desc="loss changes", disable=options.quiet):
        nn.Module.to(model, dtype)
        found.append(real_changes(loss_of(model, rows, options.batch), epsilon, trace.mean, options))
    return {**record, "real_changes": found}


def first_order(gradient: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the first-order loss changes of many random corruptions with Theorem 1."""
    ratio = RandomCorruptionRatio(len(gradient))
    root = math.sqrt(len(gradient))
    scale = options.epsilons[0] * float(gradient.norm())
    blocks = math.ceil(options.draws / BLOCK)
    walk = tqdm(cosines(gradient, options.draws, options.seed), total=blocks, disable=options.quiet)
    found = torch.cat(list(walk))
    test = stats.kstest(found.numpy(), ratio.signed_cdf)
    return {
        "epsilon": options.epsilons[0],
        "draws": options.draws,
        "largest_first_order": scale,
        "mean": scale * float(found.mean()),
        "standard_deviation": scale * float(found.std()),
        "theoretical_standard_deviation": scale / root,
        "quantiles": quantiles(scale * found.abs(), scale, ratio),
        "probabilities": [
            {
                "threshold": scale * times / root,
                "empirical": float((found.abs() > times / root).double().mean()),
                "theoretical": ratio.survival(times / root),
            }
            for times in THRESHOLDS
        ],
        "largest_share_of_worst_case": float(found.abs().max()),
        "log_probability_of_half_the_worst_case": ratio.log_survival(0.5),
        "kolmogorov_smirnov": {"statistic": float(test.statistic), "p_value": float(test.pvalue)},
    }


def cosines(gradient: Tensor, draws: int, seed: int, *, block: int = BLOCK) -> Iterator[Tensor]:
    """Yield the cosines between random directions and the gradient, block by block."""
    generator = torch.Generator().manual_seed(seed)
    direction = (gradient / gradient.norm()).float()
    for first in range(0, draws, block):
        drawn = torch.empty(min(block, draws - first), len(direction)).normal_(generator=generator)
        yield (drawn @ direction / torch.linalg.vector_norm(drawn, dim=1)).double()


def real_changes(loss: LossOverData, epsilon: float, trace: float, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the loss changes that forward passes find with the theory of both indicators."""
    constraint = CorruptionConstraint(epsilon=epsilon)
    drawn = random_loss_changes(loss, constraint, options.changes, options.seed)
    gradient = loss.gradient()
    k = sum(part.numel() for part in gradient.values())
    largest = epsilon * float(vector_norm(list(gradient.values())))
    ratio = RandomCorruptionRatio(k)
    found = torch.tensor(drawn.changes.values, dtype=torch.float64)
    return {
        "epsilon": epsilon,
        "dtype": str(next(iter(loss.parameters.values())).dtype).removeprefix("torch."),
        "first_order_maximum": largest,
        "gradient_based": loss.change(GradientCorruption(constraint)(loss.parameters, loss.gradients)),
        "standard_deviation": drawn.changes.standard_deviation,
        "theoretical_standard_deviation": largest / math.sqrt(k),
        "beyond_first_order": {
            "mean": drawn.beyond_first_order.mean,
            "standard_error": drawn.beyond_first_order.standard_error,
            "standard_deviation": drawn.beyond_first_order.standard_deviation,
            "hutchinson": second_order_average_loss_change(epsilon, trace, k),
        },
        "quantiles": quantiles(found.abs(), largest, ratio),
        "p_value": float(stats.kstest(found.numpy() / largest, ratio.signed_cdf).pvalue),
        "changes": drawn.changes.values,
    }


def quantiles(magnitudes: Tensor, largest: float, ratio: RandomCorruptionRatio) -> list[dict[str, float]]:
    """Return α(p) with P(|ΔL| < α) = p as found, with a 95 % interval, and as theory has it.

    Args:
        magnitudes: The loss changes that were found.
        largest: εG, the largest of first order.
        ratio: What share of it random corruptions reach.
    """
    found = [QuantileWithInterval.from_values(magnitudes.tolist(), p) for p in PROBABILITIES]
    return [
        {
            "p": one.p,
            "empirical": one.value,
            "low": one.low,
            "high": one.high,
            "theoretical": largest * ratio.quantile(one.p),
        }
        for one in found
    ]
