"""Sentences and their translations, from files or rows, with the place of each and a count of what was left out."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_parcor.arguments import check_count

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
        """Return the first so many pairs, one at least; all for None."""
        if most is None:
            return self
        check_count("most", most)
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
    numbered = enumerate(rows, start=1)
    pairs = ((place, *pair_of_row(row, source, target, f"{origin}, row {place}")) for place, row in numbered)
    return pair_up(pairs, origin)


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


_LINES_OF_JSON = (".json", ".jsonl")


def read_parallel_files(source_file: str | Path, target_file: str | Path) -> ParallelText:
    """Read two files of lines, UTF-8, where line n of one translates line n of the other; `.gz` too.

    Raises:
        ValueError: A file is missing, not UTF-8 (the line is named), or one has more lines; or no pair is left.
    """
    sources, targets = list(_lines(Path(source_file))), list(_lines(Path(target_file)))
    if len(sources) != len(targets):
        longer, shorter = (source_file, target_file) if len(sources) > len(targets) else (target_file, source_file)
        first = min(len(sources), len(targets)) + 1
        raise ValueError(
            f"{source_file} and {target_file}: expected as many lines, got {len(sources):,} and {len(targets):,}; "
            f"line {first:,} of {longer} has no translation in {shorter}: align the files"
        )
    pairs = zip(range(1, len(sources) + 1), sources, targets, strict=True)
    return pair_up(pairs, f"{source_file}, {target_file}")


def read_rows(path: str | Path, source: str, target: str) -> ParallelText:
    """Read one file of rows, UTF-8: `.tsv`, `.jsonl`, or `.json` with one list or an object a line; `.gz` too.

    A table has its columns' names in the first line, tabs between columns, and no quoting. Rows of JSON are as those
    that `from_rows` takes.

    Args:
        path: The file.
        source: The column, or language, of the sentences.
        target: That of their translations.

    Raises:
        ValueError: The file is missing, of another kind, not UTF-8, or a line is not as expected; or no pair is left.
    """
    path = Path(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".tsv":
        return pair_up(_table(path, source, target), str(path))
    if kind in _LINES_OF_JSON:
        return pair_up(_json(path, source, target), str(path))
    raise ValueError(
        f"{path}: expected a .tsv, .json or .jsonl file, also .gz, got {kind!r}; convert it to one of these"
    )


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, found none; check the name")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from decoded_lines(file, str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a file that gzip can read, got {error}; restore it") from error


def decoded_lines(lines: Iterable[bytes], place: str) -> Iterator[str]:
    """Yield the lines of a file of UTF-8, without their ends; a mark of the byte order before the first is dropped.

    Args:
        lines: The lines.
        place: What errors call the file.

    Raises:
        ValueError: A line is not UTF-8; it is named.
    """
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place}, line {number}: expected UTF-8, got byte {line[error.start]:#04x} at {error.start}; "
                "convert the file, say with iconv"
            ) from error
        yield text.rstrip("\r\n")


def _table(path: Path, source: str, target: str) -> Iterator[tuple[int, str, str]]:
    lines = _lines(path)
    columns = next(lines, "").split("\t")
    for column in (source, target):
        if columns.count(column) != 1:
            raise ValueError(
                f"{path}, line 1: expected a column {column!r} once, found {', '.join(columns)}; name two of these, "
                "or rename one"
            )
    places = columns.index(source), columns.index(target)
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise ValueError(
                f"{path}, line {number}: expected {len(columns)} columns, got {len(cells)}; mend the line"
            )
        yield number, cells[places[0]], cells[places[1]]


def _json(path: Path, source: str, target: str) -> Iterator[tuple[int, str, str]]:
    lines = list(_lines(path))
    if lines and lines[0].lstrip().startswith("["):
        try:
            rows = json.loads("\n".join(lines))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: expected JSON, got {error.msg}; mend the file") from error
        for number, row in enumerate(rows, start=1):
            yield number, *pair_of_row(row, source, target, f"{path}, row {number}")
        return
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected an object of JSON, got {error.msg}; mend it") from error
        yield number, *pair_of_row(row, source, target, f"{path}, line {number}")
