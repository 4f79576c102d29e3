"""The script for Table 3 of paper 1 on a tiny model and a text of a few words."""

from __future__ import annotations

import json
import math
import random
import shlex
from pathlib import Path

import pytest
import torch

from hf_parcor import CorruptionConstraint, RandomCorruption
from hf_parcor.functional import inner_product
from hf_parcor.theory import RandomCorruptionRatio
from scripts import random_corruption_theory as script

RESULTS = Path(__file__).parents[2] / "scripts" / "results" / "random_corruption"
TINY = "--width 8 --length 8 --batch 4 --steps 3 --rows 6 --draws 400 --changes 30 --probes 3 --epsilons 1e-3 0.1"


@pytest.fixture
def folder(tmp_path):
    words = random.Random(0)
    for part, lines in (("train", 40), ("valid", 10)):
        rows = [" ".join(words.choices([f"w{i}" for i in range(20)], k=8)) for _ in range(lines)]
        (tmp_path / f"ptb.{part}.txt").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_from_text_to_table(folder, capsys):
    arguments = ["--data", str(folder), "--output", str(folder / "new" / "out"), "--quiet", *TINY.split()]
    script.main(arguments)
    record = json.loads((folder / "new" / "out" / "record.json").read_text())
    text = (folder / "new" / "out" / "table.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert record["command"] in text
    assert str(folder) not in json.dumps(record)

    again, _ = script.parse([*shlex.split(record["command"])[3:]])
    asked, _ = script.parse(arguments)
    assert {**vars(again), "data": 0, "output": 0, "quiet": 0} == {**vars(asked), "data": 0, "output": 0, "quiet": 0}

    k, first = record["parameters"], record["first_order"]
    assert first["largest_first_order"] == pytest.approx(1e-3 * record["gradient_norm"])
    assert first["standard_deviation"] == pytest.approx(first["theoretical_standard_deviation"], rel=0.15)
    assert first["theoretical_standard_deviation"] == pytest.approx(1e-3 * record["gradient_norm"] / math.sqrt(k))
    assert first["kolmogorov_smirnov"]["p_value"] > 0.01
    assert [row["low"] <= row["empirical"] <= row["high"] for row in first["quantiles"]] == [True] * 3
    for row in record["real_changes"]:
        assert len(row["changes"]) == 30
        found = row["beyond_first_order"]
        if row["dtype"] == "float64":
            assert row["standard_deviation"] == pytest.approx(row["theoretical_standard_deviation"], rel=0.4)
            assert abs(found["mean"] - found["hutchinson"]) < 4 * found["standard_error"] + 0.5 * abs(found["mean"])
    assert [(row["epsilon"], row["dtype"]) for row in record["real_changes"]] == [
        (epsilon, dtype) for dtype in ("float64", "float32") for epsilon in (1e-3, 0.1)
    ]


def test_the_table_is_that_of_the_record():
    record = json.loads((RESULTS / "record.json").read_text())
    assert (RESULTS / "table.md").read_text() == script.table(record)


def test_cosines_are_those_of_random_corruptions():
    """What is sampled in blocks is `RandomCorruption`, draw for draw of one generator."""
    gradient = torch.randn(50).double()
    found = torch.cat(list(script.cosines(gradient, 5, seed=3, block=2)))
    generator, corruption = torch.Generator().manual_seed(3), RandomCorruption(CorruptionConstraint(epsilon=1))
    drawn = torch.empty(2, 50).normal_(generator=generator)
    expected = [torch.nn.functional.cosine_similarity(row.double(), gradient, dim=0) for row in drawn]
    torch.testing.assert_close(found[:2], torch.stack(expected), rtol=1e-5, atol=1e-7)
    single = corruption({"w": torch.zeros(50)}, generator=torch.Generator().manual_seed(3))["w"]
    alone = next(script.cosines(gradient, 1, seed=3))
    torch.testing.assert_close(alone[0], inner_product([single], [gradient]) / gradient.norm(), rtol=1e-5, atol=1e-7)


def test_quantiles_with_their_intervals():
    magnitudes = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double().abs()
    rows = script.quantiles(magnitudes, math.sqrt(10**6), RandomCorruptionRatio(10**6))
    for row in rows:
        assert row["low"] < row["empirical"] < row["high"]
        assert row["low"] < row["theoretical"] < row["high"]
        assert row["high"] - row["low"] < 0.2
    few = script.quantiles(magnitudes[:20], 1.0, RandomCorruptionRatio(100))
    assert [row["high"] for row in few] == [magnitudes[:20].max().item()] * 3


def test_a_folder_without_the_text(tmp_path):
    with pytest.raises(SystemExit, match=r"--data: expected ptb.train.txt or ptb.train.txt.gz"):
        script.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_no_record_is_replaced_unless_told(capsys):
    with pytest.raises(SystemExit, match="2"):
        script.parse(["--data", "FOLDER"])
    assert "--output" in capsys.readouterr().err
