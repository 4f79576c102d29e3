"""Records as files, strict JSON that is checked when it is read: what all kinds of them have in common."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hf_parcor.strict_json import Reader, from_plain, replace_text, to_strict_json

_Record = TypeVar("_Record", bound="StoredRecord")


class StoredRecord:
    """A frozen dataclass of results that is stored as strict JSON; reading a record of another kind is an error.

    Attributes:
        kind: Its name in messages.
        remedy: What to do if a file does not hold one.
        format: Version of the layout; a field in subclasses.
    """

    kind: ClassVar[str]
    remedy: ClassVar[str] = "measure again, or read it with the version of hf_parcor that wrote it"
    format: int

    def check(self) -> None:
        """Refuse what was read if its parts contradict each other; by default nothing.

        Raises:
            ValueError: They do.
        """

    def to_json(self) -> str:
        """Return the record as standard JSON, with NaN and infinities as the strings "nan", "inf" and "-inf"."""
        return to_strict_json(self)

    @classmethod
    def from_json(cls: type[_Record], text: str) -> _Record:
        """Read what `to_json` returned.

        Raises:
            ValueError: The text is not a record of this kind and format.
        """
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{cls.kind}: expected JSON, got {error}; {cls.remedy}") from error
        return cls.from_plain(data)

    @classmethod
    def from_plain(cls: type[_Record], data: Any) -> _Record:
        """Read plain values, as JSON holds them.

        Raises:
            ValueError: They are not a record of this kind and format.
        """
        if not _has_fields_of(data, cls):
            other = next((one.kind for one in StoredRecord.__subclasses__() if _has_fields_of(data, one)), None)
            if other is not None:
                raise ValueError(
                    f"{cls.kind}: expected one, got a {other}; name another file, or read it as what it is"
                )
        if not isinstance(data, dict) or data.get("format") != cls.format:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{cls.kind}: expected format {cls.format}, got {found!r}; {cls.remedy}")
        try:
            readers = {kind: _reader_of(kind) for kind in StoredRecord.__subclasses__() if kind is not cls}
            record: _Record = from_plain(cls, data, cls.kind, readers, complete=False)
            record.check()
            return record
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"{cls.kind}: expected all fields of format {cls.format}, got {error!r}; it is damaged: {cls.remedy}"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the record to a JSON file and return the path; the folder is created if needed.

        An interruption leaves the old file.
        """
        return replace_text(path, self.to_json())

    @classmethod
    def load(cls: type[_Record], path: str | Path) -> _Record:
        """Read a file that `save` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It does not hold such a record.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {cls.kind}: expected text in UTF-8, got {error}; {cls.remedy}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _reader_of(kind: type[StoredRecord]) -> Reader:
    return lambda value, name: kind.from_plain(value)


def _has_fields_of(data: Any, kind: type[StoredRecord]) -> bool:
    """Say whether plain values have the very names that a kind of record writes."""
    written: Any = kind  # every kind is a dataclass, which its type does not say
    return isinstance(data, dict) and {one.name for one in fields(written)} == data.keys()
