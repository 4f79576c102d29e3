"""What defended steps cost on a GPU: time beside the stock step, interleaved, and peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from steps.by_hand import step_of
from steps.timing import interleaved, quartiles_of_ratios
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from gpu.check import Row, Setting
from gpu.models import L2, LAST, VOCABULARY, batch_of, bert, in_bfloat16, risk, rows_for, trainer_of
from hf_parcor import SAM, ParameterDefenseTrainer

BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
Arms = dict[str, Callable[[], object]]


def bert_base(setting: Setting) -> list[Row]:
    """BERT base, batch 32 × 128, bf16 autocast."""
    sizes, rows, length = (dict[str, int](), 2, 8) if setting.quick else (BERT_BASE, 32, 128)
    model = bert(setting, **sizes)
    defended: dict[str, dict[str, Any]] = {
        **{f"whole model, K = {steps}": {"defense": risk(steps)} for steps in (1, 2, 3)},
        **{f"last layer, K = {steps}": {"defense": risk(steps), "target_modules": LAST} for steps in (1, 2, 3)},
        "SAM": {"defense": SAM(L2)},
    }
    arms = arms_of(setting, model, batch_of(rows_for(rows, length), setting.device), defended)
    return measure(setting, arms, rounds=2 if setting.quick else 20)


def decoder(setting: Setting) -> list[Row]:
    """A Llama of about 1.1 B float32 parameters, or fewer where memory is short, in bf16 autocast."""
    width, layers, rows, length = 64, 2, 2, 8
    if setting.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        # Weights, gradients, saved weights, a partial sum and a vector in the making: 20 bytes each, and activations.
        width, layers, rows, length = (2048, 20, 4, 512) if free > 40 * 2**30 else (1024, 16, 4, 256)
    if setting.quick:
        width, layers, rows, length = 64, 2, 2, 8
    config = LlamaConfig(
        vocab_size=VOCABULARY if setting.quick else 32_000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if setting.quick else width // 64,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        model: nn.Module = LlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (rows, length), device=setting.device)
    defended: dict[str, dict[str, Any]] = {
        "whole model, K = 1": {"defense": risk(1)},
        "last layer, K = 1": {"defense": risk(1), "target_modules": "last-decoder-layer"},
    }
    arms = arms_of(setting, model, {"input_ids": tokens, "labels": tokens}, defended)
    size = Row("millions of parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    return [size, *measure(setting, arms, rounds=2 if setting.quick else 8)]


def arms_of(setting: Setting, model: nn.Module, batch: dict[str, Tensor], defended: dict[str, dict[str, Any]]) -> Arms:
    """Return steps of the stock Trainer and of defended ones, on one model and one batch, with an update each."""
    in_bfloat16(model, setting.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def arm(kind: type[Trainer], **more: Any) -> Callable[[], object]:
        step = step_of(trainer_of(setting, kind, model, {}, **more), model, batch)

        def run() -> None:
            step()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {"stock": arm(Trainer), **{label: arm(ParameterDefenseTrainer, **more) for label, more in defended.items()}}


def measure(setting: Setting, arms: Arms, rounds: int) -> list[Row]:
    """Interleave the arms' steps; report seconds, quartiles of the ratio to the stock step, and peak memory."""
    cuda = setting.device == "cuda"
    peaks = {}
    for arm, step in arms.items():  # also warms up
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step()
        if cuda:
            peaks[arm] = torch.cuda.max_memory_allocated()
    times = interleaved(arms, range(rounds))
    found = []
    for arm in arms:
        low, middle, high = quartiles_of_ratios(times[arm], times["stock"])
        found.append(Row(f"{arm}: seconds, median", statistics.median(times[arm])))
        found.append(Row(f"{arm}: ratio to stock, first quartile", low))
        found.append(Row(f"{arm}: ratio to stock, median", middle))
        found.append(Row(f"{arm}: ratio to stock, third quartile", high))
        if cuda:
            found.append(Row(f"{arm}: peak memory, MiB", peaks[arm] / 2**20))
    return found
