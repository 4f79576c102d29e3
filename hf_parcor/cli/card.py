"""`hf-parcor card`: a model card from the record of a run, here and on the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_parcor.cli.flags import USUAL_METRIC, add_meaning
from hf_parcor.cli.parsing import Command, Parser
from hf_parcor.cli.recipe import MEASURED, RECIPE, SENSITIVITY
from hf_parcor.cli.report import check_trained_alike, load_record
from hf_parcor.cli.terminal import PROBE, ROBUSTNESS, refused
from hf_parcor.defense_file import defense_beside
from hf_parcor.errors import InputError
from hf_parcor.records import EvaluationData, EvaluationRecord, RecipeRecord, SensitivityRecord, SweepRecord
from hf_parcor.records.comparable import SEVERAL_TASKS
from hf_parcor.strict_json import read_strict_json, to_plain

if TYPE_CHECKING:
    from hf_parcor.cards import ModelFacts


class Card(Command):
    """Writes robustness on a model card."""

    summary = "write robustness on the model card of a run; push it to the Hub"
    usage = "RUN_DIR [flags]"
    example = "robustness --base-model bert-base-cased --dry-run"

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="the folder of a model, with its records")
        group = parser.add_argument_group("what the record does not say; default: what the last card said")
        group.add_argument("--seeds", nargs="*", default=[], metavar="DIR", help="runs of the same with other seeds")
        group.add_argument("--name", metavar="NAME", help="of the model; default: that of the folder")
        group.add_argument("--base-model", metavar="NAME", help="the model on the Hub that it was made from")
        group.add_argument("--datasets", nargs="*", metavar="NAME", help="data on the Hub that it was trained on")
        group.add_argument("--evaluated-on", metavar="NAME", help="data on the Hub of the metrics")
        group.add_argument("--dataset-config", metavar="NAME", help="their configuration")
        group.add_argument("--split", metavar="NAME", help="their split")
        group.add_argument("--task", metavar="TASK", help="such as text-classification; default: by the head")
        group.add_argument(
            "--benchmark-task",
            metavar="ID",
            help="the data set is a registered benchmark, and the clean result is for this task of its eval.yaml",
        )
        group.add_argument("--metric", metavar="NAME", help=f"what the card shows; {USUAL_METRIC}")
        add_meaning(group)
        group.add_argument("--command", metavar="TEXT", help="what made the numbers; it is published")
        group = parser.add_argument_group("the Hub; the token is that of `hf auth login`, or HF_TOKEN")
        group.add_argument("--push", metavar="REPO_ID", help="also update the card of this model on the Hub")
        group.add_argument("--results-only", action="store_true", help="there, add results to the metadata alone")
        group.add_argument("--only", nargs="*", metavar="LABEL", help="with --results-only, of these corruptions")
        group.add_argument("--create-pr", action="store_true", help="there, open a pull request instead")
        group.add_argument("--revision", metavar="NAME", help="there, the branch")
        parser.add_argument("--dry-run", action="store_true", help="change nothing, and print the difference")

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the card, or show what would change."""
        folder = _folder(arguments)
        _check_flags(arguments)
        with refused(OSError, ValueError, ImportError):
            facts = facts_of_run(arguments, folder)
        with refused(OSError, ValueError):
            # First: where the Hub refuses, nothing here is changed.
            pushed = None if arguments.push is None else _push(facts, arguments)
            if arguments.push is None or not (arguments.dry_run or arguments.results_only):
                _write(facts, folder, dry_run=arguments.dry_run)
            if pushed is not None:
                print(pushed)


_SAME = "nothing would change"


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.push is None and (arguments.create_pr or arguments.results_only or arguments.revision):
        raise InputError("--push: expected a model on the Hub, got none beside flags for it; add --push REPO_ID")
    if arguments.push is not None:
        from hf_parcor.cards.hub import check_online

        with refused(OSError):
            check_online(arguments.push)
    if arguments.only is not None and not arguments.results_only:
        raise InputError("--only: expected --results-only beside it, got none; add it, or leave --only out")


def _write(facts: ModelFacts, folder: Path, *, dry_run: bool) -> None:
    """Write the card and print its path, or print what would change."""
    from hf_parcor.cards import write_card
    from hf_parcor.cards.folder import CARD, card_of, files_beside, read_text
    from hf_parcor.cards.hub import difference

    if dry_run:
        before = read_text(folder / CARD)
        print(difference(before, card_of(facts, files_beside(facts), before)) or f"{_SAME}\n", end="")
    else:
        print(write_card(folder, facts))


