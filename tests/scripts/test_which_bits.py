"""Recipes of trained models: the whole way on a small one, and pages that are those of the records beside them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("scipy", reason="recipes need the extra 'statistics'")
pytest.importorskip("matplotlib", reason="the page needs the extra 'plots'")

from hf_parcor import EvaluationRecord, RecipeRecord, RecipeReport, SensitivityRecord, export_recipe
from hf_parcor.evaluation import ClassificationMetric, LanguageModelMetric
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
    (tmp_path / "work" / "images").mkdir(parents=True)
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


START, END, TOKENS, POSITIONS = 1, 2, 120, 12


def small_decoder() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "n_positions": POSITIONS, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ids, initializer_range=0.4)).to(which_bits.DEVICE).eval()


@pytest.mark.slow
def test_samples_are_drawn_from_all_that_the_decoder_says() -> None:
    """On its own samples a model's mean loss is its entropy, but for chance; were some left out it would be less."""
    model = small_decoder()
    found = which_bits.samples(model, 1_000, seed=3)
    assert len(found) == 1_000
    assert {row[0] for row in found} == {START}
    done = [row for row in found if len(row) < POSITIONS]
    assert done
    assert {row.index(END) + 1 - len(row) for row in done} == {0}, "each to its first end"
    batches = which_bits.sequence_batches(found)
    entropies, surprises = [], []
    with torch.no_grad():
        for row in found:
            (scores,) = model(torch.tensor([row[:-1]], device=which_bits.DEVICE)).logits.double().log_softmax(-1)
            entropies += (-scores * scores.exp()).sum(-1).tolist()
            surprises += [-float(one[token]) for one, token in zip(scores, row[1:], strict=True)]
    assert LanguageModelMetric(batches)(model)["loss"] == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)
    difference = torch.tensor(surprises) - torch.tensor(entropies)  # of mean 0, and uncorrelated: a martingale
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / len(difference) ** 0.5


def test_samples_of_one_seed_are_the_same() -> None:
    model = small_decoder()
    assert which_bits.samples(model, 4, seed=5) == which_bits.samples(model, 4, seed=5)
    assert which_bits.samples(model, 4, seed=5) != which_bits.samples(model, 4, seed=6)


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_a_page_is_that_of_its_records(folder, tmp_path) -> None:
    scores = SensitivityRecord.load(folder / "sensitivity.json")
    measured = EvaluationRecord.load(folder / "recipe_measured.json")
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    metric = next(
        name for name in ("perplexity", "accuracy", "tokenized_bleu", "ndcg@10") if name in measured.clean.metrics
    )
    chosen = RecipeRecord.load(folder / "recipe.json")
    files = {path.name: path.read_bytes() for path in export_recipe(chosen, tmp_path / "files").files}
    report = RecipeReport(scores, chosen, measured, title=title, metric=metric, files=files)
    assert report.to_markdown(tmp_path / "page.md").read_text(encoding="utf-8") == text
    of_tools = {path.name: path.read_bytes() for name in _EXPORTS if (path := folder / name).exists()}
    assert {"recipe.json": (folder / "recipe.json").read_bytes()} | of_tools == files, "and no file of an older recipe"
