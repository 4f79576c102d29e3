"""Records as files: JSON that every reader accepts, written whole or not at all, and checked when it is read."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar


def to_plain(value: Any, otherwise: Callable[[Any], Any] | None = None) -> Any:
    """Return a value as what strict JSON can hold: infinities and NaN as strings, dataclasses as objects.

    Read the strings "nan", "inf" and "-inf" back with `float`, which knows these words.

    Args:
        value: Anything.
        otherwise: What becomes of a value that has no such form; None, the default, leaves it.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> to_plain(CorruptionConstraint(p=math.inf, epsilon=0.1))
        {'p': 'inf', 'epsilon': 0.1, 'top_n': None}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):  # NumPy's integers
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name), otherwise) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry, otherwise) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [to_plain(entry, otherwise) for entry in value]
    return value if otherwise is None else otherwise(value)


def to_strict_json(value: Any) -> str:
    """Return plain values, or dataclasses of them, as standard JSON.

    Raises:
        TypeError: There is something that JSON has no word for.

    Examples:
        >>> print(to_strict_json({"p": math.inf}), end="")
        {
          "p": "inf"
        }
    """
    return json.dumps(to_plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_strict_json(path: str | os.PathLike[str]) -> Any:
    """Return what a file of standard JSON holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or has NaN or infinities that are not strings.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f'expected strict JSON, got {constant}; write it as a string, "inf" say')

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON, got {error}") from error


_Record = TypeVar("_Record", bound="StoredRecord")


class StoredRecord(ABC):
    """A frozen dataclass of results that is written as strict JSON, and refuses what another kind has written.

    Attributes:
        kind: What messages call it.
        remedy: What to do if a file holds none.
        format: Version of the layout; subclasses make it a field.
    """

    kind: ClassVar[str]
    remedy: ClassVar[str]
    format: int

    @classmethod
    @abstractmethod
    def _read(cls: type[_Record], data: dict[str, Any]) -> _Record:
        """Return the record from plain values of the right format; whatever is wrong with them may raise."""

    def to_json(self) -> str:
        """Return the record as standard JSON; NaN and infinities become the strings "nan", "inf" and "-inf"."""
        return to_strict_json(self)

    @classmethod
    def from_json(cls: type[_Record], text: str) -> _Record:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no such record, or one of another format.
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
            ValueError: They are no such record, or one of another format.
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
            return cls._read(dict(data))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{cls.kind}: expected all fields of format {cls.format}, got {error!r}; it is damaged: {cls.remedy}"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the JSON to a file, with its folder, and return the path; an interruption leaves the old file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, self.to_json())
        return path

    @classmethod
    def load(cls: type[_Record], path: str | Path) -> _Record:
        """Read a file that `save` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no such record.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {cls.kind}: expected text in UTF-8, got {error}; {cls.remedy}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _has_fields_of(data: Any, kind: type[StoredRecord]) -> bool:
    """Say whether plain values have the very names that a kind of record writes."""
    written: Any = kind  # every kind is a dataclass, which its type does not say
    return isinstance(data, dict) and {one.name for one in fields(written)} == data.keys()


def replace_text(path: Path, text: str) -> None:
    """Write a file such that another process, and an interruption, find either the old text or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")  # line endings as they are
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
