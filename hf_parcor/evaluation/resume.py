"""The file that an interrupted run of measurements goes on from.

Its first line says what is measured; each other line is one finished trial. Lines are only ever appended, so that a
kill at any moment leaves whole lines and at most a part of a last one, which is dropped and measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_parcor.evaluation.trials import Trial
from hf_parcor.injection import CorruptionSize
from hf_parcor.strict_json import flattened, replace_text, to_plain

_FORMAT = 2  # 1 knew a metric by its name alone
_KIND = "hf_parcor checkpoint"
_LONGEST = 40  # letters of a value that a message shows
_AROUND = 10  # of them before the first that differs


class CheckpointError(ValueError):
    """A file is a checkpoint of another run, damaged, or not a checkpoint; nothing was measured or written."""


def begin_checkpoint(path: Path, run: Mapping[str, Any]) -> dict[int, Trial]:
    """Return the trials that a checkpoint has, by their number; start one where there is no file.

    Args:
        path: The file.
        run: Whatever decides what is measured, as plain values by name. A checkpoint of anything else is refused.

    Raises:
        OSError: The file cannot be read or written.
        CheckpointError: It is no checkpoint, one of another run, or damaged. A `ValueError`.
    """
    run = json.loads(_line(run))
    if not path.exists():
        replace_text(path, _line({"kind": _KIND, "format": _FORMAT, "run": run}) + "\n")
        return {}
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")
    _check_run(path, lines[0] if lines else torn, run)
    trials = dict(_numbered_trial(path, line, at) for at, line in enumerate(lines[1:], start=2))
    if torn:
        os.truncate(path, len(content) - len(torn))
    return trials


def append_to_checkpoint(path: Path, trials: Mapping[int, Trial]) -> None:
    """Add finished trials, by their number, and wait until they are on the disk."""
    lines = [_line({"number": number, **to_plain(trial)}) + "\n" for number, trial in trials.items()]
    with path.open("ab") as file:
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _line(value: Any) -> str:
    return json.dumps(to_plain(value), allow_nan=False)


def _numbered_trial(path: Path, line: bytes, at: int) -> tuple[int, Trial]:
    try:
        entry = json.loads(line)
        size = entry["size"]
        return int(entry["number"]), Trial(
            seed=entry["seed"],
            metrics={name: float(value) for name, value in entry["metrics"].items()},
            size=None if size is None else _size(size),
            odd=dict(entry["odd"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a finished trial in line {at}, got {error!r}; the file is damaged: remove it, or that "
            "line and all that follow"
        ) from error


def _size(entry: Mapping[str, Any]) -> CorruptionSize:
    return CorruptionSize(int(entry["changed"]), float(entry["norm"]), float(entry["asked"]))


def _check_run(path: Path, line: bytes, run: Mapping[str, Any]) -> None:
    remedy = "give another path, or remove the file"
    try:
        header = json.loads(line)
        if header["kind"] != _KIND:
            raise ValueError(header["kind"])
        found, version = dict(header["run"]), header["format"]
    except (KeyError, TypeError, ValueError) as error:
        shown = line[:40].decode(errors="replace")
        raise CheckpointError(f"{path}: expected a checkpoint of a measurement, got {shown!r}; {remedy}") from error
    if version != _FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {_FORMAT}, got {version}; go on with the version of hf_parcor "
            f"that wrote it, {remedy}"
        )
    before, now = flattened(found), flattened(run)
    differing = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if differing:
        details = ", ".join(f"{name} ({_shown(before.get(name), now.get(name))})" for name in differing)
        raise CheckpointError(f"{path}: expected a checkpoint of this run, got one with other {details}; {remedy}")


def _shown(before: Any, now: Any) -> str:
    """Return two values, of long ones the first 40 letters from shortly before where they differ.

    Examples:
        >>> _shown("a", "b")
        'a, now b'
        >>> _shown(list(range(20)) + [4], list(range(20)) + [3])
        '…, 18, 19, 4], now …, 18, 19, 3]'
    """
    texts = [value if isinstance(value, str) else _line(value) for value in (before, now)]
    pairs = zip(*texts, strict=False)
    alike = next((place for place, (one, other) in enumerate(pairs) if one != other), min(map(len, texts)))
    start = alike - _AROUND if max(map(len, texts)) > _LONGEST and alike > _AROUND else 0
    cut = [("…" if start else "") + text[start:] for text in texts]
    return ", now ".join(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..." for text in cut)
