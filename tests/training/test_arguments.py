"""The defense as flags."""

from __future__ import annotations

import json
import math

import pytest
from transformers import HfArgumentParser

from hf_parcor import (
    ACRT,
    SAM,
    CorruptionConstraint,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    Seq2SeqParameterDefenseTrainingArguments,
)
from hf_parcor.training import DEFAULT_DEFENSE, build_defense

L3 = CorruptionConstraint(p=3, epsilon=0.1)
KINDS = [ParameterDefenseTrainingArguments, Seq2SeqParameterDefenseTrainingArguments]


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
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


def test_none_is_the_stock_step(tmp_path):
    assert build_defense(ParameterDefenseTrainingArguments(output_dir=str(tmp_path), defense="none")) is None


@pytest.mark.parametrize(
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
    ],
)
def test_flags_of_the_other_defenses(settings, expected, tmp_path):
    assert build_defense(ParameterDefenseTrainingArguments(output_dir=str(tmp_path), **settings)) == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"defense": "sam", "defense_steps": 2}, "--defense_steps: expected a setting of sam, got 2"),
        ({"defense": "gradient_penalty", "defense_epsilon": 0.2}, "--defense_epsilon: expected a setting of"),
        ({"defense": "multistep"}, "expected one of multi_step_risk, .*none, got 'multistep'"),
        ({"defense_epsilon": -1.0}, "epsilon: expected 0 <= epsilon < inf"),
        ({"defense_norm": 0.5}, "p: expected 1 <= p <= inf"),
        ({"defense_top_n": 0}, "top_n: expected a whole number >= 1"),
        ({"defense_steps": -1}, "steps: expected a whole number >= 0"),
    ],
)
def test_bad_flags_are_refused_at_construction(settings, says, tiny_bert, arguments):
    with pytest.raises(ValueError, match=says):
        ParameterDefenseTrainer(model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments, **settings))


def test_targets_from_flags(tiny_bert, arguments):
    flags = {"defense_target_modules": ["attention"], "defense_layers": [-1]}
    trainer = ParameterDefenseTrainer(model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments, **flags))
    names = list(trainer.defended_parameters())
    assert len(names) == 8
    assert all(".layer.1.attention." in name for name in names)
