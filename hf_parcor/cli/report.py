"""`hf-parcor report` and `hf-parcor compare`: a report from records, and models side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_parcor.cli.parsing import Command, Parser, add_meaning
from hf_parcor.cli.terminal import refused, tell
from hf_parcor.errors import InputError
from hf_parcor.records import EvaluationRecord, SweepRecord
from hf_parcor.records.stored import read_strict_json
from hf_parcor.reports.study import Records

_FORMATS = (".html", ".md")


class Report(Command):
    """Makes a page from records."""

    summary = "make a report from the records of a model, one a seed"
    usage = "RECORD ... [flags]"
    example = "robustness/robustness.json --output report.html"

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        parser.add_argument("records", nargs="*", metavar="RECORD", help="files, or folders of --output")
        add_pages(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the pages, and print the verdict."""
        from hf_parcor.cli.terminal import show_verdict, write_report
        from hf_parcor.reports import RobustnessReport

        if not arguments.records:
            raise InputError("records: expected at least one, got none; name files, or folders of --output")
        pages = checked_pages(arguments)
        records = load_records(arguments.records)
        if len(arguments.records) > 1:
            tell(
                f"{len(arguments.records)} records are taken for one model that was trained with different seeds; to "
                "set models side by side: hf-parcor compare"
            )
        with refused(ValueError, ImportError):
            report = RobustnessReport(
                records,
                arguments.metric or metric_of(records),
                greater_is_better=arguments.greater_is_better,
                unit=arguments.unit,
                title=arguments.title,
            )
        write_report(report, pages)
        show_verdict(report)


def add_pages(parser: Parser) -> None:
    """Add what says which pages are written, and what is on them."""
    parser.add_argument("--output", nargs="*", default=[], metavar="FILE", help="pages: .html, .md")
    parser.add_argument("--metric", metavar="NAME", help="which metric to report; default: accuracy, or the first")
    add_meaning(parser)
    parser.add_argument("--title", metavar="TEXT", help="the heading")


def checked_pages(arguments: argparse.Namespace) -> list[Path]:
    """Return the pages to be written.

    Raises:
        InputError: The name of one does not say its format.
    """
    pages = [Path(name) for name in arguments.output]
    for page in pages:
        if page.suffix not in _FORMATS:
            raise InputError(f"--output: expected a file that ends in {' or '.join(_FORMATS)}, got {page}; rename it")
    return pages


class Compare(Command):
    """Compares models by their records."""

    summary = "compare models by their records, each against the first"
    usage = "NAME=RECORD ... [flags]"
    example = "plain=plain defended=defended --output comparison.html"

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        parser.add_argument(
            "models", nargs="*", metavar="NAME=RECORD,RECORD", help="a model's records, one a seed; or a file alone"
        )
        add_pages(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the pages, and print table and verdict."""
        from hf_parcor.cli.terminal import show_verdict, write_report
        from hf_parcor.records import EvaluationRecord
        from hf_parcor.reports import RobustnessReport
        from hf_parcor.reports.terminal_tables import comparison_table

        pages = checked_pages(arguments)
        models = {name: load_records(files) for name, files in _named(arguments.models).items()}
        metric = arguments.metric or next((metric_of(records) for records in models.values()), "")
        with refused(ValueError, ImportError):
            report = RobustnessReport.compare(
                models,
                metric,
                greater_is_better=arguments.greater_is_better,
                unit=arguments.unit,
                title=arguments.title,
            )
            single = {name: record for name, record in models.items() if isinstance(record, EvaluationRecord)}
            if len(single) == len(models):
                print(comparison_table(single, metric, unit=arguments.unit))
        write_report(report, pages)
        show_verdict(report)


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
