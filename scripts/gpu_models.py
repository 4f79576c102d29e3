"""Models built from configurations, Trainers around them, and the rows that a check reports."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

from hf_parcor import CorruptionConstraint, MultiStepRisk

L2 = CorruptionConstraint(p=2, epsilon=0.1)
LAST = "last-encoder-layer"
VOCABULARY = 1000


class Skipped(Exception):  # noqa: N818
    """A check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run, how large their models are, and where records go."""

    device: str
    quick: bool
    output: str

    def need_cuda(self, what: str) -> None:
        """Raise `Skipped` without a GPU."""
        if self.device != "cuda":
            raise Skipped(f"{what} needs a GPU")


@dataclass(frozen=True)
class Row:
    """A number that a check found; it fails above its limit, or where it is NaN."""

    what: str
    value: float
    limit: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the number is at most its limit; a number without limit is only reported."""
        return self.limit is None or self.value <= self.limit


def bert(setting: Setting, **sizes: int) -> nn.Module:
    """Build a BERT without dropout, tiny in a quick run, in float32."""
    torch.manual_seed(0)
    width, layers = (64, 2) if setting.quick else (256, 4)
    chosen: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, **sizes}
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **{"intermediate_size": 4 * width, **chosen},
    )
    model: nn.Module = BertForSequenceClassification(config)
    return model.to(setting.device)


def in_bfloat16(model: nn.Module, device: str) -> nn.Module:
    """Let a model compute in bf16 autocast, as the Trainer's loop would; steps by hand do not come through there."""
    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    return model


def rows_for(model: nn.Module, count: int, length: int) -> list[dict[str, Any]]:
    """Draw labelled sequences for a classifier."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(VOCABULARY, (length,), generator=generator), "labels": index % 2}
        for index in range(count)
    ]


def batch_of(rows: list[dict[str, Any]], device: str) -> dict[str, Tensor]:
    """Return rows as one batch."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": tokens.to(device), "labels": torch.tensor([row["labels"] for row in rows], device=device)}


def trainer_of(
    setting: Setting, kind: type[Trainer], model: nn.Module, options: dict[str, Any], **more: Any
) -> Trainer:
    """Return a Trainer of plain SGD that saves and logs nothing."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=setting.device == "cpu",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        **options,
    )
    trainer = kind(model=model, args=arguments, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_of(trainer: Trainer, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a training step by hand: forward and backward on one batch, no optimizer."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.epoch = 0.0
    return lambda: trainer.training_step(model, dict(batch))


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Return a copy of the gradients in float32, and take them away."""
    copies = [p.grad.detach().float().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return copies


def distance(ours: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Return the L2 norm of the difference of two lists of tensors, over that of the second."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(ours, others, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(difference / max(sum(float(b.square().sum()) for _, b in pairs), 1e-300))


def differing_bits(ours: Iterable[Tensor], others: Iterable[Tensor]) -> int:
    """Count the bytes that differ between two lists of tensors."""
    return sum(
        int((a.detach().contiguous().view(torch.uint8) != b.detach().contiguous().view(torch.uint8)).sum())
        for a, b in zip(ours, others, strict=True)
        if a.dim()
    )


def risk(steps: int) -> MultiStepRisk:
    """Return the defense of these checks."""
    return MultiStepRisk(L2, steps=steps)
