"""What people use instead of our Trainer, driven by hand, after their papers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

RADIUS = 0.1


class Peers:
    """Optimizer steps on one model and one batch.

    Args:
        model: Any model that returns its loss.
        inputs: The batch.
        optimizer: That of the model.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.inputs, self.optimizer = model, inputs, optimizer

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return a step of each that is installed."""
        library = (
            {"pytorch_optimizer's SAM": self.sam_of_pytorch_optimizer()} if find_spec("pytorch_optimizer") else {}
        )
        return {**library, "SAM in two steps": self.sam_in_two_steps, "AWP loop": self.awp_loop}

    def sam_of_pytorch_optimizer(self) -> Callable[[], None]:
        """Return a step of the library's optimizer."""
        import pytorch_optimizer

        optimizer = pytorch_optimizer.SAM(self.model.parameters(), torch.optim.AdamW, rho=RADIUS, lr=1e-5)

        def step() -> None:
            self._backward()
            optimizer.first_step(zero_grad=True)
            self._backward()
            optimizer.second_step(zero_grad=True)

        return step

    def sam_in_two_steps(self) -> None:
        """Run SAM as its paper's algorithm box says, parameter by parameter."""
        self._backward()
        saved = {}
        with torch.no_grad():
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            for p in parameters:
                saved[p] = p.clone()
                p.add_(p.grad * (RADIUS / (norm + 1e-12)))
        self.optimizer.zero_grad()
        self._update_from(saved)

    def awp_loop(self) -> None:
        """Run the loop that adds one adversarial pass to the clean one: weights alone, each in its own small box."""
        self._backward()
        saved = {}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.grad is None or "weight" not in name:
                    continue
                saved[p] = p.clone()
                size, slope = torch.norm(p), torch.norm(p.grad)
                if slope != 0 and not torch.isnan(slope):
                    p.add_(1e-2 * p.grad / (slope + 1e-6) * (size + 1e-6))
                    box = 1e-2 * saved[p].abs()
                    p.copy_(torch.min(torch.max(p, saved[p] - box), saved[p] + box))
        self._update_from(saved)

    def _backward(self) -> None:
        self.model.train()
        self.model(**self.inputs).loss.backward()

    def _update_from(self, saved: dict[Any, Tensor]) -> None:
        """Run the pass at the moved weights, and update the saved ones."""
        self._backward()
        with torch.no_grad():
            for p, before in saved.items():
                p.copy_(before)
        self.optimizer.step()
        self.optimizer.zero_grad()
