"""What a defended training step costs beside the stock step, and beside what people would use instead.

    python -m scripts.benchmark --model MODEL --output scripts/results/benchmark.json
    python -m scripts.benchmark --shape bert-base --batch 64 --length 512 --bf16 --fused
    python -m scripts.benchmark --shape bert-base --compiled model --mode reduce-overhead
    python -m scripts.benchmark --shape llama-7b --dtype bfloat16 --batch 1 --length 512 --arms "whole model, K = 1"
    python -m scripts.benchmark --shape llama-0.3b --batch 1 --length 128
    python -m scripts.benchmark --shape narrow-bert --batch 2 --length 8 --bf16 --fused

Steps of all arms take turns on one model, each just after a stock step that it is compared with, since the speed of a
machine drifts; medians and quartiles of the ratios are reported, and on the CPU time is that of this process, whatever
else the machine did. The row of the stock step itself shows how far two of them differ. All else is counted, and
does not depend on how busy the machine is: operations of a step by PyTorch; functions that it calls, which a GPU with
little to compute waits for; its peak memory, on the CPU of the tensors
that it makes, on a GPU of the allocator; and what it does in weight space beside its passes, in bytes for each
defended weight and in launches, as where nothing can be asked for its value. On a GPU kernels are counted too.

The peers are driven by hand, without a Trainer: `pytorch_optimizer`'s SAM where it is installed
(`pip install --no-deps pytorch_optimizer`), a SAM in two steps, and an AWP loop as they are passed around, both
written here after their papers. LookSAM and SAM along the momentum are Trainers, those of `peer_trainers.py`.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import statistics
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    GradientCorruption,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    select_parameters,
)
from hf_parcor.defenses import Defense
from hf_parcor.reports.tables import markdown_table
from hf_parcor.strict_json import replace_text, to_strict_json
from hf_parcor.targets.stacks import find_stacks
from scripts.counting import PeakMemory, calls_of, kernels_beyond_passes, traffic_beyond_passes
from scripts.peer_trainers import LookSAMTrainer, MomentumTrainer, PeerTrainer
from scripts.training_steps import in_bfloat16, pairs_with, quartiles_of_ratios, quiet_arguments, step_of

RADIUS = 0.1
LIBRARY, TWO_STEPS, LOOP = "pytorch_optimizer's SAM", "SAM in two steps", "AWP loop"
PEERS = [*([LIBRARY] if find_spec("pytorch_optimizer") else []), TWO_STEPS, LOOP]
LOOKSAM, LOOKSAM_BETWEEN, MOMENTUM = "LookSAM, one step in five", "LookSAM, steps between", "along the momentum"
# Each with its Trainer, and the step of a training that it is timed at.
PEER_STEPS: dict[str, tuple[type[PeerTrainer], int]] = {
    LOOKSAM: (LookSAMTrainer, 0),
    LOOKSAM_BETWEEN: (LookSAMTrainer, 1),
    MOMENTUM: (MomentumTrainer, 1),
}


class Peers:
    """Optimizer steps on one model and one batch.

    Args:
        model: Any model that returns its loss.
        inputs: The batch.
        optimizer: That of the model.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.inputs, self.optimizer = model, inputs, optimizer

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return a step of each that is installed."""
        library = {LIBRARY: self.sam_of_pytorch_optimizer()} if LIBRARY in PEERS else {}
        return {**library, TWO_STEPS: self.sam_in_two_steps, LOOP: self.awp_loop}

    def sam_of_pytorch_optimizer(self) -> Callable[[], None]:
        """Return a step of the library's optimizer."""
        import pytorch_optimizer

        settings = {name: self.optimizer.defaults[name] for name in ("lr", "fused") if name in self.optimizer.defaults}
        optimizer = pytorch_optimizer.SAM(self.model.parameters(), type(self.optimizer), rho=RADIUS, **settings)

        def step() -> None:
            self._backward()
            optimizer.first_step(zero_grad=True)
            self._backward()
            optimizer.second_step(zero_grad=True)

        return step

    def sam_in_two_steps(self) -> None:
        """Run SAM as its paper's algorithm box says, parameter by parameter."""
        self._backward()
        saved = {}
        with torch.no_grad():
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            for p in parameters:
                saved[p] = p.clone()
                p.add_(p.grad * (RADIUS / (norm + 1e-12)))
        self.optimizer.zero_grad()
        self._update_from(saved)

    def awp_loop(self) -> None:
        """Run the loop that adds one adversarial pass to the clean one: weights alone, each in its own small box."""
        self._backward()
        saved = {}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.grad is None or "weight" not in name:
                    continue
                saved[p] = p.clone()
                size, slope = torch.norm(p), torch.norm(p.grad)
                if slope != 0 and not torch.isnan(slope):
                    p.add_(1e-2 * p.grad / (slope + 1e-6) * (size + 1e-6))
                    box = 1e-2 * saved[p].abs()
                    p.copy_(torch.min(torch.max(p, saved[p] - box), saved[p] + box))
        self._update_from(saved)

    def _backward(self) -> None:
        self.model.train()
        self.model(**self.inputs).loss.backward()

    def _update_from(self, saved: dict[Any, Tensor]) -> None:
        """Run the pass at the moved weights, and update the saved ones."""
        self._backward()
        with torch.no_grad():
            for p, before in saved.items():
                p.copy_(before)
        self.optimizer.step()
        self.optimizer.zero_grad()


