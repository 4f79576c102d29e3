"""What a defended step waits for beyond the stock step: the GPU, and other processes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from steps.by_hand import step_of
from transformers import Trainer

from gpu.check import Row, Setting, Skipped
from gpu.models import LAST, batch_of, bert, risk, rows_for, trainer_of
from hf_parcor import ParameterDefenseTrainer


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
    script = Path(__file__).parents[1] / "benchmark_distributed.py"
    command = [sys.executable, str(script), "--shape", shape, "--output", str(record)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    counted = json.loads(record.read_text(encoding="utf-8"))["counted"]["DDP"]
    stock, local = (counted[arm]["collectives"]["all_reduce"] for arm in ("stock", "whole model, local"))
    return [
        Row(f"DDP, all-reduce: {what} unlike stock", abs(local[what] - stock[what]), 0) for what in ("calls", "bytes")
    ]
