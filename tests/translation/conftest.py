"""Two languages of few words, one of which is the other with its words reversed and renamed."""

from __future__ import annotations

import random

import pytest
import torch

from hf_parcor.translation import iwslt_de_en, new_model, train_bpe

WORDS = {
    "dog": "Hund", "cat": "Katze", "house": "Haus", "tree": "Baum", "red": "rot", "small": "klein", "sees": "sieht",
    "and": "und", "the": "der", "snow": "Schnee",
}  # fmt: skip


def sentences(count, seed=0):
    """Pairs such as ("Hund rot.", "red dog.")."""
    drawn = random.Random(seed)
    pairs = []
    for _ in range(count):
        english = drawn.choices(list(WORDS), k=drawn.randint(2, 6))
        pairs.append((" ".join(WORDS[word] for word in reversed(english)) + ".", " ".join(english) + "."))
    return pairs


@pytest.fixture(scope="session")
def pairs():
    return sentences(60)


@pytest.fixture(scope="session")
def tokenizer(pairs):
    return train_bpe([text for pair in pairs for text in pair], 80)


@pytest.fixture
def tiny_model(tokenizer):
    def build(**changes):
        torch.manual_seed(0)
        layers = {f"{stack}_layers": 2 for stack in ("encoder", "decoder")}
        sizes = {f"{stack}_ffn_dim": 16 for stack in ("encoder", "decoder")}
        settings = {**layers, **sizes, "d_model": 16, "max_position_embeddings": 64, "dropout": 0.1, **changes}
        return new_model(iwslt_de_en(len(tokenizer), **settings))

    return build


@pytest.fixture(scope="session")
def rows(pairs, tokenizer):
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        for ids, labels in (
            (tokenizer(source)["input_ids"], tokenizer(target)["input_ids"]) for source, target in pairs
        )
    ]
