"""What a defended training step costs beside the stock step, and beside what people would use instead.

    python -m scripts.benchmark --model MODEL --output scripts/results/benchmark.json

Steps of all arms are interleaved on one model, so that a machine whose speed drifts drifts for all of them; ratios to
the stock step are taken within a round, and medians and quartiles over rounds are reported. Operations are counted by
PyTorch. Peak memory is that of a process of its own for each arm (on a GPU, of its allocator), less that of the stock
Trainer.

The peers are driven by hand, without a Trainer: `pytorch_optimizer`'s SAM where it is installed
(`pip install --no-deps pytorch_optimizer`), a SAM in two steps, and an AWP loop as they are passed around, both
written here after their papers.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, Trainer

from hf_parcor import ACRT, AWP, SAM, CorruptionConstraint, GradientPenalty, MultiStepRisk, ParameterDefenseTrainer
from hf_parcor.defenses import Defense
from scripts.training_steps import interleaved, quartiles_of_ratios, quiet_arguments, step_of

RADIUS = 0.1


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
        library = (
            {"pytorch_optimizer's SAM": self.sam_of_pytorch_optimizer()} if find_spec("pytorch_optimizer") else {}
        )
        return {**library, "SAM in two steps": self.sam_in_two_steps, "AWP loop": self.awp_loop}

    def sam_of_pytorch_optimizer(self) -> Callable[[], None]:
        """Return a step of the library's optimizer."""
        import pytorch_optimizer

        optimizer = pytorch_optimizer.SAM(self.model.parameters(), torch.optim.AdamW, rho=RADIUS, lr=1e-5)

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
LAST = "last-encoder-layer"
OURS: dict[str, tuple[Defense, str | list[str] | None]] = {
    **{f"whole model, K = {steps}": (MultiStepRisk(L2, steps=steps), None) for steps in (1, 2, 3)},
    **{f"last layer, K = {steps}": (MultiStepRisk(L2, steps=steps), LAST) for steps in (1, 2, 3)},
    "ACRT": (ACRT(L2), None),
    "SAM": (SAM(L2), None),
    "AWP, K = 1": (AWP(L2), None),
    "gradient penalty": (GradientPenalty(weight=0.05), None),
    "two last layers, K = 1": (MultiStepRisk(L2, steps=1), ["layer.4", "layer.5", "pooler", "classifier"]),
    "K = 1, ¼ of the batch": (MultiStepRisk(L2, steps=1, batch_share=1 / 4), None),
    **{
        f"SAM, {part} of the batch": (SAM(L2, batch_share=share), None) for part, share in (("¼", 1 / 4), ("⅛", 1 / 8))
    },
}


class Bench:
    """One model with one batch, and an optimizer step for each arm."""

    def __init__(self, name: str, batch: int, length: int) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForSequenceClassification.from_pretrained(name)
        self.arguments = quiet_arguments(tempfile.mkdtemp(), max_grad_norm=0)
        device = self.arguments.device
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.inputs = {
            "input_ids": torch.randint(self.model.config.vocab_size, (batch, length), device=device),
            "attention_mask": torch.ones(batch, length, dtype=torch.long, device=device),
            "labels": torch.randint(2, (batch,), device=device),
        }
        self.arms: dict[str, Callable[[], None]] = {STOCK: self.trained(Trainer)}
        for label, (defense, target) in OURS.items():
            self.arms[label] = self.trained(ParameterDefenseTrainer, defense=defense, target_modules=target)
        self.arms |= Peers(self.model, self.inputs, self.optimizer).steps()

    def trained(self, kind: type[Trainer], **options: Any) -> Callable[[], None]:
        """Return the step of a Trainer; the optimizer is the same for all."""
        passes = step_of(kind(model=self.model, args=self.arguments, **options), self.model, self.inputs)

        def step() -> None:
            passes()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step

    def operations(self, arm: str) -> int:
        """Count the floating-point operations of one step, after one that may look around first."""
        self.arms[arm]()
        with FlopCounterMode(display=False) as counter:
            self.arms[arm]()
        return int(counter.get_total_flops())

    def peak_memory(self, arm: str) -> int:
        """Return the peak of this process after some steps, in bytes."""
        for _ in range(3):
            self.arms[arm]()
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Return the record's rows as Markdown."""
    shown = []
    for row in rows:
        low, high = row["time_ratio_quartiles"]
        ratio = f"{row['time_ratio_median']:.2f} ({low:.2f}–{high:.2f})"
        seconds, memory = f"{row['seconds_median']:.2f}", f"{row['peak_memory_mib_over_stock']:+d}"
        shown.append([row["arm"], f"{row['operations_ratio']:.2f}", ratio, seconds, memory])
    headers = ["step", "operations", "time, median (quartiles)", "seconds", "peak memory, MiB"]
    alignment = ["left", *["right"] * 4]
    return tabulate(shown, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def main() -> None:
    """Measure, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--output", type=Path, help="where the record goes, JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--peak-memory-of", metavar="ARM", help="only print the peak memory of one arm, in bytes")
    options = parser.parse_args()
    bench = Bench(options.model, options.batch, options.length)
    if options.peak_memory_of:
        print(bench.peak_memory(options.peak_memory_of))
        return

    def memory(arm: str) -> int:
        command = [sys.executable, "-m", "scripts.benchmark", *sys.argv[1:], "--peak-memory-of", arm]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    peaks = {arm: memory(arm) for arm in tqdm(bench.arms, desc="memory")}
    operations = {arm: bench.operations(arm) for arm in tqdm(bench.arms, desc="operations")}
    times = interleaved(bench.arms, tqdm(range(options.rounds), desc="rounds"))

    rows = []
    for arm in bench.arms:
        low, middle, high = quartiles_of_ratios(times[arm], times[STOCK])
        rows.append(
            {
                "arm": arm,
                "operations_ratio": round(operations[arm] / operations[STOCK], 3),
                "time_ratio_median": round(middle, 3),
                "time_ratio_quartiles": [round(low, 3), round(high, 3)],
                "seconds_median": round(statistics.median(times[arm]), 3),
                "peak_memory_mib_over_stock": round((peaks[arm] - peaks[STOCK]) / 2**20),
            }
        )
    record = {
        "rounds": options.rounds,
        "batch": options.batch,
        "length": options.length,
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rows": rows,
    }
    print(table(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
