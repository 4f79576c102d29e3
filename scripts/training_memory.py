"""What a defended step holds beside a stock step, for each way to fine-tune: in bytes a weight, counted and not timed.

    python -m scripts.training_memory

A Llama of random weights takes a stock step and a defended one, forward and backward on a batch of two tokens, so that
weights are nearly all there is. Each way is compared with the stock step of the same way; of two defended steps
the one that holds most counts, since the first also measures the norm and looks for what passes can share. Optimizers
hold the same with a defense and without. The table stands in `hf_parcor/training/README.md`, and a test measures it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

from hf_parcor import (
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    select_parameters,
)
from hf_parcor.defenses import Defense
from hf_parcor.reports.tables import markdown_table
from scripts.counting import PeakMemory
from scripts.training_steps import quiet_arguments, step_of

L2 = CorruptionConstraint(epsilon=0.1)
WHOLE, ADAPTERS, BASE = "the whole model", "LoRA adapters", "the base under LoRA"
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Way:
    """A way to fine-tune with a defense.

    Attributes:
        defended: What is defended.
        defense: The defense.
        said: What the table calls it.
        dtype: That of the model's weights; adapters are float32, as PEFT makes them.
    """

    defended: str
    defense: Defense
    said: str
    dtype: torch.dtype = FLOAT32


K1, K2, ROUNDED = MultiStepRisk(L2), MultiStepRisk(L2, steps=2), CorruptionRisk(Quantization(4))
WAYS = [
    *(
        Way(WHOLE, defense, said, dtype)
        for dtype in (FLOAT32, BFLOAT16)
        for defense, said in ((K1, "K = 1"), (SAM(L2), "SAM"), (K2, "K = 2"), (ROUNDED, "4 bits"))
    ),
    *(Way(ADAPTERS, defense, said, BFLOAT16) for defense, said in ((K1, "K = 1"), (K2, "K = 2"))),
    *(
        Way(BASE, defense, said, dtype)
        for dtype in (FLOAT32, BFLOAT16)
        for defense, said in (
            (ROUNDED, "4 bits"),
            (CorruptionRisk(Quantization(4), merge_adapters=True), "4 bits, merged"),
        )
    ),
]


def model_of(way: Way) -> Any:
    """Return a Llama of 10 million weights, with adapters of rank 8 on its linear layers where there are any."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=8,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(way.dtype)
    if way.defended == WHOLE:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def peaks(way: Way, kind: type[Trainer], steps: int, **options: Any) -> tuple[int, nn.Module]:
    """Return the most bytes that one of some steps makes beside what was there, and the model."""
    model = model_of(way)
    trainer = kind(model=model, args=quiet_arguments(use_cpu=True), **options)
    tokens = torch.tensor([[1, 2]])
    step = step_of(trainer, model, {"input_ids": tokens, "labels": tokens})
    found = []
    for _ in range(steps):
        with PeakMemory() as memory:
            step()
        found.append(memory.peak)
        model.zero_grad()
    return max(found), model


def bytes_of(way: Way) -> tuple[float, float]:
    """Return what a defended step holds beside a stock one, in bytes a defended weight and a weight of the model."""
    stock, model = peaks(way, Trainer, 1)
    targets = ["base_layer"] if way.defended == BASE else None
    defended, _ = peaks(way, ParameterDefenseTrainer, 2, defense=way.defense, target_modules=targets)
    every = {name: weight.numel() for name, weight in model.named_parameters()}
    if way.defended == WHOLE:
        chosen = sum(every.values())
    elif way.defended == BASE:
        chosen = sum(weight.numel() for weight in select_parameters(model, target_modules=["base_layer"]).values())
    else:
        chosen = sum(count for name, count in every.items() if "lora_" in name)
    return (defended - stock) / chosen, (defended - stock) / sum(every.values())


def table(ways: Sequence[Way] = WAYS) -> str:
    """Return the table, measured."""
    rows = []
    for way in ways:
        each, of_all = bytes_of(way)
        dtype = str(way.dtype).removeprefix("torch.")
        rows.append([way.defended, dtype, way.said, f"{each:.1f}", f"{of_all:.2f}"])
    header = ["what is defended", "weights", "defense", "bytes a defended weight", "bytes a weight of the model"]
    return markdown_table(header, rows, texts=3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    print(table())


if __name__ == "__main__":
    main()
