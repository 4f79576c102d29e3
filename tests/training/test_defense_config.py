"""`defense_config.json`: what it holds, that it comes back, and what is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from for_each import for_each
from transformers import Trainer

import hf_parcor
from hf_parcor import (
    ACRT,
    SAM,
    BitFlips,
    CorruptionConstraint,
    CorruptionRisk,
    DefenseConfig,
    GaussianNoise,
    GradientCorruption,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    Quantization,
)
from hf_parcor.defenses import DEFENSES
from hf_parcor.training import DEFENSE_CONFIG_NAME
from hf_parcor.training import config as defense_config

L2 = CorruptionConstraint(epsilon=0.1)
EVERYWHERE = CorruptionConstraint(p=math.inf, epsilon=0.001, top_n=7)


@dataclass(frozen=True)
class Own(SAM):
    """A user's own defense."""

    schedule: object = None


@dataclass(frozen=True)
class OwnNoise(GaussianNoise):
    """A user's own corruption."""


CONFIGS = {
    "every setting": DefenseConfig(
        MultiStepRisk(
            EVERYWHERE,
            steps=4,
            step_size=0.3,
            random_start=True,
            start_epoch=0.1,
            interval=2,
            batch_share=0.5,
            sync_perturbation=True,
        ),
        "attention",
        ["a"],
        -1,
    ),
    "collections": DefenseConfig(ACRT(L2, alpha=1 / 3), ["b", "a"], {"d", "c"}, range(2)),
    "infinite order": DefenseConfig(GradientPenalty(p=math.inf, weight=1e-30)),
    "whole numbers for fractions": DefenseConfig(SAM(CorruptionConstraint(p=2, epsilon=1), start_epoch=3)),
    "corruptions": DefenseConfig(
        CorruptionRisk([Quantization(4), GradientCorruption(EVERYWHERE), BitFlips(rate=1e-6), BitFlips(count=3)])
    ),
    "numbers of NumPy": DefenseConfig(MultiStepRisk(L2, steps=np.int64(3), step_size=np.float32(0.5))),
}


@for_each("name", DEFENSES)
def test_every_defense_of_the_catalogue_comes_back(name, defense_of, tmp_path):
    config = DefenseConfig(defense_of(name, start_epoch=0.5))
    config.save_pretrained(tmp_path)
    assert DefenseConfig.from_pretrained(tmp_path) == config


@for_each("name", CONFIGS)
def test_comes_back(name, tmp_path):
    config = CONFIGS[name]
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / DEFENSE_CONFIG_NAME
    assert DefenseConfig.from_pretrained(str(path.parent)) == config
    assert DefenseConfig.from_pretrained(tmp_path, subfolder="new/folder") == config


def test_the_file_word_for_word(tmp_path):
    path = CONFIGS["every setting"].save_pretrained(tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
        "defense": "multi_step_risk",
        "settings": {
            "start_epoch": 0.1,
            "interval": 2,
            "batch_share": 0.5,
            "sync_perturbation": True,
            "constraint": {"p": "inf", "epsilon": 0.001, "top_n": 7},
            "steps": 4,
            "step_size": 0.3,
            "random_start": True,
        },
        "target_modules": "attention",
        "exclude_modules": ["a"],
        "layers": -1,
        "hf_parcor_version": hf_parcor.__version__,
    }


def test_collections_become_tuples_and_sets_are_put_in_order():
    config = CONFIGS["collections"]
    assert (config.target_modules, config.exclude_modules, config.layers) == (("b", "a"), ("c", "d"), (0, 1))
    assert hash(config) == hash(replace(config))


