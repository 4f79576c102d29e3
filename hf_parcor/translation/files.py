"""Parallel text from local files: two of lines, or one of rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_parcor.translation.parallel_text import ParallelText, pair_of_row, pair_up

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
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from decoded_lines(file, str(path))


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
        if column not in columns:
            raise ValueError(
                f"{path}, line 1: expected a column {column!r}, found {', '.join(columns)}; name two of these"
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
