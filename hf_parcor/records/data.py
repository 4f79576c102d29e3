"""The data that a model was measured on, as records and cards name them."""

from __future__ import annotations

import re
from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Any

_SOURCE = re.compile(r"hf://datasets/([^@/]+/[^@/]+)@([0-9a-f]{40})/")
_SLICE = r"[^\[\]():+]+(?:\[[^\[\]]*\](?:\(\w+\))?)?"
_SPLIT = re.compile(rf"(?:{_SLICE}(?:\+{_SLICE})*)?")  # as the library `datasets` reads it
_FIRST = re.compile(r"(?:\((?P<several>.+)\)|(?P<one>[^+]*))\[:(?P<limit>\d+)\]")
_LOADERS = ("csv", "json", "pandas", "parquet", "text", "generator", "arrow")
_UNNAMED = "the evaluation data"
OF_ROWS = "rows:"  # before the fingerprint of rows; that of batches has nothing before it


def same_data(one: str, other: str) -> bool | None:
    """Return whether two fingerprints are of the same data; None if that is unknown.

    It is unknown if one is missing, or if one is of rows and the other of batches, as in older records.

    Examples:
        >>> same_data("rows:12", "rows:12"), same_data("rows:12", "rows:34"), same_data("rows:12", "56")
        (True, False, None)
    """
    if not one or not other or one.startswith(OF_ROWS) != other.startswith(OF_ROWS):
        return None
    return one == other


@dataclass(frozen=True)
class EvaluationData:
    """The data that a model was evaluated on; only `name` is needed.

    Attributes:
        name: The name for readers: that of the data set, or of the file without its folder.
        id: The name on the Hub; "" if it is not there.
        config: The name of the configuration; "" if there is only one.
        split: For example "validation", or "validation[:100]" for its first rows, "(train+test)[:100]" for those of
            both together; "" if unknown, or for a whole file.
        revision: The commit on the Hub; "" if unknown.
        rows: The number of rows that were measured; None if unknown.
    """

    name: str = _UNNAMED
    id: str = ""
    config: str = ""
    split: str = ""
    revision: str = ""
    rows: int | None = None

    def __str__(self) -> str:
        named = f"{self.name} ({self.id})" if self.id and self.id != self.name else self.name
        revision = f"revision {self.revision[:7]}" if self.revision else ""
        return ", ".join(filter(None, [named, self.config, self.split, revision, self.size]))

    @property
    def size(self) -> str:
        """The number of rows, in words; "" if unknown."""
        return "" if self.rows is None else f"{self.rows:,} row{'s' * (self.rows != 1)}"

    @property
    def flags(self) -> dict[str, str]:
        """The flags of the command line for these data; empty if it cannot name them: drawn rows, or unnamed data.

        Examples:
            >>> EvaluationData("reviews", id="org/reviews", split="test[:100]").flags
            {'dataset': 'org/reviews', 'split': 'test', 'limit': '100'}
        """
        first = _FIRST.fullmatch(self.split)
        split, limit = (first["several"] or first["one"], first["limit"]) if first else (self.split, "")
        source = self.id or self.name
        if not _SPLIT.fullmatch(split) or source == _UNNAMED:
            return {}
        found = {"dataset": source, "dataset_config": self.config, "split": split, "limit": limit}
        return {flag: value for flag, value in found.items() if value}

    @property
    def is_known(self) -> bool:
        """Whether anything is known that distinguishes these data from others."""
        return self != EvaluationData()


def evaluation_data_of(dataset: Any) -> EvaluationData:
    """Return what a data set of the library `datasets` says of itself: name, configuration, split, revision, rows.

    Args:
        dataset: The data set; any other object says nothing but its length, if it has one.
    """
    info = getattr(dataset, "info", None)
    sources = map(_SOURCE.match, getattr(info, "download_checksums", None) or ())
    source = next((match for match in sources if match is not None), None)
    found, revision = source.groups() if source else ("", "")
    loaded = str(getattr(info, "dataset_name", "") or "")
    name = found or ("" if loaded in _LOADERS else loaded)
    config = str(getattr(dataset, "config_name", "") or "")
    return EvaluationData(
        name.rpartition("/")[2] or _UNNAMED,
        id=found,
        config="" if config == "default" or loaded in _LOADERS else config,
        split=str(getattr(dataset, "split", "") or ""),
        revision=revision,
        rows=len(dataset) if isinstance(dataset, Sized) else None,
    )


def named_on_hub(data: EvaluationData, name: str) -> EvaluationData:
    """Return the data by their name on the Hub, where the caller knows it.

    Examples:
        >>> named_on_hub(EvaluationData("the evaluation data", split="test"), "org/reviews")
        EvaluationData(name='reviews', id='org/reviews', config='', split='test', revision='', rows=None)
    """
    revision = data.revision if name == data.id else ""
    return replace(data, name=name.rpartition("/")[2], id=name, revision=revision)
