"""The example loop: it learns, and says what the corruption costs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import accelerate_loop

SETTINGS = {"epsilon": 0.1, "steps": 1, "epochs": 3, "lr": 0.01, "seed": 0, "cpu": True}


def trained(accumulation: int) -> float:
    return float(accelerate_loop.train(Namespace(gradient_accumulation_steps=accumulation, **SETTINGS)))


def test_it_learns(capsys):
    accuracy = trained(2)
    assert accuracy > 0.95
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split(":")[0] for line in lines]
    assert heads == ["processes", "epoch 0", "epoch 1", "epoch 2", f"accuracy {accuracy:.3f}"]
    assert "corrupted" not in lines[1], "the defense starts at epoch 1"
    clean, corrupted = (float(lines[3].split()[index].strip(",")) for index in (3, -1))
    assert corrupted > clean


def test_it_is_short_enough_to_be_read_at_once():
    assert len(Path(accelerate_loop.__file__).read_text().splitlines()) < 60, "all but one line is the plain loop"
