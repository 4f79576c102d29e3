"""Starts the processes of an engine, and brings back what the first one counted."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed
from torch.multiprocessing.spawn import spawn

from network.counting import ARMS, train


def count(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of an engine, and return what the first counted, by arm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/counted.json"
        spawn(  # type: ignore[no-untyped-call]
            run_rank, args=(options.ranks, port, engine, options, output), nprocs=options.ranks
        )
        return dict(json.loads(Path(output).read_text(encoding="utf-8")))


def run_rank(rank: int, ranks: int, port: int, engine: str, options: argparse.Namespace, output: str) -> None:
    """Train all arms of an engine on this rank; the first writes what it counted."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"}
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = {}
    for label, arm in ARMS[engine].items():
        found[label] = train(engine, arm, options.shape, options.length, options.steps)
        if rank == 0:
            print(f"counted: {engine}, {label}", file=sys.stderr)
    if rank == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()
