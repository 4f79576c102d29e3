"""A small GPT-2 that learns a text word by word."""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from hf_parcor.indicators import LossOverData

END = "<eos>"


def words_of(folder: Path, part: str) -> list[str]:
    """Return the words of `ptb.<part>.txt` or of its `.gz`, each line ended by a word of its own."""
    plain = folder / f"ptb.{part}.txt"
    packed = plain.with_name(f"{plain.name}.gz")
    if not plain.is_file() and not packed.is_file():
        raise SystemExit(f"--data: expected {plain.name} or {packed.name} in {folder}, got neither; name their folder")
    text = plain.read_text(encoding="utf-8") if plain.is_file() else gzip.decompress(packed.read_bytes()).decode()
    return [word for line in text.splitlines() for word in [*line.split(), END]]


def rows_of(words: Sequence[str], vocabulary: dict[str, int], length: int) -> Tensor:
    """Return the words' numbers in rows of one length; what is left over is dropped."""
    unknown = vocabulary.get("<unk>", 0)
    numbers = torch.tensor([vocabulary.get(word, unknown) for word in words])
    return numbers[: len(numbers) // length * length].view(-1, length)


def trained_model(rows: Tensor, vocabulary: int, options: argparse.Namespace) -> GPT2LMHeadModel:
    """Train a GPT-2 from scratch on rows that are drawn at random."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=2,
            n_positions=options.length,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps + 1)
    model.train()
    for _ in tqdm(range(options.steps), desc="training", disable=options.quiet):
        batch = rows[torch.randint(len(rows), (options.batch,))]
        torch.autograd.backward(exact_loss(model, batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def exact_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of the next word, in the precision of the model: its own rounds logits to float32."""
    logits = model(input_ids=rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def loss_of(model: GPT2LMHeadModel, rows: Tensor, batch: int) -> LossOverData:
    """Return the loss over rows as a function of all weights; the tied embeddings count once."""
    return LossOverData(model, dict(model.named_parameters()), torch.split(rows, batch), exact_loss)
