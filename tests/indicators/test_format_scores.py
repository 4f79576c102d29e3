"""Scores of formats against autograd written out in float64; what is measured, and what comes back."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
from for_each import for_each
from indicators.conftest import bert, quadratic_loss
from torch import nn

from hf_parcor import (
    FloatQuantization,
    GaussianNoise,
    LayerProbe,
    Quantization,
    SensitivityRecord,
    recipe,
    sensitivity,
)
from hf_parcor.evaluation import ClassificationMetric, NotEnoughMemoryError, NotFiniteError, model_loss
from hf_parcor.evaluation.metrics import WithDivergence
from hf_parcor.functional import random_signs
from hf_parcor.indicators import unscored
from hf_parcor.targets import TargetError, by_layer

FORMATS = [Quantization(3, "channel"), Quantization(2), FloatQuantization("fp8_e4m3")]
PROBES = 3


def test_scores_and_measured_losses_are_those_of_the_formulas(known) -> None:
    before = known.model.first.detach().clone()
    record = sensitivity(
        known.model, known.batches, FORMATS, {"all": "all"}, probes=PROBES, loss=quadratic_loss, progress=False
    )
    w, hessian = known.model.w.detach(), known.hessian[:4, :4]
    gradients = [matrix @ w + vector for _, matrix, vector in known.batches]
    fisher = (3 / 4 * 3 * gradients[0] ** 2 + 1 / 4 * 1 * gradients[1] ** 2)[:4]
    signs = [
        random_signs([known.model.first], torch.Generator().manual_seed(seed))[0].double().reshape(-1)
        for seed in range(PROBES)
    ]
    diagonal = torch.stack([sign * (hessian @ sign) for sign in signs]).mean(0)
    assert list(record.groups["all"].weights) == ["first"], "vectors stay"
    for cell, one in zip(record.cells, FORMATS, strict=True):
        error = (one({"w": before})["w"] - before).reshape(-1)
        assert error.any()
        expected = {
            "first_order": known.gradient[:4] @ error,
            "fisher": fisher @ error**2 / 2,
            "fit": fisher.mean() * (error @ error) / 2,
            "second_order": known.gradient[:4] @ error + diagonal @ error**2 / 2,
        }
        assert cell.scores == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
        whole = torch.cat([error, torch.zeros(3).double()])
        assert record.drop(cell, "loss") == pytest.approx(known.value(whole), rel=1e-10)
        assert cell.bits * 4 == one.stored_bits(before)
    assert torch.equal(known.model.first, before)


def test_scores_that_add_up_batch_by_batch_are_those_of_the_sums(known, monkeypatch) -> None:
    """A format that does not fit is among them."""
    formats = [*FORMATS, Quantization(4, 32)]

    def scored(free: int | None) -> SensitivityRecord:
        monkeypatch.setattr("hf_parcor.evaluation.placement.memory.free_memory", lambda device: free)
        options = {"loss": quadratic_loss, "budget": 0, "progress": False}
        return sensitivity(known.model, known.batches, formats, {"all": "all"}, **options)

    of_batches, of_sums = scored(32).cells, scored(None).cells  # room for the gradient, in float64, alone
    assert [cell.format for cell in of_batches] == [str(one) for one in FORMATS]
    for found, expected in zip(of_batches, of_sums, strict=True):
        assert found.scores == pytest.approx(expected.scores, rel=1e-12)


@pytest.mark.slow
@for_each(("batches", "of_what_is_needed", "bytes_a_weight"), [(1, 2.0, 2), (3, 0.99, 2), (3, 1.0, 2 + 4 + 4)])
def test_what_lies_beside_the_weights(batches, of_what_is_needed, bytes_a_weight, peak_memory, monkeypatch) -> None:
    """One gradient in bfloat16 where there is one batch or too little memory; otherwise both sums in float32 too."""
    weights = 64 * 32 * 32
    monkeypatch.setattr(
        "hf_parcor.evaluation.placement.memory.free_memory", lambda device: int(of_what_is_needed * 10 * weights)
    )
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(64))).to(torch.bfloat16)
    data = list(torch.randn(batches, 1, 32, dtype=torch.bfloat16))
    options = {"loss": lambda of, x: of(x).square().mean(), "budget": 0, "progress": False}
    with peak_memory() as watched:
        sensitivity(model, data, [Quantization(4, "channel")], **options)
    assert bytes_a_weight - 0.1 <= watched.peak / weights <= bytes_a_weight + 1


def test_where_not_even_a_gradient_fits_nothing_is_begun(known, monkeypatch) -> None:
    asked = []

    def loss(model, batch):
        asked.append(batch)
        return quadratic_loss(model, batch)

    def scored(free: int) -> SensitivityRecord:
        monkeypatch.setattr("hf_parcor.evaluation.placement.memory.free_memory", lambda device: free)
        return sensitivity(known.model, known.batches, FORMATS, {"all": "all"}, loss=loss, budget=0, progress=False)

    of_a_gradient = 8 * 4  # four weights in float64 are in matrices
    with pytest.raises(NotEnoughMemoryError, match=r"the gradient of a batch, got .*groups"):
        scored(of_a_gradient - 1)
    assert not asked
    assert scored(of_a_gradient).cells


def test_the_fisher_score_is_that_of_single_items_where_batches_have_one() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh()).double(), torch.randn(5, 3).double()
    weight, one = model[0].weight, Quantization(2)
    squares = torch.zeros_like(weight)
    for row in inputs:
        squares += torch.autograd.grad(model(row).sum(), weight)[0] ** 2 / 5
    batches = list(inputs[:, None])
    record = sensitivity(model, batches, [one], {"a": "0"}, loss=lambda m, x: m(x).sum(1).mean(), progress=False)
    error = one({"w": weight.detach()})["w"] - weight.detach()
    assert record.cells[0].scores["fisher"] == pytest.approx(float((squares * error**2).sum()) / 2, rel=1e-12)


def test_a_measured_cell_is_what_a_probe_of_its_matrices_finds() -> None:
    model, batches = bert()
    metric = ClassificationMetric(batches)
    record = sensitivity(model, metric, FORMATS[:2], progress=False)
    targets = {label: list(group.weights) for label, group in record.groups.items()}
    measured = WithDivergence(metric, model.eval())
    probe = LayerProbe(model, measured, targets=targets, progress=False).evaluate(FORMATS[:2])
    found = {(cell.group, cell.format): dict(cell.measured) for cell in record.cells}
    assert found == {(name, row.label): {k: v for k, (v,) in row.metrics.items()} for name, row in probe.rows()}
    assert "classifier" in record.outside
    assert set(record.outside).isdisjoint(record.groups)
    assert SensitivityRecord.from_json(record.to_json()) == record


class Killed(ClassificationMetric):
    """Raises at one of its calls, and counts them."""

    left, calls = -1, 0

    def of_batch(self, model, batch):
        Killed.left -= 1
        Killed.calls += 1
        if Killed.left == 0:
            raise KeyboardInterrupt
        return super().of_batch(model, batch)


@pytest.mark.slow
def test_the_most_promising_cells_are_measured_and_a_killed_run_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hf_parcor.evaluation.measurement.BETWEEN_WRITES", 2)
    model, batches = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def run(budget: int, calls: int = -1, path: object = None) -> SensitivityRecord:
        Killed.left, Killed.calls = calls, 0
        options = {"budget": budget, "checkpoint": path, "progress": False}
        return sensitivity(model, Killed(batches), [Quantization(3, "channel"), Quantization(8, "channel")], **options)

    whole = run(7)
    measured = [cell for cell in whole.cells if cell.measured]
    assert len(measured) == 7
    assert min(cell.scores["fisher"] for cell in measured) >= max(
        cell.scores["fisher"] for cell in whole.cells if not cell.measured
    )
    path, record = tmp_path / "cells.jsonl", None
    for _ in range(30):
        with suppress(KeyboardInterrupt):
            record = run(7, 31, path)
            break
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert record is not None
    assert record.to_json() == whole.to_json()
    assert run(7, 1 + len(batches), path).to_json() == whole.to_json(), "but for the model as it is, nothing again"
    more = run(8, path=path)
    assert sum(bool(cell.measured) for cell in more.cells) == 8
    resumed = Killed.calls
    run(8)
    assert resumed < Killed.calls / 2, "a larger budget goes on from a smaller one"
    assert run(0).costs("fisher")
    assert run(0, path=path).cells == run(0).cells
    assert run(0, path=tmp_path / "none.jsonl").cells == run(0).cells
    assert run(7, path=tmp_path / "none.jsonl").to_json() == whole.to_json()
    with pytest.raises(ValueError, match="budget"):
        run(0).costs("loss")


def test_one_backward_pass_and_each_measurement_once() -> None:
    model, batches = bert()
    backward, own = [], torch.Tensor.register_hook

    def loss(of: nn.Module, batch: object) -> torch.Tensor:
        found: torch.Tensor = model_loss(of, batch)
        if found.requires_grad:
            own(found, lambda gradient: backward.append(gradient))
        return found

    Killed.left, Killed.calls = -1, 0
    options = {"budget": 5, "memory": 1, "progress": False}  # so that no two measurements share a clean beginning
    record = sensitivity(model, Killed(4 * batches), FORMATS[:1], loss=loss, **options)
    assert len(backward) == 4 * len(batches)
    assert Killed.calls == (1 + 5) * 4 * len(batches), "the model as it is, and five parts"
    metric = WithDivergence(ClassificationMetric(batches), model.eval())
    assert record.clean == pytest.approx(metric(model), rel=1e-6), "which is also what the answers are taken from"
    assert record.clean["divergence"] == 0
    assert WithDivergence(ClassificationMetric(batches), model, memory=1).clean is None


def test_a_format_that_does_not_fit_a_part_is_left_out_there_and_said() -> None:
    model = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 2))
    formats = [Quantization(4, 32), Quantization(4, "channel")]
    batches = [torch.randn(3, 64)]
    targets = {"wide": "0", "narrow": "1"}
    record = sensitivity(model, batches, formats, targets, loss=lambda m, x: m(x).sum(), progress=False)
    assert [(cell.group, cell.format) for cell in record.cells] == [
        ("wide", str(formats[0])),
        ("wide", str(formats[1])),
        ("narrow", str(formats[1])),
    ]
    assert any("narrow" in note for note in record.notes)


def empty(inputs: int, outputs: int) -> nn.Linear:
    """Return a layer without weights; `nn.Linear` would warn."""
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(torch.empty(outputs, inputs))
    return layer


@for_each(
    "formats, groups, metric, error, word",
    [
        ([GaussianNoise(0.1)], None, [torch.ones(1, 2)], TypeError, "formats"),
        ([], None, [torch.ones(1, 2)], ValueError, "formats"),
        (["4-bit quantization"], None, [torch.ones(1, 2)], TypeError, "'4-bit quantization'"),
        ("4-bit quantization", None, [torch.ones(1, 2)], TypeError, "'4-bit quantization'"),
        (Quantization(4), None, [torch.ones(1, 2)], TypeError, "list"),
        ([Quantization(4), Quantization(4)], None, [torch.ones(1, 2)], ValueError, "each once"),
        ([Quantization(4)], {"a": "0", "b": ["0", "1"]}, [torch.ones(1, 2)], ValueError, "'a' and 'b'"),
        ([Quantization(4)], {"a": "0.bias"}, [torch.ones(1, 2)], ValueError, "matrix"),
        ([Quantization(4)], {"a": "2"}, [torch.ones(1, 2)], ValueError, "matrix"),
        ([Quantization(4, 32), FloatQuantization("mxfp4")], None, [torch.ones(1, 2)], ValueError, "fits a group"),
        ([Quantization(4)], {"a": "0"}, lambda model: {"accuracy": 1.0}, ValueError, "batches"),
    ],
)
def test_what_is_refused(formats, groups, metric, error, word) -> None:
    model, runs = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), empty(1, 0)), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(error, match=word):
        sensitivity(model, metric, formats, groups, loss=lambda m, x: m(x).sum(), progress=False)
    assert not runs


@for_each("name", ["seed", "probes", "budget"])
def test_numbers_below_zero_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a whole number >= 0, got -1"):
        sensitivity(nn.Linear(2, 2), [torch.ones(1, 2)], [Quantization(4)], loss=refuse_to_run, **{name: -1})


def refuse_to_run(model, batch):
    raise AssertionError("it has begun")


@for_each("progress", [True, False])
def test_progress(progress, capsys) -> None:
    model, batches = bert()
    sensitivity(model, ClassificationMetric(batches), FORMATS[:1], budget=1, progress=progress)
    shown = capsys.readouterr().err
    assert ("gradient over the data" in shown) == progress
    assert (shown == "") != progress


def test_a_part_whose_score_is_not_a_number_is_measured_first() -> None:
    """Its gradient is NaN, as of a square root at 0: what it costs is not known at all."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.odd = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(x).sum() + (0 * self.odd(x)).sqrt().sum()

    scores = sensitivity(
        Root(), [torch.ones(1, 2)], [Quantization(4)], budget=1, loss=lambda m, x: m(x), progress=False
    )
    assert {cell.group: math.isnan(cell.scores["fisher"]) for cell in scores.cells} == {"plain": False, "odd": True}
    assert [cell.group for cell in scores.cells if cell.measured] == ["odd"]


