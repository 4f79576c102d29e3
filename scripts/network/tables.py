"""What was counted, and what it takes on paper, as Markdown."""

from __future__ import annotations

from typing import Any


def counts_table(counted: dict[str, dict[str, Any]]) -> str:
    """Return calls and bytes by collective as Markdown."""
    names = ["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
    lines = [
        cells(["calls: MB a step", "all-reduce", "all-gather", "red.-scat.", "broadcast"]),
        "|:--|--:|--:|--:|--:|",
    ]
    for engine, arms in counted.items():
        for label, arm in arms.items():
            sent = [arm["collectives"].get(name) for name in names]
            shown = ["" if found is None else f"{found['calls']}: {megabytes(found['bytes'])}" for found in sent]
            lines.append(cells([f"{engine}, {label}", *shown]))
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """Return a size in 10⁶ bytes, or that it is smaller than can be shown."""
    return f"{size / 1e6:.1f}" if size >= 50_000 else "< 0.1"


def paper_table(rows: list[dict[str, Any]]) -> str:
    """Return the model on paper as Markdown."""
    gpus = sorted({row["gpus"] for row in rows})
    headers = [header for ranks in gpus for header in (f"{ranks:,} GPUs", f"{ranks:,} ∥")]
    lines = [cells(["step", *headers]), "|:--|" + "--:|" * len(headers)]
    arms = dict.fromkeys((row["engine"], row["arm"]) for row in rows)
    for engine, arm in arms:
        shown = []
        for row in sorted((r for r in rows if (r["engine"], r["arm"]) == (engine, arm)), key=lambda r: int(r["gpus"])):
            for overlap in ("one_after_the_other", "overlapped"):
                time = row[overlap]
                shown.append(f"{time['milliseconds']:.1f} ms" if arm == "stock" else f"{time['ratio']:.2f}")
        lines.append(cells([f"{engine}, {arm}", *shown]))
    return "\n".join(lines)


def cells(row: list[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {row[0]:24} | " + " | ".join(f"{cell:>11}" for cell in row[1:]) + " |"
