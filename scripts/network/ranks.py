"""Starts the processes of an engine, and brings back what the first one counted."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed
from torch.multiprocessing.spawn import spawn

from network.counting import ARMS, train

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
