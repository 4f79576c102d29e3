"""The figures and tables of both papers, drawn from records alone.

    python -m scripts.figures RECORDS... --output DIR

RECORDS are files that a `CorruptionEvaluator` or a `LayerProbe` saved. Each is called by the name of its file, or, as
NAME=FILE, by a name; records of one model with different targets have one name. What they hold is drawn:

- `paper-1-figure-3.png`, `paper-1-table-1.md`: gradient-based against random corruption, a panel, or two columns, a
  model (records of evaluators with both);
- `paper-1-figure-4.png`, `paper-1-figure-5.png`: kinds of modules, and layers (records of probes);
- `paper-2-figure-3.png`: the layers of several models side by side (probes of two models or more);
- `paper-2-table-6.md`: all parameters corrupted, or a part alone (records of evaluators with two targets).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from hf_parcor import CorruptionRecord, EvaluationRecord, SweepRecord
from hf_parcor.records.curves import short
from hf_parcor.records.metric_info import agreed
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.plots import plot_directions, plot_heat_map
from hf_parcor.reports.tables import markdown_table

Models: TypeAlias = Mapping[str, list[EvaluationRecord]]
Sweeps: TypeAlias = Mapping[str, SweepRecord]
DIRECTIONS = ("random", "gradient")


def read(entries: list[str]) -> tuple[dict[str, list[EvaluationRecord]], dict[str, SweepRecord]]:
    """Return the records of evaluators and those of probes, by their names."""
    models: dict[str, list[EvaluationRecord]] = {}
    sweeps: dict[str, SweepRecord] = {}
    for entry in entries:
        name, _, file = entry.rpartition("=")
        path = Path(file)
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "records" in content:
            sweeps[name or path.stem] = SweepRecord.load(path)
        else:
            models.setdefault(name or path.stem, []).append(EvaluationRecord.load(path))
    return models, sweeps


def rows_of(record: EvaluationRecord, direction: str) -> list[CorruptionRecord]:
    """Return the corruptions of a record in one direction."""
    return [row for row in record.corruptions if row.corruption == direction]


def table_1(models: Mapping[str, EvaluationRecord], metric: str) -> str:
    """Return a row for each norm, n and ε, and two columns a model: the metric, and its change."""
    numbers = numbers_of(models.values(), metric)
    found: dict[tuple[float, float, float], dict[tuple[str, str], str]] = {}
    for name, record in models.items():
        for direction in DIRECTIONS:
            for row in rows_of(record, direction):
                norm, n, epsilon = (row.settings[key] for key in ("p", "top_n", "epsilon"))
                change = row.mean(metric) - record.clean.mean(metric)
                cell = f"{numbers.value(row.mean(metric))} ({numbers.plain_difference(change, sign=True)})"
                found.setdefault((norm, math.inf if n is None else n, epsilon), {})[name, direction] = cell
    columns = [(name, direction) for name in models for direction in DIRECTIONS]
    rows = [["no corruption", *(numbers.value(models[name].clean.mean(metric)) for name, _ in columns)]]
    for norm, n, epsilon in sorted(found, key=lambda place: (-place[0], -place[1], place[2])):
        label = f"L{short(norm)}, n = {'k' if math.isinf(n) else n}, ε = {short(epsilon)}"
        rows.append([label, *(found[norm, n, epsilon].get(column, "–") for column in columns)])
    header = [numbers.head(metric), *(f"{name}, {direction}" for name, direction in columns)]
    return markdown_table(header, rows) + "\n"


def table_6(models: Models, metric: str) -> str:
    """Return a row for each model, and a column for each target and gradient-based corruption of it."""
    numbers = numbers_of((record for records in models.values() for record in records), metric)
    columns = [
        (target_of(record), row.label)
        for records in models.values()
        for record in records
        for row in rows_of(record, "gradient")
    ]
    columns = list(dict.fromkeys(columns))
    rows = []
    for name, records in models.items():
        cells = {
            (target_of(record), row.label): numbers.value(row.mean(metric))
            for record in records
            for row in rows_of(record, "gradient")
        }
        clean = numbers.value(records[0].clean.mean(metric))
        rows.append([name, clean, *(cells.get(column, "–") for column in columns)])
    header = [numbers.head(metric), "no corruption", *(f"{target} corrupted, {label}" for target, label in columns)]
    return markdown_table(header, rows) + "\n"


def numbers_of(records: Iterable[EvaluationRecord], metric: str) -> Numbers:
    """Return how the metric of some records is written."""
    return Numbers(agreed([record.info(metric) for record in records], metric).unit)


def target_of(record: EvaluationRecord) -> str:
    """Return what was corrupted, in words."""
    target = record.target.get("target_modules", "all")
    return target if isinstance(target, str) else ", ".join(map(str, target))


def is_of_layers(sweep: SweepRecord) -> bool:
    """Whether a probe is one of layers: all of its groups are numbered blocks."""
    return all(group.rpartition(".")[2].isdigit() for group in sweep.records)


def draw(models: Models, sweeps: Sweeps, metric: str, folder: Path) -> list[Path]:
    """Draw what the records hold, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def note(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")
        drawn.append(folder / name)

    # A model with both directions stands in paper 1's figure, one with two targets in paper 2's table.
    both = {name: records[0] for name, records in models.items() if all(rows_of(records[0], d) for d in DIRECTIONS)}
    if both:
        plot_directions(both, metric).savefig(folder / "paper-1-figure-3.png", dpi=100)
        drawn.append(folder / "paper-1-figure-3.png")
        note("paper-1-table-1.md", table_1(both, metric))
    if any(len(records) > 1 for records in models.values()):
        note("paper-2-table-6.md", table_6(models, metric))
    layers = {name: sweep for name, sweep in sweeps.items() if is_of_layers(sweep)}
    kinds = {name: sweep for name, sweep in sweeps.items() if name not in layers}
    first = dict(list(layers.items())[:1])
    pictures = [("paper-1-figure-4", kinds), ("paper-1-figure-5", first)]
    pictures += [("paper-2-figure-3", layers)] if len(layers) > 1 else []
    for name, shown in pictures:
        if shown:
            plot_heat_map(shown, metric).savefig(folder / f"{name}.png", dpi=100)
            drawn.append(folder / f"{name}.png")
    return drawn


def main() -> None:
    """Read the records and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="RECORDS", help="FILE or NAME=FILE")
    parser.add_argument("--output", type=Path, required=True, help="the folder for figures and tables")
    parser.add_argument("--metric", default="accuracy", help="default: %(default)s")
    options = parser.parse_args()
    try:
        drawn = draw(*read(options.records), options.metric, options.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not drawn:
        parser.error(
            "expected records with random and gradient-based corruptions, of probes, or of several targets, got none"
        )
    print("\n".join(map(str, drawn)))


if __name__ == "__main__":
    main()