@for_each("budget", [0, None])
def test_a_model_that_is_nan_already_is_refused(budget) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data[0, 0] = torch.nan
    batches = [{"input": torch.ones(1, 2), "labels": torch.tensor([0])}]
    for data in (batches, ClassificationMetric(batches)):
        with pytest.raises(NotFiniteError, match=r"model: expected finite .*got NaN"):
            sensitivity(model, data, FORMATS[:1], budget=budget, loss=cross_entropy, progress=False)


def cross_entropy(model, batch) -> torch.Tensor:
    inputs, labels = batch.values()
    return nn.functional.cross_entropy(model(inputs), labels)


class LogOfFirst(nn.Module):
    """NaN as soon as the first weight is rounded to fewer bits than it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.first.weight.data = torch.tensor([[1.0, 0.3]])
        self.second.weight.data = torch.tensor([[1.0], [0.5]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second((self.first(x) - 1.2).log())


def test_a_format_that_makes_every_answer_nan_is_never_for_free() -> None:
    batches = [{"x": torch.ones(1, 2), "labels": torch.tensor([0])}]
    formats = [Quantization(8, "channel"), Quantization(2, "channel")]
    for data in (batches, ClassificationMetric(batches)):
        scores = sensitivity(LogOfFirst(), data, formats, loss=cross_entropy, progress=False)
        assert not math.isfinite(scores.by_place["first", str(formats[1])].measured["divergence"])
        assert recipe(scores, bits=30.0).choice["first"].format != str(formats[1])


def test_batches_alone_are_for_their_loss_though_recipes_are_chosen_by_the_divergence() -> None:
    model, batches = bert()
    scores = sensitivity(model, batches, FORMATS[:2], progress=False)
    assert set(scores.clean) == {"loss", "divergence"}
    assert scores.metric == "loss"
    assert recipe(scores, drop=1.0).by == "loss"
    assert recipe(scores, bits=20.0).by == "divergence"
    assert sensitivity(model, ClassificationMetric(batches), FORMATS[:2], progress=False).metric == "accuracy"


def test_a_model_that_counts_its_runs_is_left_as_it_was(bits_of) -> None:
    class Counting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return super().forward(x)

    model = Counting(4, 2)
    model.register_buffer("runs", torch.zeros(()))
    before = bits_of(model)
    settings = {"loss": lambda model, x: model(x).square().mean(), "progress": False}
    for probes in (0, 1):
        sensitivity(model, [torch.ones(2, 4)], [Quantization(4, "channel")], probes=probes, **settings)
        assert bits_of(model) == before, probes


def test_a_weight_that_is_computed_is_left_as_it_was_and_in_no_group(bits_of) -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)).train()
    before = bits_of(model)
    settings = {"loss": lambda model, x: model(x).square().mean(), "progress": False}
    record = sensitivity(model, [torch.randn(3, 4)], [Quantization(4, "channel")], {"normed": ["0"]}, **settings)
    assert bits_of(model) == before
    assert record.outside == ("0", "1")


def test_what_there_is_to_score_is_known_before_anything_is_run() -> None:
    model = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 2)).to(torch.bfloat16)
    formats = [Quantization(4, 32), Quantization(4, "channel"), FloatQuantization("mxfp4"), FloatQuantization("nf4")]
    batches = [torch.randn(3, 64, dtype=torch.bfloat16)]
    loss = {"loss": lambda m, x: m(x).sum()}
    for groups in (None, {"wide": "0", "narrow": "1"}, {"all": "all"}):
        expected = sensitivity(model, batches, formats, groups, **loss, budget=0, progress=False)
        found = unscored(model, formats, groups)
        assert (found.groups, found.formats) == (expected.groups, expected.formats)
        assert [(one.group, one.format, one.bits) for one in found.cells] == [
            (one.group, one.format, one.bits) for one in expected.cells
        ]
        assert not any(one.scores or one.measured for one in found.cells)
        measured = sensitivity(model, batches, formats, groups, **loss, progress=False)
        assert all(one.measured for one in measured.cells), "what can be rounded can be measured"


@for_each("groups", [None, {"all": "all"}, "kinds", "modules"])
def test_a_matrix_without_entries_is_no_part_and_changes_no_score(groups) -> None:
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    beside = nn.Sequential(*plain, empty(0, 2), empty(2, 0))
    options = {"loss": lambda m, x: (m[1](m[0](x)) ** 2).mean(), "progress": False}
    found, expected = (sensitivity(m, [torch.ones(2, 4)], FORMATS[:2], groups, **options) for m in (beside, plain))
    assert found.cells == expected.cells
    assert found.groups == expected.groups


def test_what_holds_each_matrix_and_which_groups_have_none_is_said() -> None:
    model = nn.Sequential(nn.ModuleDict({"fc": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}), nn.Linear(2, 1))
    model[0].forward = lambda x: model[0]["norm"](model[0]["fc"](x))
    groups = {"matrix": "0.fc", "vectors": "0.norm"}
    record = sensitivity(
        model, [torch.ones(3, 2)], FORMATS[:1], groups, budget=0, loss=lambda m, x: m(x).sum(), progress=False
    )
    assert {name: dict(group.holders) for name, group in record.groups.items()} == {
        "matrix": {"0.fc.weight": {"0.fc": "Linear"}}
    }
    assert record.kinds == {"Linear": (1, 2)}
    assert record.outside == ("1",)
    (note,) = record.notes
    assert "vectors" in note


def test_formats_may_be_any_iterable_of_them() -> None:
    model = nn.Linear(2, 2, bias=False)
    assert unscored(model, iter(FORMATS), {"all": "all"}) == unscored(model, FORMATS, {"all": "all"})


def test_a_metric_without_a_loss_gets_one() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    record = sensitivity(
        model,
        lambda m: {"score": float(m[0].weight.detach().sum())},
        [Quantization(2)],
        {"all": "all"},
        batches=[torch.eye(2)],
        loss=lambda m, x: m(x).square().mean(),
        progress=False,
    )
    assert record.metric == "score"
    assert (record.info("score").greater_is_better, record.info("loss").greater_is_better) == (True, False)
    assert record.clean["loss"] == pytest.approx(float(model[0].weight.detach().square().mean()))
    assert set(record.cells[0].measured) == {"score", "loss"}


def test_weights_that_layers_share_are_of_the_first() -> None:
    """Zamba's layers share a whole transformer: its weights get one format."""
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleList([nn.ModuleDict({"own": nn.Linear(2, 2), "shared": shared}) for _ in range(2)])
    model.append(nn.ModuleDict({"shared": shared}))
    record = unscored(model, [Quantization(2)], "layers")
    weights = {label: list(group.weights) for label, group in record.groups.items()}
    assert weights == {"0": ["0.own.weight", "0.shared.weight"], "1": ["1.own.weight"]}
    assert [note.split()[0] for note in record.notes if "0.shared.weight" in note] == ["1", "2"]
    assert len(record.notes) == 2, "none of them has no matrices"
    with pytest.raises(TargetError, match="expected every weight in one group"):
        unscored(model, [Quantization(2)], by_layer(model))


