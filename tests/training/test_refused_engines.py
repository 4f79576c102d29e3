"""Engines that a defended step would be silently wrong with: refused when the Trainer is made, with what to use."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import yaml
from accelerate.utils import DistributedType
from transformers import Trainer

from hf_parcor import MultiStepRisk, ParameterDefenseMixin
from hf_parcor.training.training_args import NO_DEFENSE, ParameterDefenseTrainingArguments


def engine(kind):
    def take(trainer):
        trainer.accelerator.state.distributed_type = kind

    return take


def fsdp(version):
    def take(trainer):
        trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=version, activation_checkpointing=False)

    return take


def split(**sizes):
    def take(trainer):
        ones = {"tp_size": 1, "cp_size": 1, "sp_size": 1, "sp_backend": "", "cp_enabled": False}
        trainer.accelerator.state.parallelism_config = SimpleNamespace(**{**ones, **sizes})

    return take


def loaded(**attributes):
    def take(trainer):
        for name, value in attributes.items():
            setattr(trainer.model, name, value)

    return take


def sharded_when_loaded(trainer):
    kind = type(trainer.model)
    trainer.model.__class__ = type(kind.__name__, (kind,), {"is_distributed_loading_by_transformers": True})


def of_xla(trainer):
    trainer.is_fsdp_xla_enabled = True


REFUSED = {
    "DeepSpeed": (engine(DistributedType.DEEPSPEED), {}, "updates inside backward.*take out deepspeed=.*or use DDP"),
    "Megatron-LM": (engine(DistributedType.MEGATRON_LM), {}, "got Megatron-LM, .*FSDP2.*or use DDP"),
    "XLA": (of_xla, {}, "got XLA's FSDP, which is not tested;.*or use DDP"),
    "FSDP1": (fsdp(1), {}, "expected version 2 with a defense, got 1.*fsdp_version: 2"),
    "compiled": (
        fsdp(2),
        {"torch_compile": True},
        "torch_compile: expected no compiled model for a defense under FSDP2, got one by INDUCTOR",
    ),
    "penalty": (fsdp(2), {"defense": "gradient_penalty"}, "differentiates once under FSDP2.*use ACRT"),
    "tensor": (split(tp_size=2), {}, "tp_size: expected 1 with a defense, got 2.*FSDP2"),
    "context": (split(cp_size=2), {}, "cp_size: expected 1.*take out parallelism_config=.*FSDP2"),
    "sequence": (split(sp_size=4), {}, "sp_size: expected 1.*take out parallelism_config=.*FSDP2"),
    "plan": (loaded(_tp_size=2), {}, "expected one that was loaded whole"),
    "shards": (sharded_when_loaded, {}, "expected one that was loaded whole"),
    "disk": (loaded(hf_device_map={"a": 0, "b": "disk"}), {}, "expected no offloaded part.*load the model onto"),
    "memory": (loaded(hf_device_map={"a": 0, "b": "cpu"}), {}, "expected no offloaded part"),
}
ALLOWED = {
    "FSDP2": fsdp(2),
    "whole": split(),
    "devices": loaded(hf_device_map={"a": 0, "b": 1}),
    "memory alone": loaded(hf_device_map={"": "cpu"}),
}


@pytest.fixture
def build(tiny_bert, arguments):
    """Make a Trainer on an engine: what the stock Trainer has found is there when the defense is checked."""

    def make(take, **options):
        class OnEngine(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                take(self)

        class Defended(ParameterDefenseMixin, OnEngine):
            pass

        return Defended(model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments, **options))

    return make


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_to_use_instead(build, name):
    take, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(take, **options)


@pytest.mark.parametrize("name", ["DeepSpeed", "Megatron-LM", "XLA", "tensor", "context", "sequence", "shards"])
def test_the_lines_that_are_named_ask_for_fsdp2(build, arguments, name):
    """The arguments read theirs, and those of Accelerate stand in the file that is named."""
    with pytest.raises(ValueError, match="fsdp=True and") as refused:
        build(REFUSED[name][0])
    message = str(refused.value)
    (config,) = re.findall(r"fsdp_config=(\{.*?\})", message)
    with patch.dict(os.environ):  # which the arguments write into
        plugin = arguments(fsdp=True, fsdp_config=ast.literal_eval(config)).fsdp_plugin_args
    assert plugin["fsdp_version"] == 2
    (path,) = re.findall(r"examples/\S+\.yaml", message)
    written = yaml.safe_load((Path(__file__).parents[2] / path).read_text(encoding="utf-8"))
    assert written["distributed_type"] == re.findall(r"distributed_type: (\w+)", message)[0]
    assert str(written["fsdp_config"]["fsdp_version"]) == re.findall(r"fsdp_version: (\w+)", message)[0]


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP1", "tensor"])
def test_without_a_defense_nothing_is(build, name):
    build(REFUSED[name][0], defense=NO_DEFENSE)


@pytest.mark.parametrize("nothing", [{"defense_epsilon": 0.0}, {"defense_steps": 0}], ids=["epsilon=0", "steps=0"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_defense_that_is_the_stock_step_runs_on_all(build, name, nothing):
    take, options, _ = REFUSED[name]
    if options.get("defense") == "gradient_penalty":
        nothing = {"defense_weight": 0.0}
    assert build(take, **options, **nothing).defense.is_stock


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(build, name):
    assert isinstance(build(ALLOWED[name]).defense, MultiStepRisk)
