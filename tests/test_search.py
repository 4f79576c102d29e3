"""The search around the real Trainer: which trainings it runs, that it resumes, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from trainings import QUIET
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hf_parcor import (
    ACRT,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    GaussianNoise,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
)
from hf_parcor.records import SearchRecord, SearchTrial
from hf_parcor.reports.plots import plot_search
from hf_parcor.reports.tables import search_table
from hf_parcor.search import golden_section_maximum, search_epsilon, search_strength

L2 = CorruptionConstraint(epsilon=0.1)


def model_init():
    return BertForSequenceClassification(BertConfig(**tiny.encoder(layers=1)))


@pytest.fixture
def make_trainer(tmp_path):
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": i % 2} for i in range(8)]

    def make(defense=None, **options):
        defense = defense or MultiStepRisk(L2, steps=1)
        settings = {**QUIET, "max_steps": 2, "logging_steps": 1, **options}
        arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
        return ParameterDefenseTrainer(
            model_init=model_init, args=arguments, train_dataset=rows, eval_dataset=rows, defense=defense
        )

    return make


def peaked(trainer, trained, peak=0.05, stop_after=math.inf):
    """Return a measure with a known best ε and K; it also counts trainings, and interrupts."""

    def evaluate():
        if len(trained) >= stop_after:
            raise KeyboardInterrupt
        defense = trainer.defense
        trained.append((defense.steps, defense.constraint.epsilon))
        return {"score": -(math.log(defense.constraint.epsilon / peak) ** 2) - (defense.steps - 2) ** 2}

    return evaluate


def test_walks_by_golden_section_on_the_log_scale(make_trainer, tmp_path):
    trainer, trained = make_trainer(), []
    record = search_epsilon(
        trainer,
        0.01,
        1.0,
        direction="maximize",
        n_trials=7,
        evaluate=peaked(trainer, trained),
        compute_objective=sum_of,
    )
    expected = golden_section_maximum(lambda x: -((x - math.log(0.05)) ** 2), math.log(0.01), 0.0, 7)
    assert [epsilon for _, epsilon in trained] == pytest.approx([math.exp(x) for x, _ in expected], rel=1e-3)
    assert record.best.strength == pytest.approx(0.05, rel=0.25)
    assert record.is_unimodal(None)
    assert SearchRecord.load(tmp_path / "epsilon_search.json") == record
    assert trainer.defense == MultiStepRisk(L2, steps=1)
    assert trainer.args.output_dir == str(tmp_path)


def sum_of(metrics):
    return sum(metrics.values())


def test_each_training_starts_anew_with_its_own_radius(make_trainer):
    """The same ε gives the same loss as a Trainer of its own."""
    record = search_epsilon(make_trainer(), 0.01, 1.0, direction="minimize", n_trials=3)
    for trial in record.trials:
        alone = make_trainer(MultiStepRisk(CorruptionConstraint(epsilon=trial.strength), steps=1))
        alone.train()
        assert alone.evaluate()["eval_loss"] == trial.objective == trial.metrics["eval_loss"]
    assert record.best.objective == min(trial.objective for trial in record.trials)


@pytest.mark.slow
def test_steps_rise_until_their_best_falls(make_trainer):
    trainer, trained = make_trainer(), []
    record = search_epsilon(
        trainer,
        0.01,
        1.0,
        direction="maximize",
        steps=(4, 1, 2, 3),
        n_trials=4,
        evaluate=peaked(trainer, trained),
    )
    assert sorted({steps for steps, _ in trained}) == [1, 2, 3]  # 3 is worse than 2, so 4 is not tried
    assert record.best.steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 4])
def test_goes_on_after_an_interruption(make_trainer, tmp_path, stop_after):
    options = {"direction": "maximize", "steps": (1, 2), "n_trials": 3}
    trainer, whole = make_trainer(), []
    reference = search_epsilon(
        trainer, 0.01, 1.0, evaluate=peaked(trainer, whole), path=tmp_path / "reference.json", **options
    )
    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        search_epsilon(trainer, 0.01, 1.0, evaluate=peaked(trainer, first, stop_after=stop_after), **options)
    assert trainer.defense == MultiStepRisk(L2, steps=1)
    record = search_epsilon(trainer, 0.01, 1.0, evaluate=peaked(trainer, second), **options)
    assert first + second == whole
    assert record == reference


@pytest.mark.parametrize("killed_in", [3, 7], ids=["in the first training", "in the second"])
def test_goes_on_from_the_checkpoint_of_an_interrupted_training(make_trainer, tmp_path, killed_in):
    asked = {"low": 0.01, "high": 1.0, "direction": "minimize", "n_trials": 2}
    reference = search_epsilon(make_trainer(max_steps=4), **asked, path=tmp_path / "reference.json")
    steps = []
    for last in (killed_in, math.inf):
        trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=4)

        def training_step(*args, plain=trainer.training_step, last=last, **kwargs):
            if len(steps) == last:
                raise KeyboardInterrupt
            steps.append(1)
            return plain(*args, **kwargs)

        trainer.training_step = training_step
        if last == killed_in:
            with pytest.raises(KeyboardInterrupt):
                search_epsilon(trainer, **asked)
    record = search_epsilon(trainer, **asked)
    assert len(steps) == 2 * 4
    assert [t.objective for t in record.trials] == [t.objective for t in reference.trials]


@pytest.mark.parametrize("another", [{"defense": SAM(L2), "path": "sam.json"}, {"defense": None, "path": None}])
def test_never_takes_the_trainings_of_another_search_for_its_own(make_trainer, tmp_path, another):
    asked = {"low": 0.01, "high": 1.0, "direction": "minimize", "n_trials": 2}
    search_epsilon(make_trainer(save_strategy="steps"), **asked)
    if another["path"] is None:
        (tmp_path / "epsilon_search.json").unlink()  # to begin anew
    path = another["path"] and tmp_path / another["path"]
    with pytest.raises(ValueError, match=r"expected no trainings of another search, got checkpoints in epsilon-0\.05"):
        search_epsilon(make_trainer(another["defense"]), **asked, path=path)
    search_epsilon(make_trainer(), **asked, steps=(1,), path=tmp_path / "steps.json")  # has folders of its own


def test_more_trials_go_further(make_trainer):
    trainer, first, second = make_trainer(), [], []
    search_epsilon(trainer, 0.01, 1.0, direction="maximize", n_trials=3, evaluate=peaked(trainer, first))
    record = search_epsilon(trainer, 0.01, 1.0, direction="maximize", n_trials=5, evaluate=peaked(trainer, second))
    assert (len(first), len(second), len(record.trials)) == (3, 2, 5)


def trials(values, steps=1):
    return tuple(SearchTrial(0.1 * (i + 1), steps, value) for i, value in enumerate(values))


class TestRecord:
    @pytest.mark.parametrize(
        ("values", "direction", "expected"),
        [
            ([1, 2, 3], "maximize", True),
            ([1, 3, 3, 2], "maximize", True),
            ([1, 3, 2, 3], "maximize", False),
            ([3, 1, 2], "minimize", True),
            ([3, 1, math.nan], "maximize", True),
            ([math.nan, 3, 1], "maximize", True),
        ],
    )
    def test_unimodal(self, values, direction, expected):
        assert SearchRecord("", 0.1, 1.0, direction, trials(values)).is_unimodal(1) is expected

    def test_nan_is_never_the_best_and_survives_json(self):
        record = SearchRecord("d", 0.1, 1.0, "minimize", trials([math.nan, 2.0, 3.0]))
        assert record.best.objective == 2.0
        again = SearchRecord.from_json(record.to_json())
        assert math.isnan(again.trials[0].objective)
        assert again.trials[1:] == record.trials[1:]

    @pytest.mark.parametrize("text", ["[]", '{"format": 0}', '{"format": 1, "trials": [{}]}'])
    def test_damaged(self, text):
        with pytest.raises(ValueError, match="search record: expected"):
            SearchRecord.from_json(text)

    def test_without_trials(self):
        with pytest.raises(ValueError, match="expected one or more"):
            _ = SearchRecord("", 0.1, 1.0, "maximize").best


@pytest.mark.parametrize(
    ("corruption", "low", "high", "setting", "peak"),
    [(GaussianNoise(0.1), 0.01, 1.0, "std", 0.05), (Quantization(4), 2, 12, "bits", 5)],
)
def test_the_strength_of_a_corruption(make_trainer, tmp_path, corruption, low, high, setting, peak):
    trainer, trained = make_trainer(CorruptionRisk(corruption, clean_weight=0)), []

    def evaluate():
        trained.append(getattr(trainer.defense.corruptions[0], setting))
        return {"score": -(math.log(trained[-1] / peak) ** 2)}

    options = {"direction": "maximize", "n_trials": 6, "evaluate": evaluate, "compute_objective": sum_of}
    record = search_strength(trainer, low, high, **options)
    assert record.best.strength == pytest.approx(peak, rel=0.25)
    assert [trial.strength for trial in record.trials] == trained
    assert len(set(trained)) == len(trained)
    assert search_strength(trainer, low, high, **options) == SearchRecord.load(tmp_path / "strength_search.json")
    assert record.setting == setting == plot_search(record).axes[0].get_xlabel()


class TestBadInput:
    @pytest.mark.parametrize(
        ("defense", "options", "says"),
        [
            (None, {"direction": "up"}, "direction: expected 'maximize' or 'minimize'"),
            (None, {"direction": "maximize", "low": 0.0}, "expected 0 < low < high"),
            (None, {"direction": "maximize", "steps": ()}, "steps: expected at least one K"),
            (None, {"direction": "maximize", "steps": (0,)}, "steps: expected a whole number >= 1"),
            (None, {"direction": "maximize", "n_trials": 1}, "n_trials: expected a whole number >= 2"),
            (ACRT(L2), {"direction": "maximize", "steps": (1,)}, "which takes no steps"),
            (GradientPenalty(weight=0.1), {"direction": "maximize"}, "expected one with a constraint"),
            (MultiStepRisk(L2, step_size=0.1), {"direction": "maximize"}, "step_size: expected None"),
        ],
    )
    def test_settings(self, make_trainer, defense, options, says):
        options = {"low": 0.01, "high": 1.0, **options}
        with pytest.raises(ValueError, match=says):
            search_epsilon(make_trainer(defense), options.pop("low"), options.pop("high"), **options)

    @pytest.mark.parametrize(
        "defense", [SAM(L2), CorruptionRisk([Quantization(4), Quantization(5)]), MultiStepRisk(L2, steps=1)]
    )
    def test_no_strength_to_search(self, make_trainer, defense):
        with pytest.raises(ValueError, match="expected a CorruptionRisk of one corruption"):
            search_strength(make_trainer(defense), 0.1, 1.0, direction="maximize")

    @pytest.mark.parametrize(("low", "high", "says"), [(1, 8, "bits: expected a whole number >= 2"), (2, 99, "bits")])
    def test_ends_that_the_corruption_does_not_allow_are_refused_before_any_training(
        self, make_trainer, low, high, says
    ):
        trainer = make_trainer(CorruptionRisk(Quantization(4)))
        trainer.train = None
        with pytest.raises(ValueError, match=says):
            search_strength(trainer, low, high, direction="minimize", n_trials=6)

    def test_trainer_without_model_init(self, make_trainer):
        trainer = make_trainer()
        trainer.model_init = None
        with pytest.raises(ValueError, match="expected one made with model_init"):
            search_epsilon(trainer, 0.1, 1.0, direction="maximize")

    def test_trainings_that_nothing_could_judge_are_refused_before_they_run(self, make_trainer):
        trainer = make_trainer()
        trainer.eval_dataset = trainer.train = None
        with pytest.raises(ValueError, match="evaluate: expected a function, or a Trainer with an eval_dataset"):
            search_epsilon(trainer, 0.01, 1.0, direction="minimize")

    def test_a_measurement_that_returns_nothing(self, make_trainer):
        with pytest.raises(TypeError, match="evaluate: expected numbers by name, got None"):
            search_epsilon(make_trainer(), 0.01, 1.0, direction="minimize", evaluate=lambda: None)

    def test_record_of_another_search(self, make_trainer, tmp_path):
        SearchRecord("another", 0.01, 1.0, "maximize").save(tmp_path / "epsilon_search.json")
        with pytest.raises(ValueError, match="expected a record of this search, got one of another"):
            search_epsilon(make_trainer(), 0.01, 1.0, direction="maximize")


class TestReaders:
    record = SearchRecord(
        "d", 0.1, 1.0, "maximize", (*trials([0.7, 0.9, 0.8]), *trials([0.6, 0.85, math.nan], steps=2))
    )

    def test_table(self):
        lines = search_table(replace(self.record, trials=(*self.record.trials, SearchTrial(1, 2, 0.5, {}, True))))
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
        assert rows[0] == ["K", "ε", "objective (maximize)", ""]
        assert rows[3] == ["1", "0.2", "0.9", "best"]
        assert rows[-1] == ["2", "1", "0.5", "collapsed"]

    def test_no_number_is_the_best_of_none(self):
        assert "best" not in search_table(replace(self.record, trials=trials([math.nan, math.nan])))

    def test_no_column_of_what_was_not_searched(self):
        table = search_table(SearchRecord("d", 0.1, 1.0, "maximize", (SearchTrial(0.3, None, 0.5, {}, False),)))
        assert [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]] == ["0.3", "0.5", "best"]

    def test_plot(self):
        figure = plot_search(self.record, "accuracy")
        (axis,) = figure.axes
        first, second, ring = axis.get_lines()
        assert first.get_xydata().tolist() == [[t.strength, t.objective] for t in self.record.curve(1)]
        assert [first.get_label(), second.get_label()] == ["K = 1", "K = 2"]
        assert ring.get_xydata().tolist() == [[0.2, 0.9]]
        assert axis.get_xscale() == "log"
        assert axis.get_ylabel() == "accuracy"

    def test_plot_without_trials(self):
        with pytest.raises(ValueError, match="expected one or more"):
            plot_search(SearchRecord("", 0.1, 1.0, "maximize"))
