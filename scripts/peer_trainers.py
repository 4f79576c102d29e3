"""What others would train with instead, in the same example: torchao's QAT, LookSAM, and SAM along the momentum.

    python -m scripts.peer_trainers looksam --do_train ... (the flags of examples/train_sst2.py, --defense none)

They stand here to be compared with, not to be used: one process, no accumulation of gradients, no scaler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor import ParameterDefenseTrainer, corrupted
from hf_parcor.functional import inner_product, vector_norm
from scripts.sst2_runs import run_example_with

EVERY, ALPHA = 5, 0.7  # LookSAM's k and α, in its paper's words


class PeerTrainer(ParameterDefenseTrainer):
    """A Trainer with passes of its own; the defense stays none."""

    radius = 0.05  # that of the arm "SAM ε/2"

    def weights(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        assert self.model is not None, "the example gives one"
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the weights that have one."""
        return {name: weight.grad for name, weight in self.weights().items() if weight.grad is not None}

    def passed_at(self, direction: Mapping[str, Tensor], *arguments: Any) -> Tensor:
        """Run the stock step at w + ε d / ‖d‖; the gradient is all that stays of it."""
        weights = self.weights()
        factor = self.radius / vector_norm(list(direction.values())).clamp_min(1e-12)
        along = {name: piece * factor for name, piece in direction.items()}
        with corrupted({name: weights[name] for name in along}, along):
            return super().training_step(*arguments)


class LookSAMTrainer(PeerTrainer):
    """SAM in every fifth step; between, the part of its gradient that is orthogonal to the clean one is used again.

    After Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization" (2022), algorithm 1.
    """

    orthogonal: dict[str, Tensor] | None = None

    def training_step(self, *arguments: Any) -> Tensor:
        """Run one pass, and every fifth time the second one."""
        loss = super().training_step(*arguments)
        clean = {name: gradient.clone() for name, gradient in self.gradients().items()}
        if self.orthogonal is None or self.state.global_step % EVERY == 0:
            for gradient in self.gradients().values():
                gradient.zero_()
            self.passed_at(clean, *arguments)
            at_clean, moved = list(clean.values()), list(self.gradients().values())
            along = inner_product(moved, at_clean) / inner_product(at_clean, at_clean).clamp_min(1e-24)
            self.orthogonal = {name: gradient - along * clean[name] for name, gradient in self.gradients().items()}
        else:
            length, of_orthogonal = (vector_norm(list(one.values())) for one in (clean, self.orthogonal))
            factor = ALPHA * length / of_orthogonal.clamp_min(1e-12)
            for name, gradient in self.gradients().items():
                gradient.add_(self.orthogonal[name] * factor)
        return loss


class MomentumTrainer(PeerTrainer):
    """One pass a step, at the weights moved along AdamW's running mean of gradients."""

    def training_step(self, *arguments: Any) -> Tensor:
        """Run the only pass; the first step knows no mean, and is the stock one."""
        assert self.optimizer is not None, "training has begun"
        state = self.optimizer.state
        means = {name: state[weight]["exp_avg"] for name, weight in self.weights().items() if weight in state}
        return self.passed_at(means, *arguments) if means else super().training_step(*arguments)


class TorchaoTrainer(ParameterDefenseTrainer):
    """Trains with torchao's fake quantizers in all linear layers and embeddings: 4 bits, symmetric, a scale a channel.

    They leave the model when training ends, so that its float weights are saved and measured as those of all arms.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        rounded = IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True)  # type: ignore[attr-defined]
        quantize_(
            model,
            QATConfig(weight_config=rounded, step="prepare"),
            lambda part, _: type(part) in (nn.Linear, nn.Embedding),
        )
        super().__init__(model=model, **options)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, and take the fake quantizers out."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        found = super().train(*arguments, **options)
        quantize_(self.model, QATConfig(step="convert"), lambda part, _: hasattr(part, "weight_fake_quantizer"))
        return found


PEERS = {"looksam": LookSAMTrainer, "momentum": MomentumTrainer, "torchao": TorchaoTrainer}


def main() -> None:
    """Run the example with the Trainer of a peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--radius", type=float, default=PeerTrainer.radius, help="ε, of those that move the weights")
    options, sys.argv[1:] = parser.parse_known_args()
    PeerTrainer.radius = options.radius
    run_example_with(PEERS[options.peer])


if __name__ == "__main__":
    main()
