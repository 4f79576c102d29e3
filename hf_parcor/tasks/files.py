"""Rows from local files: CSV, TSV, JSON, JSON lines and plain text, also compressed with gzip.

Values are what the file says: a text "NA" is no missing value, and a quote in a TSV file is a quote.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from hf_parcor.errors import InputError

Row = dict[str, Any]
# Only what a number is written as again: 007, -0 and digits of other scripts would lose how they are written.
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


def read_file(path: str | Path) -> list[Row]:
    """Return the rows of a file, by the names of their columns.

    Columns of CSV and TSV files that hold whole numbers alone become numbers, if `str` gives every cell back as it
    was; 007 remains a text. What is nested in JSON objects gets names with dots: `{"translation": {"de": "Hallo"}}`
    is a column `translation.de`. Lines of a .txt file are the column `text`.

    Raises:
        InputError: There is no such file, it cannot be read, or it is not what its name says.
    """
    path = Path(path)
    kind = data_suffix(path)
    if kind not in _READERS:
        raise InputError(
            f"{path}: expected a file that ends in {_KNOWN}, got {path.name!r}; convert it to one of these"
        )
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a file, found none; check its name") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a file that can be read, got {error}; restore or convert it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, got {error}; convert it to UTF-8") from error
    return _READERS[kind](path, text)


def data_suffix(path: str | Path) -> str:
    """Return how the name of a data file ends, without `.gz`; "" where no reader knows it.

    Examples:
        >>> data_suffix("dev.tsv.gz"), data_suffix("stanfordnlp/sst2")
        ('.tsv', '')
    """
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    return suffix if suffix in _READERS else ""


def _read_tsv(path: Path, text: str) -> list[Row]:
    return _with_header(path, ((at, line.split("\t")) for at, line in enumerate(_lines(text), start=1) if line))


def _read_csv(path: Path, text: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        with _cells_up_to(len(text)):
            return _with_header(path, [(reader.line_num, cells) for cells in reader if cells])
    except csv.Error as error:
        _refuse(path, f"line {reader.line_num}", "comma-separated values", str(error))


@contextmanager
def _cells_up_to(length: int) -> Iterator[None]:
    """Let the module csv read cells of this length; its limit is one for all code in the process."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, length))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _with_header(path: Path, numbered: Iterable[tuple[int, list[str]]]) -> list[Row]:
    rows = list(numbered)
    if not rows:
        return []
    (first, header), *rows = rows
    for index, name in enumerate(header):
        if name in header[:index]:
            _refuse_twice(path, f"line {first}", name)
    for at, cells in rows:
        if len(cells) != len(header):
            _refuse(path, f"line {at}", f"{len(header)} cells ({', '.join(header)})", str(len(cells)))
    columns = [_numbers([cells[index] for _, cells in rows]) for index in range(len(header))]
    return [dict(zip(header, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _numbers(cells: list[str]) -> list[Any]:
    whole = all(_WHOLE_NUMBER.fullmatch(cell) for cell in cells)
    return [int(cell) for cell in cells] if whole else cells


def _read_json(path: Path, text: str) -> list[Row]:
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # JSON lines by another name
            return _read_json_lines(path, text)
        _refuse(path, f"line {error.lineno}", "JSON", error.msg)
    except (ValueError, RecursionError) as error:
        _refuse(path, "", "JSON", str(error))
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else [found]
    if isinstance(found, dict) and _is_row(found, lists):  # JSON lines by another name, of one line
        return [_flat(path, "row 1", found)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        _refuse(path, "line 1", "a list of objects", type(found).__name__)
    return [_flat(path, f"row {index}", row) for index, row in enumerate(lists[0], start=1)]


def _is_row(found: Row, lists: list[list[Any]]) -> bool:
    """Return whether an object is a row: neither around a list of rows, nor columns with numbered cells, as of pandas.

    Examples:
        >>> _is_row({"tokens": ["a"], "label": 1}, [["a"]]), _is_row({"data": [{"text": "a"}]}, [[{"text": "a"}]])
        (True, False)
    """
    of_rows = len(lists) == 1 and all(isinstance(row, dict) for row in lists[0])
    return not of_rows and not all(isinstance(value, dict) for value in found.values())


def _read_json_lines(path: Path, text: str) -> list[Row]:
    return [_json_line(path, f"line {at}", line) for at, line in enumerate(_lines(text), start=1) if line.strip()]


def _json_line(path: Path, at: str, line: str) -> Row:
    try:
        found = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        _refuse(path, at, "a JSON object", error.msg)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and brackets as deep
        _refuse(path, at, "a JSON object", str(error))
    return _flat(path, at, found)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object of JSON, where Python's reader would take the last of two values and say nothing."""
    found: Row = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} twice in one object")
        found[name] = value
    return found


def _read_text(path: Path, text: str) -> list[Row]:
    return [{"text": line} for line in _lines(text)]


def _lines(text: str) -> list[str]:
    """Return lines as files have them; `str.splitlines` also cuts at separators inside of a text."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _flat(path: Path, at: str, row: Any) -> Row:
    if not isinstance(row, dict):
        _refuse(path, at, "an object with the columns by name", type(row).__name__)
    flat: Row = {}
    for name, value in row.items():
        nested = {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        for column in nested:
            if column in flat:
                _refuse_twice(path, at, column)
        flat |= nested
    half = next(_half_characters(flat), None)
    if half is not None:
        _refuse(path, at, "text", f"half of a character (\\u{ord(half):04x})")
    return flat


def _half_characters(value: Any) -> Iterator[str]:
    """Yield surrogates without their partner: JSON can write them, but they are no text for a tokenizer."""
    if isinstance(value, str):
        yield from _HALF_CHARACTER.findall(value)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _half_characters(name)
            yield from _half_characters(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _half_characters(entry)


def _refuse_twice(path: Path, at: str, column: str) -> NoReturn:
    _refuse(path, at, "columns of different names", f"{column!r} twice")


def _refuse(path: Path, at: str, expected: str, found: str) -> NoReturn:
    where = f" in {at}" if at else ""
    raise InputError(f"{path}: expected {expected}{where}, got {found}; mend or convert the file")


_READERS: Mapping[str, Callable[[Path, str], list[Row]]] = MappingProxyType(
    {".csv": _read_csv, ".tsv": _read_tsv, ".json": _read_json, ".jsonl": _read_json_lines, ".txt": _read_text}
)
_KNOWN = f"{', '.join(_READERS)}, or these and .gz"
