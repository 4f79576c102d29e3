"""All that needs a GPU, check by check, each in a process and a time budget of its own; run by `gpu_checks.sh`.

    bash scripts/gpu_checks.sh                        # records to $OUT, or to runs/gpu_checks
    bash scripts/gpu_checks.sh --device cpu --quick   # small shapes: tries out the checks themselves

Ends with 0 if every check that ran holds, with 1 if one does not, and with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
)

from hf_parcor import (
    AWP,
    SAM,
    BitFlips,
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRisk,
    FloatQuantization,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
    corrupted,
    select_parameters,
)
from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import LanguageModelMetric, NotEnoughMemoryError
from hf_parcor.functional import constrained_maximum
from hf_parcor.functional.vectors import add_multiple_
from hf_parcor.indicators import sensitivity
from hf_parcor.targets import by_layer, by_module
from scripts.benchmark import PEERS, STOCK, TINY, Bench, random_model
from scripts.benchmark_distributed import FSDP2, Defended
from scripts.counting import PeakMemory
from scripts.training_steps import in_bfloat16, quiet_arguments, seconds, step_of


class Skipped(Exception):  # noqa: N818
    """A check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run, how large their models are, and where records go."""

    device: str
    quick: bool
    output: str

    def need_cuda(self, what: str) -> None:
        """Raise `Skipped` without a GPU."""
        if self.device != "cuda":
            raise Skipped(f"{what} needs a GPU")


@dataclass(frozen=True)
class Row:
    """A number that a check found; it fails above its limit, or where it is NaN."""

    what: str
    value: float
    limit: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the number is at most its limit; a number without limit is only reported."""
        return self.limit is None or self.value <= self.limit


def distance(ours: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Return the L2 norm of the difference of two lists of tensors, over that of the second."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(ours, others, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(difference / max(sum(float(b.square().sum()) for _, b in pairs), 1e-300))


def differing_bits(ours: Iterable[Tensor], others: Iterable[Tensor]) -> int:
    """Count the bytes that differ between two lists of tensors."""
    return sum(
        int((a.detach().contiguous().view(torch.uint8) != b.detach().contiguous().view(torch.uint8)).sum())
        for a, b in zip(ours, others, strict=True)
        if a.dim()
    )


L2 = CorruptionConstraint(p=2, epsilon=0.1)
LAST = "last-encoder-layer"
VOCABULARY = 1000


def bert(setting: Setting, **sizes: int) -> nn.Module:
    """Build a BERT without dropout, tiny in a quick run, in float32."""
    torch.manual_seed(0)
    width, layers = (64, 2) if setting.quick else (256, 4)
    chosen: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, **sizes}
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **{"intermediate_size": 4 * width, **chosen},
    )
    model: nn.Module = BertForSequenceClassification(config)
    return model.to(setting.device)


def rows_for(count: int, length: int) -> list[dict[str, Any]]:
    """Draw labelled sequences for a classifier."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(VOCABULARY, (length,), generator=generator), "labels": index % 2}
        for index in range(count)
    ]


def batch_of(rows: list[dict[str, Any]], device: str) -> dict[str, Tensor]:
    """Return rows as one batch."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": tokens.to(device), "labels": torch.tensor([row["labels"] for row in rows], device=device)}


