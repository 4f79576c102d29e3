"""`hf-parcor report` and `hf-parcor compare`: a report from records, and models side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hf_parcor.cli.flags import USUAL_METRIC, add_meaning
from hf_parcor.cli.parsing import Command, Parser
from hf_parcor.cli.terminal import PAGES, PROBE, ROBUSTNESS, refused, show_verdict, tell, write_report, writing
from hf_parcor.defense_file import DEFENSE_CONFIG_NAME, defense_beside, differences, has_run
from hf_parcor.errors import InputError
from hf_parcor.records import EvaluationRecord, SweepRecord
from hf_parcor.reports import RobustnessReport
from hf_parcor.reports.tables import comparison_table

_OF_A_MODEL = ("config.json", "adapter_config.json", DEFENSE_CONFIG_NAME)
Records: TypeAlias = list[EvaluationRecord] | list[SweepRecord]


class Report(Command):
    """Makes a page from records."""

    summary = "make a report from the records of a model, one a seed"
    usage = "RECORD ... [flags]"
    example = "robustness --pages report.html"

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        parser.add_argument("records", nargs="*", metavar="RECORD", help="files, or folders of --output-dir")
        add_pages(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the pages, and print the verdict."""
        if not arguments.records:
            raise InputError("records: expected at least one, got none; name files, or folders of --output-dir")
        pages = checked_pages(arguments)
        (records,) = load_records({"": arguments.records}).values()
        if len(arguments.records) > 1:
            tell(
                f"{len(arguments.records)} records are taken for one model that was trained with different seeds; to "
                "set models side by side: hf-parcor compare"
            )
        with refused(ValueError, ImportError):
            report = RobustnessReport(
                records,
                arguments.metric,
                greater_is_better=arguments.greater_is_better,
                unit=arguments.unit,
                title=arguments.title,
            )
        _show(report, pages, arguments)


def _show(report: RobustnessReport, pages: Sequence[Path], arguments: argparse.Namespace, table: str = "") -> None:
    """Write the pages, and print the verdict, under a table if there is one, or all as JSON."""
    with writing("--pages"):
        written = write_report(report, pages)
    if written:
        tell(f"wrote {' and '.join(map(str, written))}")
    if arguments.json:
        print(report.to_json(), end="")
        return
    if table:
        print(table)
    show_verdict(report)


def add_pages(parser: Parser) -> None:
    """Add what says which pages are written, what is on them, and how the verdict is printed."""
    parser.add_argument("--pages", nargs="+", default=[], metavar="FILE", help="pages to write: .html, .md")
    parser.add_argument("--metric", metavar="NAME", help=f"which metric to report; {USUAL_METRIC}")
    add_meaning(parser)
    parser.add_argument("--title", metavar="TEXT", help="the heading")
    parser.add_argument("--json", action="store_true", help="print verdict and means as JSON, and nothing else")


def checked_pages(arguments: argparse.Namespace) -> list[Path]:
    """Return the pages to be written.

    Raises:
        InputError: The name of one does not say its format.
    """
    pages = [Path(name) for name in arguments.pages]
    for page in pages:
        if page.suffix not in PAGES:
            raise InputError(f"--pages: expected files that end in {' or '.join(PAGES)}, got {page}; rename it")
    return pages


