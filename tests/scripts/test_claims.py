"""The page of claims and the first table are those of the records, and its tests are SciPy's."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from for_each import for_each

from hf_parcor import EvaluationRecord

stats = pytest.importorskip("scipy.stats", reason="tests need the extra 'statistics'")
claims = importlib.import_module("scripts.claims")
reproduce = importlib.import_module("scripts.reproduce")

COMPARED = [claim.evidence for claim in claims.CLAIMS if isinstance(claim.evidence, claims.Higher)]


def by_hand(runs) -> list[float]:
    """Return the numbers of some runs, read as plain JSON."""
    found = []
    for seed in range(1, 10):
        path = reproduce.RESULTS / runs.folder / f"{runs.arm}-seed{seed}{runs.ending}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        record = record["records"][runs.group] if runs.group else record
        rows = [record["clean"], *record["corruptions"]]
        chosen = [
            row for row in rows if runs.rows(claims.CorruptionRecord(row["corruption"], row["label"], {}, (0,), {}))
        ]
        means = [sum(row["metrics"][runs.metric]) / len(row["metrics"][runs.metric]) for row in chosen]
        found.append(sum(means) / len(means) * (1 if "bleu" in runs.metric or runs.metric == "loss" else 100))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Precision loss occurred:RuntimeWarning")  # models that learned nothing are alike
def test_comparisons_are_scipys() -> None:
    ours, theirs = [], []
    for one in COMPARED:
        first, second = by_hand(one.first), by_hand(one.second)
        assert (one.first.values(), one.second.values()) == (pytest.approx(first), pytest.approx(second))
        ours.append(one.test().p_value)
        theirs.append(stats.ttest_ind([value + one.margin for value in first], second, alternative="greater").pvalue)
    assert ours == pytest.approx(theirs)

    def that_hold(places: list[int]) -> set[int]:
        """Holm: the smallest against 0.05/m, then 0.05/(m − 1), until one fails."""
        holds, order = set(), sorted(places, key=lambda place: theirs[place])
        for rank, place in enumerate(order):
            if theirs[place] >= 0.05 / (len(order) - rank):
                break
            holds.add(place)
        return holds

    folders = [one.first.folder for one in COMPARED]
    of_campaign = set()
    for folder in set(folders):
        of_campaign |= that_hold([place for place, one in enumerate(folders) if one == folder])
    of_page = that_hold(list(range(len(theirs))))
    assert of_page < of_campaign, "or no mark is needed"
    rows = [row for row in claims.rows() if isinstance(row.claim.evidence, claims.Higher)]
    assert {place for place, row in enumerate(rows) if row.verdict.startswith(claims.CONFIRMED)} == of_campaign
    assert {place for place, row in enumerate(rows) if row.verdict == claims.CONFIRMED} == of_page


@pytest.mark.parametrize("path", [claims.PAGE, claims.README], ids=lambda path: path.parent.name)
def test_pages_are_those_of_the_records(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == (claims.page() if path == claims.PAGE else claims.with_first_table(text))


def test_the_page_names_every_record_and_nothing_else() -> None:
    folder = claims.PAGE.parent
    named = {folder / link for link in re.findall(r"^- \[.*?\]\((.*?)\):", claims.PAGE.read_text(), re.MULTILINE)}
    records = list(folder.rglob("*.json"))
    assert [str(path) for path in records if not named & {path, path.parent}] == []
    assert {path for path in named if not path.exists()} == set()


def test_the_first_table_is_between_its_marks() -> None:
    start, end = claims.FIRST_TABLE
    text = f"above\n{start}old\n{end}below\n"
    assert claims.with_first_table(text) == f"above\n{start}{claims.first_table()}{end}below\n"


STUDIES = [(name, size, study) for name, sizes in reproduce.STUDIES.items() for size, study in sizes.items()]


def test_studies_are_campaigns_and_their_records() -> None:
    for name, size, study in STUDIES:
        module = importlib.import_module(f"scripts.{study.words()[1].removeprefix('scripts.')}")
        assert set(study.arms) <= {*reproduce.arms_of(module), *getattr(module, "TINY", ())}, (name, size)
        assert study.side_by_side == hasattr(module, "over_runs"), (name, size)
        folder = reproduce.RESULTS / study.records
        assert folder.is_dir(), (name, size)
        seeds = {int(seed) for path in folder.glob("*.json") for seed in re.findall(r"-seed(\d+)", path.name)}
        assert not study.records or not seeds or seeds == set(study.seeds), (name, size)


TIMED = [
    (name, size, ["--hours", "1000"])
    for name, size, study in STUDIES
    if study.side_by_side and reproduce.seconds_of(reproduce.runs_of(study))
]


@for_each("name, size, more", [*((name, size, []) for name, size, _ in STUDIES), *TIMED])
def test_a_study_is_read_by_its_campaign(name, size, more, monkeypatch, capsys) -> None:
    """What would run is a command line that the campaign's own parser takes, up to where it would begin to work."""
    monkeypatch.setattr(sys, "argv", ["x", name, "--size", size, "--model", "M", "--data", "D", "--dry-run", *more])
    with pytest.raises(SystemExit, match="0"):
        reproduce.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m")]
    _, _, module, *arguments = shlex.split(line)
    if not more:
        shown = reproduce.STUDIES[name][size].line()
        assert line.startswith(f"{shown.replace('MODEL', 'M').replace('FOLDER', 'D')} "), "what pages say that runs"
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--no-such-flag"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(module).main()
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


