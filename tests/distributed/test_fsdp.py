"""Defended training under FSDP2: two ranks do what one process does on the joined batch."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from another_device.device import cases_here, cases_on, rank_device
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trainings import QUIET
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    GaussianNoise,
    GradientCorruption,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
)
from hf_parcor.distributed.dtensors import local_part
from hf_parcor.distributed.fsdp import drop_gathered

pytestmark = pytest.mark.slow  # ranks are processes of their own

CONSTRAINT = CorruptionConstraint(epsilon=0.2)
DEFENSES = {
    "multi-step": (MultiStepRisk(CONSTRAINT, steps=2), "all"),
    "top n": (MultiStepRisk(CorruptionConstraint(epsilon=0.2, top_n=300), steps=2), "all"),
    "max norm": (ACRT(CorruptionConstraint(p=math.inf, epsilon=0.01)), "all"),
    "SAM": (SAM(CONSTRAINT), "all"),
    "AWP": (AWP(CorruptionConstraint(epsilon=0.05), per_tensor=True), "all"),
    "corruption": (
        CorruptionRisk([GradientCorruption(CONSTRAINT), Quantization(4), GaussianNoise(0.02)], clean_weight=0.25),
        "all",
    ),
    "part": (MultiStepRisk(CONSTRAINT, steps=2), ["classifier", "layer.1.attention"]),
}


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=31,  # odd sizes: shards differ, and the last rank has none of the smallest
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=21,
        max_position_embeddings=9,
        **tiny.STILL,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(rank_device())


def rows():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(31, (8,), generator=generator),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": int(torch.randint(3, (), generator=generator)),
        }
        for _ in range(24)
    ]


class OnShards:
    """Gets FSDP2 from Accelerate on CPUs too, where Accelerate itself takes DDP."""

    replicas = 1

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            if self.replicas > 1:
                ranks = distributed.get_world_size()
                state.parallelism_config = ParallelismConfig(self.replicas, ranks // self.replicas)
                state.device_mesh = state.parallelism_config.get_device_mesh(rank_device().type)
            self.is_fsdp_enabled = True


class Trainer(OnShards, ParameterDefenseTrainer):
    pass


class Stock(OnShards, tf.Trainer):
    pass


class KeepGathered(TrainerCallback):
    """Lets FSDP2 keep gathered weights as long as it can, as people do who accumulate gradients."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if isinstance(model, FSDPModule):
            model.set_reshard_after_backward(False)
            model.set_reshard_after_forward(False)


def arguments(folder, world_size, **options):
    defaults = {
        **QUIET,
        "output_dir": folder,
        "logging_steps": 1,
        "per_device_train_batch_size": 4 // world_size,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        "average_tokens_across_devices": False,
        "optim": "sgd",
    }
    return TrainingArguments(**{**defaults, **options})


def sharding(**settings):
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": ["BertLayer"],
            **settings,
        },
    }


