"""What the defended training step costs: time and operations against the stock step, in one run.

    python scripts/benchmark_step.py --model MODEL --output scripts/results/benchmark_step.json

Steps are interleaved (stock, K = 1, 2, 3, stock, ...) on the same model, so that a machine whose speed drifts drifts
for all of them; the ratio is taken within a round, and medians and quartiles over rounds are reported. Operations are
counted by PyTorch. What it costs in memory does not depend on the machine: `tests/defenses/test_step.py` asserts it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer

STEPS = (1, 2, 3)


class Bench:
    """One model, one optimizer, and a stock and a defended Trainer around them."""

    def __init__(self, name: str, norm: float, epsilon: float, batch: int, length: int) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForSequenceClassification.from_pretrained(name)
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=not torch.cuda.is_available(), max_grad_norm=0
        )
        self.model.to(arguments.device)
        self.stock = Trainer(model=self.model, args=arguments)
        self.defended = ParameterDefenseTrainer(model=self.model, args=arguments)
        for trainer in (self.stock, self.defended):
            trainer.current_gradient_accumulation_steps = 1
            trainer.state.epoch = 0.0
        self.constraint = CorruptionConstraint(p=norm, epsilon=epsilon)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        vocabulary = self.model.config.vocab_size
        self.inputs = {
            "input_ids": torch.randint(vocabulary, (batch, length)),
            "attention_mask": torch.ones(batch, length, dtype=torch.long),
            "labels": torch.randint(2, (batch,)),
        }

    def step(self, steps: int) -> None:
        """Run a whole training step: the stock one for `steps = 0`."""
        self.defended.defense = MultiStepRisk(self.constraint, steps=max(steps, 1))
        trainer: Trainer = self.defended if steps else self.stock
        trainer.training_step(self.model, dict(self.inputs))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, steps: int) -> float:
        """Time one step, with the device done."""
        started = time.perf_counter()
        self.step(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def operations(self, steps: int) -> int:
        """Count the floating-point operations of one step."""
        with FlopCounterMode(display=False) as counter:
            self.step(steps)
        return int(counter.get_total_flops())


def main() -> None:
    """Measure, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--output", type=Path, help="where the record goes, JSON")
    parser.add_argument("--norm", type=float, default=2.0, help="2 or inf")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    epsilon = 5e-4 if math.isinf(options.norm) else 0.1
    bench = Bench(options.model, options.norm, epsilon, options.batch, options.length)
    operations = {steps: bench.operations(steps) for steps in (0, *STEPS)}
    for steps in (0, *STEPS):
        bench.step(steps)
    times: dict[int, list[float]] = {steps: [] for steps in (0, *STEPS)}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for steps in times:
            times[steps].append(bench.seconds(steps))

    rows: list[dict[str, Any]] = []
    for steps in STEPS:
        ratios = [ours / stock for ours, stock in zip(times[steps], times[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "steps": steps,
                "operations_ratio": operations[steps] / operations[0],
                "time_ratio_median": round(middle, 3),
                "time_ratio_quartiles": [round(low, 3), round(high, 3)],
                "time_over_passes": round(middle / (steps + 1), 3),
            }
        )
    record = {
        "stock_step_seconds_median": round(statistics.median(times[0]), 3),
        "rounds": options.rounds,
        "batch": options.batch,
        "length": options.length,
        "norm": str(options.norm),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rows": rows,
    }
    print(json.dumps(record, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
