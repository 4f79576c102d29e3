"""Sentences and their translations, with the place of each and a count of what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 5

TRANSLATION_COLUMN = "translation"


@dataclass(frozen=True)
class ParallelText:
    """Sentences, their translations, and where they come from.

    Args:
        sources: The sentences.
        targets: Their translations, as many.
        origin: A file, two files or a data set, as reports call it.
        places: The line or row of each pair, counted from 1.
        skipped: Which lines or rows were left out, by reason.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    origin: str
    places: Sequence[int]
    skipped: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def report(self) -> str:
        """How many pairs there are, and how many were left out, why, and where.

        Examples:
            >>> ParallelText(["a"], ["b"], "train.tsv", [1], {"empty source": [2, 3]}).report
            'train.tsv: 1 pairs; left out 2: empty source (lines 2, 3)'
        """
        return f"{self.origin}: {len(self):,} pairs{shown_skips(self.skipped)}"

    def first(self, most: int | None) -> ParallelText:
        """Return the first so many pairs, all for None."""
        if most is None:
            return self
        return ParallelText(self.sources[:most], self.targets[:most], self.origin, self.places[:most], self.skipped)


def shown_skips(skipped: Mapping[str, Sequence[int]]) -> str:
    """Return what was left out, why and where, empty if nothing was.

    Examples:
        >>> shown_skips({"empty target": [4], "more than 8 tokens": [1, 2, 3, 5, 6, 7]})
        '; left out 7: empty target (line 4), more than 8 tokens (lines 1, 2, 3, 5, 6 and 1 more)'
    """
    parts = []
    for reason, places in skipped.items():
        if places:
            more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
            lines = "line" if len(places) == 1 else "lines"
            parts.append(f"{reason} ({lines} {', '.join(map(str, places[:_SHOWN]))}{more})")
    return f"; left out {sum(map(len, skipped.values()))}: {', '.join(parts)}" if parts else ""


def pair_up(pairs: Iterable[tuple[int, str, str]], origin: str) -> ParallelText:
    """Return the pairs as parallel text, without those of which a side is empty; these are counted.

    Args:
        pairs: The place, the sentence and the translation of each.
        origin: Where they come from.

    Raises:
        ValueError: No pair is left.

    Examples:
        >>> text = pair_up([(1, "ein Hund", "a dog"), (2, " ", "a cat")], "two lines")
        >>> text.sources, text.skipped
        (['ein Hund'], {'empty source': [2]})
    """
    sources, targets, places = [], [], []
    skipped: dict[str, list[int]] = {}
    for place, source, target in pairs:
        if not source.strip() or not target.strip():
            reason = "empty target" if source.strip() else "empty source"
            skipped.setdefault(reason, []).append(place)
            continue
        sources.append(source)
        targets.append(target)
        places.append(place)
    if not sources:
        raise ValueError(
            f"{origin}: expected at least one pair of sentences, found none{shown_skips(skipped)}; fill it"
        )
    return ParallelText(sources, targets, origin, places, skipped)


def from_rows(rows: Iterable[Mapping[str, Any]], source: str, target: str, origin: str) -> ParallelText:
    """Return the rows of a data set as parallel text.

    Args:
        rows: Each with a `translation` by language, as `IWSLT/iwslt2017` on the Hub has, or with a column for each.
        source: The language, or column, of the sentences.
        target: That of their translations.
        origin: What reports call the data set.

    Raises:
        ValueError: A row lacks a language, has no text there, or no pair is left.

    Examples:
        >>> from_rows([{"translation": {"de": "ein Hund", "en": "a dog"}}], "de", "en", "a data set").targets
        ['a dog']
    """

    def pairs() -> Iterator[tuple[int, str, str]]:
        for place, row in enumerate(rows, start=1):
            yield place, *pair_of_row(row, source, target, f"{origin}, row {place}")

    return pair_up(pairs(), origin)


def pair_of_row(row: Any, source: str, target: str, place: str) -> tuple[str, str]:
    """Return both texts of a row.

    Raises:
        ValueError: It is no mapping, or lacks a language, or has no text there.
    """
    texts = row.get(TRANSLATION_COLUMN, row) if isinstance(row, Mapping) else row
    if not isinstance(texts, Mapping):
        raise ValueError(
            f"{place}: expected texts by language, got {texts!r}; give each row {TRANSLATION_COLUMN!r} with a text for"
            " each language, or a column for each"
        )
    for language in (source, target):
        if not isinstance(texts.get(language), str):
            raise ValueError(
                f"{place}: expected a text for {language!r}, got {texts.get(language)!r}; it has "
                f"{', '.join(map(str, texts)) or 'nothing'}: name two of these as languages"
            )
    return texts[source], texts[target]
