"""Masked language models: which token is hidden?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.errors import InputError
from hf_parcor.evaluation import BatchMetric, LanguageModelMetric
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, Task

_MAX_LENGTH = 512
_CHOSEN = 0.15  # of BERT (Devlin et al., 2019), as the two shares below
_MASKED, _REPLACED = 0.8, 0.1


class FillMask(Task):
    """The tokens of texts that are hidden: loss, perplexity and accuracy over them.

    Each row is cut into windows of the longest length, with the special tokens around each; rows without a token are
    left out. Of a window's tokens 15 % are chosen, one at least: of these, 80 % are masked, 10 % are replaced by any
    other and 10 % stay. What is measured hides the same tokens in every walk, see `hide`; in training they are drawn
    anew in each epoch.
    """

    name = "fill-mask"
    heads = ("ForMaskedLM",)
    auto_class = "AutoModelForMaskedLM"
    roles: ClassVar[Mapping[str, Role]] = {"text": Role(("text", "sentence", "content", "document"))}
    takes = frozenset({"max_length"})
    metrics = ("perplexity", "loss", "accuracy")

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return the model's tokenizer.

        Raises:
            InputError: There is none, or it has no token to pad or to mask with.
        """
        tokenizer = super().load_processor(name, **settings)
        if tokenizer.mask_token is None:
            raise InputError(
                f"tokenizer: expected one with a mask token, got that of {name!r} without; set its mask_token, and "
                "save it"
            )
        return tokenizer

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return windows over the text of each row, in which nothing is hidden yet.

        Raises:
            InputError: No row has a token, or the length has no room for one.
        """
        tokenizer, length = processed.processor, processed.length(_MAX_LENGTH)
        texts = rows.texts(columns["text"])
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        with_tokens = [index for index, tokens in enumerate(encoded) if tokens]
        if not with_tokens:
            raise InputError(f"{rows.source}: expected a token of text or more, got none; name other data")
        shortest = min(with_tokens, key=lambda index: len(encoded[index]))
        before, behind = _around(tokenizer, texts[shortest], encoded[shortest])
        room = length - len(before) - len(behind)
        if room < 1:
            raise InputError(
                f"max_length: expected more than the {len(before) + len(behind)} special tokens around a text, got "
                f"{length}; raise --max-length"
            )
        return [
            {"input_ids": [*before, *tokens[start : start + room], *behind]}
            for tokens in encoded
            for start in range(0, len(tokens), room)
        ]

    def collator(self, processed: Processed) -> Collator:
        """Return what pads windows, and labels where something is hidden, to the longest of their batch."""
        return DataCollatorForTokenClassification(processed.processor)

    def batches(
        self, examples: Sequence[Example], processed: Processed, size: int, workers: int = 0
    ) -> DataLoader[Any]:
        """Return batches of windows in which tokens are hidden: once, for all walks through them."""
        hidden = [hide(example["input_ids"], processed.processor) for example in examples]
        return super().batches(hidden, processed, size, workers)

    def training_collator(self, processed: Processed) -> Collator:
        """Return what hides other tokens each time."""
        collator: Collator = DataCollatorForLanguageModeling(
            processed.processor,
            mlm_probability=_CHOSEN,
            mask_replace_prob=_MASKED,
            random_replace_prob=_REPLACED,
        )
        return collator

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return perplexity, loss and accuracy of the tokens that are hidden.

        Raises:
            InputError: There is no such metric.
        """
        self.check_metric(name)
        return LanguageModelMetric(batches)


def hide(tokens: Sequence[int], tokenizer: Any) -> Example:
    """Return a window in which tokens are hidden, by a draw that depends on the window's tokens alone.

    So it is the same in batches of any size, in every process, and for every model with this tokenizer. Special tokens
    are not hidden.

    Args:
        tokens: The window.
        tokenizer: Has a mask token.

    Returns:
        `input_ids`, and `labels`, −100 where nothing is hidden.

    Examples:
        >>> from transformers import BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]
        >>> tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        >>> sum(label != -100 for label in hide([2, 5, 6, 7, 3], tokenizer)["labels"])
        1
    """
    drawn = torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, tokens)).encode()))
    special = tokenizer.get_special_tokens_mask(list(tokens), already_has_special_tokens=True)
    ids, free = torch.tensor(tokens), torch.tensor(special) == 0
    chances = torch.rand(len(ids), generator=drawn).masked_fill_(~free, 1.0)
    chosen = free & ((chances < _CHOSEN) | (chances == chances.min()))
    labels = ids.masked_fill(~chosen, IGNORED_LABEL)
    fates = torch.rand(len(ids), generator=drawn)
    others = torch.randint(len(tokenizer), (len(ids),), generator=drawn)
    ids = torch.where(chosen & (fates < _MASKED), tokenizer.mask_token_id, ids)
    ids = torch.where(chosen & (fates >= 1 - _REPLACED), others, ids)
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def _around(tokenizer: Any, text: str, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the special tokens before and behind a text that has these tokens.

    Raises:
        InputError: The tokens are others where special ones are around them.
    """
    whole, count = list(tokenizer(text, verbose=False)["input_ids"]), len(tokens)
    for begin in range(len(whole)):
        if whole[begin : begin + count] == list(tokens):
            return whole[:begin], whole[begin + count :]
    raise InputError(
        f"tokenizer: expected one that puts special tokens around a text, got {type(tokenizer).__name__}, which makes "
        f"{whole} of {text!r}, and {list(tokens)} without them; measure with batches and a LanguageModelMetric"
    )
