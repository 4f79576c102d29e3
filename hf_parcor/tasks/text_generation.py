"""Causal language models: how likely is a text?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.errors import InputError, nearest
from hf_parcor.evaluation import BatchMetric, LanguageModelMetric
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, Task

_MAX_LENGTH = 512


class TextGeneration(Task):
    """The next token of a text: loss, perplexity, accuracy.

    The texts of all rows are joined, with the end-of-text token of the tokenizer after each, if it has one, and cut
    into blocks of the longest length. The first token of a block has nothing to be predicted from.
    """

    name = "text-generation"
    heads = ("ForCausalLM", "LMHeadModel")
    auto_class = "AutoModelForCausalLM"
    roles: ClassVar[Mapping[str, Role]] = {"text": Role(("text", "sentence", "content", "document"))}
    pads = False
    metrics = ("perplexity", "loss", "accuracy")

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return blocks of the joined text."""
        texts = [processed.encoding.prefix + str(text) for text in rows.column(columns["text"])]
        end = processed.processor.eos_token_id
        tokens: list[int] = []
        for of_text in processed.processor(texts, add_special_tokens=False)["input_ids"]:
            tokens += of_text
            if end is not None:
                tokens.append(end)
        length = processed.length(_MAX_LENGTH)
        blocks = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise InputError(f"{rows.source}: expected two tokens of text or more, got {len(tokens)}; name other data")
        return [{"input_ids": block, "labels": block} for block in blocks]

    def collator(self, processed: Processed) -> Collator:
        """Return what pads blocks, whether the tokenizer has a token for it or not."""
        return _padded

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return perplexity, loss and accuracy."""
        if name not in self.metrics:
            raise InputError(
                f"metric: expected one of {', '.join(self.metrics)} for {self.name}, got {name!r}"
                f"{nearest(name, self.metrics)}; name one of them"
            )
        return LanguageModelMetric(batches)


def _padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    tokens = [torch.tensor(example["input_ids"]) for example in examples]
    inside = [torch.ones_like(block) for block in tokens]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence(inside, batch_first=True),
        "labels": pad_sequence(tokens, batch_first=True, padding_value=IGNORED_LABEL),
    }
