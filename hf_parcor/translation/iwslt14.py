"""IWSLT'14 De-En as the papers train on it: fairseq's preparation, with sacremoses in the place of Moses."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from hf_parcor.translation.iwslt import IwsltText
from hf_parcor.translation.parallel_text import ParallelText, pair_up

SPLITS = ("train", "validation", "test")

IWSLT14_DE_EN_PAIRS = {"train": 160_239, "validation": 7_283, "test": 6_750}
"""How many pairs fairseq's script gives. Paper 1 says 160K, 7K and 7K; the 153K of paper 2 this does not give."""

MAX_LENGTH = 175
MAX_RATIO = 1.5
EVERY = 23
_LONGEST_WORD = 1000
_TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
_MAY_DIFFER = 0.01

_LAST_POINT = re.compile(r"(?<=[^\s.])\.$")


def prepare_iwslt14_de_en(text: IwsltText, splits: Collection[str] = SPLITS) -> dict[str, ParallelText]:
    """Return the splits of IWSLT'14 De-En as fairseq's `prepare-iwslt14.sh` makes them, up to the subwords.

    - Training lines with titles and descriptions, which are sentences too; `&amp;` stays as it stands in the files.
    - Moses' tokens, then lower case: in this order, since a point before a small letter ends no sentence.
    - Left out of training: a side without a token or with more than 175, one side more than 1.5 times as long as the
      other, a token of more than 1,000 characters.
    - Of what is left every 23rd pair is the validation split, the rest is for training.
    - The test split is dev2010, TEDX dev2012, tst2010, tst2011 and tst2012, all of it, with `'` in the place of `’`.

    Expect about 160,239, 7,283 and 6,750 pairs (`IWSLT14_DE_EN_PAIRS`; `unlike_papers` compares). The papers' joint
    vocabulary is `train_bpe(chain(train.sources, train.targets), 10_149, split_punctuation=False)`.

    Args:
        text: What `read_iwslt` found in the distribution of 2014, in either direction.
        splits: Which of `train`, `validation` and `test`; the first two together cost what one does, a minute or
            two of a processor.

    Raises:
        ValueError: It is not that distribution, a set is missing, or a file is malformed.
        ImportError: sacremoses is not installed.
    """
    missing = [name for name in _TESTS if name not in text.sets]
    if {text.source, text.target} != {"de", "en"} or text.year != "14" or missing:
        raise ValueError(
            f"{text.origin}: expected IWSLT'14 De-En with {', '.join(_TESTS)}, got IWSLT'{text.year or '?'} "
            f"{text.pair} with {', '.join(text.sets) or 'no set'}; give that distribution, or read this one as it is"
        )
    tokenizers = moses_tokenizer(text.source), moses_tokenizer(text.target)

    def prepared(pairs: Iterable[tuple[int, str, str]]) -> Iterator[tuple[int, str, str]]:
        for place, source, target in pairs:
            yield place, tokenizers[0](source).lower(), tokenizers[1](target).lower()

    found = {}
    if {"train", "validation"} & set(splits):
        lines = ((place, source, target) for place, _, source, target in text.lines())
        found = _split(prepared(lines), text.origin)
    if "test" in splits:
        segments = (
            (place, source.replace("’", "'"), target.replace("’", "'"))
            for place, source, target in text.segments(*_TESTS)
        )
        found["test"] = pair_up(prepared(segments), f"{text.origin}, prepared, test")
    return {split: found[split] for split in SPLITS if split in splits}


def unlike_papers(prepared: Mapping[str, ParallelText]) -> str | None:
    """Return which splits differ by more than 1 % from `IWSLT14_DE_EN_PAIRS`, None if none does.

    Examples:
        >>> unlike_papers({"test": ParallelText(["ja"], ["yes"], "a file", [1])})
        'test: expected about 6,750 pairs, got 1'
    """
    differ = [
        f"{split}: expected about {IWSLT14_DE_EN_PAIRS[split]:,} pairs, got {len(text):,}"
        for split, text in prepared.items()
        if abs(len(text) - IWSLT14_DE_EN_PAIRS[split]) > _MAY_DIFFER * IWSLT14_DE_EN_PAIRS[split]
    ]
    return "; ".join(differ) or None


def moses_tokenizer(language: str) -> Callable[[str], str]:
    """Return a function that gives the tokens of a text with spaces between them, as Moses' `tokenizer.perl` does.

    It is sacremoses' tokenizer, but the point at the very end of a text is a token of its own, as in the script, which
    makes two of `usw.` there. Of the 28,066 sentences of the prepared validation and test sets, written as people do,
    all but 11 come out as fairseq's.

    Raises:
        ImportError: sacremoses is not installed.
    """
    try:
        from sacremoses import MosesTokenizer
    except ImportError as error:
        raise ImportError("Moses' tokens need sacremoses; install it with: pip install 'hf-parcor[moses]'") from error
    tokenizer = MosesTokenizer(lang=language)

    def tokenize(text: str) -> str:
        return _LAST_POINT.sub(" .", tokenizer.tokenize(text, return_str=True))

    return tokenize


def left_out(source: str, target: str) -> str | None:
    """Return why a pair of tokenised sentences is not trained on, None if it is.

    Examples:
        >>> left_out("a b c", "a b"), left_out("a b c d", "a b")
        (None, 'more than 1.5 times as long')
    """
    words = source.split(), target.split()
    lengths = [len(side) for side in words]
    if max(lengths) > MAX_LENGTH:
        return f"more than {MAX_LENGTH} tokens"
    if min(lengths) and max(lengths) > MAX_RATIO * min(lengths):
        return f"more than {MAX_RATIO} times as long"
    if any(len(word) > _LONGEST_WORD for side in words for word in side):
        return f"a token of more than {_LONGEST_WORD:,} characters"
    return None


def _split(pairs: Iterable[tuple[int, str, str]], origin: str) -> dict[str, ParallelText]:
    skipped: dict[str, list[int]] = {}

    def good() -> Iterator[tuple[int, str, str]]:
        for place, source, target in pairs:
            reason = left_out(source, target)
            if reason is None:
                yield place, source, target
            else:
                skipped.setdefault(reason, []).append(place)

    kept = pair_up(good(), origin)
    numbers = {
        "train": [number for number in range(len(kept)) if (number + 1) % EVERY],
        "validation": [number for number in range(len(kept)) if not (number + 1) % EVERY],
    }
    left = {**kept.skipped, **skipped}
    return {
        split: ParallelText(
            [kept.sources[number] for number in chosen],
            [kept.targets[number] for number in chosen],
            f"{origin}, prepared, {split}",
            [kept.places[number] for number in chosen],
            left if split == "train" else {},
        )
        for split, chosen in numbers.items()
    }
