"""A logistic regression small enough to differentiate by hand, and its gradients by autograd, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor


@dataclass
class LogisticGradients:
    """A `GradientSource`: mean of log(1 + exp(−y xᵀ(W m + c))) over batches, W a matrix, m and c other weights."""

    weights: Mapping[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]
    asked: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    """Which batch was asked for, and at which corruption."""

    def __len__(self) -> int:
        return len(self.batches)

    def loss(self, weights: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        scores = x.to(weights["matrix"].dtype) @ (weights["matrix"] @ weights["mix"] + weights["shift"])
        return torch.nn.functional.softplus(-y * scores).mean()

    def gradient(self, corruption: Mapping[str, Tensor], batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        moved = {name: weight.detach() + corruption[name].to(weight.dtype) for name, weight in self.weights.items()}
        return self.gradient_at(moved, len(batches), batches)

    def gradient_at(
        self,
        values: Mapping[str, Tensor],
        most: int | None = None,
        batches: list[tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        with torch.enable_grad():
            points = {
                name: values.get(name, weight).detach().clone().requires_grad_()
                for name, weight in self.weights.items()
            }
            losses = [self.loss(points, batch) for batch in (batches or self.batches)[:most]]
            loss = torch.stack(losses).mean()
            return dict(zip(points, torch.autograd.grad(loss, list(points.values())), strict=True))

    def loss_at(self, values: Mapping[str, Tensor], most: int | None = None) -> float:
        with torch.no_grad():
            points = {**self.weights, **values}
            return float(torch.stack([self.loss(points, batch) for batch in self.batches[:most]]).mean())

    def over_data(self) -> dict[str, Tensor]:
        return self.gradient({name: torch.zeros_like(weight) for name, weight in self.weights.items()}, self.batches)

    def on_next_batch(self, corruption: Mapping[str, Tensor]) -> dict[str, Tensor]:
        index = len(self.asked) % len(self.batches)
        self.asked.append((index, {name: change.clone() for name, change in corruption.items()}))
        return self.gradient(corruption, [self.batches[index]])


@pytest.fixture
def weights() -> dict[str, torch.nn.Parameter]:
    return {
        "matrix": torch.nn.Parameter(torch.randn(4, 6).t()),  # not contiguous
        "mix": torch.nn.Parameter(torch.randn(4)),
        "shift": torch.nn.Parameter(torch.randn(6)),
    }


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 6, dtype=torch.float64), torch.randn(8).sign()) for _ in range(5)]


@pytest.fixture
def logistic(batches: list[tuple[Tensor, Tensor]]) -> Callable[[Mapping[str, Tensor]], LogisticGradients]:
    """Return a builder of gradient sources for weights."""
    return lambda weights: LogisticGradients(weights, batches)
