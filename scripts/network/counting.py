"""Steps of a stock or a defended Trainer on this rank, and what it sends and computes in one."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from steps.by_hand import quiet_arguments
from torch import distributed, nn
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainerCallback

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseMixin
from network.collectives import CollectiveCounter

LAST = "last-encoder-layer"
STEPS = 4  # the first steps also look around; the last two must be alike
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bert-base": {},
    "bert-small": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048},
    "tiny": {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    },
}
# Engine and label of each arm, with the target modules, and whether processes share a corruption; stock has neither.
ARMS: dict[str, dict[str, tuple[str, bool] | None]] = {
    "DDP": {
        "stock": None,
        "whole model, local": ("all", False),
        "whole model, global": ("all", True),
        "last layer, local": (LAST, False),
        "last layer, global": (LAST, True),
    },
    "FSDP2": {"stock": None, "whole model, global": ("all", False), "last layer, global": (LAST, False)},
}


class OnThisEngine(Trainer):
    """Gets FSDP2 on CPUs too, where Accelerate takes DDP whatever it is told."""

    def create_accelerator_and_postprocess(self) -> None:
        """Make the Accelerator."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.use_cpu:
            state = self.accelerator.state
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            self.is_fsdp_enabled = True


class Defended(ParameterDefenseMixin, OnThisEngine):
    """The defended Trainer on this engine."""


class ReadEachStep(TrainerCallback):
    """Keeps what was counted in each optimizer step."""

    def __init__(self, counter: CollectiveCounter) -> None:
        self.counter = counter
        self.steps: list[dict[str, Any]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Read the counter."""
        self.steps.append(self.counter.read())


def bert(shape: str) -> BertForSequenceClassification:
    """Build a BERT classifier of this shape, the same on all ranks."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**CONFIGURATIONS[shape]))


def train(engine: str, arm: tuple[str, bool] | None, shape: str, length: int, corruption_steps: int) -> dict[str, Any]:
    """Train some steps on all ranks, and return what the last one sent and computed here.

    Raises:
        RuntimeError: The last two steps differ, ranks hold different weights, or the last layer ran with full passes
            under DDP.
    """
    model, counter = bert(shape), CollectiveCounter()
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    rows = [
        {"input_ids": torch.randint(vocabulary, (length,), generator=generator), "labels": index % 2}
        for index in range(STEPS * distributed.get_world_size())
    ]
    sharding: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]},
    }
    watch = ReadEachStep(counter)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = quiet_arguments(
            folder,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            **(sharding if engine == "FSDP2" else {}),
        )
        common: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": rows, "callbacks": [watch]}
        if arm is None:
            trainer: Trainer = OnThisEngine(**common)
        else:
            targets, shared = arm
            defense = MultiStepRisk(CorruptionConstraint(epsilon=0.1), corruption_steps, sync_perturbation=shared)
            trainer = Defended(**common, defense=defense, target_modules=targets)
        trainer.remove_callback(PrinterCallback)
        with counter:
            trainer.train()
    if watch.steps[-1] != watch.steps[-2]:
        raise RuntimeError(f"expected two steps that are alike, got {watch.steps[-2:]}; train longer")
    found = {**watch.steps[-1], "reuses_prefix": getattr(trainer, "shared_prefix", None) is not None}
    if engine == "DDP":
        if found["reuses_prefix"] != (arm is not None and arm[0] == LAST):
            raise RuntimeError(f"expected a reused prefix for {LAST} alone, got {found['reuses_prefix']}; see the log")
        check_same_weights(model)
    return found


def check_same_weights(model: nn.Module) -> None:
    """Raise a RuntimeError if another rank holds other bits."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(digests, sha.hexdigest())
    if len(set(digests)) > 1:
        raise RuntimeError(f"expected the same weights on all ranks, got {digests}; the ranks have drifted apart")
