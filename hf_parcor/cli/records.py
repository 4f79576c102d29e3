"""Records from files, whichever kind they hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hf_parcor.cli.errors import refused
from hf_parcor.evaluation import EvaluationRecord, SweepRecord
from hf_parcor.input_error import InputError
from hf_parcor.report.study import Records

PROBE = "probe.json"
ROBUSTNESS = "robustness.json"
_IN_A_FOLDER = (PROBE, ROBUSTNESS)


def load_records(names: Sequence[str]) -> Records:
    """Return what some files hold, one a seed.

    Args:
        names: Files, or folders that `hf-parcor` wrote to.

    Raises:
        InputError: A file is no record, or they are of different kinds.
    """
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