def train(folder, world_size, name, resume=None, callbacks=None, **options):
    defense, targets = DEFENSES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        trainer = Trainer(
            model=tiny_bert(),
            args=arguments(folder, world_size, **options),
            train_dataset=rows(),
            eval_dataset=rows()[:8],
            defense=defense,
            target_modules=targets,
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
    assert (trainer.shared_prefix is not None) == (targets != "all")
    return trainer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_of(trainer):
    """Return the weights, gathered, and the logs of the defended steps."""
    drop_gathered(trainer.model)
    weights = dict(trainer.model.named_parameters())
    assert all(isinstance(value, DTensor) == bool(trainer.args.fsdp) for value in weights.values())
    logs = [entry for entry in trainer.state.log_history if "sharpness" in entry or "eval_loss" in entry]
    return {name: whole(value.detach()).clone() for name, value in weights.items()}, logs


def train_on_ranks(folder, runs, replicas=1):
    world_size, OnShards.replicas = distributed.get_world_size(), replicas
    return [
        state_of(train(folder, world_size, name, **sharding(**settings), **options))
        for name, settings, options in runs
    ]


RUNS = [
    ("multi-step", {}, {}),
    ("multi-step", {}, {"gradient_accumulation_steps": 3, "max_steps": 3}),
    ("SAM", {"reshard_after_forward": False}, {"gradient_accumulation_steps": 2, "max_steps": 3}),
    ("multi-step", {}, {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}),
    ("multi-step", {}, {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "callbacks": [KeepGathered]}),
    ("multi-step", {"activation_checkpointing": True}, {"max_steps": 2, "max_grad_norm": 0.05}),
    ("top n", {}, {"max_steps": 4}),
    ("max norm", {}, {"max_steps": 4}),
    ("corruption", {}, {"max_steps": 4}),
    ("AWP", {}, {"max_steps": 4}),
    ("part", {}, {"max_steps": 4}),
    ("part", {"activation_checkpointing": True}, {"max_steps": 2}),
]
SOME_RUNS = [run for run in RUNS if run[0] in ("SAM", "top n", "corruption")] + RUNS[-2:-1]  # where it may matter
OFFLOADED = [(name, {"cpu_offload": True}, {"max_steps": 2}) for name in ("multi-step", "top n", "corruption", "part")]
REPLICATED = [
    ("top n", {}, {"gradient_accumulation_steps": 2, "max_steps": 2}),
    ("part", {}, {"max_steps": 2}),
]
KEYS = ("loss", "loss_clean", "loss_corrupted", "corruption_norm", "corruption_norm_asked", "grad_norm", "eval_loss")


def same(found, expected, case):
    """Check weights and logs of a run against those of another."""
    (weights, logs), (expected_weights, expected_logs) = found, expected
    for name, value in expected_weights.items():
        here = weights[name if name in weights else wrapped(name, weights)]
        assert float((here - value).abs().max()) < 1e-6, f"{case}, {name}"
    for entry, other in zip(logs, expected_logs, strict=True):
        keys = [key for key in KEYS if key in other]
        assert [entry[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-3), case


def wrapped(name, names):
    return next(other for other in names if other.replace("_checkpoint_wrapped_module.", "") == name)


def on_two_ranks(folder):
    return (
        train_on_ranks(folder, cases_here(RUNS, SOME_RUNS)),
        stop_and_resume(folder),
        spoiled(folder),
        cards(f"{folder}/card"),
    )


@pytest.fixture(scope="module")
def two_ranks(run_on_ranks, device_of_ranks, tmp_path_factory):
    """Return the runs, the run that was stopped, and the spoiled steps, each as both ranks found it."""
    folder = str(tmp_path_factory.mktemp("runs"))
    return list(zip(*run_on_ranks(on_two_ranks, 2, folder, device=device_of_ranks), strict=True))


@pytest.mark.slow
def test_two_ranks_equal_one_process(two_ranks, device_of_ranks, tmp_path):
    check_equal(two_ranks[0], cases_on(device_of_ranks, RUNS, SOME_RUNS), tmp_path)


@pytest.mark.slow
def test_four_ranks_with_replicas_equal_one_process(run_on_ranks, tmp_path):
    check_equal(run_on_ranks(train_on_ranks, 4, str(tmp_path), REPLICATED, 2), REPLICATED, tmp_path)


@pytest.mark.slow
def test_weights_that_are_offloaded_equal_those_of_one_process(run_on_ranks, device_of_ranks, tmp_path):
    """Weights, gradients and corruptions lie on the CPU, and ranks meet elsewhere."""
    if device_of_ranks == "cpu":
        pytest.skip("FSDP2 offloads from an accelerator")
    check_equal(run_on_ranks(train_on_ranks, 2, str(tmp_path), OFFLOADED, device=device_of_ranks), OFFLOADED, tmp_path)


def check_equal(found, runs, tmp_path):
    for (name, settings, options), *answers in zip(runs, *found, strict=True):
        expected = state_of(train(str(tmp_path), 1, name, **options))
        for answer in answers:
            same(answer, expected, f"{name} {settings} {options}")


def stop_and_resume(folder):
    runs = []
    options = {"max_steps": 4, "optim": "adamw_torch", "bf16": True}
    for index, start in enumerate((None, None, "first")):
        saving = {"save_strategy": "steps", "save_steps": 2} if index else {}
        resumed = {"resume": f"{folder}/1/checkpoint-2"} if start else {}
        trainer = train(f"{folder}/{index}", 2, "multi-step", **sharding(), **options, **saving, **resumed)
        runs.append(state_of(trainer)[0])
    return runs


def test_a_resumed_run_is_the_run_that_was_not_interrupted(two_ranks):
    """With AdamW, bf16 arithmetic and float32 weights."""
    for plain, saving, resumed in two_ranks[1]:
        for name, value in plain.items():
            assert value.dtype == torch.float32
            assert torch.equal(saving[name], value), name
            assert torch.equal(resumed[name], value), name


class Spoiling:
    """Multiplies the loss of the first pass of a step on rank 1 by NaN, and keeps the shards that each pass saw."""

    def compute_loss(self, model, *args, **kwargs):
        drop_gathered(model)
        self.seen = [*getattr(self, "seen", []), shards_of(model)]
        spoil = len(self.seen) == 1 and distributed.get_rank() == 1
        return super().compute_loss(model, *args, **kwargs) * (math.nan if spoil else 1.0)


class Spoiled(Spoiling, Trainer):
    pass


class SpoiledStock(Spoiling, Stock):
    pass


def shards_of(model):
    return {name: local_part(value).detach().clone() for name, value in model.named_parameters()}


def spoiled(folder):
    """Train one step whose loss is NaN on a rank; the shards that each pass saw, and those after the update."""
    found = {}
    for kind, settings in (
        (SpoiledStock, {}),
        (Spoiled, {"defense": SAM(CONSTRAINT)}),
        (Spoiled, {"defense": MultiStepRisk(CONSTRAINT, steps=2), "reuse_prefix": False}),
    ):
        options = arguments(folder, 2, max_steps=1, **sharding())
        trainer = kind(model=tiny_bert(), args=options, train_dataset=rows(), **settings)
        trainer.train()
        drop_gathered(trainer.model)
        found[str(settings.get("defense", "stock"))] = (trainer.seen, shards_of(trainer.model))
    return found


def test_a_rank_without_a_number_makes_no_corruption_and_spoils_what_it_spoils_in_the_stock_trainer(two_ranks):
    """SAM takes nothing but the corruption from the pass without a number: its update is that of the clean loss."""
    for rank in two_ranks[2]:
        (stock_seen, stock), (sam_seen, sam), (risk_seen, risk) = rank.values()
        assert [len(seen) for seen in (stock_seen, sam_seen, risk_seen)] == [1, 2, 3]
        for seen in (*sam_seen, *risk_seen[:2]):  # the second pass has a number again, and the third its corruption
            torch.testing.assert_close(seen, stock_seen[0], rtol=0, atol=0)
        assert all(value.isnan().all() for value in stock.values())
        torch.testing.assert_close(risk, stock, rtol=0, atol=0, equal_nan=True)
        assert all(value.isfinite().all() for value in sam.values())
        assert any(not torch.equal(value, stock_seen[0][name]) for name, value in sam.items())


def cards(folder):
    """Return the card of the weights that were measured, and of those after one more update."""
    trainer = train(folder, 2, "multi-step", max_steps=1, **sharding())
    trainer.evaluate_robustness([GaussianNoise(0.1)], trials=1)
    written = []
    for _ in range(2):
        trainer.create_model_card()
        written.append((Path(folder) / "README.md").read_text(encoding="utf-8") if distributed.get_rank() == 0 else "")
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(2)
    return written


def test_a_card_is_written_by_one_rank_while_the_others_go_on(two_ranks):
    measured, changed = two_ranks[3][0]
    assert "| Gaussian σ=0.1 |" in measured
    assert "| Gaussian σ=0.1 |" not in changed