L2 = CorruptionConstraint(p=2, epsilon=RADIUS)
STOCK = "stock Trainer"
LAST, TWO_LAST = "last layer", "two last layers"
ROUNDED = Quantization(4)
# Each arm with its defense, and which part of the model is defended.
OURS: dict[str, tuple[Defense, str]] = {
    **{f"whole model, K = {steps}": (MultiStepRisk(L2, steps=steps), "all") for steps in (1, 2, 3)},
    **{f"last layer, K = {steps}": (MultiStepRisk(L2, steps=steps), LAST) for steps in (1, 2, 3)},
    "ACRT": (ACRT(L2), "all"),
    "SAM": (SAM(L2), "all"),
    "AWP, K = 1": (AWP(L2), "all"),
    "gradient penalty": (GradientPenalty(weight=0.05), "all"),
    "4 bits": (CorruptionRisk(ROUNDED, clean_weight=0), "all"),
    "half 4 bits": (CorruptionRisk(ROUNDED), "all"),
    "worst direction and 4 bits": (CorruptionRisk([GradientCorruption(L2), ROUNDED], clean_weight=1 / 3), "all"),
    "two last layers, K = 1": (MultiStepRisk(L2, steps=1), TWO_LAST),
    "K = 1, ¼ of the batch": (MultiStepRisk(L2, steps=1, batch_share=1 / 4), "all"),
    **{
        f"SAM, {part} of the batch": (SAM(L2, batch_share=share), "all")
        for part, share in (("¼", 1 / 4), ("⅛", 1 / 8))
    },
}
ARMS = [STOCK, *OURS, *PEERS, *PEER_STEPS]

TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 18,
    "num_attention_heads": 32,
}


def llama_of(billions: float) -> LlamaConfig:
    """Return the Llama nearest to a size, 128 as wide as it is deep, with heads of 128.

    Examples:
        >>> config = llama_of(6.74)
        >>> config.hidden_size, config.intermediate_size, config.num_hidden_layers
        (4096, 11008, 32)
    """
    vocabulary = 32_000

    def inner(layers: int) -> int:  # two thirds of 4 widths, in multiples of 256
        return math.ceil(8 / 3 * 128 * layers / 256) * 256

    def size(layers: int) -> int:
        width = 128 * layers
        return layers * (4 * width**2 + 3 * width * inner(layers)) + 2 * vocabulary * width

    layers = min(range(1, 129), key=lambda count: abs(size(count) - 1e9 * billions))
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128 * layers,
        intermediate_size=inner(layers),
        num_hidden_layers=layers,
        num_attention_heads=layers,
    )


NARROW: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA_OF_SIZE = re.compile(r"llama-(\d+(?:\.\d+)?)b")
SHAPES: dict[str, Callable[[], nn.Module]] = {
    "tiny-bert": lambda: BertForSequenceClassification(BertConfig(**TINY)),
    "bert-base": lambda: BertForSequenceClassification(BertConfig()),
    "narrow-bert": lambda: BertForSequenceClassification(BertConfig(**NARROW)),  # its time is the host's
    "tiny-llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "llama-1b": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_1B)),  # 1.04 B parameters
    "llama-7b": lambda: LlamaForCausalLM(LlamaConfig()),  # 6.74 B
}


NAMES_OF_SHAPES = f"{', '.join(SHAPES)}, or llama-SIZEb, in billions"


def builder_of(shape: str) -> Callable[[], nn.Module]:
    """Return what builds a model of a shape.

    Raises:
        argparse.ArgumentTypeError: There is no such shape.
    """
    sized = LLAMA_OF_SIZE.fullmatch(shape)
    if shape not in SHAPES and sized is None:
        raise argparse.ArgumentTypeError(f"expected {NAMES_OF_SHAPES}; got {shape!r}")
    return SHAPES[shape] if sized is None or shape in SHAPES else lambda: LlamaForCausalLM(llama_of(float(sized[1])))


