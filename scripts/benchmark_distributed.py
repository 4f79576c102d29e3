"""What a defended training step sends over the network beside the stock step, under DDP and FSDP2.

    python scripts/benchmark_distributed.py --output scripts/results/distributed.json

It starts its own ranks, on GPUs with NCCL, else on the CPU with gloo. Calls and bytes of an optimizer step are counted
by collective on rank 0, without accumulation, once a step is like the one before. Bytes are those of the whole tensor
that is reduced or gathered, so they do not depend on the number of ranks but for padding. From these counts follows
what a step costs on a cluster, on paper; the assumptions are printed with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, fields
from pathlib import Path

import accelerate
import torch
import transformers
from network.cluster import Cluster, assumptions, steps_on_paper
from network.counting import ARMS, CONFIGURATIONS, bert
from network.ranks import count
from network.tables import counts_table, paper_table


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
        "command": " ".join(["python", "scripts/benchmark_distributed.py", *sys.argv[1:]]),
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
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