def trainer_of(
    setting: Setting, kind: type[Trainer], model: nn.Module, options: dict[str, Any], **more: Any
) -> Trainer:
    """Return a Trainer of plain SGD that saves and logs nothing."""
    arguments = quiet_arguments(
        use_cpu=setting.device == "cpu",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = kind(model=model, args=arguments, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Return a copy of the gradients in float32, and take them away."""
    copies = [p.grad.detach().float().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return copies


def risk(steps: int) -> MultiStepRisk:
    """Return the defense of these checks."""
    return MultiStepRisk(L2, steps=steps)


SCALE = 2.0**10  # of the loss in float16
RATE = 0.1
DTYPES = {"fp32": (None, 1e-4), "bf16": (torch.bfloat16, 3e-2), "fp16": (torch.float16, 3e-2)}


class Scaled(ParameterDefenseTrainer):
    """Starts its real loss scaler, where it has one, at another scale."""

    scale = SCALE

    def create_accelerator_and_postprocess(self) -> None:
        """Make the Accelerator."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=self.scale)


class Overflowing(Scaled):
    """No float16 gradient is finite at this scale."""

    scale = 2.0**60


def longhand_step(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None, scale: float) -> None:
    """Take one SGD step along the risk of K = 2 and L2, ε = 0.1, as Algorithm 1 says, by autograd alone."""
    weights = list(model.parameters())
    clean = [w.detach().clone() for w in weights]
    corruption = [torch.zeros_like(w) for w in weights]
    total = [torch.zeros_like(w) for w in weights]
    device = clean[0].device.type
    for _ in range(3):
        with torch.no_grad():
            for w, w0, a in zip(weights, clean, corruption, strict=True):
                w.copy_(w0 + a)
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch).loss
        found = torch.autograd.grad(loss * scale, weights, allow_unused=True)
        slopes = [torch.zeros_like(w) if g is None else g / scale for g, w in zip(found, weights, strict=True)]
        total = [t + g / 3 for t, g in zip(total, slopes, strict=True)]
        length = torch.sqrt(sum((g.square().sum() for g in slopes), torch.zeros((), device=device)))
        moved = [a + 1.5 * 0.1 / 2 * g / length for a, g in zip(corruption, slopes, strict=True)]
        size = torch.sqrt(sum((a.square().sum() for a in moved), torch.zeros((), device=device)))
        corruption = [a * torch.clamp(0.1 / size, max=1.0) for a in moved]
    with torch.no_grad():
        for w, w0, g in zip(weights, clean, total, strict=True):
            w.copy_(w0 - RATE * g)


def precision(setting: Setting) -> list[Row]:
    """Three Trainer steps against autograd by hand: the difference of weights over what the steps moved.

    In 16 bits the order of operations alone makes a difference: as far as from float32 by hand, it may be.
    """
    found = []
    exact: list[Tensor] = []
    for name, (dtype, limit) in DTYPES.items():
        if name == "fp16" and setting.device == "cpu":
            continue  # Accelerate refuses it there
        options: dict[str, Any] = {} if dtype is None else {name: True}
        options |= {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": RATE}
        ours, other = bert(setting), bert(setting)
        before = [w.detach().clone() for w in ours.parameters()]
        rows = rows_for(12, 16)
        trainer_of(setting, Scaled, ours, options, train_dataset=rows, defense=risk(2)).train()
        other.train()
        for start in (0, 4, 8):
            longhand_step(
                other, batch_of(rows[start : start + 4], setting.device), dtype, SCALE if name == "fp16" else 1
            )
        moved = [a.detach() - b for a, b in zip(ours.parameters(), before, strict=True)]
        expected = [a.detach() - b for a, b in zip(other.parameters(), before, strict=True)]
        exact = exact or expected  # float32 comes first
        limit = max(limit, distance(expected, exact))
        found.append(Row(f"{name}: distance from autograd by hand", distance(moved, expected), limit))
        if name == "fp16":
            found.extend(overflow(setting, rows, options))
    return found


def overflow(setting: Setting, rows: list[dict[str, Any]], options: dict[str, Any]) -> list[Row]:
    """Overflowing float16 gradients: the scaler skips the step, and the weights stay."""
    model = bert(setting)
    before = [w.detach().clone() for w in model.parameters()]
    options = {**options, "max_steps": 1}
    trainer = trainer_of(setting, Overflowing, model, options, train_dataset=rows, defense=risk(2))
    trainer.train()
    scale = trainer.accelerator.scaler.get_scale()
    return [
        Row("fp16 overflow: bytes of weights that changed", differing_bits(model.parameters(), before), 0),
        Row("fp16 overflow: scale over half the first", scale / (Overflowing.scale / 2), 1),
    ]


def compiled(setting: Setting) -> list[Row]:
    """Two steps of a compiled model against those of the plain one: no farther off than with the stock Trainer."""
    backend = "inductor" if setting.device == "cuda" else "aot_eager"
    arms: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
        "stock": (Trainer, {}),
        "K = 1": (ParameterDefenseTrainer, {"defense": risk(1)}),
    }
    found = {}
    for label, (kind, more) in arms.items():
        moved = []
        choices: list[dict[str, Any]] = [{}, {"torch_compile": True, "torch_compile_backend": backend}]
        for options in choices:
            model = bert(setting)
            before = [w.detach().clone() for w in model.parameters()]
            options |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": RATE}
            trainer_of(setting, kind, model, options, train_dataset=rows_for(8, 16), **more).train()
            moved.append([a.detach() - b for a, b in zip(model.parameters(), before, strict=True)])
        found[label] = distance(moved[1], moved[0])
    limit = max(1e-3, 2 * found["stock"])
    rows = [
        Row(f"{backend}, {label}: distance from the plain run", value, None if label == "stock" else limit)
        for label, value in found.items()
    ]
    modes = ["default", "reduce-overhead"] if backend == "inductor" else ["default"]
    return [*rows, *(row for mode in modes for row in compiled_layers(setting, backend, mode, limit))]


def compiled_layers(setting: Setting, backend: str, mode: str, limit: float) -> list[Row]:
    """A prefix of layers that are compiled each by itself: it is shared, and no later step compiles anew."""
    gradients, again = [], 0
    for choice in (False, True):
        torch.compiler.reset()
        model = bert(setting)
        for layer in model.get_submodule("bert.encoder.layer").children() if choice else ():
            layer.compile(**({"mode": mode} if backend == "inductor" else {"backend": backend}))
        trainer = trainer_of(setting, ParameterDefenseTrainer, model, {}, defense=risk(1), target_modules=LAST)
        step = step_of(trainer, model, batch_of(rows_for(8, 16), setting.device))
        for _ in range(3):  # the first tries the prefix out, and CUDA graphs are recorded in the second
            model.zero_grad()
            step()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        model.zero_grad()
        step()
        again += torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        none = choice and not graphs
        gradients.append(gradients_of(model))
    shared = trainer.shared_prefix is not None  # type: ignore[attr-defined]
    label = f"{backend}, {mode}, each layer by itself"
    return [
        Row(f"{label}: no prefix was shared", not shared, 0),
        Row(f"{label}: nothing was compiled", none, 0),
        Row(f"{label}: graphs compiled in a later step", again, 0),
        Row(f"{label}: distance from what is not compiled", distance(*reversed(gradients)), limit),
    ]


class Stop(Exception):  # noqa: N818
    """Raised in the middle of a step."""


def restored(setting: Setting) -> list[Row]:
    """Weights after a step, and after one that an exception ends, bit for bit."""
    found = []
    defenses = {
        "whole model": (risk(2), None),
        "last layer": (risk(2), LAST),
        "SAM": (SAM(L2), None),
        "AWP": (AWP(L2), None),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for label, (defense, target) in defenses.items():
            model = bert(setting).to(dtype=dtype)
            before = [w.detach().clone() for w in model.parameters()]
            batch = batch_of(rows_for(4, 16), setting.device)
            trainer = trainer_of(setting, ParameterDefenseTrainer, model, {}, defense=defense, target_modules=target)
            step = step_of(trainer, model, batch)
            step()
            label = f"{label}, {str(dtype).removeprefix('torch.')}: bytes that changed"
            found.append(Row(label, differing_bits(model.parameters(), before), 0))
            calls: list[int] = []

            def stop(*_: object, calls: list[int] = calls) -> None:
                calls.append(1)
                if len(calls) == 2:
                    raise Stop

            model.get_submodule("classifier").register_forward_pre_hook(stop)
            try:
                step()
            except Stop:
                found.append(Row(f"{label}, exception", differing_bits(model.parameters(), before), 0))
            else:
                found.append(Row(f"{label}, exception did not come", 1, 0))
    return found


def prefix(setting: Setting) -> list[Row]:
    """Gradients of a reused prefix against those of full passes."""
    found = []
    for name, limit in (("fp32", 1e-4), ("bf16", 2e-2)):
        gradients = []
        for reuse in (True, False):
            model = bert(setting) if name == "fp32" else in_bfloat16(bert(setting), setting.device)
            trainer = trainer_of(
                setting,
                ParameterDefenseTrainer,
                model,
                {},
                defense=risk(2),
                target_modules=LAST,
                reuse_prefix=reuse,
            )
            step_of(trainer, model, batch_of(rows_for(8, 16), setting.device))()
            gradients.append(gradients_of(model))
            wrong = (trainer.shared_prefix is not None) is not reuse  # type: ignore[attr-defined]
            found.append(Row(f"{name}: reuse={reuse} was not followed", wrong, 0))
        found.append(Row(f"{name}: distance from full passes", distance(*gradients), limit))
    return found


def same_as_cpu(setting: Setting) -> list[Row]:
    """Corruptions of the same weights with the same seed, here and on the CPU."""
    torch.manual_seed(0)
    size = 1000 if setting.quick else 500_000
    shapes = {"a": (size,), "b": (size, 3), "c": (size // 100, 3), "d": (size // 50, 64), "e": (30, 64)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}  # two pairs with rows of one width
    there = {name: value.to(setting.device) for name, value in weights.items()}
    found = []
    exact: list[Corruption] = [
        *(Quantization(4), Quantization(8, "channel", code_range="full"), Quantization(4, symmetric=False)),
        *(Quantization(4, "channel"), Quantization(4, "channel", symmetric=False, zero_point="float")),
        *(FloatQuantization("fp8_e4m3"), FloatQuantization("fp8_e5m2", "channel"), FloatQuantization("nf4")),
        *(BitFlips(count=100), BitFlips(rate=1e-4), GaussianNoise(0.1)),
    ]
    for corruption in [*exact, UniformNoise(0.1), RandomCorruption(L2)]:
        ours, others = (corruption(w, generator=torch.Generator().manual_seed(3)) for w in (there, weights))
        here = [value.cpu() for value in ours.values()]
        if corruption in exact:
            found.append(Row(f"{corruption}: differing bytes", differing_bits(here, others.values()), 0))
        else:
            found.append(Row(f"{corruption}: distance", distance(here, others.values()), 1e-6))
    for p, n in ((2.0, size // 10), (float("inf"), size // 7)):
        vectors = [list(w.values()) for w in (there, weights)]
        top, expected = (constrained_maximum(vector, p, 0.1, n) for vector in vectors)
        chosen = sum(int(((a.cpu() != 0) != (b != 0)).sum()) for a, b in zip(top, expected, strict=True))
        found.append(Row(f"top {n}, p={p:g}: entries chosen otherwise", chosen, 0))
        found.append(Row(f"top {n}, p={p:g}: how many are not n", abs(sum(int((a != 0).sum()) for a in top) - n), 0))
        found.append(Row(f"top {n}, p={p:g}: distance", distance(top, expected), 1e-5))
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)):
        sums = []
        for device in ("cpu", setting.device):
            w, v = ([value.to(device, dtype, copy=True) for value in (weights["a"], weights["b"])] for _ in range(2))
            add_multiple_(w, v, torch.tensor(0.037, dtype=torch.float64, device=device))
            add_multiple_(w, [math.nan * part for part in v], torch.zeros((), dtype=torch.float64, device=device))
            sums.append(w)
        found.append(Row(f"w + f·v in one pass, {dtype}: distance", distance(*reversed(sums)), limit))
    return found


def synchronizations(setting: Setting) -> list[Row]:
    """How often the host waits for the GPU in a defended step, beyond what its passes do in the stock step."""
    setting.need_cuda("counting how often the host waits")
    counts = {}
    arms: dict[str, tuple[type[Trainer], dict[str, Any], int]] = {"stock": (Trainer, {}, 1)}
    for label, target in (("whole model", None), ("last layer", LAST)):
        for steps in (1, 2):
            more = {"defense": risk(steps), "target_modules": target}
            arms[f"{label}, K = {steps}"] = (ParameterDefenseTrainer, more, steps + 1)
    few = MultiStepRisk(CorruptionConstraint(epsilon=0.1, top_n=1000), steps=2)
    arms["top 1000, K = 2"] = (ParameterDefenseTrainer, {"defense": few}, 3)
    arms["half 4 bits"] = (ParameterDefenseTrainer, {"defense": CorruptionRisk(Quantization(4))}, 2)
    for label, (kind, more, _) in arms.items():
        model = bert(setting)
        step = step_of(trainer_of(setting, kind, model, {}, **more), model, batch_of(rows_for(4, 16), "cuda"))
        step()
        step()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts[label] = sum("synchroniz" in str(warning.message) for warning in caught)
    stock = counts["stock"]
    return [Row(f"{label}: waits", counts[label], stock * passes) for label, (_, _, passes) in arms.items()]


def joined_training(setting: Setting, kind: type[Trainer], batch: int, **options: Any) -> list[Tensor]:
    """Train two steps with a corruption that all processes share; return what the whole weights moved by."""
    model = bert(setting)
    before = [w.detach().clone() for w in model.parameters()]
    options |= {"max_steps": 2, "per_device_train_batch_size": batch, "learning_rate": RATE}
    options["average_tokens_across_devices"] = False
    defense = MultiStepRisk(L2, steps=1, sync_perturbation=True)
    trainer_of(setting, kind, model, options, train_dataset=rows_for(16, 16), defense=defense).train()
    return [whole_on_cpu(w.detach()) - start.cpu() for w, start in zip(model.parameters(), before, strict=True)]


def whole_on_cpu(weight: Tensor) -> Tensor:
    """Return a weight that FSDP2 cut along its first dimension: `full_tensor` of CUDA tensors dies over gloo."""
    if not isinstance(weight, DTensor):
        return weight.cpu()
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, weight.to_local().cpu().numpy())
    return torch.cat([torch.from_numpy(part) for part in parts]).view(weight.shape)


ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": FSDP2,
    "FSDP2, offloaded": {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "cpu_offload": True}},
}


def watched_rank(setting: Setting, engine: str, rank: int) -> None:
    """Let this process say where it was if a signal ends it."""
    path = Path(setting.output) / f"{engine}-{rank}.txt"
    faulthandler.enable(path.open("w", encoding="utf-8"))


def train_on_rank(rank: int, setting: Setting, folder: str, engine: str) -> None:
    """Train under an engine on one of two ranks, and write what the weights moved by."""
    local = rank % max(1, torch.cuda.device_count() if setting.device == "cuda" else 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": "2"}
    prepare_process(setting)
    watched_rank(setting, engine, rank)
    if setting.device == "cuda":
        torch.cuda.set_device(local)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{engine}", rank=rank, world_size=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.save(joined_training(setting, Defended, 4, **ENGINES[engine]), f"{folder}/{engine}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def two_ranks(setting: Setting) -> list[Row]:
    """DDP and FSDP2 on two ranks that share a device, over gloo, against one process with the joined batches."""
    alone, found = joined_training(setting, ParameterDefenseTrainer, 8), []
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            if setting.device == "cpu" and "offloaded" in engine:  # from an accelerator
                continue
            try:
                spawn(train_on_rank, args=(setting, folder, engine), nprocs=2)  # type: ignore[no-untyped-call]
            except ProcessExitedException as died:
                if died.signal_name is None:
                    raise
                # gloo is little used with CUDA tensors: the other engine is tested all the same.
                found.append(Row(f"{engine}: ranks that died of {died.signal_name}, see {engine}-0.txt and -1", 1, 0))
                continue
            first, second = (torch.load(f"{folder}/{engine}-{rank}.pt") for rank in range(2))
            found.append(Row(f"{engine}: distance from one process", distance(first, alone), 1e-3))
            found.append(Row(f"{engine}: bytes that differ between ranks", differing_bits(first, second), 0))
    return found


def two_processes(setting: Setting) -> list[Row]:
    """DDP and FSDP2 on two ranks: as many all-reduces as the stock Trainer, the same weights everywhere."""
    if setting.device == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped(f"DDP and FSDP2 over NCCL need 2 GPUs, got {torch.cuda.device_count()}")
    record = Path(setting.output).resolve() / "distributed.json"
    shape = "tiny" if setting.quick else "bert-small"
    command = [sys.executable, "-m", "scripts.benchmark_distributed", "--shape", shape, "--output", str(record)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    counted = json.loads(record.read_text(encoding="utf-8"))["counted"]["DDP"]
    stock, local = (counted[arm]["collectives"]["all_reduce"] for arm in ("stock", "whole model, local"))
    return [
        Row(f"DDP, all-reduce: {what} unlike stock", abs(local[what] - stock[what]), 0) for what in ("calls", "bytes")
    ]


SAMS = [peer for peer in PEERS if "SAM" in peer]
BEYOND = ["whole model, K = 1", "whole model, K = 2", "SAM"]
COMPARED = [*BEYOND, "last layer, K = 1", "4 bits", "SAM, ⅛ of the batch", *SAMS]
# Of a step with K = 1 in weight space. A batched launch is several kernels where tensors are many or large: about one
# for each 21 million entries. Kernels are reported, launches limited.
LAUNCHES = 60


def costs(setting: Setting, shape: str, batch: int, length: int, rounds: int, limits: dict[str, float]) -> list[Row]:
    """Time steps in bf16 autocast; limits are of the median ratio to the stock step, where a GPU is timed."""
    timed = setting.device == "cuda" and not setting.quick
    model = random_model(shape, device=setting.device)
    bench = Bench(model, batch, length, bf16=True, fused=True, arms=COMPARED)
    label = f"{shape}, {batch} × {length}"
    found = {cost.arm: cost for cost in bench.costs(rounds)}
    rows = [Row(f"{label}: millions of parameters", sum(p.numel() for p in model.parameters()) / 1e6)]
    for arm, cost in found.items():
        (low, high), moved = cost.time_ratio_quartiles, cost.bytes_per_defended_weight
        limit = LAUNCHES if arm == "whole model, K = 1" else None
        rows += [
            Row(f"{label}, {arm}: seconds, median", cost.seconds_median),
            Row(f"{label}, {arm}: ratio to stock, first quartile", low),
            Row(f"{label}, {arm}: ratio to stock, median", cost.time_ratio_median, limits.get(arm) if timed else None),
            Row(f"{label}, {arm}: ratio to stock, third quartile", high),
            Row(f"{label}, {arm}: memory over stock, MiB", cost.peak_memory_mib_over_stock),
            Row(f"{label}, {arm}: function calls over stock", cost.calls_ratio),
        ]
        if moved is not None and cost.launches_beyond_passes is not None:
            rows.append(Row(f"{label}, {arm}: bytes a defended weight beyond its passes", moved))
            rows.append(Row(f"{label}, {arm}: launches beyond its passes", cost.launches_beyond_passes, limit))
        if cost.kernels_beyond_passes is not None:
            rows.append(Row(f"{label}, {arm}: kernels beyond its passes", cost.kernels_beyond_passes))
    for peer in SAMS:  # slower beyond the spread of both
        slower = found["SAM"].time_ratio_quartiles[0] / found[peer].time_ratio_quartiles[1]
        rows.append(Row(f"{label}, SAM: first quartile over the third of {peer}", slower, 1 if timed else None))
    return rows


def bert_base(setting: Setting) -> list[Row]:
    """BERT base, compute-bound and launch-bound."""
    if setting.quick:
        return costs(setting, "tiny-bert", 2, 8, 2, {})
    long = costs(setting, "bert-base", 64, 512, 12, {"whole model, K = 1": 2.0, "whole model, K = 2": 3.0})
    return [*long, *costs(setting, "bert-base", 32, 128, 15, {"whole model, K = 1": 2.1})]


def need_memory(setting: Setting, gib: float) -> None:
    """Raise `Skipped` on a GPU with less free memory."""
    if setting.device == "cuda" and not setting.quick:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            raise Skipped(f"expected {gib:.0f} GiB of free memory, got {free:.0f}")


def decoder(setting: Setting) -> list[Row]:
    """A Llama of 1 B float32 weights."""
    need_memory(setting, 60)
    if setting.quick:
        return costs(setting, "tiny-llama", 2, 8, 2, {})
    return costs(setting, "llama-1b", 4, 1024, 8, {"whole model, K = 1": 1.97, "whole model, K = 2": 2.97})


def bf16_weights(setting: Setting) -> list[Row]:
    """Memory of a step on bf16 weights beyond that of the stock step: at most 2 × the weights with one climb."""
    need_memory(setting, 40)
    shape, batch, length = ("tiny-llama", 2, 8) if setting.quick else ("llama-1b", 2, 512)
    model = random_model(shape, torch.bfloat16, setting.device)
    bench = Bench(model, batch, length, fused=True, arms=BEYOND)
    peaks = {arm: bench.counted(arm).peak for arm in bench.steps}
    size = sum(p.numel() for p in model.parameters())
    # The saved bits and the sum of the gradients; copies of the batch, here 40 KB, are 4e-5 of a byte a weight. With
    # two steps saved bits and a second gradient, and while a is made the largest tensor, of 66 million, twice.
    limits = dict(zip(BEYOND, (4.001, 4.6, 4.001), strict=True))
    return [
        Row(
            f"{arm}: bytes a weight beyond stock",
            (peaks[arm] - peaks[STOCK]) / size,
            None if setting.quick else limit,  # what is done in chunks is larger than a small model
        )
        for arm, limit in limits.items()
    ]


def tokens_for(model: Any, batches: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """Draw batches for a causal language model."""
    drawn = [torch.randint(model.config.vocab_size, (rows, length), device=model.device) for _ in range(batches)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


REFUSABLE = 60  # GiB; or they are refused before they start
GIB_AT_MOST: dict[str, tuple[Corruption, float]] = {
    "noise": (GaussianNoise(0.01), 30),
    "quantization": (Quantization(4), 30),
    "flips": (BitFlips(rate=1e-6), 30),
    "gradient": (GradientCorruption(L2), REFUSABLE),
    "multi-step": (MultiStepCorruption(L2, steps=1), REFUSABLE),
    "multi-step, K = 2": (MultiStepCorruption(L2, steps=2), REFUSABLE),
}
ON_THE_HOST = "multi-step, K = 3, bits saved on the host"
FLIP = "a worst bit flip"
SECONDS_AT_MOST = {FLIP: 120}


def evaluation_7b(setting: Setting) -> list[Row]:
    """Peak memory, weights included, while all of a Llama of 6.7 B bf16 weights is corrupted and measured."""
    need_memory(setting, 70)
    model: Any = random_model("tiny-llama" if setting.quick else "llama-7b", torch.bfloat16, setting.device)
    model.eval()
    weights = sum(p.nbytes for p in model.parameters())
    batches = tokens_for(model, 1, 1, 8 if setting.quick else 512)
    started = time.monotonic()
    parts = len(by_module(model))
    found = [
        Row("modules", parts),
        Row("selecting each module: seconds", time.monotonic() - started, None if setting.quick else 1),
    ]
    measured = {
        **GIB_AT_MOST,
        ON_THE_HOST: (MultiStepCorruption(L2, steps=3), REFUSABLE),
        FLIP: (WorstBitFlips(1, candidates=5), REFUSABLE),
    }
    for label, (corruption, gib) in measured.items():
        where = "cpu" if label == ON_THE_HOST else None
        evaluator = CorruptionEvaluator(model, LanguageModelMetric(batches), saved_on=where, progress=False)
        started = time.monotonic()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with PeakMemory() if setting.device == "cpu" else nullcontext() as memory:
            try:
                evaluator.evaluate([corruption], trials=1)
                peak = torch.cuda.max_memory_allocated() if memory is None else weights + memory.peak
            except torch.cuda.OutOfMemoryError:
                peak = math.inf
            except NotEnoughMemoryError as refused:  # before it started, with the number and the way out
                found.append(Row(f"{label}: GiB, refused: {refused}", 0 if gib == REFUSABLE else math.inf, gib))
                continue
        found.append(Row(f"{label}: GiB", peak / 2**30, None if setting.quick else gib))
        seconds_at_most = None if setting.quick else SECONDS_AT_MOST.get(label)
        found.append(Row(f"{label}: seconds", time.monotonic() - started, seconds_at_most))
    return found


def scores(setting: Setting) -> list[Row]:
    """What each of five formats costs each linear layer of a Llama of 1 B bf16 weights, four cells measured."""
    need_memory(setting, 20)
    model: Any = random_model("tiny-llama" if setting.quick else "llama-1b", torch.bfloat16, setting.device)
    batches = tokens_for(model, 1, 1, 8 if setting.quick else 512)
    size = sum(p.numel() for p in model.parameters())
    started = time.monotonic()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() if setting.device == "cpu" else nullcontext() as memory:
        record = sensitivity(model, batches, budget=4, progress=False)
    peak = memory.peak if memory is not None else torch.cuda.max_memory_allocated() - 2 * size
    measured = sum(bool(cell.measured) for cell in record.cells)
    return [
        Row("cells", len(record.cells)),
        Row("cells measured, away from 4", abs(measured - 4), 0),
        Row("seconds", time.monotonic() - started, None if setting.quick else 120),
        Row("bytes a weight beyond the weights", peak / size, None if setting.quick else 6),
    ]


def spread(setting: Setting) -> list[Row]:
    """A decoder of which Accelerate keeps a layer in main memory and one on the disk, against one in one place."""
    model: Any = random_model("tiny-llama", device=setting.device).eval()
    batches = tokens_for(model, 2, 2, 8)
    without_gradients = [GaussianNoise(0.1), Quantization(4)]
    every = [*without_gradients, GradientCorruption(L2), MultiStepCorruption(L2, steps=2)]

    def losses(layers: list[int], corruptions: list[Corruption]) -> list[float]:
        names = [f"model.layers.{index}" for index in layers]
        evaluator = CorruptionEvaluator(model, LanguageModelMetric(batches), target_modules=names, progress=False)
        return [row.mean("loss") for row in evaluator.evaluate(corruptions, trials=1).rows()]

    def measured() -> tuple[list[float], list[float]]:
        return losses([0], every), losses([0, 2], without_gradients)

    expected = measured()
    whole = [weight.detach().cpu().clone() for weight in select_parameters(model, "model.layers.0").values()]
    here: Any = 0 if setting.device == "cuda" else "cpu"
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), here)
    places |= {f"model.layers.{index}": place for index, place in enumerate((here, "disk", here))}
    with tempfile.TemporaryDirectory() as folder:
        accelerate.dispatch_model(model, places, main_device=here, offload_dir=folder)
        accelerate.cpu_offload(model.model.layers[2], execution_device=here)
        found = measured()
        after = [weight.detach().cpu() for weight in select_parameters(model, "model.layers.0").values()]
    rows = [Row("bytes that changed", differing_bits(after, whole), 0)]
    for where, *pair in zip(("on the device", "in main memory"), found, expected, strict=True):
        off = max(abs(ours / other - 1) for ours, other in zip(*pair, strict=True))
        rows.append(Row(f"losses, {where}: largest relative difference", off, 1e-5))
    return rows


def sweep(setting: Setting) -> list[Row]:
    """Each layer of a decoder under noise of three strengths, by a probe and by a plain loop.

    The data are 16 batches, as of a small validation set. A pass is one of all layers.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 16, "vocab_size": 32_000}
    with torch.device(setting.device):
        model: Any = LlamaForCausalLM(LlamaConfig(**(TINY if setting.quick else sizes)))
    model.eval()
    batches = tokens_for(model, 2, 2, 8) if setting.quick else tokens_for(model, 16, 4, 256)
    metric, noises = LanguageModelMetric(batches), [GaussianNoise(std) for std in (0.005, 0.01, 0.02)]
    layers = by_layer(model)

    def by_loop() -> None:
        metric(model)
        for layer in layers.values():
            weights = select_parameters(model, layer)
            for noise in noises:
                with corrupted(weights, noise(weights)):
                    metric(model)

    def by_probe() -> None:
        # Memory for what all parts have in common: more recordings of a batch would run its beginning again for each.
        LayerProbe(model, metric, targets=layers, memory=8 * 2**30, progress=False).evaluate(noises, trials=1)

    metric(model)  # warms up
    computed = 0

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal computed
            computed += 1
            return forward(*args, **kwargs)

        return call

    for layer in model.model.layers:
        layer.forward = counted(layer.forward)
    loop = seconds(by_loop)
    of_loop, computed = computed, 0
    probe = seconds(by_probe)
    limit = 0.6 if setting.device == "cuda" and not setting.quick else None
    return [
        Row("layers", len(layers)),
        Row("plain loop: passes", of_loop / len(model.model.layers)),
        Row("probe: passes", computed / len(model.model.layers)),
        Row("plain loop: seconds", loop),
        Row("probe: seconds", probe),
        Row("probe over plain loop", probe / loop, limit),
    ]


TOTAL = 505.0  # seconds for all checks; `gpu_checks.sh` ends what takes longer, imports included
# Each check with the seconds that it may take.
CHECKS: dict[str, tuple[Callable[[Setting], list[Row]], float]] = {
    "precision": (precision, 60),
    "restored": (restored, 45),
    "prefix": (prefix, 45),
    "same_as_cpu": (same_as_cpu, 45),
    "synchronizations": (synchronizations, 45),
    "bert_base": (bert_base, 120),
    "decoder": (decoder, 80),
    "bf16_weights": (bf16_weights, 45),
    "evaluation_7b": (evaluation_7b, 220),
    "scores": (scores, 120),
    "spread": (spread, 30),
    "sweep": (sweep, 80),
    "two_ranks": (two_ranks, 90),
    "two_processes": (two_processes, 150),
    "compiled": (compiled, 90),
}


def prepare_process(setting: Setting) -> None:
    """Let a process be quiet, not crowd the CPU, and multiply in full precision."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if setting.device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def run_check(name: str, setting: Setting, record: str) -> None:
    """Run a check in this process, and write what it found."""
    os.setsid()  # it ends with all that it starts
    prepare_process(setting)
    try:
        rows = CHECKS[name][0](setting)
        status = "holds" if all(row.holds for row in rows) else "fails"
        found: dict[str, Any] = {"status": status, "rows": [{**asdict(row), "holds": row.holds} for row in rows]}
    except Skipped as reason:
        found = {"status": "skipped", "reason": str(reason)}
    except BaseException:
        found = {"status": "fails", "reason": traceback.format_exc()}
    Path(record).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_in_budget(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Run a check in a process of its own, and end that when its time is over."""
    record = Path(setting.output) / f"{name}.json"
    record.unlink(missing_ok=True)
    started = time.monotonic()
    process = multiprocessing.get_context("forkserver").Process(target=run_check, args=(name, setting, str(record)))
    process.start()
    process.join(seconds)
    over = process.is_alive()
    if over:
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    if over:
        found: dict[str, Any] = {"status": "fails", "reason": f"took more than {seconds:.0f} s"}
    elif not record.exists():
        found = {"status": "fails", "reason": f"its process ended with {process.exitcode}"}
    else:
        found = json.loads(record.read_text(encoding="utf-8"))
    found["seconds"] = round(time.monotonic() - started, 1)
    record.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def shown(name: str, found: dict[str, Any]) -> str:
    """Return what a check found as text."""
    lines = [f"{name}: {found['status']} ({found['seconds']} s)"]
    if "reason" in found:
        lines.append(f"    {found['reason'].strip()}")
    for row in found.get("rows", []):
        limit = "" if row["limit"] is None else f"  (at most {row['limit']:g})"
        lines.append(f"    {'' if row['holds'] else 'FAILS  '}{row['what']}: {row['value']:.4g}{limit}")
    return "\n".join(lines)


def main() -> int:
    """Run the checks, write records and a summary as they come, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/gpu_checks", help="the folder of the records")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="some of the checks")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected a GPU, got none; pass --device cpu --quick to try the checks out", file=sys.stderr)
        return 2
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(options.device, options.quick, options.output)
    machine = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "devices": torch.cuda.device_count(),
        "quick": options.quick,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer", "hf_parcor.trainers"])
    first = context.Process(target=str)  # so that no check pays for the imports
    first.start()
    first.join()
    deadline = time.monotonic() + TOTAL
    checks: dict[str, Any] = {}
    summary = [", ".join(f"{key} {value}" for key, value in machine.items())]
    print(summary[0], flush=True)
    for name in options.only:
        checks[name] = run_in_budget(name, setting, max(1.0, min(CHECKS[name][1], deadline - time.monotonic())))
        summary.append(shown(name, checks[name]))
        print(summary[-1], flush=True)
        (folder / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
        record = json.dumps({"machine": machine, "checks": checks}, indent=2, ensure_ascii=False)
        (folder / "checks.json").write_text(record + "\n", encoding="utf-8")
    return int(any(found["status"] == "fails" for found in checks.values()))


if __name__ == "__main__":
    sys.exit(main())
