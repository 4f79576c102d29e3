"""Parallel text as rows of token numbers, with a count of what is too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    prefix: str = "",
) -> EncodedText:
    """Return the pairs as token numbers.

    Args:
        text: The pairs.
        source_tokenizer: That of the sentences.
        target_tokenizer: That of the translations; may be the same.
        max_tokens: The most tokens of either side, with the end of the sentence and what names its language.
        cut: Whether longer ones are cut to that, so that a score is that of all sentences. Else the pair is left out.
        prefix: Put before each sentence, such as "translate English to German: " for T5.

    Raises:
        ValueError: No pair is left.
    """

    def tokens(
        sources: Sequence[str], targets: Sequence[str], **settings: Any
    ) -> Iterator[tuple[list[int], list[int]]]:
        named = {"return_token_type_ids": False, **settings}
        encoded: Any = source_tokenizer([prefix + source for source in sources], **named)
        labels: Any = target_tokenizer(text_target=list(targets), **named)
        return zip(encoded["input_ids"], labels["input_ids"], strict=True)

    rows, long = [], []
    for index, (source, target) in enumerate(tokens(text.sources, text.targets)):
        if max(len(source), len(target)) > max_tokens:
            long.append(text.places[index])
            if not cut:
                continue
            pair = text.sources[index : index + 1], text.targets[index : index + 1]
            source, target = next(tokens(*pair, truncation=True, max_length=max_tokens))
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
