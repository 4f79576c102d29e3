"""What single trials found, the record that is made from them, and the file that an interrupted run goes on from.

The file's first line says what is measured; each other line is one finished trial. Lines are only ever appended, so
that a kill at any moment leaves whole lines and at most a part of a last one, which is dropped and measured again.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging

from hf_parcor.evaluation.answers import NOT_FINITE
from hf_parcor.evaluation.metrics.generation import CUT
from hf_parcor.injection import CorruptionSize
from hf_parcor.records.evaluation import CorruptionKind, CorruptionRecord
from hf_parcor.strict_json import replace_text, to_plain

logger = logging.get_logger(__name__)

DEFAULT_TRIALS = 3
"""Of each stochastic corruption, wherever nothing else is said: the fewest that show how far trials lie apart."""

_OF_THE_CLOCK = (
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),  # Trainer.evaluate
    *("total_time_in_seconds", "latency_in_seconds"),  # the evaluators of evaluate
)


@dataclass(frozen=True)
class Trial:
    """One measurement, as plain values.

    Attributes:
        seed: What its randomness was drawn with.
        metrics: What the metric returned; NaN for what is no number.
        size: What the corruption changed, if there was one.
        odd: How those metrics read that are not finite or no number; and, by their own names, the shares of
            predictions that were not finite, and of texts that were cut, if there were any.
    """

    seed: int
    metrics: Mapping[str, float]
    size: CorruptionSize | None = None
    odd: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int, metrics: Mapping[str, object], size: CorruptionSize | None = None) -> Trial:
        """Return the trial in which a metric returned this."""
        numbers = {str(key): _number(value) for key, value in metrics.items()}
        odd = {str(key): repr(value) for key, value in metrics.items() if not math.isfinite(numbers[str(key)])}
        for name in (NOT_FINITE, CUT):
            share = numbers.pop(name, 0.0)  # no metric: most trials have none
            if share:
                odd[name] = repr(share)
        return cls(seed, numbers, size, odd)

    @property
    def not_finite(self) -> float:
        """Which share of the predictions was not finite."""
        return float(self.odd.get(NOT_FINITE, 0.0))

    @property
    def cut(self) -> float:
        """Which share of the generated texts did not end within the length."""
        return float(self.odd.get(CUT, 0.0))


def is_of_the_clock(name: str) -> bool:
    """Return whether a metric is a time or a speed, as `Trainer.evaluate` and evaluators of `evaluate` name them.

    Examples:
        >>> [name for name in ("eval_loss", "eval_runtime", "eval_samples_per_second") if is_of_the_clock(name)]
        ['eval_runtime', 'eval_samples_per_second']
    """
    return name.endswith(_OF_THE_CLOCK)


def checked_metrics(metrics: object) -> Mapping[str, object]:
    """Return what a metric found, without what tells how long it took.

    Raises:
        TypeError: It is no mapping, or one without anything that was found.
    """
    found = metrics if isinstance(metrics, Mapping) else {}
    found = {name: value for name, value in found.items() if not is_of_the_clock(name)}
    if not found:
        raise TypeError(
            f"metric: expected numbers by name, such as {{'accuracy': 0.9}}, got {metrics!r}; return a dict"
        )
    return found


def record_of(
    corruption: str,
    label: str,
    settings: Mapping[str, Any],
    trials: Sequence[Trial],
    kind: CorruptionKind | None = None,
) -> CorruptionRecord:
    """Return the record of one corruption's trials; what is odd about them is noted, and logged as a warning."""
    keys = dict.fromkeys(key for trial in trials for key in trial.metrics)
    metrics = {key: tuple(trial.metrics.get(key, math.nan) for trial in trials) for key in keys}
    notes = (
        *(f"no weight changed with seed {t.seed}" for t in trials if t.size is not None and not t.size.changed),
        *(
            f"{100 * t.not_finite:.3g} % of the predictions were not finite with seed {t.seed}; they count as wrong"
            for t in trials
            if t.not_finite
        ),
        *(
            f"{100 * t.cut:.3g} % of the generated texts did not end within their length and are scored as they "
            "were cut; allow for more tokens"
            for t in trials
            if t.cut and t.size is None  # a corrupted model may well run on
        ),
        *(
            f"{key} was {trial.odd.get(key)} with seed {trial.seed}"
            for key, values in metrics.items()
            for trial, value in zip(trials, values, strict=True)
            if not math.isfinite(value)
        ),
    )
    for note in notes:
        logger.warning(f"{label}: {note}; it is kept in the record.")
    sizes = [trial.size for trial in trials if trial.size is not None]
    return CorruptionRecord(
        corruption=corruption,
        label=label,
        settings=dict(settings),
        seeds=tuple(trial.seed for trial in trials),
        metrics=metrics,
        changed=statistics.fmean(size.changed for size in sizes) if sizes else 0.0,
        norm=statistics.fmean(size.norm for size in sizes) if sizes else 0.0,
        notes=notes,
        not_finite=tuple(trial.not_finite for trial in trials) if any(t.not_finite for t in trials) else (),
        kind=kind,
    )


def _number(value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, Real) else math.nan


_FORMAT = 2  # 1 knew a metric by its name alone
_KIND = "hf_parcor checkpoint"


class CheckpointError(ValueError):
    """A checkpoint is of another run, damaged, or none; nothing was measured, and the file is as it was."""


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
        path.parent.mkdir(parents=True, exist_ok=True)
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
            size=None if size is None else CorruptionSize(int(size["changed"]), float(size["norm"])),
            odd=dict(entry["odd"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a finished trial in line {at}, got {error!r}; the file is damaged: remove it, or that "
            "line and all that follow"
        ) from error


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
    before, now = _flat(found), _flat(run)
    differing = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if differing:
        details = ", ".join(f"{name} ({_shown(before.get(name))}, now {_shown(now.get(name))})" for name in differing)
        raise CheckpointError(f"{path}: expected a checkpoint of this run, got one with other {details}; {remedy}")


def _flat(run: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Return settings at any depth by names such as "metric.settings.num_beams", to show those that differ."""
    flat: dict[str, Any] = {}
    for name, value in run.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{within}{name}.")
        else:
            flat[f"{within}{name}"] = value
    return flat


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else _line(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
