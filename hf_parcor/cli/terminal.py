"""What a command shows and where it goes: terminal, folder; and what ends it."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_parcor.errors import InputError
from hf_parcor.records.stored import StoredRecord
from hf_parcor.reports import RobustnessReport

_WIDTH = 80


def speaks() -> bool:
    """Return whether this process is the one that says and writes what all of those that `torchrun` started found."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    """Write a line about the work, not a result."""
    if speaks():
        print(f"hf-parcor: {text}", file=sys.stderr)


def wrapped(text: str) -> str:
    """Return text in lines for a terminal of 80 columns; names and paths are not cut."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The user stopped a command; the message says how it goes on."""


@contextmanager
def refused(*kinds: type[Exception]) -> Iterator[None]:
    """Let exceptions of these kinds be a user's mistake.

    Only for what checks arguments, and nothing else, inside: a bug there would lose its traceback.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(str(error)) from error


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Let Ctrl-C say how the work goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(how) from error


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
