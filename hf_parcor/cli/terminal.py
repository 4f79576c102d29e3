"""What a command shows and where it goes: terminal, folder; and what ends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_parcor.errors import InputError
from hf_parcor.records import EvaluationRecord, RecipeRecord, SensitivityRecord, SweepRecord
from hf_parcor.reports import FirstLookReport, RecipeReport, RobustnessReport
from hf_parcor.reports.tables import comparison_table, group_table

PROBE = "probe.json"
ROBUSTNESS = "robustness.json"
PAGES = (".html", ".md")


def speaks() -> bool:
    """Return whether this process is the one that says and writes what all of those that `torchrun` started found."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    """Write a line about the work, not a result."""
    if speaks():
        print(f"hf-parcor: {text}", file=sys.stderr)


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
def writing(flag: str = "--output-dir") -> Iterator[None]:
    """Let what cannot be written be a user's mistake, of the flag that named its place."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag}: expected places that can be written to, got {error}; name others") from error


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Let Ctrl-C say how the work goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(how) from error


def output_folder(name: str | None) -> Path | None:
    """Return a folder for results, which is made where there is none; None where none is asked for.

    Raises:
        InputError: It cannot be made, or written to.
    """
    if name is None:
        return None
    check_output_folder(name)
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_output_folder(name: str, flag: str = "--output-dir") -> None:
    """Refuse a folder that cannot be made, or written to.

    Raises:
        InputError: A file is in its place, or a folder above it is not ours.
    """
    there = Path(name).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{flag}: expected a folder that can be written to, got {name}, where {there} is "
            f"{'one that cannot' if there.is_dir() else 'a file'}; name another"
        )


def checkpoint_in(folder: Path | None, name: str) -> Path | None:
    """Return where a measurement is kept on its way, beside the record of that name; None for no folder."""
    return None if folder is None else (folder / name).with_suffix(".jsonl")


def how_to_go_on(checkpoint: Path | None) -> str:
    """Return what to do after an interruption."""
    if checkpoint is None:
        return "nothing was kept; with --output-dir DIR the same command goes on where it stopped"
    return f"what is finished is in {checkpoint}; the same command goes on from there"


def show(record: EvaluationRecord | SweepRecord, metric: str, path: Path | None, *, as_json: bool = False) -> None:
    """Keep a record and its pages, and print it: as JSON, or as a table with the verdict.

    Args:
        record: What was measured.
        metric: What is shown of it.
        path: Its file; the pages are beside it and differ in the suffix. None to keep nothing.
        as_json: Print the record, and nothing else.

    Raises:
        InputError: A file cannot be written, or a library for statistics is missing.
    """
    if not speaks():
        return
    table = table_of(record, metric)
    with refused(ImportError):
        report = RobustnessReport(record, metric)
    if path is not None:
        keep(record, report, path)
    if as_json:
        print(record.to_json(), end="")
    else:
        print(table)
        show_verdict(report)


def keep(
    record: EvaluationRecord | SweepRecord | SensitivityRecord, report: RobustnessReport | FirstLookReport, path: Path
) -> None:
    """Write a record, and its pages beside it, which differ in the suffix, and say where they are.

    Another record that was there, such as that of a training, is moved aside.

    Raises:
        InputError: A file cannot be written.
    """
    with writing():
        if path.is_file() and path.read_bytes() != record.to_json().encode():
            set_aside(path)
        record.save(path)
        pages = write_report(report, [path.with_suffix(suffix) for suffix in PAGES])
    tell(f"the record is in {path}, its pages are {' and '.join(map(str, pages))}")


def set_aside(path: Path) -> None:
    """Move a record aside that is there, such as that of other weights, and its pages."""
    if not path.is_file():
        return
    before = path.with_suffix(f".before{path.suffix}")
    for suffix in (path.suffix, *PAGES):
        if path.with_suffix(suffix).is_file():
            path.with_suffix(suffix).replace(before.with_suffix(suffix))
    tell(f"{path} was another record; it is {before} now")


def table_of(record: EvaluationRecord | SweepRecord, metric: str) -> str:
    """Return the table of a record."""
    if isinstance(record, SweepRecord):
        return group_table(record.records, metric)
    return comparison_table({record.model: record}, metric)


def show_verdict(report: RobustnessReport) -> None:
    """Print the findings of a report, and say what was guessed of the metric."""
    print(f"\n{report}")
    for guess in report.guesses:
        if guess not in report.verdict:
            tell(guess)


def show_answer(
    record: RecipeRecord | SensitivityRecord, report: RecipeReport | FirstLookReport, *, as_json: bool
) -> None:
    """Print a record as JSON, or what its report leads with and the numbers behind it."""
    if as_json:
        print(record.to_json(), end="")
        return
    print(f"{report}\n")


def write_report(report: RobustnessReport | FirstLookReport, paths: Iterable[Path]) -> list[Path]:
    """Write pages, in the format that the name of each says."""
    return [report.to_markdown(path) if path.suffix == ".md" else report.to_html(path) for path in paths]