@for_each(
    ("change", "says"),
    [
        ({"defense": "multistep"}, "defense: expected one of multi_step_risk, .*, got 'multistep'"),
        ({"defense": None}, "defense: expected a string, got None"),
        ({"defense": "acrt"}, "expected exactly the settings .*alpha, got the unknown steps, .*, no alpha"),
        ({"settings": {"rho": 0.1}}, "got the unknown rho, no start_epoch, .*no constraint"),
        ({"settings": [0.1]}, r"settings: expected an object of settings, got \[0.1\]"),
        ({"settings.steps": "2"}, "settings.steps: expected a whole number, got '2'"),
        ({"settings.steps": 2.0}, "settings.steps: expected a whole number, got 2.0"),
        ({"settings.steps": True}, "settings.steps: expected a whole number, got True"),
        ({"settings.steps": -1}, "steps: expected a whole number >= 0, got -1"),
        ({"settings.random_start": 1}, "settings.random_start: expected true or false, got 1"),
        ({"settings.start_epoch": None}, 'settings.start_epoch: expected a number or "inf", got None'),
        ({"settings.start_epoch": False}, 'settings.start_epoch: expected a number or "inf", got False'),
        ({"settings.step_size": "big"}, "settings.step_size: expected a number or \"inf\", got 'big'"),
        ({"settings.constraint": None}, "settings.constraint: expected an object of settings, got None"),
        ({"settings.constraint.p": 3}, "expected p = 2 or p = inf, got p = 3"),
        ({"settings.constraint.epsilon": "nan"}, "epsilon: expected 0 <= epsilon < inf, got NaN"),
        ({"settings.constraint.top_n": 0}, "top_n: expected a whole number >= 1, got 0"),
        ({"target_modules": 3}, "target_modules: expected a string, got 3; or target_modules: expected a list, got 3"),
        ({"exclude_modules": ["a", 1]}, r"exclude_modules\[1\]: expected a string, got 1"),
        ({"layers": ["0"]}, r"layers\[0\]: expected a whole number, got '0'"),
        ({"hf_parcor_version": 1}, "hf_parcor_version: expected a string, got 1"),
        ({"comment": "mine"}, "expected an object with exactly defense, settings, .*, got .*'comment'"),
    ],
)
def test_a_file_that_says_something_else_is_refused_by_name(change, says, tmp_path):
    path = CONFIGS["every setting"].save_pretrained(tmp_path)
    values = json.loads(path.read_text(encoding="utf-8"))
    for name, value in change.items():
        *folders, last = name.split(".")
        place = values
        for folder in folders:
            place = place[folder]
        place[last] = value
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=says) as caught:
        DefenseConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "install that version, or save the model again" in str(caught.value)


@for_each(
    ("defense", "own"),
    [
        (Own(L2), Own),
        (CorruptionRisk([OwnNoise(0.1)]), OwnNoise),
        (CorruptionRisk([Quantization(4), OwnNoise(0.1)]), OwnNoise),
    ],
)
def test_a_class_of_the_users_own_is_named_and_no_damage(defense, own, tmp_path):
    """It is written, so the file is sound; and one letter off in a name of the catalogue is no such class."""
    path = DefenseConfig(defense).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{own.__module__}.{own.__qualname__}")) as caught:
        DefenseConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not re.search("damaged|another version|save the model again", str(caught.value))
    path.write_text(path.read_text().replace(f"{own.__module__}.{own.__qualname__}", "gausian"))
    with pytest.raises(ValueError, match="damaged"):
        DefenseConfig.from_pretrained(tmp_path)


@for_each(
    ("content", "says"),
    [
        (b"", "expected JSON, got Expecting value"),
        (b'{"defense": "sam"', "expected JSON, got Expecting"),
        (b"\xff\xfe", "expected JSON, got 'utf-8' codec"),
        (b'{"defense": NaN}', 'expected strict JSON, got NaN; write it as a string, "inf" say'),
        (b"[]", "expected an object with exactly defense, .*, got list"),
        (b"{}", r"expected an object with exactly defense, .*, got \[\]"),
    ],
)
def test_a_broken_file_is_refused_by_name(content, says, tmp_path):
    (tmp_path / DEFENSE_CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        DefenseConfig.from_pretrained(tmp_path)
    assert str(tmp_path / DEFENSE_CONFIG_NAME) in str(caught.value)


def test_a_missing_file_is_said_with_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"expected defense_config.json in .*, got none: .* name the folder"):
        DefenseConfig.from_pretrained(tmp_path)


def test_a_corruption_is_no_defense_and_the_message_says_which_is_one():
    for given in (Quantization(4), GaussianNoise(0.1)):
        with pytest.raises(TypeError, match="CorruptionRisk") as error:
            DefenseConfig(given)
        proposed = re.search(r"pass (.*)", str(error.value))[1]
        assert eval(proposed) == CorruptionRisk(given)


def test_what_is_no_defense_is_refused():
    with pytest.raises(TypeError, match=r"defense: expected a Defense .*, got 'sam'"):
        DefenseConfig("sam")


@for_each("counts", [{"defended_steps": -1}, {"defended_steps": True}, {"trained_steps": 1.5}])
def test_a_number_of_steps_is_a_whole_number(counts):
    with pytest.raises(ValueError, match=rf"{next(iter(counts))}: expected a whole number >= 0"):
        DefenseConfig(SAM(CorruptionConstraint(epsilon=0.1)), **counts)


