"""All that needs a GPU, check by check, each in a process and a time budget of its own; run by `gpu_checks.sh`.

    bash scripts/gpu_checks.sh                        # records to $OUT, or to runs/gpu_checks
    bash scripts/gpu_checks.sh --device cpu --quick   # small shapes: tries out the checks themselves

Ends with 0 if every check that ran holds, with 1 if one does not, and with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn
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
    FloatQuantization,
    GaussianNoise,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    RandomCorruption,
    UniformNoise,
)
from hf_parcor.functional import constrained_maximum
from scripts.training_steps import interleaved, quartiles_of_ratios, quiet_arguments, step_of


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


def in_bfloat16(model: nn.Module, device: str) -> nn.Module:
    """Let a model compute in bf16 autocast, as the Trainer's loop would; steps by hand do not come through there."""
    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    return model


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
        tempfile.mkdtemp(),
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
    """Three Trainer steps against autograd by hand: the difference of weights over what the steps moved."""
    found = []
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
    """Two steps of a compiled model against those of the plain one."""
    backend = "inductor" if setting.device == "cuda" else "aot_eager"
    moved = []
    choices: list[dict[str, Any]] = [{}, {"torch_compile": True, "torch_compile_backend": backend}]
    for options in choices:
        model = bert(setting)
        before = [w.detach().clone() for w in model.parameters()]
        options |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": RATE}
        rows = rows_for(8, 16)
        trainer_of(setting, ParameterDefenseTrainer, model, options, train_dataset=rows, defense=risk(1)).train()
        moved.append([a.detach() - b for a, b in zip(model.parameters(), before, strict=True)])
    return [Row(f"{backend}: distance from the plain run", distance(moved[1], moved[0]), 1e-3)]


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
    weights = {"a": torch.randn(size), "b": torch.randn(size, 3)}
    there = {name: value.to(setting.device) for name, value in weights.items()}
    found = []
    exact = [
        *(Quantization(4), Quantization(8, "channel", code_range="full"), Quantization(4, symmetric=False)),
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


BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
Arms = dict[str, Callable[[], object]]


def bert_base(setting: Setting) -> list[Row]:
    """BERT base, batch 32 × 128, bf16 autocast."""
    sizes, rows, length = (dict[str, int](), 2, 8) if setting.quick else (BERT_BASE, 32, 128)
    model = bert(setting, **sizes)
    defended: dict[str, dict[str, Any]] = {
        **{f"whole model, K = {steps}": {"defense": risk(steps)} for steps in (1, 2, 3)},
        **{f"last layer, K = {steps}": {"defense": risk(steps), "target_modules": LAST} for steps in (1, 2, 3)},
        "SAM": {"defense": SAM(L2)},
    }
    arms = arms_of(setting, model, batch_of(rows_for(rows, length), setting.device), defended)
    return measure(setting, arms, rounds=2 if setting.quick else 20)


def decoder(setting: Setting) -> list[Row]:
    """A Llama of about 1.1 B float32 parameters, or fewer where memory is short, in bf16 autocast."""
    width, layers, rows, length = 64, 2, 2, 8
    if setting.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        # Weights, gradients, saved weights, a partial sum and a vector in the making: 20 bytes each, and activations.
        width, layers, rows, length = (2048, 20, 4, 512) if free > 40 * 2**30 else (1024, 16, 4, 256)
    if setting.quick:
        width, layers, rows, length = 64, 2, 2, 8
    config = LlamaConfig(
        vocab_size=VOCABULARY if setting.quick else 32_000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if setting.quick else width // 64,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        model: nn.Module = LlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (rows, length), device=setting.device)
    defended: dict[str, dict[str, Any]] = {
        "whole model, K = 1": {"defense": risk(1)},
        "last layer, K = 1": {"defense": risk(1), "target_modules": "last-decoder-layer"},
    }
    arms = arms_of(setting, model, {"input_ids": tokens, "labels": tokens}, defended)
    size = Row("millions of parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    return [size, *measure(setting, arms, rounds=2 if setting.quick else 8)]


def arms_of(setting: Setting, model: nn.Module, batch: dict[str, Tensor], defended: dict[str, dict[str, Any]]) -> Arms:
    """Return steps of the stock Trainer and of defended ones, on one model and one batch, with an update each."""
    in_bfloat16(model, setting.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def arm(kind: type[Trainer], **more: Any) -> Callable[[], object]:
        step = step_of(trainer_of(setting, kind, model, {}, **more), model, batch)

        def run() -> None:
            step()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {"stock": arm(Trainer), **{label: arm(ParameterDefenseTrainer, **more) for label, more in defended.items()}}


def measure(setting: Setting, arms: Arms, rounds: int) -> list[Row]:
    """Interleave the arms' steps; report seconds, quartiles of the ratio to the stock step, and peak memory."""
    cuda = setting.device == "cuda"
    peaks = {}
    for arm, step in arms.items():  # also warms up
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step()
        if cuda:
            peaks[arm] = torch.cuda.max_memory_allocated()
    times = interleaved(arms, range(rounds))
    found = []
    for arm in arms:
        low, middle, high = quartiles_of_ratios(times[arm], times["stock"])
        found.append(Row(f"{arm}: seconds, median", statistics.median(times[arm])))
        found.append(Row(f"{arm}: ratio to stock, first quartile", low))
        found.append(Row(f"{arm}: ratio to stock, median", middle))
        found.append(Row(f"{arm}: ratio to stock, third quartile", high))
        if cuda:
            found.append(Row(f"{arm}: peak memory, MiB", peaks[arm] / 2**20))
    return found


TOTAL = 500.0  # seconds for all checks
# Each check with the seconds that it may take.
CHECKS: dict[str, tuple[Callable[[Setting], list[Row]], float]] = {
    "precision": (precision, 60),
    "restored": (restored, 45),
    "prefix": (prefix, 45),
    "same_as_cpu": (same_as_cpu, 45),
    "synchronizations": (synchronizations, 45),
    "bert_base": (bert_base, 90),
    "decoder": (decoder, 90),
    "two_processes": (two_processes, 150),
    "compiled": (compiled, 90),
}


def run_check(name: str, setting: Setting, record: str) -> None:
    """Run a check in this process, and write what it found."""
    os.setsid()  # it ends with all that it starts
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if setting.device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
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
