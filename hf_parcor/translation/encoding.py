"""Parallel text as rows of token numbers, with a count of what is too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_parcor.translation.parallel_text import ParallelText, shown_skips


@dataclass(frozen=True)
class EncodedText:
    """Rows to train or measure on.

    Args:
        rows: Each with `input_ids`, `attention_mask` and `labels`, a list of numbers each.
        report: How many pairs there are, and what was left out or cut, why and where.
    """

    rows: Sequence[Mapping[str, list[int]]]
    report: str


def encode(
    text: ParallelText,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    cut: bool = False,
) -> EncodedText:
    """Return the pairs as token numbers.

    Args:
        text: The pairs.
        source_tokenizer: That of the sentences.
        target_tokenizer: That of the translations; may be the same.
        max_tokens: The most tokens of either side, with the end of the sentence.
        cut: Whether longer ones are cut to that, so that a score is that of all sentences. Else the pair is left out.

    Raises:
        ValueError: No pair is left.
    """
    sides: list[Any] = [
        source_tokenizer(list(text.sources), return_token_type_ids=False),
        target_tokenizer(text_target=list(text.targets), return_token_type_ids=False),
    ]
    rows, long = [], []
    for place, source, target in zip(text.places, sides[0]["input_ids"], sides[1]["input_ids"], strict=True):
        if max(len(source), len(target)) > max_tokens:
            long.append(place)
            if not cut:
                continue
            source, target = (_cut(tokens, max_tokens) for tokens in (source, target))
        rows.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": target})
    reason = {f"more than {max_tokens:,} tokens": long}
    if not rows:
        raise ValueError(
            f"{text.origin}: expected a pair of at most {max_tokens:,} tokens, found none"
            f"{shown_skips({**text.skipped, **reason})}; raise the limit"
        )
    if cut:
        report = text.report + shown_skips(reason).replace("left out", "cut")
    else:
        report = f"{text.origin}: {len(rows):,} pairs{shown_skips({**text.skipped, **reason})}"
    return EncodedText(rows, report)


def _cut(tokens: list[int], most: int) -> list[int]:
    """Return the first tokens, and the last one, which ends the sentence."""
    return tokens if len(tokens) <= most else [*tokens[: most - 1], tokens[-1]]
