"""The README's Python examples run, in order, on a tiny model; its commands and paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, TrainingArguments

from hf_parcor import EvaluationRecord, ParameterDefenseTrainingArguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": i % 2} for i in range(8)]
    names = {
        "model": model,
        "model_init": lambda: model,
        "train_dataset": rows,
        "eval_dataset": rows,
        "train_loader": DataLoader(rows, batch_size=2),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "training_args": TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
        ),
        "batches": [
            {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": torch.tensor([0, 1] * 4)}
        ],
    }
    examples = fences("python")
    assert len(examples) >= 4
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    record = EvaluationRecord.load("robustness.json")
    assert [row.label for row in record.corruptions] == [
        "gradient-based L2 ε=0.1",
        "Gaussian σ=0.02",
        "4-bit quantization",
    ]
    printed = capsys.readouterr().out
    assert "no corruption" in printed
    assert "risk 0." in printed
    assert names["noisy"].shape == (8, 2)


def test_commands_name_scripts_that_exist():
    scripts = re.findall(r"\b(?:bash|python) ((?:scripts|examples)/[^\s`]+)", README)
    assert "scripts/quickstart.sh" in scripts
    assert "scripts/test.sh" in scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_flags_of_the_example_exist():
    example = next(fence for fence in fences("bash") if "--defense_target_modules" in fence)
    line = re.findall(r"--\S+(?: [^-\s]\S*)*", example.replace("\\\n", " "))
    flags = [part for option in line for part in option.split()]
    (arguments,) = HfArgumentParser(ParameterDefenseTrainingArguments).parse_args_into_dataclasses(flags)
    assert arguments.defense_target_modules == ["last-encoder-layer"]


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)|`((?:tests|hf_parcor)/[\w./]+)`", README))
def test_paths_exist(target):
    path = next(filter(None, target))
    assert path.startswith("http") or (ROOT / path).exists()
