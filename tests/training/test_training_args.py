"""The defense as flags."""

from __future__ import annotations

import inspect
import json
import math

import pytest
from for_each import for_each
from transformers import HfArgumentParser

from hf_parcor import (
    ACRT,
    SAM,
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRisk,
    DefenseConfig,
    GaussianNoise,
    GradientPenalty,
    LayerProbe,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    Quantization,
    Seq2SeqParameterDefenseTrainingArguments,
    select_parameters,
)
from hf_parcor.defenses import DEFENSES, ConstrainedDefense
from hf_parcor.evaluation import DEFAULT_TRIALS, RobustnessCallback, RobustnessMixin, measure_robustness
from hf_parcor.training import DEFAULT_DEFENSE, build_defense

L3 = CorruptionConstraint(p=3, epsilon=0.1)
KINDS = [ParameterDefenseTrainingArguments, Seq2SeqParameterDefenseTrainingArguments]


@for_each("kind", KINDS)
def test_flags_from_a_command_line(kind, tmp_path):
    line = (
        f"--output_dir {tmp_path} --defense multi_step_risk --defense_epsilon 0.001 --defense_norm inf "
        "--defense_steps 2 --defense_step_size 0.0007 --defense_top_n 100 --defense_random_start "
        "--defense_start_epoch 0.5 --defense_target_modules attention layer-norm --defense_layers 0 -1"
    )
    (arguments,) = HfArgumentParser(kind).parse_args_into_dataclasses(line.split())
    assert build_defense(arguments) == MultiStepRisk(
        CorruptionConstraint(p=math.inf, epsilon=0.001, top_n=100),
        steps=2,
        step_size=0.0007,
        random_start=True,
        start_epoch=0.5,
    )
    assert arguments.defense_target_modules == ["attention", "layer-norm"]
    assert arguments.defense_layers == [0, -1]


@for_each("kind", KINDS)
def test_flags_from_a_json_file_and_back(kind, tmp_path):
    path = tmp_path / "arguments.json"
    path.write_text(
        json.dumps({"output_dir": str(tmp_path), "defense_epsilon": 0.3, "defense_target_modules": ["bias"]})
    )
    (arguments,) = HfArgumentParser(kind).parse_json_file(str(path))
    assert build_defense(arguments).constraint.epsilon == 0.3
    assert json.loads(arguments.to_json_string())["defense_target_modules"] == ["bias"]


def test_defaults_are_the_default_defense(tmp_path):
    assert build_defense(ParameterDefenseTrainingArguments(output_dir=str(tmp_path))) == DEFAULT_DEFENSE


def test_each_setting_has_one_default(tmp_path):
    """However a defense is made, and of whichever kind."""
    flags = ParameterDefenseTrainingArguments(output_dir=str(tmp_path))
    for name, kind in DEFENSES.items():
        required = {"constraint": DEFAULT_DEFENSE.constraint} if issubclass(kind, ConstrainedDefense) else {}
        if kind is CorruptionRisk:
            required, flags.defense_corruption = {"corruption": Quantization(4)}, ["quantization=4"]
        else:
            flags.defense_corruption = None
        flags.defense = name
        assert build_defense(flags) == kind(**required)
    assert MultiStepRisk(DEFAULT_DEFENSE.constraint) == DEFAULT_DEFENSE
    asked = (CorruptionEvaluator.evaluate, LayerProbe.evaluate, measure_robustness)
    for function in (*asked, RobustnessMixin.evaluate_robustness, RobustnessCallback.__init__):
        assert inspect.signature(function).parameters["trials"].default == DEFAULT_TRIALS, function


