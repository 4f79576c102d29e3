"""What a defended training step sends over the network beside the stock step, under DDP and FSDP2.

    python -m scripts.benchmark_distributed --output scripts/results/distributed.json

It starts its own ranks, on GPUs with NCCL, else on the CPU with gloo. Calls and bytes of an optimizer step are counted
by collective on rank 0, without accumulation, once a step is like the one before. Bytes are those of the whole tensor
that is reduced or gathered, so they do not depend on the number of ranks but for padding. From these counts follows
what a step costs on a cluster, on paper; the assumptions are printed with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainerCallback

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseMixin
from hf_parcor.strict_json import replace_text, to_strict_json
from scripts.training_steps import quiet_arguments


def _size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in _flat(tensors))


def _flat(tensors: Any) -> Iterator[Tensor]:
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for part in tensors:
            yield from _flat(part)


# Each operator with its collective, and where the whole tensor is: an argument, or −1 for what it returns.
_OPERATORS: dict[str, tuple[str, int]] = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", -1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
}
_WITHOUT_BYTES = {"c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls and bytes of collectives while it is entered, and the operations of matrix products.

    DDP reduces its buckets from C++, but through the dispatcher, in the thread state of the backward that was called;
    so it is seen here too, as a communication hook would see it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it.

        Raises:
            RuntimeError: A collective that the table does not have.
        """
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it is made of comes here next
        name = func._schema.name
        counted = func.namespace in {"c10d", "_c10d_functional"} and name not in _WITHOUT_BYTES
        if counted and name not in _OPERATORS:
            raise RuntimeError(f"expected one of {', '.join(_OPERATORS)}, got {name}; add it to the table")
        result = func(*args, **(kwargs or {}))
        if counted:
            collective, place = _OPERATORS[name]
            self.calls[collective] += 1
            self.bytes[collective] += _size(result if place < 0 else args[place])
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def read(self) -> dict[str, Any]:
        """Return what was counted since the last reading."""
        counted = {name: {"calls": self.calls[name], "bytes": self.bytes[name]} for name in sorted(self.calls)}
        found = {"collectives": counted, "operations": self.operations}
        self.calls, self.bytes, self.operations = Counter(), Counter(), 0
        return found


