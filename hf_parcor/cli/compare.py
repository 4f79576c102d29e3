"""`hf-parcor compare`: models side by side, each against the first."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_parcor.cli.command import Command
from hf_parcor.cli.errors import refused
from hf_parcor.cli.parser import Parser
from hf_parcor.cli.report import add_pages, checked_pages
from hf_parcor.input_error import InputError


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
        from hf_parcor.cli.records import load_records, metric_of
        from hf_parcor.cli.results import show_verdict, write_report
        from hf_parcor.evaluation import EvaluationRecord
        from hf_parcor.report import RobustnessReport
        from hf_parcor.tables import comparison_table

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