def known_shape(name: str) -> str:
    """Return the name of a shape, or refuse it."""
    builder_of(name)
    return name


def random_model(shape: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """Build a model of one of the shapes with random weights, where it is going to be."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that 7 B are never there in float32
    try:
        with torch.device(device):
            return builder_of(shape)()
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Cost:
    """What a step of an arm costs; what a peer or a double backward does in weight space is not counted."""

    arm: str
    operations_ratio: float
    calls_ratio: float
    time_ratio_median: float
    time_ratio_quartiles: tuple[float, float]
    seconds_median: float
    peak_memory_mib_over_stock: int
    bytes_per_defended_weight: float | None
    launches_beyond_passes: int | None
    kernels_beyond_passes: int | None


class Counted(NamedTuple):
    """A step's operations, its function calls, and the most bytes that it takes beside what was there."""

    operations: int
    calls: int
    peak: int


class Bench:
    """One model with one batch, and an optimizer step for each arm.

    Args:
        model: A classifier of two classes, or a causal language model, on its device.
        batch: How many rows it gets.
        length: How many tokens a row has.
        bf16: Whether it computes in bf16 autocast.
        fused: Whether AdamW is the fused one.
        compiled: What is compiled, the model or each of its layers; None for nothing.
        mode: That of `torch.compile`.
        arms: Which of `ARMS` to look at; the stock step always is.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        *,
        bf16: bool = False,
        fused: bool = False,
        compiled: str | None = None,
        mode: str = "default",
        arms: Collection[str] = tuple(ARMS),
    ) -> None:
        self.model, self.device = model, model.device
        self.arguments = quiet_arguments(max_grad_norm=0, use_cpu=model.device.type == "cpu")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused or None)
        layers, self.is_decoder = model.config.num_hidden_layers, isinstance(model, LlamaForCausalLM)
        tokens = torch.randint(model.config.vocab_size, (batch, length), device=self.device)
        mask = torch.ones(batch, length, dtype=torch.long, device=self.device)
        labels = tokens if self.is_decoder else torch.randint(2, (batch,), device=self.device)
        self.inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        stack, ends = ("layers", ["model.norm", "lm_head"]) if self.is_decoder else ("layer", ["pooler", "classifier"])
        self.targets: dict[str, str | list[str]] = {
            "all": "all",
            LAST: "last-decoder-layer" if self.is_decoder else "last-encoder-layer",
            TWO_LAST: [f"{stack}.{layers - 2}", f"{stack}.{layers - 1}", *ends],
        }
        if bf16:
            in_bfloat16(model, self.device.type)
        if compiled:
            layers_of = [layer for stack in find_stacks(model) for layer in stack.blocks.values()]
            for part in [model] if compiled == "model" else layers_of:
                part.compile(mode=mode)
        every = {STOCK: self.trained(Trainer)}
        for arm, (defense, part) in OURS.items():
            if arm in arms:
                every[arm] = self.trained(ParameterDefenseTrainer, defense=defense, target_modules=self.targets[part])
        every |= Peers(self.model, self.inputs, self.optimizer).steps()
        every |= {arm: self.of_peer(kind, at) for arm, (kind, at) in PEER_STEPS.items() if arm in arms}
        self.steps = {arm: step for arm, step in every.items() if arm in {STOCK, *arms}}

    def trained(self, kind: type[Trainer], **options: Any) -> Callable[[], None]:
        """Return the step of a Trainer; the optimizer is the same for all."""
        return self._updated(step_of(kind(model=self.model, args=self.arguments, **options), self.model, self.inputs))

    def of_peer(self, kind: type[PeerTrainer], at: int) -> Callable[[], None]:
        """Return what the Trainer of a peer does in each step of this number."""
        trainer = kind(model=self.model, args=self.arguments)
        trainer.defense = None
        trainer.optimizer, trainer.state.global_step = self.optimizer, at
        return self._updated(step_of(trainer, self.model, self.inputs))

    def _updated(self, passes: Callable[[], object]) -> Callable[[], None]:
        def step() -> None:
            passes()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step

    def counted(self, arm: str) -> Counted:
        """Count a step; one comes first, which may look around."""
        self.steps[arm]()
        calls = calls_of(self.steps[arm])
        before = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        watch = nullcontext() if self.device.type == "cuda" else PeakMemory()
        with FlopCounterMode(display=False) as counter, watch as memory:
            self.steps[arm]()
        # As on a CPU: without what PyTorch's allocator leaves over, up to 1 MiB a tensor.
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before if memory is None else memory.peak
        return Counted(int(counter.get_total_flops()), calls, peak)

    def beyond_passes(self, arm: str) -> tuple[float, int, int | None] | tuple[None, None, None]:
        """Return bytes for each defended weight, launches, and on a GPU kernels, in weight space alone."""
        defense, part = OURS.get(arm, (None, ""))
        if defense is None or isinstance(defense, GradientPenalty):
            return None, None, None
        if isinstance(defense, AWP):
            defense = replace(defense, input_epsilon=0.0)  # inputs are no weights
        weights = select_parameters(self.model, self.targets[part])
        traffic = traffic_beyond_passes(defense, weights)
        kernels = kernels_beyond_passes(defense, weights) if self.device.type == "cuda" else None
        size = sum(weight.numel() for weight in weights.values())
        return traffic.bytes.total() / size, traffic.launches.total(), kernels

    def costs(self, rounds: int) -> list[Cost]:
        """Count and time the steps of all arms."""
        counted = {arm: self.counted(arm) for arm in tqdm(self.steps, desc="counting", disable=None)}
        stock = counted[STOCK]
        times = pairs_with(self.steps[STOCK], self.steps, tqdm(range(rounds), desc="rounds", disable=None))
        found = []
        for arm in self.steps:
            low, middle, high = quartiles_of_ratios(times[arm])
            of_arm = counted[arm]
            moved, launches, kernels = self.beyond_passes(arm)
            found.append(
                Cost(
                    arm,
                    operations_ratio=round(of_arm.operations / stock.operations, 3),
                    calls_ratio=round(of_arm.calls / stock.calls, 3),
                    time_ratio_median=round(middle, 3),
                    time_ratio_quartiles=(round(low, 3), round(high, 3)),
                    seconds_median=round(statistics.median(ours for ours, _ in times[arm]), 4),
                    peak_memory_mib_over_stock=round((of_arm.peak - stock.peak) / 2**20),
                    bytes_per_defended_weight=None if moved is None else round(moved, 1),
                    launches_beyond_passes=launches,
                    kernels_beyond_passes=kernels,
                )
            )
        return found


def table(costs: list[Cost]) -> str:
    """Return costs as Markdown."""
    on_gpu = any(cost.kernels_beyond_passes is not None for cost in costs)
    times = ["time, median (quartiles)", "seconds"]
    header = ["step", "operations", "calls", *times, "memory, MiB", "bytes a weight", "launches"]
    rows = []
    for cost in costs:
        low, high = cost.time_ratio_quartiles
        rows.append(
            [
                cost.arm,
                f"{cost.operations_ratio:.2f}",
                f"{cost.calls_ratio:.2f}",
                f"{cost.time_ratio_median:.2f} ({low:.2f}–{high:.2f})",
                f"{cost.seconds_median:.3g}",
                f"{cost.peak_memory_mib_over_stock:+d}",
                "" if cost.bytes_per_defended_weight is None else f"{cost.bytes_per_defended_weight:.0f}",
                "" if cost.launches_beyond_passes is None else f"{cost.launches_beyond_passes}",
                *(["" if cost.kernels_beyond_passes is None else f"{cost.kernels_beyond_passes}"] * on_gpu),
            ]
        )
    return markdown_table([*header, *["kernels"] * on_gpu], rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a folder or a name on the Hub, for a classifier of two classes")
    what.add_argument("--shape", type=known_shape, help=f"a model with random weights instead: {NAMES_OF_SHAPES}")
    parser.add_argument("--output", type=Path, help="where the record goes, JSON")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2, for quartiles; default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="rows a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 autocast")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="that of the weights")
    parser.add_argument("--fused", action="store_true", help="update with PyTorch's fused AdamW")
    parser.add_argument("--compiled", choices=["model", "layers"], help="compile it as one, or each layer by itself")
    parser.add_argument("--mode", choices=["default", "reduce-overhead"], default="default", help="of torch.compile")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help=f"some of {ARMS}")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, which have quartiles, got {options.rounds}")
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, options.dtype)
    if options.shape:
        model = random_model(options.shape, dtype, device)
    else:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(options.model, dtype=dtype).to(device)
    settings = {name: getattr(options, name) for name in ("bf16", "fused", "compiled", "mode")}
    costs = Bench(model, options.batch, options.length, arms=options.arms, **settings).costs(options.rounds)
    print(table(costs))
    record = {
        "shape": options.shape,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rounds": options.rounds,
        "batch": options.batch,
        "length": options.length,
        "dtype": options.dtype,
        **settings,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "rows": [asdict(cost) for cost in costs],
    }
    if options.output:
        replace_text(options.output, to_strict_json(record))


if __name__ == "__main__":
    main()
