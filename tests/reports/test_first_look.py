"""A first look: the weakest part first, what is sure and what is not, from the record alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import (
    FirstLookReport,
    FloatQuantization,
    MetricInfo,
    Quantization,
    SensitivityRecord,
    select_parameters,
    sensitivity,
)
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.records import EvaluationData, FormatScore, WeightGroup

FORMAT = {"4-bit quantization": {"corruption": "quantization", "settings": {"bits": 4}}}


def record(values, metric="loss", clean=2.0, divergence=None, **settings) -> SensitivityRecord:
    """Return parts with falling scores and what the first of them measure; None for none."""
    names = [f"layers.{index}" for index in range(len(values))]
    groups = {name: WeightGroup({f"{name}.weight": 1000}, 16.0) for name in names}
    cells = tuple(
        FormatScore(
            name,
            "4-bit quantization",
            4.0,
            {"first_order": -0.1, "fisher": 1 / (1 + place)},
            {} if value is None else {metric: value, **({"divergence": divergence[place]} if divergence else {})},
        )
        for place, (name, value) in enumerate(zip(names, values, strict=True))
    )
    of_clean = {metric: clean, **({"divergence": 0.0} if divergence else {})}
    infos = {"divergence": MetricInfo(False, "nats")}
    return SensitivityRecord("m", groups, FORMAT, cells, of_clean, metric, metric_info=infos, **settings)


@for_each(
    ("values", "settings", "words", "absent"),
    [
        ([2.1, 3.5, 2.2, None, None], {}, ["layers.1 is the weakest of 5", "+1.5", "layers.2, by +0.2"], ["No part"]),
        ([2.1, 3.5, 2.2, None, None], {}, ["Measured were the 3", "0.33", "0.25, of layers.3"], ["All"]),
        ([2.1, 3.5, 2.2, None, None], {}, ["the largest of the other 2 is", "fisher −0.50 (Spearman)"], ["one is"]),
        ([2.1, 3.5], {"parameters": 9000}, ["have 2,000 of 9,000 weights"], []),
        ([2.1, 3.5], {}, ["layers.1 is the weakest of 2", "All 2 parts"], ["Spearman"]),
        ([2.001, 1.5, 2.0], {}, ["No part alone is weak", "layers.0, it changes by +0.001"], ["target_modules"]),
        (  # answers move most where the loss happens to fall
            [1.0, 2.1, 2.01],
            {"divergence": [0.5, 0.1, 0.01]},
            ["layers.1 is the weakest of 3", "+0.1", "no other that was measured"],
            ["the next"],
        ),
        ([1.0, 1.5], {}, ["No part alone is weak", "none of them makes it worse at all"], ["with the worst"]),
        ([2.0, 1.5], {}, ["No part alone is weak", "none of them makes it worse at all"], ["with the worst"]),
        ([2.1, 2.2, None], {}, ["more; the other one is 0.33, of layers.2"], ["the other 1"]),
        (
            [0.8, 0.7],
            {"metric": "accuracy", "clean": 0.9, "evaluated_on": EvaluationData("dev", rows=40)},
            ["One of 40 rows is 2.5 points."],
            [],
        ),
        (
            [0.0, 0.0],
            {"metric": "accuracy", "clean": 0.0},
            ["accuracy is not above 0 without", "nothing to lose"],
            ["weakest", "target_modules", "No part"],
        ),
        ([0.0, 0.0], {"clean": 0.0}, ["No part alone is weak", "none of them makes it worse at all"], ["weakest"]),
        ([0.5, 0.0], {"clean": 0.0}, ["layers.0 is the weakest of 2", "no other that was measured"], ["No part"]),
        ([3.0, 2.5], {"evaluated_on": EvaluationData("dev", rows=40)}, [], ["One of 40 rows"]),
        (
            [3.0],
            {},
            ["layers.0 is the only part in", "CorruptionRisk(Quantization(bits=4))"],
            ["the next", "than the others", "All 1"],
        ),
        ([3.0], {}, ["target_modules=['layers.0']"], []),
        ([2.0, math.nan, 3.0], {}, ["layers.1 is the weakest of 3", "nan"], []),
        ([2.0, math.inf, 3.0], {}, ["layers.1 is the weakest of 3", "∞"], []),
        (
            [0.8, 0.7, 0.85],
            {"metric": "accuracy", "clean": 0.9},
            ["layers.1 is the weakest of 3", "90.0 %", "−20.0 points"],
            ["No part"],
        ),
        (  # of two that cost a row each, the one whose answers moved more
            [0.8, 0.8],
            {"metric": "accuracy", "clean": 0.9, "divergence": [0.1, 0.4]},
            ["layers.1 is the weakest of 2", "the next, layers.0"],
            [],
        ),
    ],
)
def test_the_answer(values, settings, words, absent, tmp_path_factory):
    report = FirstLookReport(record(values, **settings))
    said = " ".join(report.verdict)
    assert [word for word in words if word not in said] == [], said
    assert [word for word in absent if word in said] == [], said
    assert report.verdict[0] == report.answer
    folder = tmp_path_factory.mktemp("look")
    markdown = report.to_markdown(folder / "look.md").read_text()
    html = report.to_html(folder / "look.html").read_text()
    assert html.count("<tr>") == markdown.count("| layers.") + 1 == len(values) + 1
    places = [int(place) for place in re.findall(r"^\| layers\.(\d)", markdown, re.MULTILINE)]
    measured = sum(value is not None for value in values)
    assert sorted(places[:measured]) == list(range(measured))
    assert places[measured:] == list(range(measured, len(values))), "the others by their scores"


@for_each("held, modules", [(1, ["layers.0"]), (3, ["a.0", "a.1", "a.2"]), (4, ["layers.0"])])
def test_the_few_modules_of_the_weakest_part_are_what_to_defend(held, modules):
    scores = record([3.5, 2.1])
    names = ["layers.0.weight"] if held == 1 else [f"a.{place}.weight" for place in range(held)]
    groups = {**scores.groups, "layers.0": WeightGroup(dict.fromkeys(names, 10), 16.0)}
    assert f"target_modules={modules!r}" in " ".join(FirstLookReport(replace(scores, groups=groups)).verdict)


def test_a_name_that_ends_another_one_does_not_take_that_too():
    scores = replace(record([3.5, 2.1]), outside=("inner.layers.0",))
    selected = re.search(r"target_modules=(\[.*?\])\)", " ".join(FirstLookReport(scores).verdict))[1]
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1)])})
    model["inner"] = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1)])})
    assert list(select_parameters(model, eval(selected))) == ["layers.0.weight", "layers.0.bias"]


@for_each("rows", [None, 40])
def test_every_part_has_its_divergence_and_data_are_named_where_they_are_known(rows, tmp_path_factory):
    data = None if rows is None else EvaluationData("dev", rows=rows)
    look = FirstLookReport(record([2.1, 3.5, None], divergence=[0.25, 0.125, None], evaluated_on=data))
    text = look.to_markdown(tmp_path_factory.mktemp("look") / "look.md").read_text(encoding="utf-8")
    assert ("Measured on dev" in text) == (rows is not None)
    of_part = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| layers.")}
    for place, found in enumerate(("0.25", "0.12", "–")):
        assert f" {found} |" in of_part[f"layers.{place}"]


@for_each(
    "changed",
    [{"formats": {**FORMAT, "8-bit quantization": {"corruption": "quantization", "settings": {"bits": 8}}}}, {}],
)
def test_what_is_no_first_look(changed):
    scores = replace(record([2.1, 3.5]), **changed) if changed else record([None, None])
    with pytest.raises(ValueError, match="one format"):
        FirstLookReport(scores)


@for_each(
    "one, scale",
    [
        (Quantization(4), "each tensor"),
        (Quantization(4, "channel", code_range="full"), "each channel"),
        (Quantization(4, 4), "each 4 weights"),
        (FloatQuantization("fp8_e4m3", "channel"), "each channel"),
    ],
)
@for_each("groups, embeddings", [("layers", 0), (None, 0), ("kinds", 3)])
def test_what_shares_a_scale_and_which_modules_are_in_it(tiny_bert, one, scale, groups, embeddings) -> None:
    model = tiny_bert()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([0, 1])}
    scores = sensitivity(model, ClassificationMetric([batch]), [one], groups, budget=1, progress=False)
    scores = SensitivityRecord.from_json(scores.to_json())
    chosen = {name for group in scores.groups.values() for name in group.weights}
    for kind in (torch.nn.Linear, torch.nn.Embedding):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        within = sum(f"{name}.weight" in chosen for name in names)
        assert scores.kinds[kind.__name__] == (within, len(names))
        assert f"{within} of {len(names)} {kind.__name__}" in " ".join(FirstLookReport(scores).verdict)
    assert scores.kinds["Embedding"][0] == embeddings
    assert scale in " ".join(FirstLookReport(scores).verdict)
