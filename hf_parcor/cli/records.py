"""Records from files, whichever kind they hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_parcor.cli.errors import refused
from hf_parcor.evaluation import EvaluationRecord, SweepRecord
from hf_parcor.input_error import InputError
from hf_parcor.report.study import Records
from hf_parcor.strict_json import read_strict_json

PROBE = "probe.json"
ROBUSTNESS = "robustness.json"
_IN_A_FOLDER = (PROBE, ROBUSTNESS)
_DEFENSE = "defense_config.json"  # written here too, since reports must not wait for the Trainer
_OF_A_MODEL = ("config.json", "adapter_config.json", _DEFENSE)


def load_records(names: Sequence[str]) -> Records:
    """Return what some files hold, one a seed.

    Args:
        names: Files, or folders that `hf-parcor` wrote to.

    Raises:
        InputError: A file is no record, or they are of different kinds, or beside models that were trained otherwise.
    """
    check_trained_alike([Path(name) for name in names])
    found = [load_record(Path(name)) for name in names]
    sweeps = [record.records for record in found if isinstance(record, SweepRecord)]
    evaluations = [record for record in found if isinstance(record, EvaluationRecord)]
    if sweeps and evaluations:
        raise InputError(
            f"records: expected those of a probe or those of an evaluation, got both in {', '.join(names)}; report "
            "them apart"
        )
    if len(found) == 1:
        return sweeps[0] if sweeps else evaluations[0]
    return sweeps or evaluations


def check_trained_alike(places: Sequence[Path]) -> None:
    """Refuse folders of models that were trained with different defenses: they are no seeds of one training.

    Args:
        places: Folders, or files; those without a model say nothing.

    Raises:
        InputError: Two models have different defenses beside them, or one has none.
    """
    models = [place for place in places if any((place / name).is_file() for name in _OF_A_MODEL)]
    if len(models) < 2:
        return
    from hf_parcor.training.checkpoints import differences

    first, *others = models
    for other in others:
        changes = differences(*(_settings_of(defense_beside(place)) for place in (first, other)))
        if changes:
            raise InputError(
                f"records: expected those of one training with different seeds, got models that were trained with "
                f"different defenses in {first} and {other} ({'; '.join(changes)}); set them side by side with "
                f"hf-parcor compare {first} {other}"
            )


def defense_beside(folder: Path) -> dict[str, Any] | None:
    """Return what stands beside a model, also a defense of the user's own class; None where it was not defended.

    Raises:
        InputError: It is no object.
        OSError: It cannot be read.
        ValueError: It is no JSON.
    """
    path = folder / _DEFENSE
    if not path.is_file():
        return None
    found = read_strict_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected settings by name, got {type(found).__name__}; save the model again")
    return found


def _settings_of(defense: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a defense that ran."""
    return {"defense": None} if defense is None or defense.get("defended_steps") == 0 else defense


def metric_of(records: Records) -> str:
    """Return the metric to report where none is named: accuracy, or the first that there is."""
    single = records if isinstance(records, EvaluationRecord) else None
    entry = records
    while single is None:
        entry = next(iter(entry.values())) if isinstance(entry, dict) else entry[0]  # type: ignore[index]
        single = entry if isinstance(entry, EvaluationRecord) else None
    return "accuracy" if "accuracy" in single.clean.metrics else next(iter(single.clean.metrics))


def load_record(path: Path) -> EvaluationRecord | SweepRecord:
    """Return what a file holds, or the only one in a folder.

    Raises:
        InputError: It is no record, or the folder has none or both.
    """
    if path.is_dir():
        inside = [path / name for name in _IN_A_FOLDER if (path / name).is_file()]
        if len(inside) != 1:
            raise InputError(
                f"{path}: expected a folder with one of {' and '.join(_IN_A_FOLDER)}, got {len(inside)} of them; name "
                "the file"
            )
        path = inside[0]
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: expected a record that can be read, got {error.strerror}; check its name"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a record in UTF-8, got {error}; measure again") from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None  # what is wrong with it is said below
    kind: type[EvaluationRecord] | type[SweepRecord] = (
        SweepRecord if isinstance(found, dict) and "records" in found else EvaluationRecord
    )
    with refused(ValueError):
        return kind.load(path)
