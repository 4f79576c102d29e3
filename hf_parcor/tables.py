"""Tables drawn from records: Markdown that also reads well in a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord


def comparison_table(
    records: Mapping[str, EvaluationRecord], metric: str = "accuracy", *, percent: bool = True
) -> str:
    """Return a Markdown table: a row for each corruption, a column for each record.

    A cell is the mean over trials and, where there are several, ± the sample standard deviation. A last column shows
    the change from the first record to the last.

    Args:
        records: Records by the name of their column, all of the same corruptions.
        metric: Which metric to show.
        percent: Whether to multiply by 100. Default True.

    Raises:
        ValueError: There are no records, or they are not of the same corruptions.
        ImportError: tabulate is not installed.
    """
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise ImportError("tables need tabulate; install it with: pip install 'hf-parcor[tables]'") from error
    labels = [[row.label for row in record.rows()] for record in records.values()]
    if not labels or any(other != labels[0] for other in labels):
        raise ValueError(
            "records: expected one or more of the same corruptions in the same order; evaluate them alike"
        )
    scale = 100.0 if percent else 1.0
    columns = [record.rows() for record in records.values()]
    rows = [
        [cells[0].label, *(_cell(cell, metric, scale) for cell in cells), _change(cells, metric, scale)]
        for cells in zip(*columns, strict=True)
    ]
    change = ["change"] if len(records) > 1 else []
    body = rows if change else [row[:-1] for row in rows]
    unit = " (%)" if percent else ""
    header = [f"{metric}{unit}", *records, *change]
    alignment = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(body, headers=header, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def _cell(record: CorruptionRecord, metric: str, scale: float) -> str:
    mean = f"{record.mean(metric) * scale:.1f}"
    deviation = record.deviation(metric)
    return mean if math.isnan(deviation) else f"{mean} ± {deviation * scale:.1f}"


def _change(cells: tuple[CorruptionRecord, ...], metric: str, scale: float) -> str:
    return f"{(cells[-1].mean(metric) - cells[0].mean(metric)) * scale:+.1f}"