class Compare(Command):
    """Compares models by their records."""

    summary = "compare models by their records, each against the first"
    usage = "NAME=RECORD ... [flags]"
    example = "plain=plain defended=defended --pages comparison.html"

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        parser.add_argument(
            "models", nargs="*", metavar="NAME=RECORD,RECORD", help="a model's records, one a seed; or a file alone"
        )
        add_pages(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the pages, and print table and verdict."""
        pages = checked_pages(arguments)
        named = _named(arguments.models)
        if len(named) < 2:
            raise InputError(
                f"models: expected two or more to compare, got {len(named)}; name another, or use hf-parcor report"
            )
        models = load_records(named)
        with refused(ValueError, ImportError):
            report = RobustnessReport.compare(
                models,
                arguments.metric,
                greater_is_better=arguments.greater_is_better,
                unit=arguments.unit,
                title=arguments.title,
            )
            firsts = {name: records[0] for name, records in models.items() if len(records) == 1}
            single = {name: record for name, record in firsts.items() if isinstance(record, EvaluationRecord)}
            table = ""
            if len(single) == len(models):
                table = comparison_table(single, arguments.metric, unit=arguments.unit)
        _show(report, pages, arguments, table)


def _named(words: list[str]) -> dict[str, list[str]]:
    """Return the files of each model by its name: what stands before =, or else the name of file or folder."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, named, files = word.partition("=")
        if not named or Path(word).exists():
            name, files = _short(word, words), word
        if name in found:
            raise InputError(f"models: expected each name once, got {name!r} twice; write NAME=RECORD")
        found[name] = [files] if Path(files).exists() else files.split(",")
    return found


def _short(word: str, words: list[str]) -> str:
    path = Path(word)
    return path.stem if sum(Path(other).stem == path.stem for other in words) == 1 else str(path.parent)


def load_records(models: Mapping[str, Sequence[str]]) -> dict[str, Records]:
    """Return what the files of some models hold, one a seed.

    A folder may hold both kinds of record, as a model card wants it. Then it stands for its evaluation, unless all
    else that is named are probes.

    Args:
        models: Files, or folders that `hf-parcor` wrote to, by the name of the model.

    Raises:
        InputError: A file is no record, or they are of different kinds, or beside models that were trained otherwise.
    """
    for names in models.values():
        check_trained_alike([Path(name) for name in names])
    places = [Path(name) for names in models.values() for name in names]
    loaded = {place: load_record(place) for place in places if not _holds_both(place)}
    kind = PROBE if loaded and all(isinstance(record, SweepRecord) for record in loaded.values()) else ROBUSTNESS
    for place in filter(_holds_both, places):
        loaded[place] = load_record(place / kind)
        tell(f"{place} holds two records, of which {kind} is read; to read the other, name its file")
    if len({type(record) for record in loaded.values()}) > 1:
        raise InputError(
            "records: expected those of probes or those of evaluations, got both in "
            f"{', '.join(map(str, places))}; report them apart"
        )
    return {name: _of_one_kind([loaded[Path(file)] for file in files]) for name, files in models.items()}


def _of_one_kind(found: Sequence[EvaluationRecord | SweepRecord]) -> Records:
    evaluations = [record for record in found if isinstance(record, EvaluationRecord)]
    return evaluations or [record for record in found if isinstance(record, SweepRecord)]


def _holds_both(place: Path) -> bool:
    return (place / PROBE).is_file() and (place / ROBUSTNESS).is_file()


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
    first, *others = models
    for other in others:
        changes = differences(*(_settings_of(defense_beside(place)) for place in (first, other)))
        if changes:
            raise InputError(
                f"records: expected those of one training with different seeds, got models that were trained with "
                f"different defenses in {first} and {other} ({'; '.join(changes)}); set them side by side with "
                f"hf-parcor compare {first} {other}"
            )


def _settings_of(defense: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a defense that ran."""
    return dict(defense) if has_run(defense) else {"defense": None}


def load_record(path: Path) -> EvaluationRecord | SweepRecord:
    """Return what a file holds, or a folder, of the evaluation first.

    Raises:
        InputError: It is no record, or the folder has none.
    """
    if path.is_dir():
        inside = [path / name for name in (ROBUSTNESS, PROBE) if (path / name).is_file()]
        if not inside:
            raise InputError(
                f"{path}: expected a folder with {ROBUSTNESS} or {PROBE}, got neither; measure first, with "
                f"hf-parcor evaluate MODEL --output-dir {path}, or name the file of the record"
            )
        path = inside[0]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: expected a record that can be read, got {error.strerror}; check its name"
        ) from error
    except ValueError:
        found = None  # what is wrong with it is said below
    kind: type[EvaluationRecord] | type[SweepRecord] = (
        SweepRecord if isinstance(found, dict) and "records" in found else EvaluationRecord
    )
    with refused(ValueError):
        return kind.load(path)
