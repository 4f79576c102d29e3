"""Losses whose gradient and Hessian are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from hf_parcor import CorruptionConstraint, IndicatorRecord, measure_indicators
from hf_parcor.evaluation.losses import Loss, model_loss
from hf_parcor.indicators import LossOverData


class Quadratic(nn.Module):
    """½ wᵀAw + bᵀw, of the row of data that is given: a matrix and a vector; w lies in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 2).double()), nn.Parameter(torch.randn(3).double())

    @property
    def w(self) -> Tensor:
        return torch.cat([self.first.reshape(-1), self.second])


class Known(NamedTuple):
    """A quadratic loss over two batches of 3 and 1 items, and what is known of its mean."""

    model: Quadratic
    loss: LossOverData
    batches: list[tuple[Tensor, Tensor, Tensor]]
    hessian: Tensor
    gradient: Tensor

    def measure(self, *constraints: CorruptionConstraint, **options: Any) -> IndicatorRecord:
        return measure_indicators(
            self.model, self.batches, constraints, **{"loss": quadratic_loss, "progress": False, **options}
        )

    def value(self, a: Tensor) -> float:
        """L(w + a) − L(w)."""
        return float(self.gradient @ a + a @ self.hessian @ a / 2)


def quadratic_loss(model: Quadratic, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    _, a, b = batch
    return model.w @ a @ model.w / 2 + b @ model.w


@pytest.fixture
def known() -> Known:
    model = Quadratic()
    matrices = [torch.randn(7, 7).double() for _ in range(2)]
    matrices = [matrix + matrix.T for matrix in matrices]
    vectors = [torch.randn(7).double() for _ in range(2)]
    batches = [
        (torch.zeros(size), matrix, vector) for size, matrix, vector in zip((3, 1), matrices, vectors, strict=True)
    ]
    hessian = 0.75 * matrices[0] + 0.25 * matrices[1]
    gradient = hessian @ model.w.detach() + 0.75 * vectors[0] + 0.25 * vectors[1]
    return Known(
        model, LossOverData(model, dict(model.named_parameters()), batches, quadratic_loss), batches, hessian, gradient
    )


SIZES = (3, 2)


def texts() -> list[Tensor]:
    return [torch.randint(3, 12, (size, 5)) for size in SIZES]


def bert() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.encoder(12, inner=8)))
    return model, [{"input_ids": text, "labels": text[:, 0] % 2} for text in texts()]


def t5() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**tiny.t5(12, layers=1, inner=8)))
    return model, [{"input_ids": text, "labels": text[:, :3].contiguous()} for text in texts()]


def gpt2() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.gpt2(12)))
    return model, [{"input_ids": text, "labels": text} for text in texts()]


def vit() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**tiny.images(layers=1, inner=8)))
    return model, [
        {"pixel_values": torch.randn(size, 3, 8, 8).double(), "labels": torch.arange(size) % 2} for size in SIZES
    ]


def exact_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a causal language model in float64; its own rounds to float32."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.fixture(params=[bert, t5, gpt2, vit], ids=lambda build: build.__name__)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, list[dict[str, Tensor]], Loss]:
    """A model in float64, in training mode with dropout; its data; its loss."""
    model, batches = request.param()
    return model.double().train(), batches, exact_loss if request.param is gpt2 else model_loss
