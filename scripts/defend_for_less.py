"""How much robustness cheaper defenses of the whole model buy: SST-2, as `reproduce_sst2.py`, and a front.

    python -m scripts.defend_for_less --model MODEL --data FOLDER --output scripts/results/less

Each arm is trained with each seed (those that gained next to nothing only with the first), and its accuracy measured
without corruption and along the worst direction (gradient-based, L2) at six radii. What an arm gains is the area
between its curve and the plain one, as a mean over 0 <= ε <= 0.3, in points; what it costs is the time of a step, from
the record of `benchmark.py`. The output folder gets a record for each run, `table.md` and `front.png`. Finished runs
are kept, so an interrupted campaign goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_parcor import CorruptionConstraint, GradientCorruption
from hf_parcor.records import EvaluationRecord
from hf_parcor.reports.panels import new_figure
from hf_parcor.statistics import MeanAndSpread, student_t_test
from scripts.benchmark import LOOKSAM, LOOKSAM_BETWEEN, MOMENTUM
from scripts.campaigns import ONE_STEP, PLAIN, Arm, Run, l2, mean_and_deviation, over_runs, write_table
from scripts.peer_trainers import EVERY
from scripts.sst2_runs import measured_under, parse_options, peer

BENCHMARK = Path(__file__).parent / "results" / "benchmark.json"
AIM = 1.3  # stock steps
RADII = [0.025, 0.05, 0.1, 0.15, 0.2, 0.3]
HALF, BETWEEN, FULL = (l2("sam", epsilon) for epsilon in (0.05, 0.075, 0.1))
QUARTER, EIGHTH, SIXTEENTH = (["--defense_batch_share", share] for share in ("0.25", "0.125", "0.0625"))
EVERY_THIRD = ["--defense_interval", "3"]
LATE = ["--defense_start_epoch", "0.67"]


@dataclass(frozen=True)
class Cheaper(Arm):
    """An arm, and the row of the benchmark that tells what its defended steps cost."""

    timed_as: str
    full: str | None = None  # the arm that it approximates
    dropped: bool = False  # after the first seed, with which it gained less than three points
    share: float | None = None  # of the steps that are timed so; by its defense unless told
    else_timed_as: str | None = None  # the others; None for stock steps

    @property
    def defended_steps(self) -> float:
        """The share of the steps that are defended, in one epoch."""
        defense = self.defense
        if self.share is not None:
            return self.share
        return 0.0 if defense is None else (1 - defense.start_epoch) / defense.interval


def cheaper_peer(label: str, name: str, epsilon: float, timed_as: str, **more: Any) -> Cheaper:
    """Return an arm that a Trainer of `peer_trainers.py` trains."""
    arm = peer(label, name, epsilon)
    return Cheaper(arm.label, arm.flags, timed_as, program=arm.program, **more)


ONE, SAM = "multi_step_risk-1", "sam-half"
RADII_OF_PEERS = (("-half", "ε/2", 0.05), ("", "ε", 0.1))
ARMS = {
    "plain": Cheaper(PLAIN.label, PLAIN.flags, "stock Trainer"),
    ONE: Cheaper("K = 1", ONE_STEP, "whole model, K = 1"),
    SAM: Cheaper("SAM ε/2", HALF, "SAM"),
    "sam-half-quarter": Cheaper("SAM ε/2, ¼ of the batch", HALF + QUARTER, "SAM, ¼ of the batch", SAM, dropped=True),
    "sam-half-third": Cheaper("SAM ε/2, every 3rd step", HALF + EVERY_THIRD, "SAM", SAM, dropped=True),
    f"{ONE}-quarter": Cheaper("K = 1, ¼ of the batch", ONE_STEP + QUARTER, "K = 1, ¼ of the batch", ONE, dropped=True),
    f"{ONE}-third": Cheaper("K = 1, every 3rd step", ONE_STEP + EVERY_THIRD, "whole model, K = 1", ONE, dropped=True),
    "sam-half-late": Cheaper("SAM ε/2, last third", HALF + LATE, "SAM", SAM, dropped=True),
    f"{ONE}-upper-2": Cheaper(
        "K = 1, two last layers",
        [*ONE_STEP, "--defense_target_modules", "layer.4", "layer.5", "pooler", "classifier"],
        "two last layers, K = 1",
        ONE,
    ),
    f"{ONE}-late": Cheaper("K = 1, last third", ONE_STEP + LATE, "whole model, K = 1", ONE, dropped=True),
    "sam-half-eighth": Cheaper("SAM ε/2, ⅛ of the batch", HALF + EIGHTH, "SAM, ⅛ of the batch", SAM),
    "sam-between-eighth": Cheaper("SAM ¾ε, ⅛ of the batch", BETWEEN + EIGHTH, "SAM, ⅛ of the batch", SAM),
    "sam-eighth": Cheaper("SAM ε, ⅛ of the batch", FULL + EIGHTH, "SAM, ⅛ of the batch", SAM),
    "sam-sixteenth": Cheaper("SAM ε, two examples", FULL + SIXTEENTH, "SAM, ⅛ of the batch", SAM),
    "sam-quarter": Cheaper("SAM ε, ¼ of the batch", FULL + QUARTER, "SAM, ¼ of the batch", SAM, dropped=True),
    **{
        f"looksam{ending}": cheaper_peer(
            f"LookSAM {radius}", "looksam", epsilon, LOOKSAM, share=1 / EVERY, else_timed_as=LOOKSAM_BETWEEN
        )
        for ending, radius, epsilon in RADII_OF_PEERS
    },
    **{
        f"momentum{ending}": cheaper_peer(f"along the momentum, {radius}", "momentum", epsilon, MOMENTUM, share=1.0)
        for ending, radius, epsilon in RADII_OF_PEERS
    },
}


def measure(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train one model and measure it along the worst direction, unless its record is there already."""
    corruptions = [GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in RADII]
    return measured_under(options, run, corruptions)