@for_each(
    "words, what",
    [
        ([], "expected a study"),
        (["probes", "--size", "full"], "--size"),
        (["sst2"], "--data and --model"),
        (["parser"], "--data"),
        (["theory", "--data", "D", "--hours", "1", "--dry-run"], "--hours"),
        (["detection", "--data", "D", "--hours", "1", "--dry-run"], "runs were timed"),
        (["sst2", "--model", "M", "--data", "D", "--hours", "0.001", "--dry-run"], "nothing fits"),
    ],
)
def test_what_cannot_run_is_said_before(words, what, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *words])
    with pytest.raises(SystemExit, match="2"):
        reproduce.main()
    assert what in capsys.readouterr().err


def test_an_arm_takes_what_all_its_runs_of_a_seed_take_and_is_told_if_it_was_never_timed(monkeypatch, capsys) -> None:
    runs = {
        "tuned-half": 1.0,
        "scratch-half": 2.0,
        "tuned-sam-half": 4.0,
        "scratch-sam-half": 8.0,
        "an-older-one": 9.0,
    }
    assert reproduce.seconds_of_arms(runs, ["half", "sam-half", "new"]) == {"half": 3.0, "sam-half": 12.0}
    monkeypatch.setattr(
        sys, "argv", ["x", "sst2-deployed", "--model", "M", "--data", "D", "--hours", "1000", "--dry-run"]
    )
    with pytest.raises(SystemExit, match="0"):
        reproduce.main()
    assert "left out: torchao (never timed)" in capsys.readouterr().out


def test_hours_never_hold_more_than_fits() -> None:
    seconds = {f"arm{count}": 100.0 * count for count in range(1, 6)}
    for jobs, hours in [(1, 0.1), (2, 0.1), (3, 1.0), (1, 5.0)]:
        fitting, others = reproduce.plan(seconds, [*seconds, "new"], 3, jobs, hours)
        assert 3 * sum(seconds[arm] for arm in fitting) <= 3600 * hours * jobs
        assert {*fitting, *others} == {*seconds, "new"}
        assert others["new"] == "never timed"
        left = 3600 * hours * jobs - 3 * sum(seconds[arm] for arm in fitting)
        assert all(3 * seconds[arm] > left for arm in others if arm in seconds), "none of the others would fit"


def difference(first: str, second: str, label: str, folder: str = "sst2_first") -> float:
    return claims.arms(folder, first, second, claims.labelled(label)).test().mean_difference


def mean(arm: str, label: str, folder: str = "sst2_full") -> str:
    values = claims.Runs(folder, arm, claims.labelled(label)).values()
    return f"{sum(values) / len(values):.1f}"


def time_of(arm: str) -> str:
    rows = json.loads((reproduce.RESULTS / "benchmark.json").read_text(encoding="utf-8"))["rows"]
    (row,) = (row for row in rows if row["arm"] == arm)
    return f"{row['time_ratio_median']:.2f}"


