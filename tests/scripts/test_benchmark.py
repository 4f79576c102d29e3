"""The benchmark runs on the shapes that it offers, and counts what is known by hand."""

from __future__ import annotations

import json

import pytest
import torch
from for_each import for_each
from transformers import LlamaForCausalLM

from scripts import benchmark
from scripts.benchmark import ARMS, OURS, STOCK, llama_of

K1 = "whole model, K = 1"
BERT = {  # the operations of arms, in stock steps
    K1: 2,
    "last layer, K = 2": 1 + 2 / 3,
    "SAM, ⅛ of the batch": 1 + 1 / 8,
    "worst direction and 4 bits": 3,
    "AWP loop": 2,
    "LookSAM, one step in five": 2,
    "LookSAM, steps between": 1,
    "along the momentum": 1,
}


@pytest.mark.slow
@for_each(
    ("flags", "expected", "bytes_of_one_step"),
    [
        (["--shape", "tiny-bert", "--fused"], BERT, 32),
        (["--shape", "tiny-llama", "--bf16", "--dtype", "bfloat16"], {K1: 2}, 16),
    ],
)
def test_what_is_counted(flags, expected, bytes_of_one_step, tmp_path, capsys):
    path = tmp_path / "new" / "record.json"
    small = ["--rounds", "2", "--batch", "8", "--length", "8"]
    benchmark.main([*flags, *small, "--arms", *expected, "--output", str(path)])
    rows = {row["arm"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == [STOCK, *(arm for arm in ARMS if arm in expected)]
    for arm, ratio in expected.items():  # the head is no layer
        assert rows[arm]["operations_ratio"] == pytest.approx(ratio, abs=0.02), arm
    for arm, row in rows.items():
        low, high = row["time_ratio_quartiles"]
        assert low <= row["time_ratio_median"] <= high
        assert (
            (row["bytes_per_defended_weight"] is None) == (row["launches_beyond_passes"] is None) == (arm not in OURS)
        )
    assert rows[K1]["bytes_per_defended_weight"] == pytest.approx(bytes_of_one_step, abs=1)
    shown = capsys.readouterr().out
    assert all(f"| {arm} " in shown for arm in rows)


@for_each("billions", [0.1, 0.3, 1, 3, 13, 70])
def test_a_llama_has_about_its_size(billions):
    with torch.device("meta"):
        model = benchmark.builder_of(f"llama-{billions}b")() if billions != 1 else LlamaForCausalLM(llama_of(1))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(1e9 * billions, rel=0.15)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--shape", "tiny-bert", "--model", "x"],
        ["--shape", "tiny-bert", "--arms", "no"],
        ["--shape", "llama-3"],
        ["--shape", "bert"],
        ["--shape", "tiny-bert", "--arms", "SAM", "--rounds", "1"],  # has no quartiles
    ],
)
def test_wrong_arguments(flags):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(flags)
