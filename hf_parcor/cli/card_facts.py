"""What a card says of a run: measured in its records, described by the flags, else by the last card."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_parcor.cli.records import PROBE, ROBUSTNESS, check_trained_alike, defense_beside, load_record
from hf_parcor.evaluation import EvaluationRecord, SweepRecord
from hf_parcor.evaluation.comparable import SEVERAL_TASKS
from hf_parcor.evaluation.provenance import task_of_class
from hf_parcor.input_error import InputError
from hf_parcor.model_card import EvaluationData, ModelFacts, facts_of, with_probe
from hf_parcor.model_card.folder import FACTS
from hf_parcor.strict_json import read_strict_json

_DESCRIBED = ("name", "base_model", "datasets", "task", "metric", "command", "benchmark_task")


def facts_of_run(arguments: argparse.Namespace, folder: Path) -> ModelFacts:
    """Return the facts of a run.

    Args:
        arguments: The flags of `hf-parcor card`.
        folder: The folder of the model.

    Raises:
        InputError: The records are not those of one model, or a flag asks for what they do not hold.
        OSError: A file cannot be read.
        ValueError: As in `facts_of` and `with_probe`.
        ImportError: As in `facts_of`.
    """
    last = ModelFacts.load(folder / FACTS) if (folder / FACTS).is_file() else None
    given: dict[str, Any] = {name: value for name in _DESCRIBED if (value := getattr(arguments, name)) is not None}
    sweep = SweepRecord.load(folder / PROBE) if (folder / PROBE).is_file() else None
    if (folder / ROBUSTNESS).is_file() or arguments.seeds or last is None:
        described = {} if last is None else {name: getattr(last, name) for name in _DESCRIBED}
        named = {"name": folder.absolute().name, **described, **given}
        measured: SweepRecord | list[EvaluationRecord]
        if sweep is not None and not (folder / ROBUSTNESS).is_file() and not arguments.seeds:
            measured = sweep
        else:
            places = [folder, *map(Path, arguments.seeds)]
            check_trained_alike(places)
            measured = [_evaluation(place) for place in places]
        first = measured if isinstance(measured, SweepRecord) else measured[0]
        data = _data(arguments, first, last)
        tasks = [given.get("task", ""), first.task, described.get("task", ""), _task_of_head(folder)]
        task = next((name for name in tasks if name not in SEVERAL_TASKS), first.task or tasks[-1])
        facts = facts_of(measured, **{**named, "task": task}, evaluated_on=data, defense=defense_beside(folder))
        if last is not None and last.metric == facts.metric:  # what the record does not say, the last card may
            facts = replace(facts, info=facts.info.stating(**{**last.info.stated, **facts.info.stated}))
    else:
        if arguments.metric is not None:
            raise InputError(f"--metric: expected {ROBUSTNESS} to read it from, got none; evaluate the model again")
        data = _described(arguments, last.evaluated_on)
        facts = replace(last, **{**given, "datasets": tuple(given.get("datasets", last.datasets))}, evaluated_on=data)
    info = facts.info.stating(greater_is_better=arguments.greater_is_better, unit=arguments.unit)
    facts = replace(facts, info=info)
    if last is not None and facts.evaluated_on != last.evaluated_on and arguments.benchmark_task is None:
        facts = replace(facts, benchmark_task="")  # that of other data
    facts = facts if sweep is None else with_probe(facts, sweep)
    return facts if arguments.only is None else _only(facts, arguments.only)


def _data(
    arguments: argparse.Namespace, record: EvaluationRecord | SweepRecord, last: ModelFacts | None
) -> EvaluationData:
    """Return the data that a record says, unless the last card of the same data says it better."""
    found = record.evaluated_on
    if last is not None and (found is None or (last.data == record.data != "" and last.evaluated_on.id)):
        found = last.evaluated_on
    return _described(arguments, found or EvaluationData())


def _described(arguments: argparse.Namespace, data: EvaluationData) -> EvaluationData:
    """Return data with what the flags say of them."""
    if arguments.evaluated_on not in (None, data.id):
        data = EvaluationData(arguments.evaluated_on.rpartition("/")[2], arguments.evaluated_on, rows=data.rows)
    places = {"config": arguments.dataset_config, "split": arguments.split}
    return replace(data, **{name: value for name, value in places.items() if value is not None})


def _task_of_head(folder: Path) -> str:
    """Return the task that the model in a folder has a head for; "" where it does not say."""
    try:
        found = read_strict_json(folder / "config.json")
    except (OSError, ValueError):  # an adapter, or no model
        return ""
    architectures = found.get("architectures") if isinstance(found, dict) else None
    return task_of_class(str(architectures[0])) if architectures else ""


def _evaluation(place: Path) -> EvaluationRecord:
    """Return the record of an evaluation in a folder, beside which there may be a probe, or in a file."""
    path = place / ROBUSTNESS
    record = load_record(path if path.is_file() else place)
    if not isinstance(record, EvaluationRecord):
        raise InputError(f"{place}: expected the record of an evaluation, got a probe; run hf-parcor evaluate")
    return record


def _only(facts: ModelFacts, labels: Sequence[str]) -> ModelFacts:
    kept = tuple(row for row in facts.corruptions if row.label in labels)
    if len(kept) != len(labels):
        known = ", ".join(repr(row.label) for row in facts.corruptions)
        raise InputError(f"--only: expected labels out of {known}, got {labels}; take them from the table")
    return replace(facts, corruptions=kept)