def numbers_of_the_first_page() -> list[str]:
    """Return what the first page says beside its table, with the numbers of the records."""
    worst = [
        difference("multi_step_risk-1", "plain", label)
        for label in (
            "gradient-based L2 ε=0.1",
            "gradient-based L2 ε=0.2",
            "multi-step L2 ε=0.1",
            "gradient-based L2 ε=0.5",
        )
    ]
    noise = claims.arms("sst2_first", "multi_step_risk-1", "plain", claims.labelled("Gaussian σ=0.02")).test()
    bits = difference("multi_step_risk-1", "plain", "6-bit quantization")
    gpu = claims.costs_two_passes_on_a_gpu()[1]
    long, short = (re.search(rf"{shape}: ([\d.]+)", gpu)[1] for shape in ("64 × 512", "32 × 128"))
    flips = "3 worst flips (int8, 5 candidates)"
    return [
        f"keeps {min(worst):.1f} to {max(worst):.1f} points more",
        f"gains {noise.mean_difference:.1f} (t = {noise.t:.0f}), at 6 bits {bits:.1f}",
        f"holds {mean('half-4-bits', '4-bit quantization')} there, where plain training holds "
        f"{mean('plain', '4-bit quantization')}",
        f"keeps {mean('worst-and-4-bits', flips)} after the three worst bit flips of int8 codes, "
        f"where plain keeps {mean('plain', flips)}",
        f"K = 1 takes {time_of('whole model, K = 1')} stock steps on a CPU, {long} (batches of 64 × 512 tokens) to "
        f"{short} (32 × 128) on an H100; the last of six layers {time_of('last layer, K = 1')}",
    ]


@for_each("said", numbers_of_the_first_page())
def test_numbers_of_the_first_page(said) -> None:
    assert said in " ".join(claims.README.read_text(encoding="utf-8").split())


TABLES = (Path(claims.__file__).parent / "README.md").read_text(encoding="utf-8")


@for_each(
    "folder, first",
    [("sst2_first", "| accuracy"), ("sst2_full", "| accuracy"), ("language_model", "| L2, gradient-based")],
)
def test_rows_of_the_tables_are_those_of_the_records(folder, first) -> None:
    kept = (reproduce.RESULTS / folder / "table.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in kept if line.startswith(first))
    shown = TABLES[TABLES.index(header) :].split("\n\n")[0].splitlines()
    assert len(shown) > 8
    assert [line for line in shown if line not in kept] == []


def of_accuracies(row) -> list[str]:
    return [f"{100 * row.mean('accuracy'):.1f}"]


def of_a_decoder(row) -> list[str]:
    return [f"{row.mean('perplexity'):.1f}", f"{row.mean('divergence'):.3f}"]


@for_each("place, system", list(enumerate(["sst2", "images", "decoder"])))
def test_the_recipes_table_is_its_record(place, system) -> None:
    record = EvaluationRecord.load(reproduce.RESULTS / "recipe" / system / "recipe_measured.json")
    section = TABLES.split("| chosen by, at most 4.1 bits")[1 + place].split("\n\n")[0]
    rows = {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines())
    }
    shown = of_a_decoder if system == "decoder" else of_accuracies
    clean = shown(record.clean)
    assert rows["as it is"][1:] == clean if "as it is" in rows else f"{clean[0]} as it is" in TABLES
    names = {
        "divergence": "recipe",
        "Fisher": "by fisher",
        "FIT": "by fit",
        "4 bits for all": next(row.label for row in record.corruptions if row.label.startswith("4-bit")),
    }
    names |= {
        "loss": "by loss",
        "first order": "by first_order",
        "second order": "by second_order",
    }
    if shown is of_accuracies:
        names["accuracy"] = "by accuracy"
    measured = {row.label: row for row in record.corruptions}
    for words, label in names.items():
        (cells,) = (cells for name, cells in rows.items() if name.split(",")[0] == words)
        row = measured[label]
        assert cells == [f"{row.settings['bits']:.2f}", *shown(row)], words
    if system == "sst2":
        deployed = json.loads((reproduce.RESULTS / "recipe" / system / "deployed.json").read_text())["metrics"]
        assert deployed == pytest.approx({name: measured["recipe"].mean(name) for name in deployed}, rel=1e-5)
        assert f"{100 * deployed['accuracy']:.2f} % of the test sentences right and a loss of" in TABLES
        assert f"{deployed['loss']:.5f}, to the last digit" in TABLES
