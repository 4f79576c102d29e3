"""Subword vocabularies of a given size, and parallel text as their tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_parcor.translation.parallel_text import ParallelText, shown_skips

START, PADDING, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
SPECIAL = [START, PADDING, END, UNKNOWN]  # as fairseq numbers them

_DIGITS = 9


def train_bpe(texts: Iterable[str], size: int, *, split_punctuation: bool = True) -> PreTrainedTokenizerFast:
    """Learn a vocabulary by merging frequent pairs (byte-pair encoding); for a joint one hand in both languages.

    The same texts in the same order give the same vocabulary.

    Args:
        texts: The sentences.
        size: How many subwords there are, the four special ones included.
        split_punctuation: Whether a subword never holds a punctuation mark and something else. False for tokenised
            text, where spaces alone divide, so that `&apos;s` may be one.

    Returns:
        A tokenizer that ends each sentence with `</s>`, and whose `decode` gives the sentence back.

    Raises:
        ValueError: The texts do not yield so many subwords, or `size` has no room for their letters.
    """
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    return _train(Tokenizer(models.BPE(unk_token=UNKNOWN)), trainer, texts, size, split_punctuation)


def train_unigram(texts: Iterable[str], size: int, *, split_punctuation: bool = True) -> PreTrainedTokenizerFast:
    """Learn a vocabulary that makes the texts likely under a unigram model; else as `train_bpe`.

    The library sums probabilities in no fixed order. They are rounded, and subwords of the same one put in the order
    of the alphabet, so that two trainings agree unless a subword was on the very edge of being dropped.
    """
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False)
    return _train(Tokenizer(models.Unigram()), trainer, texts, size, split_punctuation)


def _in_fixed_order(tokenizer: Tokenizer) -> Tokenizer:
    """Return a unigram tokenizer with rounded scores, and subwords after the special ones sorted by score and text."""
    described = json.loads(tokenizer.to_str())
    pieces = [(piece, round(score, _DIGITS)) for piece, score in described["model"]["vocab"]]
    learned = sorted(pieces[len(SPECIAL) :], key=lambda entry: (-entry[1], entry[0]))
    described["model"]["vocab"] = pieces[: len(SPECIAL)] + learned
    return Tokenizer.from_str(json.dumps(described))


def _train(
    tokenizer: Tokenizer, trainer: trainers.Trainer, texts: Iterable[str], size: int, split_punctuation: bool
) -> PreTrainedTokenizerFast:
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Metaspace()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation()]) if split_punctuation else words
    )
    tokenizer.decoder = decoders.Metaspace()
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:  # the library has no class of its own
        raise ValueError(f"size: expected room for all letters, got {size:,}; ask for more ({error})") from error
    if isinstance(tokenizer.model, models.Unigram):
        tokenizer = _in_fixed_order(tokenizer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(
            f"size: expected a vocabulary of {size:,}, the texts yield {tokenizer.get_vocab_size():,}; "
            "ask for another size, or give more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, SPECIAL.index(END))]
    )
    build: Any = PreTrainedTokenizerFast  # Transformers does not say what it takes
    named: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        bos_token=START,
        pad_token=PADDING,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    return named


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