LAST = "last-encoder-layer"
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]},
}
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
    watch = ReadEachStep(counter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = quiet_arguments(
            per_device_train_batch_size=1,
            max_steps=STEPS,
            **(FSDP2 if engine == "FSDP2" else {}),
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


COUNTED = "counted.json"


def count(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of an engine, and return what the first counted, by arm."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(  # type: ignore[no-untyped-call]
            run_rank, args=(options.ranks, engine, options, Path(folder)), nprocs=options.ranks
        )
        return dict(json.loads((Path(folder) / COUNTED).read_text(encoding="utf-8")))


def run_rank(rank: int, ranks: int, engine: str, options: argparse.Namespace, folder: Path) -> None:
    """Train all arms of an engine on this rank; the first writes what it counted."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in here.items()}
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    # They meet at a file: a port that is free now may be taken when all have imported what they need.
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=ranks,
    )
    found = {}
    for label, arm in ARMS[engine].items():
        found[label] = train(engine, arm, options.shape, options.length, options.steps)
        if rank == 0:
            print(f"counted: {engine}, {label}", file=sys.stderr)
    if rank == 0:
        (folder / COUNTED).write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


# Collectives with what each rank sends of the whole tensor, on a ring of n ranks.
RING: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0 if n > 1 else 0.0,
}


@dataclass(frozen=True)
class Cluster:
    """GPUs in machines, and what stands between them.

    Args:
        gigabits_inside: What a GPU sends a second inside its machine.
        gigabits_across: The same between machines.
        gpus_of_machine: GPUs in one machine.
        microseconds: What a call waits for each level of a tree over the ranks.
        teraflops: The peak of a GPU, in 10¹² operations a second.
        share: Which part of the peak is reached.
    """

    gigabits_inside: float = 3600.0
    gigabits_across: float = 400.0
    gpus_of_machine: int = 8
    microseconds: float = 5.0
    teraflops: float = 989.0
    share: float = 0.5

    def bytes_a_second(self, ranks: int) -> float:
        """Return what a rank sends a second: a ring is as fast as its slowest link.

        Examples:
            >>> Cluster().bytes_a_second(8), Cluster().bytes_a_second(9)
            (450000000000.0, 50000000000.0)
        """
        gigabits = self.gigabits_inside if ranks <= self.gpus_of_machine else self.gigabits_across
        return gigabits * 1e9 / 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's parts."""

    compute: float
    communicate: float

    @property
    def one_after_the_other(self) -> float:
        """Without overlap."""
        return self.compute + self.communicate

    @property
    def overlapped(self) -> float:
        """With full overlap, which no program beats."""
        return max(self.compute, self.communicate)


def bytes_on_the_wire(collective: str, size: float, ranks: int) -> float:
    """Return what one rank sends for a collective over a whole tensor of `size` bytes.

    Raises:
        ValueError: An unknown collective, or no rank.

    Examples:
        >>> bytes_on_the_wire("all_reduce", 100, 4), bytes_on_the_wire("all_gather", 100, 4)
        (150.0, 75.0)
    """
    if collective not in RING:
        raise ValueError(f"collective: expected one of {', '.join(RING)}, got {collective!r}; choose one of these")
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}; pass how many there are")
    return size * RING[collective](ranks)


def step_time(
    collectives: Mapping[str, Mapping[str, int]], operations: float, ranks: int, cluster: Cluster
) -> StepTime:
    """Return the seconds of one step: bytes over bandwidth and a wait for each call; operations over their rate.

    Args:
        collectives: For each, its `calls` and its `bytes`, those of whole tensors.
        operations: Floating-point operations of one rank.
        ranks: How many GPUs there are.
        cluster: How fast they are.
    """
    sent = sum(bytes_on_the_wire(name, counted["bytes"], ranks) for name, counted in collectives.items())
    calls = sum(counted["calls"] for counted in collectives.values())
    wait = cluster.microseconds * 1e-6 * math.ceil(math.log2(ranks))
    return StepTime(
        compute=operations / (cluster.teraflops * 1e12 * cluster.share),
        communicate=sent / cluster.bytes_a_second(ranks) + calls * wait,
    )


def steps_on_paper(
    counted: Mapping[str, Mapping[str, Any]], sequences: float, gpus: Iterable[int], cluster: Cluster
) -> list[dict[str, Any]]:
    """Return what a step of each arm takes on clusters: milliseconds, and the ratio to the engine's stock step.

    Args:
        counted: What was counted of one sequence, by engine and arm.
        sequences: How many a GPU has.
        gpus: Sizes of clusters.
        cluster: How fast they are.
    """
    rows = []
    for engine, arms in counted.items():
        for label, arm in arms.items():
            for ranks in gpus:
                ours, stock = (
                    step_time(of["collectives"], of["operations"] * sequences, ranks, cluster)
                    for of in (arm, arms["stock"])
                )
                row: dict[str, Any] = {"engine": engine, "arm": label, "gpus": ranks}
                for overlap in ("one_after_the_other", "overlapped"):
                    here, there = getattr(ours, overlap), getattr(stock, overlap)
                    row[overlap] = {"milliseconds": round(here * 1e3, 3), "ratio": round(here / there, 3)}
                rows.append(row)
    return rows


def assumptions(tokens: int, cluster: Cluster) -> str:
    """Return what the model takes for granted."""
    return (
        f"Assumed: {tokens:,} tokens a GPU and step, no accumulation; operations as counted, at "
        f"{cluster.share:.0%} of {cluster.teraflops:g} TFLOP/s;\n"
        f"ring collectives, {cluster.gigabits_inside:g} Gbit/s a GPU in machines of {cluster.gpus_of_machine} and "
        f"{cluster.gigabits_across:g} Gbit/s across; a call waits\n"
        f"{cluster.microseconds:g} µs × log₂ n; float32 is sent, as counted; no optimizer, loader or stragglers. "
        "Stock steps in milliseconds,\nthe others as multiples of them: nothing overlaps, then (∥) all that is sent "
        "overlaps with all that is computed.\n'Global' waits for its corruption, so its ∥ is out of reach."
    )


def counts_table(counted: dict[str, dict[str, Any]]) -> str:
    """Return calls and bytes by collective as Markdown."""
    names = ["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
    lines = [
        cells(["calls: MB a step", "all-reduce", "all-gather", "red.-scat.", "broadcast"]),
        "|:--|--:|--:|--:|--:|",
    ]
    for engine, arms in counted.items():
        for label, arm in arms.items():
            sent = [arm["collectives"].get(name) for name in names]
            shown = ["" if found is None else f"{found['calls']}: {megabytes(found['bytes'])}" for found in sent]
            lines.append(cells([f"{engine}, {label}", *shown]))
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """Return a size in 10⁶ bytes, or that it is smaller than can be shown."""
    return f"{size / 1e6:.1f}" if size >= 50_000 else "< 0.1"


def paper_table(rows: list[dict[str, Any]]) -> str:
    """Return the model on paper as Markdown."""
    gpus = sorted({row["gpus"] for row in rows})
    headers = [header for ranks in gpus for header in (f"{ranks:,} GPUs", f"{ranks:,} ∥")]
    lines = [cells(["step", *headers]), "|:--|" + "--:|" * len(headers)]
    arms = dict.fromkeys((row["engine"], row["arm"]) for row in rows)
    for engine, arm in arms:
        shown = []
        for row in sorted((r for r in rows if (r["engine"], r["arm"]) == (engine, arm)), key=lambda r: int(r["gpus"])):
            for overlap in ("one_after_the_other", "overlapped"):
                time = row[overlap]
                shown.append(f"{time['milliseconds']:.1f} ms" if arm == "stock" else f"{time['ratio']:.2f}")
        lines.append(cells([f"{engine}, {arm}", *shown]))
    return "\n".join(lines)


def cells(row: list[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {row[0]:24} | " + " | ".join(f"{cell:>11}" for cell in row[1:]) + " |"


def main() -> None:
    """Count, print the tables, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the record goes, JSON")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", choices=CONFIGURATIONS, default="bert-base", help="what the model is like")
    parser.add_argument("--steps", type=int, default=1, help="corruption steps K")
    parser.add_argument("--length", type=int, default=8, help="tokens of the one sequence that each rank trains on")
    parser.add_argument("--tokens", type=int, default=32 * 128, help="on paper: tokens a GPU and step")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024], help="on paper: how many there are")
    for setting in fields(Cluster):
        flag = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(setting.default), default=setting.default, help="on paper: see Cluster")
    options = parser.parse_args()
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and options.ranks > devices:
        parser.error(f"--ranks: expected at most {devices}, as many as there are GPUs, got {options.ranks}")
    cluster = Cluster(**{setting.name: getattr(options, setting.name) for setting in fields(Cluster)})

    counted = {engine: count(engine, options) for engine in ARMS}
    # One sequence was counted.
    rows = steps_on_paper(counted, options.tokens / options.length, options.gpus, cluster)
    print(f"{options.shape}, {options.ranks} ranks, K = {options.steps}\n\n{counts_table(counted)}\n")
    print(f"{assumptions(options.tokens, cluster)}\n\n{paper_table(rows)}")
    record = {
        "command": " ".join(["python", "-m", "scripts.benchmark_distributed", *sys.argv[1:]]),
        "world_size": options.ranks,
        "backend": "nccl" if torch.cuda.is_available() else "gloo",
        "shape": options.shape,
        "parameters": sum(parameter.numel() for parameter in bert(options.shape).parameters()),
        "corruption_steps": options.steps,
        "length": options.length,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "counted": counted,
        "on_paper": {"cluster": asdict(cluster), "tokens": options.tokens, "rows": rows},
    }
    if options.output:
        replace_text(options.output, to_strict_json(record))


if __name__ == "__main__":
    main()
