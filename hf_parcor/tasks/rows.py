"""Rows of data, from the Hub or from a local file, and what their columns are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_parcor.hub_data import load_hub_data
from hf_parcor.input_error import InputError, nearest
from hf_parcor.tasks.files import data_suffix, read_file


@dataclass(frozen=True)
class Rows:
    """Rows of data, each a mapping from the names of columns to values.

    Attributes:
        source: What messages call them.
        entries: The rows, a list or a `datasets.Dataset`.
        columns: The names of the columns.
        class_names: For columns with numbers that stand for names: the names, in order.

    Raises:
        InputError: There is no row.
    """

    source: str
    entries: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.entries):
            raise InputError(f"{self.source}: expected at least one row, got none; name other data")

    def column(self, name: str) -> list[Any]:
        """Return all values of a column.

        Raises:
            InputError: A row lacks it.
        """
        values = [row.get(name) for row in self.entries]
        if None in values:
            raise InputError(
                f"{self.source}: expected a value of {name!r} in each row, got none in row {values.index(None) + 1}; "
                "mend the data, or name another column or split"
            )
        return values


def load_rows(source: str, split: str = "validation", configuration: str | None = None) -> Rows:
    """Return the rows of a local file, of a local folder that `datasets` knows, or of a data set on the Hub.

    A data set that is still a loading script is read as `load_hub_data` does.

    Args:
        source: A file (.csv, .tsv, .json, .jsonl, .txt, also .gz), a folder, or a name on the Hub.
        split: Which split; a file has none.
        configuration: The data set's configuration.

    Raises:
        InputError: There is no such data, split or configuration, or it has no row.
        ImportError: It is no local file, and datasets is not installed.
    """
    path = Path(source)
    if path.is_file() or data_suffix(source):
        rows = read_file(path)
        return Rows(source, rows, tuple(dict.fromkeys(name for row in rows for name in row)))
    found = load_hub_data(source, configuration, split=split)
    if "translation" in found.features:
        found = found.flatten()
    return Rows(source, found, tuple(found.column_names), _class_names(found.features))


def find_column(rows: Rows, role: str, known: Sequence[str], given: Mapping[str, str]) -> str | None:
    """Return the column that has a role: the one that is given, or the first with a well-known name.

    Raises:
        InputError: The column that is given does not exist, or two have one well-known name but for its case.
    """
    if role in given:
        if given[role] not in rows.columns:
            raise InputError(
                f"{rows.source}: expected one of the columns {', '.join(rows.columns)}, got {given[role]!r} for "
                f"{role}{nearest(given[role], rows.columns)}; name the column"
            )
        return given[role]
    found = next(filter(None, ([name for name in rows.columns if name.lower() == wanted] for wanted in known)), [])
    if len(found) > 1:
        raise InputError(
            f"{rows.source}: expected one column for {role}, got {', '.join(found)}; name it with --column {role}=NAME"
        )
    return found[0] if found else None


def _class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the names behind the numbers of those columns that are labels, or lists of labels."""
    found: dict[str, Sequence[str]] = {}
    for name, feature in features.items():
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names is not None:
            found[name] = list(names)
    return found