class Cut(nn.Module):
    """One layer is used but no gradient reaches it, one is not used, and one never changes: it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.unused, self.zero, self.last = (nn.Linear(4, 4) for _ in range(4))
        nn.init.zeros_(self.zero.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.last(self.zero(rows) + self.cut(rows).detach())


@for_each(("budget", "unused", "silent"), [(None, ["unused"], ["cut", "zero"]), (0, ["cut", "unused"], ["zero"])])
def test_what_the_data_do_not_use_is_left_out_and_stays_in_every_recipe(budget, unused, silent) -> None:
    """One that is behind a detach is as silent as one that is not used; only a measurement tells them apart."""
    options = {"loss": lambda model, x: model(x).square().mean(), "budget": budget, "progress": False}
    record = sensitivity(Cut(), [torch.randn(5, 4)], [Quantization(2)], **options)
    assert list(record.unused) == unused
    assert list(record.outside) == unused
    assert list(record.groups) == [name for name in ("cut", "unused", "zero", "last") if name not in unused]
    assert {cell.group for cell in record.cells} == record.groups.keys()
    assert record.kinds == {"Linear": (4 - len(unused), 4)}
    (said,) = [note for note in record.notes if "gradient" in note]
    assert [name for name in ("cut", "zero", "last") if name in said] == silent
    chosen = recipe(record, bits=8)
    assert {*chosen.choice} == record.groups.keys()
    assert any(f"do not use {', '.join(unused)}:" in note for note in chosen.notes)
    assert SensitivityRecord.from_json(record.to_json()) == record


def test_of_a_loss_that_depends_on_nothing_no_part_is_left_out() -> None:
    batches, options = [torch.randn(5, 4)], {"budget": 0, "progress": False}
    record = sensitivity(Cut(), batches, [Quantization(2)], loss=lambda model, x: x.mean().requires_grad_(), **options)
    assert not record.unused
    assert len(record.groups) == 4