def _push(facts: ModelFacts, arguments: argparse.Namespace) -> str:
    """Push the card, or results alone, and return where it is, or what would change."""
    from hf_parcor.cards import Destination, push_card, push_results

    push = push_results if arguments.results_only else push_card
    options = {name: getattr(arguments, name) for name in ("revision", "create_pr", "dry_run")}
    published = push(facts, Destination(arguments.push, **options))
    return published.difference or _SAME if arguments.dry_run else published.url or "nothing has changed"


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.run_dir is None:
        raise InputError("RUN_DIR: expected the folder of a run, got none; name one")
    folder = Path(arguments.run_dir)
    if not folder.is_dir():
        raise InputError(f"RUN_DIR: expected a folder, got {folder}; name the folder that holds the records")
    return folder


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
    from hf_parcor.cards import ModelFacts, facts_of, with_probe, with_recipe
    from hf_parcor.cards.facts import without_corruption
    from hf_parcor.cards.folder import FACTS
    from hf_parcor.cards.front_matter import eval_result_file

    last = ModelFacts.load(folder / FACTS) if (folder / FACTS).is_file() else None
    given: dict[str, Any] = {name: value for name in _DESCRIBED if (value := getattr(arguments, name)) is not None}
    stated = {"greater_is_better": arguments.greater_is_better, "unit": arguments.unit}
    sweep = SweepRecord.load(folder / PROBE) if (folder / PROBE).is_file() else None
    plan = _plan(folder)
    evaluated = (folder / ROBUSTNESS).is_file() or bool(arguments.seeds)
    if evaluated or last is None:
        described = {} if last is None else {name: getattr(last, name) for name in _DESCRIBED}
        named = {"name": folder.absolute().name, **described, **given}
        measured: SweepRecord | list[EvaluationRecord]
        if sweep is not None and not evaluated:
            measured = sweep
        elif plan is not None and not evaluated:
            measured = [without_corruption(plan[-1])]
        else:
            places = [folder, *map(Path, arguments.seeds)]
            check_trained_alike(places)
            measured = [_evaluation(place) for place in places]
        first = measured if isinstance(measured, SweepRecord) else measured[0]
        data = _data(arguments, first, last)
        tasks = [given.get("task", ""), first.task, described.get("task", ""), _task_of_head(folder)]
        task = next((name for name in tasks if name not in SEVERAL_TASKS), first.task or tasks[-1])
        facts = facts_of(
            measured, **{**named, "task": task}, evaluated_on=data, defense=defense_beside(folder), **stated
        )
        if last is not None and "command" not in given and _numbers(last) != _numbers(facts):
            facts = replace(facts, command="")  # that of other numbers
        if last is not None and last.metric == facts.metric:  # what the record does not say, the last card may
            facts = replace(facts, info=facts.info.stating(**{**last.info.stated, **facts.info.stated}))
    else:
        if arguments.metric is not None:
            raise InputError(f"--metric: expected {ROBUSTNESS} to read it from, got none; evaluate the model again")
        data = _described(arguments, last.evaluated_on)
        facts = replace(last, **{**given, "datasets": tuple(given.get("datasets", last.datasets))}, evaluated_on=data)
    facts = replace(facts, info=facts.info.stating(**stated))
    if last is not None and facts.evaluated_on != last.evaluated_on and arguments.benchmark_task is None:
        facts = replace(facts, benchmark_task="")  # that of other data
    facts = facts if sweep is None else with_probe(facts, sweep)
    facts = facts if plan is None else with_recipe(facts, *plan)
    if arguments.benchmark_task and not eval_result_file(facts):
        raise InputError(
            "--benchmark-task: expected a result on a whole split of a data set on the Hub, of one model, got one on "
            f"{facts.evaluated_on.id or facts.evaluated_on.name or 'unknown data'} "
            f"({facts.evaluated_on.split or 'no split'}); say what it was measured on with --evaluated-on and "
            "--split, or leave it out"
        )
    return facts if arguments.only is None else _only(facts, arguments.only)


def _plan(folder: Path) -> tuple[SensitivityRecord, RecipeRecord, EvaluationRecord] | None:
    """Return the records of a recipe that was measured as a whole; None where there is none."""
    if not (folder / MEASURED).is_file():
        return None
    return (
        SensitivityRecord.load(folder / SENSITIVITY),
        RecipeRecord.load(folder / RECIPE),
        EvaluationRecord.load(folder / MEASURED),
    )


def _numbers(facts: ModelFacts) -> Any:
    """Return what was measured as values that can be compared: NaN and infinities are words."""
    return to_plain(list(facts.rows()))


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
    from hf_parcor.evaluation.identity.provenance import task_of_class
    from hf_parcor.tasks.sentence_similarity import SENTENCE_TRANSFORMER, is_sentence_transformer

    if is_sentence_transformer(str(folder)):
        return task_of_class(SENTENCE_TRANSFORMER)
    try:
        found = read_strict_json(folder / "config.json")
    except (OSError, ValueError):  # an adapter, or no model
        return ""
    architectures = found.get("architectures") if isinstance(found, dict) else None
    return task_of_class(str(architectures[0])) if architectures else ""


def _evaluation(place: Path) -> EvaluationRecord:
    """Return the record of an evaluation in a folder, beside which there may be a probe, or in a file."""
    record = load_record(place)
    if not isinstance(record, EvaluationRecord):
        raise InputError(f"{place}: expected the record of an evaluation, got a probe; run hf-parcor evaluate")
    return record


def _only(facts: ModelFacts, labels: Sequence[str]) -> ModelFacts:
    kept = tuple(row for row in facts.corruptions if row.label in labels)
    if len(kept) != len(labels):
        known = ", ".join(repr(row.label) for row in facts.corruptions)
        raise InputError(f"--only: expected labels out of {known}, got {labels}; take them from the table")
    return replace(facts, corruptions=kept)