TWO_PLACES = {
    "epsilon": ({"defense_epsilon": 0.3}, {"defense": SAM(L3)}, r"defense=SAM.*--defense_epsilon 0.3"),
    "a kind": ({"defense": "acrt"}, {"defense": SAM(L3)}, r"defense=SAM.*--defense 'acrt'"),
    "what would be refused": ({"defense_norm": 3.0}, {"defense": DEFAULT_DEFENSE}, "--defense_norm 3.0"),
    "none": ({"defense": "none"}, {"defense": DEFAULT_DEFENSE}, r"defense=MultiStepRisk.*--defense 'none'"),
    "several": (
        {"defense_steps": 2, "defense_start_epoch": 1.0},
        {"defense": DEFAULT_DEFENSE},
        r"--defense_steps 2, --defense_start_epoch 1.0",
    ),
    "targets": (
        {"defense_target_modules": ["attention"]},
        {"target_modules": "all-linear"},
        r"target_modules='all-linear'.*--defense_target_modules \['attention'\]",
    ),
    "excluded": ({"defense_exclude_modules": ["bias"]}, {"exclude_modules": ["query"]}, "--defense_exclude_modules"),
    "layers": ({"defense_layers": [0]}, {"layers": 1}, r"layers=1 .*--defense_layers \[0\]"),
    "all layers": ({"defense_layers": [0]}, {"defense": DefenseConfig(SAM(L3))}, "layers=None .*--defense_layers"),
    "a file": ({"defense_epsilon": 0.3}, {"defense": DefenseConfig(SAM(L3))}, "defense=SAM.*--defense_epsilon 0.3"),
    "prefix": ({"defense_reuse_prefix": False}, {"reuse_prefix": True}, r"reuse_prefix=True.*--defense_reuse_prefix"),
}
ONE_PLACE = {
    "nothing": ({}, {"defense": SAM(L3), "target_modules": "attention", "reuse_prefix": False}),
    "the same defense": (
        {"defense": "sam", "defense_norm": 3.0},
        {"defense": SAM(CorruptionConstraint(p=3, epsilon=0.1))},
    ),
    "the same targets": ({"defense_target_modules": ["bias", "query"]}, {"target_modules": {"query", "bias"}}),
    "the same layer": ({"defense_layers": [0]}, {"layers": 0}),
    "the same layers": ({"defense_layers": [0, 1]}, {"layers": range(2)}),
    "the same prefix": ({"defense_reuse_prefix": False}, {"reuse_prefix": False}),
    "other things": ({"defense_target_modules": ["attention"], "defense_layers": [0]}, {"defense": SAM(L3)}),
    "what has no argument": ({"defense_layers": [0]}, {"target_modules": "attention"}),
    "the targets of a defense by flags": ({"defense": "sam", "defense_epsilon": 0.3}, {"target_modules": ["bias"]}),
}


@for_each("name", TWO_PLACES)
def test_settings_in_two_places_are_an_error_that_names_both(name, tiny_bert, arguments):
    flags, passed, message = TWO_PLACES[name]
    with pytest.raises(ValueError, match=f"expected it in one place, got .*{message}.*leave one of the two out"):
        ParameterDefenseTrainer(
            model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments, **flags), **passed
        )


@for_each("name", ONE_PLACE)
def test_settings_that_say_the_same_or_other_things_are_none(name, tiny_bert, arguments):
    flags, passed = ONE_PLACE[name]
    trainer = ParameterDefenseTrainer(
        model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments, **flags), **passed
    )
    assert trainer.defense == passed.get("defense", trainer.defense)


WHOLE = DefenseConfig(SAM(L3), "all-linear", ["query"], (0,))


def test_what_was_saved_can_be_given(tiny_bert, arguments, rows, tmp_path):
    """A file of an earlier run gives the whole of it; so do its parts."""
    WHOLE.save_pretrained(tmp_path / "old")
    targets = {"target_modules": "all-linear", "exclude_modules": ["query"], "layers": 0}
    given = [
        {"defense": DefenseConfig.from_pretrained(tmp_path / "old")},
        {"defense": WHOLE, **targets},
        {"defense": SAM(L3), **targets},
    ]
    trainers = [ParameterDefenseTrainer(model=tiny_bert(), args=arguments(max_steps=1), **one) for one in given]
    expected = list(select_parameters(tiny_bert(), **targets))
    for trainer in trainers:
        assert list(trainer.defended_parameters()) == expected
        assert trainer.defense == SAM(L3)
    trainers[0].save_model(str(tmp_path / "new"))
    assert DefenseConfig.from_pretrained(tmp_path / "new") == WHOLE


@for_each("other", [{"target_modules": "attention"}, {"exclude_modules": "bias"}, {"layers": 1}])
def test_targets_beside_a_file_that_has_others_are_refused(other, tiny_bert, arguments):
    (name,) = other
    with pytest.raises(ValueError, match=f"{name}: expected it in one place, .*pass the defense alone"):
        ParameterDefenseTrainer(model=tiny_bert(), args=arguments(), defense=WHOLE, **other)


def test_a_flag_is_read_where_its_own_argument_was_not_passed(tiny_bert, arguments, rows):
    args = arguments(ParameterDefenseTrainingArguments, max_steps=1)
    trainer = ParameterDefenseTrainer(
        model=tiny_bert(), args=args, train_dataset=rows, defense=SAM(L3), target_modules="last-encoder-layer"
    )
    args.defense_reuse_prefix = False
    trainer.train()
    assert trainer.shared_prefix is None
    args.defense_reuse_prefix = True
    trainer.train()
    assert trainer.shared_prefix is not None


