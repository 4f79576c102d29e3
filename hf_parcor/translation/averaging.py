"""The mean of the last checkpoints of a run, as fairseq's `average_checkpoints.py` makes it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
_FOR_GOING_ON = r"optimizer|scheduler|scaler|rng_state|trainer_state|training_args|pytorch_model"
_MEASURED = r"robustness|probe|quick|recipe|sensitivity|README"  # of the weights of one checkpoint
_OF_ONE = re.compile(rf"({_FOR_GOING_ON}|{_MEASURED}).*")


def last_checkpoints(folder: str | Path, count: int) -> list[Path]:
    """Return the last checkpoints of a Trainer's output folder, the oldest of them first.

    Raises:
        ValueError: There are fewer.
    """
    found = {
        int(match.group(1)): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    if not 1 <= count <= len(found):
        raise ValueError(
            f"count: expected 1 to {len(found)}, as many checkpoints as {folder} has, got {count}; keep more with "
            "save_total_limit"
        )
    return [found[step] for step in sorted(found)[-count:]]


def average_weights(checkpoints: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return w = (w_1 + ... + w_n) / n of the weights of n checkpoints, summed in fp64, in the dtype that they have.

    Args:
        checkpoints: Folders with a `model.safetensors` each.

    Raises:
        ValueError: There are none, one has no such file, or they have other names, shapes or dtypes.
    """
    if not checkpoints:
        raise ValueError("checkpoints: expected at least one folder, got none; name the checkpoints")
    total: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    for folder in checkpoints:
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise ValueError(f"{folder}: expected {WEIGHTS}, found none; save with safetensors, in one file")
        weights = load_file(path)
        first = first or weights
        _check_same(first, weights, folder)
        for name, value in weights.items():
            exact = value.double() if value.is_floating_point() else value
            if name not in total:
                total[name] = exact.clone()
            elif value.is_floating_point():
                total[name] += exact
    return {
        name: (value / len(checkpoints)).to(first[name].dtype) if value.is_floating_point() else value
        for name, value in total.items()
    }


def average_checkpoints(checkpoints: Sequence[str | Path], output: str | Path) -> Path:
    """Write the mean of checkpoints as a model folder, with configuration and tokenizers of the last one.

    What was measured of the last one, and its card, are not of the mean, and are left behind.

    Args:
        checkpoints: Folders with a `model.safetensors` each.
        output: The folder to write.

    Returns:
        The folder, which `from_pretrained` loads.

    Raises:
        ValueError: There are none, one has no such file, they have other names, shapes or dtypes, or the output is one
            of them.
    """
    folder = Path(output)
    if folder.resolve() in {Path(checkpoint).resolve() for checkpoint in checkpoints}:
        raise ValueError(f"output: expected another folder than the checkpoints, got {output}; name a new one")
    weights = average_weights(checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(checkpoints[-1]).iterdir()):
        if (path / "tokenizer_config.json").is_file():  # a second tokenizer
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.name != WEIGHTS and path.is_file() and not _OF_ONE.fullmatch(path.name):
            shutil.copy2(path, folder / path.name)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def _check_same(first: dict[str, Tensor], weights: dict[str, Tensor], folder: str | Path) -> None:
    odd = sorted(first.keys() ^ weights.keys())
    odd += [
        name
        for name, value in first.items()
        if name in weights and (value.shape, value.dtype) != (weights[name].shape, weights[name].dtype)
    ]
    if odd:
        raise ValueError(
            f"{folder}: expected the weights of the first checkpoint, {odd[0]!r} differs; average those of one run"
        )
    counts = [name for name, value in first.items() if not value.is_floating_point()]
    if not all(torch.equal(first[name], weights[name]) for name in counts):
        raise ValueError(f"{folder}: expected the whole numbers of the first checkpoint; average those of one run")
