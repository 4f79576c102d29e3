"""A defense is claimed where it ran: the steps are counted, and the count stays with the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from for_each import for_each
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from hf_parcor import (
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    DefenseConfig,
    GaussianNoise,
    MultiStepRisk,
    ParameterDefenseTrainer,
)
from hf_parcor.cards.front_matter import unmeasured_metadata
from hf_parcor.cards.text import unmeasured_section
from hf_parcor.training import DEFENSE_CONFIG_NAME

ONE = MultiStepRisk(CorruptionConstraint(epsilon=0.1), steps=1)
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture
def build(tiny_bert, arguments, rows):
    def make(defense=ONE, model=None, kind=ParameterDefenseTrainer, target_modules=None, callbacks=(), **options):
        extra = {"callbacks": list(callbacks)}
        if kind is ParameterDefenseTrainer:
            extra |= {"defense": defense, "target_modules": target_modules}
        return kind(
            model or tiny_bert(), arguments(**{**SAVED, **options}), train_dataset=rows, eval_dataset=rows[:4], **extra
        )

    return make


def counts(config):
    return config.defended_steps, config.trained_steps


def in_file(folder):
    return counts(DefenseConfig.from_pretrained(folder))


def claim(values):
    """What a card says, and whether it has the tag."""
    said = unmeasured_section(values)
    tagged = "adversarial-parameter-defense" in unmeasured_metadata(values)["tags"]
    assert tagged == ("were defended in training" in said) != ("not defended in training" in said)
    return said if tagged else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defense", "options", "defended", "trained"),
    [
        (ONE, {}, 6, 6),
        (ONE, {"gradient_accumulation_steps": 2, "max_steps": 3}, 3, 3),
        (replace(ONE, interval=4), {}, 2, 6),
        (replace(ONE, start_epoch=9), {}, 0, 6),
        (replace(ONE, steps=0), {}, 0, 6),
    ],
)
def test_the_steps_that_ran_are_the_steps_that_are_claimed(build, tmp_path, defense, options, defended, trained):
    trainer = build(defense, **options)
    assert counts(trainer.defense_config) == (0, 0)
    assert claim(trainer._defense_values) == ""
    trainer.train()
    trainer.save_model()
    assert counts(trainer.defense_config) == in_file(tmp_path) == (defended, trained)
    said = claim(trainer._defense_values)
    assert bool(said) == (defended > 0)
    if defended:
        assert (
            f"in all of its {trained} steps" if defended == trained else f"in {defended} of {trained} steps"
        ) in said
    else:
        assert f"in none of {trained} steps" in unmeasured_section(trainer._defense_values)


def test_a_resumed_run_counts_as_the_one_that_was_not_interrupted(build, tmp_path):
    defense = replace(ONE, interval=3)
    build(defense).train()
    assert [in_file(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)] == [(1, 2), (2, 4), (2, 6)]
    for step, path in ((2, str), (4, Path), (6, str)):
        again = build(defense)
        again.train(resume_from_checkpoint=path(tmp_path / f"checkpoint-{step}"))
        assert counts(again.defense_config) == (2, 6)


def test_more_training_goes_on_and_another_model_begins_anew(build, tiny_bert):
    trainer = build(max_steps=2)
    trainer.train()
    trainer.train()
    assert counts(trainer.defense_config) == (4, 4)
    trainer.model = trainer.model_wrapped = tiny_bert()
    assert counts(trainer.defense_config) == (0, 0)
    trainer.train()
    assert counts(trainer.defense_config) == (2, 2)


def test_the_best_checkpoint_brings_its_count_back(build, tmp_path):
    """The defense started after the step that is best: what is published was never defended."""

    class FirstIsBest(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            state.best_global_step, state.best_model_checkpoint = 2, str(tmp_path / "checkpoint-2")

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    trainer = build(replace(ONE, start_epoch=0.5), **best)
    trainer.add_callback(FirstIsBest())
    trainer.train()
    assert in_file(tmp_path / "checkpoint-6")[0] > 0
    assert counts(trainer.defense_config) == in_file(tmp_path / "checkpoint-2") == (0, 2)
    assert claim(trainer._defense_values) == ""


@pytest.mark.parametrize("other", [SAM(CorruptionConstraint(epsilon=0.1)), replace(ONE, steps=2)])
def test_steps_of_another_defense_are_not_claimed_for_this_one(build, tmp_path, other):
    trainer = build(other, max_steps=2)
    trainer.train()
    trainer.defense = ONE
    assert counts(trainer.defense_config) == (0, 2)
    again = build(ONE)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert counts(again.defense_config) == (4, 6)


@pytest.mark.slow
@for_each("before", [None, ONE, replace(ONE, steps=0)])
def test_a_defense_that_is_set_before_the_first_step_is_logged_and_counted_as_from_the_start(build, before):
    """Of a frozen head, which only a corruption that needs no gradient defends; with a last pass at other noise."""
    noise = CorruptionRisk([GaussianNoise(1e-4), GaussianNoise(3.0)])

    class Sets(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.classifier.requires_grad_(False)
            trainer.defense = noise

    found = []
    for begun_with in (noise, before):
        trainer = build(begun_with or ONE, logging_steps=6, target_modules=["classifier"], callbacks=[Sets])
        trainer.defense = begun_with
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        found.append((counts(trainer.defense_config), logged["loss_corrupted"], logged.keys()))
    assert found[0] == found[1]
    assert found[0][0] == (6, 6)


@for_each("wrong", [GaussianNoise(0.1), "sam", 0.1])
def test_only_a_defense_can_be_set(build, wrong):
    trainer = build()
    with pytest.raises(TypeError, match="defense: expected"):
        trainer.defense = wrong
    assert trainer.defense == ONE


def test_a_defense_that_the_settings_refuse_cannot_be_set(build):
    stock = replace(ONE, steps=0)
    trainer = build(stock, optim="lomo")
    with pytest.raises(ValueError, match="optim: expected an optimizer that updates after backward"):
        trainer.defense = ONE
    assert trainer.defense == stock


def test_a_defense_that_the_defended_weights_refuse_cannot_be_set(build):
    """Noise needs no gradient of them, the worst direction does."""
    noise = CorruptionRisk(GaussianNoise(0.1))
    trainer = build(noise)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected trainable parameters, got .* frozen ones"):
        trainer.defense = ONE
    assert trainer.defense == noise


def test_steps_of_the_stock_trainer_are_not_claimed(build, tmp_path):
    build(kind=Trainer, max_steps=2).train()
    again = build()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert counts(again.defense_config) == (4, 6)


def test_what_was_never_corrupted_was_not_defended(arguments, rows):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Embedding(30, 3), nn.Linear(2, 2)

        def forward(self, input_ids, labels, **rest):
            return {"loss": nn.functional.cross_entropy(self.used(input_ids).mean(1), labels)}

    trainer = ParameterDefenseTrainer(
        Idle(), arguments(max_steps=2), train_dataset=rows, defense=ONE, target_modules=["idle"]
    )
    trainer.train()
    assert counts(trainer.defense_config) == (0, 2)


class TestALoadedModel:
    def test_keeps_what_is_true_of_its_weights(self, build, tmp_path):
        build().train()
        folder = tmp_path / "checkpoint-6"
        written = json.loads((folder / DEFENSE_CONFIG_NAME).read_text())
        other = build(SAM(ONE.constraint), model=load(folder), output_dir=str(folder))
        assert "`multi_step_risk`" in claim(other._defense_values)
        other.save_model()
        assert json.loads((folder / DEFENSE_CONFIG_NAME).read_text()) == written
        other.save_model(str(tmp_path / "copy"))
        assert json.loads((tmp_path / "copy" / DEFENSE_CONFIG_NAME).read_text()) == written

    def test_goes_on_counting(self, build, tmp_path):
        build().train()
        again = build(model=load(tmp_path / "checkpoint-4"), max_steps=1)
        again.train()
        assert counts(again.defense_config) == (5, 5)

    def test_under_adapters_says_nothing_of_them(self, build, tmp_path):
        peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")
        build(max_steps=2).train()
        base = load(tmp_path / "checkpoint-2")
        adapted = build(model=peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"])), max_steps=1)
        assert counts(adapted.defense_config) == (0, 0)
        adapted.train()
        assert counts(adapted.defense_config) == (1, 1)


def load(folder):
    return BertForSequenceClassification.from_pretrained(folder)


class TestAFileWithoutCounts:
    def test_is_read_and_taken_at_its_word(self, build, tmp_path):
        build().train()
        folder = tmp_path / "checkpoint-2"
        DefenseConfig(ONE).save_pretrained(folder)
        assert in_file(folder) == (None, None)
        again = build()
        again.train(resume_from_checkpoint=str(folder))
        assert counts(again.defense_config) == (None, 6)
        assert " steps" not in claim(again._defense_values).split(":\n")[0].split("### Defense")[1]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "values", [{"defended_steps": -1}, {"defended_steps": True}, {"defended_steps": 3, "trained_steps": 2}]
    )
    def test_one_that_cannot_be_is_refused_and_ends_no_run(self, build, tmp_path, values):
        build().train()
        folder = tmp_path / "checkpoint-2"
        path = folder / DEFENSE_CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        with pytest.raises(ValueError, match="defended_steps: expected"):
            DefenseConfig.from_pretrained(folder)
        again = build()
        again.train(resume_from_checkpoint=str(folder))
        assert counts(again.defense_config)[0] is None


def test_counts_are_no_part_of_what_settings_are_compared_by(build, tmp_path, said):
    build(max_steps=4).train()
    build().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert said("another defense") == []
    assert DefenseConfig(ONE, defended_steps=1) == DefenseConfig(ONE)