@for_each(
    ("flags", "unread"),
    [
        ({}, None),
        # what runs with and without a defense have in common
        ({"defense_target_modules": ["attention"], "defense_layers": [-1], "defense_reuse_prefix": False}, None),
        ({"defense_epsilon": 0.2, "defense_steps": 2}, "--defense_epsilon, --defense_steps would set"),
    ],
)
def test_none_is_the_stock_step(flags, unread, tmp_path, caplog):
    caplog.clear()
    arguments = ParameterDefenseTrainingArguments(output_dir=str(tmp_path), defense="none", **flags)
    assert build_defense(arguments) is None
    assert (unread in caplog.text) if unread else not caplog.text


@for_each(
    ("settings", "expected"),
    [
        ({"defense": "acrt", "defense_alpha": 0.3, "defense_norm": 3.0}, ACRT(L3, alpha=0.3)),
        ({"defense": "sam", "defense_norm": 3.0, "defense_start_epoch": 1.0}, SAM(L3, start_epoch=1.0)),
        (
            {"defense": "sam", "defense_norm": 3.0, "defense_sync_perturbation": True},
            SAM(L3, sync_perturbation=True),
        ),
        (
            {"defense": "gradient_penalty", "defense_norm": math.inf, "defense_weight": 0.2},
            GradientPenalty(math.inf, weight=0.2),
        ),
        (
            {"defense": "corruption", "defense_corruption": ["quantization=4,5", "gaussian=0.02"]},
            CorruptionRisk([Quantization(4), Quantization(5), GaussianNoise(0.02)]),
        ),
        ({"defense": "corruption", "defense_corruption": "quantization=4"}, CorruptionRisk(Quantization(4))),
        (
            {
                "defense": "corruption",
                "defense_corruption": ["quantization=4"],
                "defense_clean_weight": 0.0,
                "defense_ramp_epochs": 0.5,
                "defense_draw_one": True,
            },
            CorruptionRisk(Quantization(4), clean_weight=0, ramp_epochs=0.5, draw_one=True),
        ),
    ],
)
def test_flags_of_the_other_defenses(settings, expected, tmp_path):
    assert build_defense(ParameterDefenseTrainingArguments(output_dir=str(tmp_path), **settings)) == expected


@for_each(
    ("settings", "says"),
    [
        ({"defense": "sam", "defense_steps": 2}, "--defense_steps: expected a setting of sam, got 2"),
        ({"defense": "gradient_penalty", "defense_epsilon": 0.2}, "--defense_epsilon: expected a setting of"),
        ({"defense": "multistep"}, "expected one of multi_step_risk, .*none, got 'multistep'"),
        ({"defense": "corruption"}, "--defense_corruption: expected it with --defense corruption"),
        ({"defense": "corruption", "defense_corruption": ["quantisation=4"]}, "did you mean quantization"),
        ({"defense": "corruption", "defense_corruption": ["multi-step=4"]}, "MultiStepRisk"),
        (
            {"defense": "sam", "defense_corruption": ["quantization=4"]},
            "--defense_corruption: expected a setting of sam",
        ),
        ({"defense_epsilon": -1.0}, "epsilon: expected 0 <= epsilon < inf"),
        ({"defense_norm": 0.5}, "p: expected 1 <= p <= inf"),
        ({"defense_top_n": 0}, "top_n: expected a whole number >= 1"),
        ({"defense_steps": -1}, "steps: expected a whole number >= 0"),
        ({"defense_epsilon": "1e-3"}, "epsilon: expected 0 <= epsilon < inf, got '1e-3' of type str"),
        ({"defense_random_start": "false"}, "random_start: expected True or False, got 'false'"),
        ({"defense": "sam", "defense_sync_perturbation": "no"}, "sync_perturbation: expected True or False, got 'no'"),
        ({"defense_reuse_prefix": "false"}, "reuse_prefix: expected True or False, got 'false'"),
    ],
)
def test_bad_flags_are_refused_at_construction(settings, says, tiny_bert, arguments):
    with pytest.raises((ValueError, TypeError), match=says):
        ParameterDefenseTrainer(model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments, **settings))


def test_targets_from_flags(tiny_bert, arguments):
    flags = {"defense_target_modules": ["attention"], "defense_layers": [-1]}
    trainer = ParameterDefenseTrainer(model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments, **flags))
    names = list(trainer.defended_parameters())
    assert len(names) == 8
    assert all(".layer.1.attention." in name for name in names)
