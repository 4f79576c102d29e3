"""Models built from configurations, data for them, and Trainers around them."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from steps.by_hand import quiet_arguments
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer

from gpu.check import Setting
from hf_parcor import CorruptionConstraint, MultiStepRisk

L2 = CorruptionConstraint(p=2, epsilon=0.1)
LAST = "last-encoder-layer"
VOCABULARY = 1000


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


def rows_for(count: int, length: int) -> list[dict[str, Any]]:
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
    arguments = quiet_arguments(
        tempfile.mkdtemp(),
        use_cpu=setting.device == "cpu",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = kind(model=model, args=arguments, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Return a copy of the gradients in float32, and take them away."""
    copies = [p.grad.detach().float().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return copies


def risk(steps: int) -> MultiStepRisk:
    """Return the defense of these checks."""
    return MultiStepRisk(L2, steps=steps)
