"""Tables of records, and Markdown in which each table reads as well in a terminal of 80 columns as on a page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hf_parcor.records.comparable import by_identity, check_comparable, in_one_alone
from hf_parcor.records.curves import Series
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord
from hf_parcor.records.search import SearchRecord
from hf_parcor.reports.markup import text_of
from hf_parcor.reports.numbers import Numbers, metric_of, numbers_of

_LONGEST = 40  # a longer cell runs out of its column, and widens no other
_TERMINAL = 80  # columns
_NARROWEST = 3  # what the mark of an alignment takes


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        caption: What it shows.
        header: One text a column.
        rows: One text a column; the first names the row.
        shares: Of a heat map, how much of the largest drop each cell but the first has; None for a cell without.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shares: tuple[tuple[float | None, ...], ...] = ()


def markdown_table(
    header: Iterable[str], rows: Iterable[Iterable[str]], *, texts: int = 1, longest: int | None = _LONGEST
) -> str:
    r"""Return a Markdown table of escaped texts, its columns in line: texts at the left, numbers at the right.

    Args:
        header: The names of the columns.
        rows: The cells of each line.
        texts: How many columns, from the first on, hold texts.
        longest: A longer cell runs out of its column, and widens no other; None for columns as wide as their cells.

    Examples:
        >>> print(markdown_table(["accuracy (%)", "plain"], [["no corruption", "92.3"], ["a|b", "60.0 ± 1.0"]]))
        | accuracy (%)  |      plain |
        | :------------ | ---------: |
        | no corruption |       92.3 |
        | a\|b          | 60.0 ± 1.0 |
    """
    lines = [[text_of(cell) for cell in line] for line in (header, *rows)]
    widths = [_width(column, longest) for column in zip(*lines, strict=True)]
    marks = [
        f":{'-' * (width - 1)}" if place < texts else f"{'-' * (width - 1)}:" for place, width in enumerate(widths)
    ]
    shown = []
    for line in (lines[0], marks, *lines[1:]):
        cells = enumerate(zip(line, widths, strict=True))
        shown.append(
            " | ".join(
                cell + _spaces(cell, width) if place < texts else _spaces(cell, width) + cell
                for place, (cell, width) in cells
            )
        )
    return "\n".join(f"| {line} |" for line in shown)


def short_names(groups: Iterable[str]) -> dict[str, str]:
    """Return for each name what is left of it without the modules that all of them are in, but for the last.

    Examples:
        >>> short_names(["bert.encoder.layer.0", "bert.encoder.layer.10"])
        {'bert.encoder.layer.0': 'layer.0', 'bert.encoder.layer.10': 'layer.10'}
        >>> short_names(["attention", "linear"])
        {'attention': 'attention', 'linear': 'linear'}
    """
    paths = [group.split(".") for group in groups]
    shared = 0
    while paths and all(len(path) > shared + 2 and path[: shared + 1] == paths[0][: shared + 1] for path in paths):
        shared += 1
    return {".".join(path): ".".join(path[shared:]) for path in paths}


def _width(column: Iterable[str], longest: int | None) -> int:
    widths = map(_places, column)
    return max([_NARROWEST, *(width for width in widths if longest is None or width <= longest)])


def _spaces(cell: str, width: int) -> str:
    return " " * (width - _places(cell))


def _places(text: str) -> int:
    r"""Return how many places of a terminal a text takes: two a wide letter, none a mark above or below one.

    Examples:
        >>> _places("bert"), _places("模型"), _places("cafe\u0301")
        (4, 4, 4)
    """
    marks = sum(unicodedata.category(letter) in ("Mn", "Me") for letter in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def search_table(record: SearchRecord) -> str:
    """Return a Markdown table of a search: a row for each training, by K, if that was searched, and strength.

    The best one is marked, unless all objectives are NaN.
    """
    numbers = Numbers()
    counts = dict.fromkeys(trial.steps for trial in record.trials)
    searched = counts.keys() - {None}
    rows = [
        [
            *(["–" if trial.steps is None else str(trial.steps)] if searched else []),
            numbers.value(trial.strength),
            numbers.value(trial.objective),
            " ".join(
                ["best"] * (trial == record.best and not math.isnan(trial.objective)) + ["collapsed"] * trial.collapsed
            ),
        ]
        for steps in counts
        for trial in record.curve(steps)
    ]
    return markdown_table([*(["K"] if searched else []), record.symbol, f"objective ({record.direction})", ""], rows)


def comparison_table(
    records: Mapping[str, EvaluationRecord], metric: str | None = None, *, unit: str | None = None
) -> str:
    """Return a Markdown table: a row for each corruption, a column for each record.

    A cell is the mean over trials and, where there are several, ± the sample standard deviation. Of two records a last
    column shows the change. Rows are those that two records have, whatever their order; what only one of several has
    is left out, see `in_one_alone`, and what one of three lacks is a dash there. A long cell widens its column where
    the table still fits a terminal of 80 columns, and runs out of it elsewhere.

    Args:
        records: Records by the name of their column.
        metric: Which metric to show. By default, the `usual_metric` of the first record.
        unit: As in `MetricInfo`; numbers are written as `Numbers` does. None, the default, for what the records say.

    Raises:
        ValueError: There are no records, no two have a corruption in common, they lack the metric, state different
            units of it, or are of other data or tasks; see `check_comparable`.
    """
    if not records:
        raise ValueError("records: expected one or more, got none; pass what an evaluator returned")
    check_comparable(records)
    in_one_alone({name: record.corruptions for name, record in records.items()})
    metric = metric_of(records.values(), metric)
    numbers = numbers_of(records.values(), metric, unit)
    columns = [by_identity(record.corruptions) for record in records.values()]
    lines: list[tuple[CorruptionRecord | None, ...]] = [tuple(record.clean for record in records.values())]
    for key in dict.fromkeys(key for column in columns for key in column):
        line = tuple(column.get(key) for column in columns)
        if sum(row is not None for row in line) > 1 or len(columns) == 1:
            lines.append(line)
    rows = [
        [
            next(row.label for row in line if row is not None),
            *("–" if row is None else _cell(row, metric, numbers) for row in line),
            *_change(line, metric, numbers),
        ]
        for line in lines
    ]
    header = [numbers.head(metric), *records, *["change"] * (len(records) == 2)]
    wide = markdown_table(header, rows, longest=None)
    return wide if _places(wide.partition("\n")[0]) <= _TERMINAL else markdown_table(header, rows)


def group_table(
    records: Mapping[str, EvaluationRecord],
    metric: str | None = None,
    *,
    width: int = _TERMINAL,
) -> str:
    """Return Markdown tables of a probe, one for each series of corruptions: a row for each group.

    A cell is that of `comparison_table`.

    Args:
        records: Records of the same corruptions, by the name of the group.
        metric: Which metric to show. By default, the `usual_metric` of the first record.
        width: How wide a table may be; where a column more would be too much, another table begins below.

    Raises:
        ValueError: There are no records, they are not of the same corruptions, or they lack the metric.
    """
    labels = [[row.label for row in record.corruptions] for record in records.values()]
    if not labels or not labels[0] or any(other != labels[0] for other in labels):
        raise ValueError(
            "records: expected one or more of the same corruptions in the same order; probe the groups alike"
        )
    metric = metric_of(records.values(), metric)
    numbers = numbers_of(records.values(), metric, None)
    first = next(iter(records.values()))
    names = [numbers.head(metric), "no corruption", *records]
    room_left = width - 1 - _room(names)
    tables: dict[tuple[str, int], list[list[str]]] = {}
    part = room = 0
    for index, corruption in enumerate(first.corruptions):
        series = Series.of(corruption)
        rows = [first.clean, *(record.corruptions[index] for record in records.values())]
        column = [series.level(corruption), *(_cell(row, metric, numbers) for row in rows)]
        if (series.name, part) not in tables or _room(column) > room:
            part, room = index, room_left
        room -= _room(column)
        tables.setdefault((series.name, part), [names]).append(column)
    shown = []
    for (name, _), columns in tables.items():
        header, *lines = zip(*columns, strict=True)
        shown.append(f"{text_of(name)}\n\n{markdown_table(header, lines, longest=None)}")
    return "\n\n".join(shown)


def _room(column: Iterable[str]) -> int:
    """Return how much of a line a column takes, with a bar and two spaces."""
    return 3 + _width(map(text_of, column), None)


def _cell(record: CorruptionRecord, metric: str, numbers: Numbers) -> str:
    return numbers.with_spread(record.mean(metric), record.deviation(metric))


def _change(line: tuple[CorruptionRecord | None, ...], metric: str, numbers: Numbers) -> list[str]:
    if len(line) != 2:
        return []
    first, second = (row.mean(metric) for row in line if row is not None)
    return [numbers.plain_difference(second - first, sign=True)]
