"""Tables drawn from records: Markdown that also reads well in a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hf_parcor.records.comparable import check_comparable
from hf_parcor.records.curves import Series
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord
from hf_parcor.records.metric_info import POINTS, SHARE, agreed, shown_unit
from hf_parcor.records.search import SearchRecord


def search_table(record: SearchRecord) -> str:
    """Return a Markdown table of a search: a row for each training, in the order of K and ε, the best one marked.

    Raises:
        ImportError: tabulate is not installed.
    """
    counts = list(dict.fromkeys(trial.steps for trial in record.trials))
    rows = [
        [
            "-" if trial.steps is None else str(trial.steps),
            f"{trial.epsilon:.4g}",
            f"{trial.objective:#.4g}",
            " ".join(["best"] * (trial == record.best) + ["collapsed"] * trial.collapsed),
        ]
        for steps in counts
        for trial in record.curve(steps)
    ]
    return _tabulate(rows, ["K", "ε", f"objective ({record.direction})", ""])


def comparison_table(
    records: Mapping[str, EvaluationRecord], metric: str = "accuracy", *, unit: str | None = None
) -> str:
    """Return a Markdown table: a row for each corruption, a column for each record.

    A cell is the mean over trials and, where there are several, ± the sample standard deviation. A last column shows
    the change from the first record to the last.

    Args:
        records: Records by the name of their column, all of the same corruptions.
        metric: Which metric to show.
        unit: As in `MetricInfo`: shares are shown in percent with one decimal, points of 100 with two, all else with
            three. None, the default, for what the records say.

    Raises:
        ValueError: There are no records, they are not of the same corruptions, they lack the metric, state different
            units of it, or are of other data or tasks; see `check_comparable`.
        ImportError: tabulate is not installed.
    """
    check_comparable(records)
    labels = [[row.label for row in record.rows()] for record in records.values()]
    if not labels or any(other != labels[0] for other in labels):
        raise ValueError(
            "records: expected one or more of the same corruptions in the same order; evaluate them alike"
        )
    head, show = _written(records, metric, unit)
    columns = [record.rows() for record in records.values()]
    rows = [
        [_text(cells[0].label), *(_cell(cell, metric, show) for cell in cells), *_change(cells, metric, show)]
        for cells in zip(*columns, strict=True)
    ]
    change = ["change"] if len(records) > 1 else []
    header = [head, *map(_text, records), *change]
    return _tabulate(rows, header)


def group_table(
    records: Mapping[str, EvaluationRecord], metric: str = "accuracy", *, unit: str | None = None, width: int = 80
) -> str:
    """Return Markdown tables of a probe, one for each series of corruptions: a row for each group.

    A cell is that of `comparison_table`.

    Args:
        records: Records of the same corruptions, by the name of the group.
        metric: Which metric to show.
        unit: As in `comparison_table`.
        width: How wide a table may be; where a column more would be too much, another table begins below.

    Raises:
        ValueError: There are no records, they are not of the same corruptions, or they lack the metric.
        ImportError: tabulate is not installed.
    """
    labels = [[row.label for row in record.corruptions] for record in records.values()]
    if not labels or not labels[0] or any(other != labels[0] for other in labels):
        raise ValueError(
            "records: expected one or more of the same corruptions in the same order; probe the groups alike"
        )
    head, show = _written(records, metric, unit)
    first = next(iter(records.values()))
    names = [head, "no corruption", *map(_text, records)]
    room_left = width - 1 - _room(names)
    tables: dict[tuple[str, int], list[list[str]]] = {}
    part = room = 0
    for index, corruption in enumerate(first.corruptions):
        series = Series.of(corruption)
        rows = [first.clean, *(record.corruptions[index] for record in records.values())]
        column = [_text(series.level(corruption)), *(_cell(row, metric, show) for row in rows)]
        if (series.name, part) not in tables or _room(column) > room:
            part, room = index, room_left
        room -= _room(column)
        tables.setdefault((series.name, part), [names]).append(column)
    shown = []
    for (name, _), columns in tables.items():
        header, *cells = zip(*columns, strict=True)
        shown.append(f"{_text(name)}\n\n{_tabulate([list(row) for row in cells], list(header))}")
    return "\n\n".join(shown)


def _room(column: list[str]) -> int:
    """Return how wide tabulate makes a column, with its header, a bar and two spaces."""
    return 3 + max(len(column[0]) + 2, *map(len, column))


def _tabulate(rows: list[list[str]], header: list[str]) -> str:
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise ImportError("tables need tabulate; install it with: pip install 'hf-parcor[tables]'") from error
    alignment = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(rows, headers=header, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def _text(text: str) -> str:
    """Return text that cannot end a cell or a line."""
    return " ".join(text.replace("|", r"\|").split())


def _written(records: Mapping[str, EvaluationRecord], metric: str, unit: str | None) -> tuple[str, Callable[..., str]]:
    """Return the head of a table, a metric with its unit, and what writes its values."""
    unit = agreed([record.info(metric).stating(unit=unit) for record in records.values()], metric).unit
    factor, shown = shown_unit(unit)
    digits = {SHARE: 1, POINTS: 2}.get(unit, 3)

    def show(value: float, sign: str = "") -> str:
        return f"{round(factor * value, digits) + 0.0:{sign}.{digits}f}"  # adding 0 turns −0 into 0

    return _text(metric) + (f" ({_text(shown)})" if shown else ""), show


def _cell(record: CorruptionRecord, metric: str, show: Callable[..., str]) -> str:
    mean, deviation = show(record.mean(metric)), record.deviation(metric)
    return mean if math.isnan(deviation) else f"{mean} ± {show(deviation)}"


def _change(cells: tuple[CorruptionRecord, ...], metric: str, show: Callable[..., str]) -> list[str]:
    if len(cells) == 1:
        return []
    change = cells[-1].mean(metric) - cells[0].mean(metric)
    return ["nan" if math.isnan(change) else show(change, "+")]
