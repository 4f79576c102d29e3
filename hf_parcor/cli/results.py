"""Where results go: a record and a report in a folder, a table and a verdict on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from hf_parcor.cli.errors import refused
from hf_parcor.cli.terminal import speaks, tell, wrapped
from hf_parcor.report import RobustnessReport
from hf_parcor.stored_record import StoredRecord


def output_folder(arguments: argparse.Namespace) -> Path | None:
    """Return the folder for results, which can be written to; None where none is asked for.

    Raises:
        InputError: It cannot be made.
    """
    if arguments.output is None:
        return None
    folder = Path(arguments.output)
    with refused(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def how_to_go_on(checkpoint: Path | None) -> str:
    """Return what to do after an interruption."""
    if checkpoint is None:
        return "nothing was kept; with --output DIR the same command goes on where it stopped"
    return f"what is finished is in {checkpoint}; the same command goes on from there"


def show(arguments: argparse.Namespace, record: StoredRecord, report: RobustnessReport, table: str, name: str) -> None:
    """Write record and report to the folder that is asked for, and print the record, or a table and the verdict."""
    if not speaks():
        return
    folder = output_folder(arguments)
    if folder is not None:
        path = record.save(folder / name)
        pages = write_report(report, [folder / "report.html", folder / "report.md"])
        tell(f"the record is in {path}, the report in {' and '.join(map(str, pages))}")
    if arguments.json:
        print(record.to_json(), end="")
    else:
        print(table)
        show_verdict(report)


def show_verdict(report: RobustnessReport) -> None:
    """Print the findings of a report, and say what was guessed of the metric."""
    for finding in report.verdict:
        print(f"\n{wrapped(finding)}")
    for guess in report.guesses:
        if guess not in report.verdict:
            tell(guess)


def write_report(report: RobustnessReport, paths: Iterable[Path]) -> list[Path]:
    """Write pages, in the format that the name of each says.

    Raises:
        InputError: A page cannot be written.
    """
    with refused(OSError):
        return [report.to_markdown(path) if path.suffix == ".md" else report.to_html(path) for path in paths]