def area(record: EvaluationRecord) -> float:
    """Return the mean accuracy over 0 <= ε <= 0.3 in per cent: the area under the curve, by trapezoids."""
    radii = [0.0, *RADII]
    values = [100 * row.mean("accuracy") for row in record.rows()]
    width = zip(radii[:-1], radii[1:], values[:-1], values[1:], strict=True)
    return sum((right - left) * (first + second) / 2 for left, right, first, second in width) / radii[-1]


def step_cost(arm: Cheaper) -> float:
    """Return the median time of a step over a run, in stock steps of the same round of the benchmark."""
    times = {row["arm"]: float(row["time_ratio_median"]) for row in json.loads(BENCHMARK.read_text())["rows"]}
    other = 1.0 if arm.else_timed_as is None else times[arm.else_timed_as]
    return other + arm.defended_steps * (times[arm.timed_as] - other)


def front(records: dict[str, list[EvaluationRecord]]) -> list[dict[str, float | str]]:
    """Return what each arm costs and gains, the cheapest first."""
    areas = {name: [area(record) for record in of_arm] for name, of_arm in records.items()}
    gains = {name: fmean(of_arm) - fmean(areas["plain"][: len(of_arm)]) for name, of_arm in areas.items()}
    rows: list[dict[str, float | str]] = []
    for name, of_arm in areas.items():
        arm = ARMS[name]
        row: dict[str, float | str] = {"arm": arm.label, "cost": step_cost(arm), "gain": gains[name]}
        row["clean"] = mean_and_deviation([100 * record.rows()[0].mean("accuracy") for record in records[name]], 1)
        row["area"] = mean_and_deviation(of_arm, 1)
        if name != "plain" and len(of_arm) > 1:
            test = student_t_test(MeanAndSpread.from_values(of_arm), MeanAndSpread.from_values(areas["plain"]))
            row["t"] = f"{test.t:.1f}{'*' if test.is_significant() else ''}"
        if arm.full is not None and not arm.dropped:
            row["share"] = f"{100 * gains[name] / gains[arm.full]:.0f} %"
        rows.append(row)
    return sorted(rows, key=lambda row: row["cost"])


def table(rows: list[dict[str, float | str]]) -> str:
    """Return the front as Markdown."""
    lines = ["| arm | step | clean | area | gain | t | of the full gain |", "|:--|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        cells = [f"{row['cost']:.2f}", row["clean"], row["area"], f"{row['gain']:+.1f}"]
        lines.append(f"| {row['arm']} | {' | '.join(map(str, cells))} | {row.get('t', '')} | {row.get('share', '')} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, float | str]], path: Path) -> None:
    """Draw gain against cost."""
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    axes.axhline(0, color="0.8", linewidth=1)
    axes.axvline(AIM, color="0.8", linewidth=1, linestyle="--")
    peers = {arm.label for arm in ARMS.values() if arm.program}
    for row in rows:
        place = (float(row["cost"]), float(row["gain"]))
        color = "C2" if row["arm"] in peers else "C1" if str(row["arm"]).startswith("SAM") else "C0"
        several = "±" in str(row["area"])
        axes.plot(*place, "o", color=color, markerfacecolor=color if several else "none")
        if several:
            crowded = color == "C1" and place[0] < AIM
            aside = {"xytext": (-8, -3), "ha": "right"} if crowded else {"xytext": (8, -3)}
            axes.annotate(str(row["arm"]), place, textcoords="offset points", **aside)
    axes.set_title("hollow: a quarter of the batch, every third step, last third; one seed", fontsize="medium")
    axes.set_xlabel("time of a step, in stock steps")
    axes.set_ylabel("accuracy gained, mean over 0 ≤ ε ≤ 0.3 (points)")
    axes.set_xlim(0.73, 2.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is missing, and draw the front."""
    options = parse_options(__doc__, ARMS, "runs/sst2")
    arms = {name: ARMS[name] for name in options.arms or ARMS if not ARMS[name].dropped}
    records = over_runs(measure, "runs", options, arms)
    first = argparse.Namespace(**{**vars(options), "seeds": options.seeds[:1]})
    dropped = {name: ARMS[name] for name in options.arms or ARMS if ARMS[name].dropped}
    records |= over_runs(measure, "runs with the first seed", first, dropped)
    if options.arms:
        return
    rows = front(records)
    seeds = ", ".join(map(str, options.seeds))
    text = (
        f"SST-2 dev accuracy (%) along the worst direction, seeds {seeds}, mean ± sample standard deviation; area: "
        "mean over 0 <= ε <= 0.3; gain: area less that of the plain arm; step: time, in stock steps, a run's mean.\n"
        "t: Student's test with pooled variance that the arm is no better than plain; * p < 0.05, one-sided.\n\n"
        f"{table(rows)}"
    )
    write_table(options.output, text)
    plot(rows, options.output / "front.png")


if __name__ == "__main__":
    main()
