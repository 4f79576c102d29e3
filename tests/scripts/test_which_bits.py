"""Recipes of trained models: the whole way on a small one, and pages that are those of the records beside them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="recipes need the extra 'statistics'")
pytest.importorskip("matplotlib", reason="the page needs the extra 'plots'")

from hf_parcor import EvaluationRecord, RecipeRecord, RecipeReport, SensitivityRecord, export_recipe
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.recipes.exports import _EXPORTS
from scripts import which_bits
from scripts.reproduce import RESULTS

KEPT = sorted(path.parent for path in (RESULTS / "recipe").glob("*/recipe.json"))


def small(options) -> which_bits.Judged:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    first, second = (
        ClassificationMetric([{"input": torch.randn(8, 8), "labels": torch.arange(8) % 3}]) for _ in range(2)
    )
    return which_bits.Judged("a small one", options.work, model, first, second, "accuracy", {"a": "0", "b": "2"})


@pytest.mark.slow
def test_a_recipe_is_chosen_on_some_rows_and_judged_on_others(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(which_bits.SYSTEMS, "images", small)
    folders = ["--data", tmp_path, "--output", tmp_path / "out", "--work", tmp_path / "work", "--model", "none"]
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(sys, "argv", ["x", "--system", "images", *map(str, folders)])
    which_bits.main()
    answer = capsys.readouterr().out.splitlines()[0]
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert answer in page
    assert "owe nothing to the choice" in page
    chosen = RecipeRecord.load(tmp_path / "out" / "recipe.json")
    assert [(pair.first, pair.second) for pair in chosen.pairs] == [("a", "b")]
    four = json.loads((tmp_path / "out" / "recipe_measured.json").read_text(encoding="utf-8"))["corruptions"]
    (of_four,) = [row["settings"]["bits"] for row in four if row["label"] == str(which_bits.FORMATS[3])]
    assert of_four <= chosen.budget["bits"] < of_four + 0.1


def test_what_a_system_starts_from_is_asked_for(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--system", "images", "--data", "d", "--output", "o"])
    with pytest.raises(SystemExit, match="2"):
        which_bits.main()
    assert "--model: expected" in capsys.readouterr().err


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_a_page_is_that_of_its_records(folder, tmp_path) -> None:
    scores = SensitivityRecord.load(folder / "sensitivity.json")
    measured = EvaluationRecord.load(folder / "recipe_measured.json")
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    metric = next(name for name in ("accuracy", "tokenized_bleu") if name in measured.clean.metrics)
    chosen = RecipeRecord.load(folder / "recipe.json")
    files = {path.name: path.read_bytes() for path in export_recipe(chosen, tmp_path / "files").files}
    report = RecipeReport(scores, chosen, measured, title=title, metric=metric, files=files)
    assert report.to_markdown(tmp_path / "page.md").read_text(encoding="utf-8") == text
    of_tools = {path.name: path.read_bytes() for name in _EXPORTS if (path := folder / name).exists()}
    assert {"recipe.json": (folder / "recipe.json").read_bytes()} | of_tools == files, "and no file of an older recipe"
