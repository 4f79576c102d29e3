"""`hf-parcor report`: a report from records."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_parcor.cli.command import Command
from hf_parcor.cli.errors import refused
from hf_parcor.cli.options import add_meaning
from hf_parcor.cli.parser import Parser
from hf_parcor.cli.terminal import tell
from hf_parcor.input_error import InputError

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
        from hf_parcor.cli.records import load_records, metric_of
        from hf_parcor.cli.results import show_verdict, write_report
        from hf_parcor.report import RobustnessReport

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
