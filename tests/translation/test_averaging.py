"""The mean of checkpoints against a longhand one, which are the last, and what is refused."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_parcor.translation import average_checkpoints, average_weights, last_checkpoints

SCRIPT = Path(__file__).parents[2] / "scripts" / "average_checkpoints.py"


@pytest.fixture
def checkpoints(tiny_model, tokenizer, tmp_path):
    """Three of a run, of which the last by name is not the last by number."""
    folders = []
    for step in (9, 10, 11):
        torch.manual_seed(step)
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        folder = tmp_path / "run" / f"checkpoint-{step}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tokenizer.save_pretrained(folder / "target_tokenizer")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin"):
            (folder / name).write_bytes(b"of the run")
        for name in ("robustness.json", "robustness_facts.json", "probe.html", "README.md"):
            (folder / name).write_bytes(b"what these weights alone were measured to lose")
        folders.append(folder)
    (tmp_path / "run" / "checkpoint-best").mkdir()
    return folders


def mean(folders):
    """Number by number, in Python's own arithmetic."""
    all_of_them = [load_file(folder / "model.safetensors") for folder in folders]
    return {
        name: [
            sum(numbers) / len(folders)
            for numbers in zip(*(w[name].flatten().tolist() for w in all_of_them), strict=True)
        ]
        for name in all_of_them[0]
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_longhand_mean(checkpoints, tmp_path, count):
    last = last_checkpoints(tmp_path / "run", count)
    assert last == checkpoints[-count:]
    found = average_weights(last)
    for name, numbers in mean(last).items():
        expected = torch.tensor(numbers, dtype=torch.float64).float()
        assert torch.equal(found[name].flatten(), expected), name


def test_a_folder_that_loads(checkpoints, tmp_path, tokenizer):
    folder = average_checkpoints(checkpoints, tmp_path / "average")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    expected = mean(checkpoints)["model.decoder.layers.1.fc2.weight"]
    assert model.model.decoder.layers[1].fc2.weight.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert AutoTokenizer.from_pretrained(folder)("Hund")["input_ids"] == tokenizer("Hund")["input_ids"]
    kept = {path.name for path in folder.iterdir()}
    assert kept == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "target_tokenizer",
    }
    assert AutoTokenizer.from_pretrained(folder / "target_tokenizer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_exactly(tmp_path, dtype):
    values = [1.0, 1.0, 1.0 + 2**-7]
    for step, value in enumerate(values):
        (tmp_path / str(step)).mkdir()
        save_file({"w": torch.tensor([value, 3.0], dtype=dtype)}, tmp_path / str(step) / "model.safetensors")
    found = average_weights([tmp_path / str(step) for step in range(3)])["w"]
    assert found.dtype == dtype
    assert torch.equal(found, torch.tensor([sum(values) / 3, 3.0], dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("count", [0, 4])
def test_as_many_as_there_are(checkpoints, tmp_path, count):
    with pytest.raises(ValueError, match=f"count: expected 1 to 3, .*, got {count}"):
        last_checkpoints(tmp_path / "run", count)


def save(folder, **weights):
    folder.mkdir(exist_ok=True)
    save_file({name: torch.as_tensor(value) for name, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"w": [1.0, 2.0], "v": [1.0]}, "'v' differs"),
        ({"w": [1.0]}, "'w' differs"),
        ({"w": torch.ones(2).bfloat16()}, "'w' differs"),
    ],
)
def test_of_another_run(tmp_path, other, says):
    folders = [save(tmp_path / "one", w=[1.0, 2.0]), save(tmp_path / "two", **other)]
    with pytest.raises(ValueError, match=f"two: expected the weights of the first checkpoint, {says}"):
        average_weights(folders)


def test_refused(tmp_path):
    one, two = save(tmp_path / "one", w=[1.0], n=[1]), save(tmp_path / "two", w=[1.0], n=[2])
    with pytest.raises(ValueError, match="two: expected the whole numbers of the first checkpoint"):
        average_weights([one, two])
    with pytest.raises(ValueError, match="checkpoints: expected at least one folder, got none"):
        average_weights([])
    with pytest.raises(ValueError, match=r"expected model\.safetensors, found none"):
        average_weights([tmp_path])
    before = (one / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="output: expected another folder than the checkpoints"):
        average_checkpoints([one], one)
    assert (one / "model.safetensors").read_bytes() == before


def test_command_line(checkpoints, tmp_path, monkeypatch, capsys):
    output = tmp_path / "average"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "run"), "--last", "2", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    expected = average_weights(checkpoints[1:])
    assert all(torch.equal(value, expected[name]) for name, value in load_file(output / "model.safetensors").items())
    assert "checkpoint-10, checkpoint-11" in capsys.readouterr().out