@for_each(
    ("target", "says"),
    [
        ({"layers": True}, "layers: expected a whole number, got True"),
        ({"layers": [0, 1.0]}, r"layers\[1\]: expected a whole number, got 1.0"),
        ({"target_modules": 5}, "target_modules: expected a string, got 5"),
        ({"exclude_modules": ["a", None]}, r"exclude_modules\[1\]: expected a string, got None"),
    ],
)
def test_targets_that_could_not_be_read_back_are_refused(target, says):
    with pytest.raises(ValueError, match=says):
        DefenseConfig(SAM(L2), **target)


@for_each("schedule", [math.sin, {"warm": (1, math.inf)}, {3}])
def test_a_defense_of_ones_own_is_written_and_not_imported(schedule, tmp_path):
    """Saving must not end a training run; importing what a file names must not happen."""
    path = DefenseConfig(Own(L2, schedule=schedule)).save_pretrained(tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["defense"] == f"{__name__}.Own"
    with pytest.raises(ValueError, match=r"got '.*\.Own'"):
        DefenseConfig.from_pretrained(tmp_path)


def test_the_hub_is_asked_as_transformers_asks_it(monkeypatch, tmp_path):
    config, asked = CONFIGS["collections"], []
    path = config.save_pretrained(tmp_path)
    monkeypatch.setattr(
        defense_config, "cached_file", lambda name, file, **options: asked.append((name, file, options)) or str(path)
    )
    options = {"revision": "v1", "token": "secret", "cache_dir": "cache", "force_download": True}
    assert DefenseConfig.from_pretrained("owner/model", **options) == config
    assert asked == [("owner/model", DEFENSE_CONFIG_NAME, {**options, "local_files_only": False, "subfolder": ""})]
    with pytest.raises(TypeError, match="revison"):
        DefenseConfig.from_pretrained("owner/model", revison="v1")


class TestBesideTheModel:
    def test_beside_every_checkpoint_and_the_model_and_no_other_file_changes(self, tiny_bert, train, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        files = {}
        for name, kind, extra in (
            ("stock", Trainer, {}),
            (
                "ours",
                ParameterDefenseTrainer,
                {"defense": MultiStepRisk(L2, steps=1), "target_modules": ["attention"]},
            ),
        ):
            folder = tmp_path / name
            trainer = train(kind, tiny_bert(), {**options, "output_dir": str(folder)}, **extra)
            trainer.save_model()
            trainer.save_model(str(folder / "elsewhere"))
            files[name] = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        added = files["ours"] - files["stock"]
        assert files["stock"] < files["ours"]
        assert {path.name for path in added} == {DEFENSE_CONFIG_NAME}
        assert {str(path.parent) for path in added} == {".", "elsewhere", "checkpoint-2", "checkpoint-4"}
        for path in added:
            saved = DefenseConfig.from_pretrained((tmp_path / "ours" / path).parent)
            assert saved == DefenseConfig(MultiStepRisk(L2, steps=1), ["attention"]) == trainer.defense_config

    def test_targets_of_the_flags(self, tiny_bert, arguments, tmp_path):
        flags = {"defense_exclude_modules": ["bias"], "defense_layers": [-1], "defense_target_modules": ["attention"]}
        trainer = ParameterDefenseTrainer(tiny_bert(), arguments(ParameterDefenseTrainingArguments, **flags))
        trainer.save_model()
        saved = DefenseConfig.from_pretrained(tmp_path)
        assert saved == DefenseConfig(trainer.defense, ["attention"], ["bias"], [-1])
        again = ParameterDefenseTrainer(tiny_bert(), arguments(), target_modules=saved.target_modules)
        assert set(trainer.defended_parameters()) < set(again.defended_parameters())

    def test_nothing_for_the_stock_step_and_an_old_file_goes(self, tiny_bert, arguments, tmp_path, said):
        trainer = ParameterDefenseTrainer(
            tiny_bert(), arguments(ParameterDefenseTrainingArguments, defense="none", output_dir=str(tmp_path / "new"))
        )
        trainer.save_model()
        assert trainer.defense_config is None
        assert not (tmp_path / "new" / DEFENSE_CONFIG_NAME).exists()
        assert said("described the model") == []
        CONFIGS["collections"].save_pretrained(tmp_path / "new")
        trainer.save_model()
        assert len(said(f"{tmp_path / 'new' / DEFENSE_CONFIG_NAME} described the model")) == 1
        assert not (tmp_path / "new" / DEFENSE_CONFIG_NAME).exists(), "it would be claimed of the new weights"

    def test_only_the_process_that_saves_writes(self, tiny_bert, arguments, tmp_path, monkeypatch):
        trainer = ParameterDefenseTrainer(tiny_bert(), arguments())
        monkeypatch.setattr(type(trainer.args), "should_save", False)
        trainer.save_model(str(tmp_path / "rank-1"))
        assert not (tmp_path / "rank-1").exists()
