"""The example script on a few lines: texts, prompts and chats; the whole model, and LoRA adapters, for 4 bits too."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from example_program import TRAINS_AND_MEASURES, run_with, steps_logged
from for_each import for_each
from local_models import SENTENCES, WORDS, save_gpt2, save_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_parcor import EvaluationRecord, Quantization, corrupted, select_parameters

pytest.importorskip("trl", reason="the example needs the extra 'trl'")
peft = pytest.importorskip("peft", reason="adapters need the extra 'peft'")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_sft.py"
ADAPTERS = {"use_peft": True, "lora_target_modules": ["q_proj", "down_proj"], "lora_r": 2}
FOUR_BITS = {"defense": "corruption", "defense_corruption": ["quantization=4"]}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }} </s>"
    "{% endgeneration %}{% else %}{{ message.content }} film {% endif %}{% endfor %}"
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return the folder of a tiny Llama, which drops nothing."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    config = LlamaConfig(**tiny.encoder(len(WORDS)), **ends, initializer_range=0.5)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def settings(tmp_path, model):
    (tmp_path / "train.txt").write_text("\n".join([*SENTENCES, "", *SENTENCES]), encoding="utf-8")
    (tmp_path / "dev.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    return {
        **TRAINS_AND_MEASURES,
        "model_name_or_path": model,
        "train_file": str(tmp_path / "train.txt"),
        "validation_file": str(tmp_path / "dev.txt"),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 6,
        "num_train_epochs": 1,
        "learning_rate": 0.02,
        "bf16": False,
        "corruptions": ["gradient=2", "quantization=2"],
    }


def loss_of_token(model, tokenizer) -> float:
    """The mean loss of a token over the sentences, each with the end after it, by itself."""
    losses = []
    for sentence in SENTENCES:
        ids = torch.tensor([[*tokenizer(sentence)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_what_is_measured_is_what_the_saved_model_does(settings, tmp_path, monkeypatch, capsys):
    out = run_with(SCRIPT, settings, monkeypatch)
    assert "2-bit quantization" in capsys.readouterr().out
    assert all(entry["loss_corrupted"] > entry["loss_clean"] for entry in steps_logged(out))
    assert json.loads((out / "train_results.json").read_text())["train_samples"] == 2 * len(SENTENCES), "no empty line"
    record = EvaluationRecord.load(out / "robustness.json")
    model, tokenizer = loaded(out)
    clean, climbed, rounded = (row.mean("loss") for row in record.rows())
    assert loss_of_token(model, tokenizer) == pytest.approx(clean, rel=1e-5)
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] == pytest.approx(clean)
    weights = select_parameters(model)
    with corrupted(weights, Quantization(2)(weights)):
        assert loss_of_token(model, tokenizer) == pytest.approx(rounded, rel=1e-5)
    assert climbed > clean
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "defended in training" in card
    assert "2-bit quantization" in card


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_whole_run(settings, tmp_path, monkeypatch):
    given = {**settings, **ADAPTERS, "do_eval": False, "save_strategy": "steps", "save_steps": 1}
    whole = run_with(SCRIPT, given, monkeypatch)
    part = tmp_path / "part"
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    run_with(SCRIPT, {**given, "output_dir": str(part), "resume_from_checkpoint": "true"}, monkeypatch)
    assert len(steps_logged(whole)) == 3
    name = "adapter_model.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes() != (part / "checkpoint-2" / name).read_bytes()


@pytest.mark.slow
@for_each(
    "given",
    [{}, {**FOUR_BITS, "defense_target_modules": ["base_layer"], "defense_merge_adapters": True}],
)
def test_adapters_learn_and_the_model_under_them_stays(settings, tmp_path, monkeypatch, model, given):
    out = run_with(SCRIPT, {**settings, **ADAPTERS, **given, "corruption_target_modules": ["base_layer"]}, monkeypatch)
    base, tokenizer = loaded(model)
    adapted = peft.PeftModel.from_pretrained(base, out).eval()
    record = EvaluationRecord.load(out / "robustness.json")
    assert loss_of_token(adapted, tokenizer) == pytest.approx(record.clean.mean("loss"), rel=1e-5)
    under = select_parameters(adapted, target_modules=["base_layer"])
    assert record.parameters == sum(weight.numel() for weight in under.values())
    with corrupted(under, Quantization(2)(under)):
        assert loss_of_token(adapted, tokenizer) == pytest.approx(record.corruptions[1].mean("loss"), rel=1e-5)
    assert not (out / "model.safetensors").exists()
    # What was saved is measured again, from its folder.
    again = {**settings, "model_name_or_path": str(out), "output_dir": str(tmp_path / "again"), "do_train": False}
    results = run_with(SCRIPT, {**again, "skip_corruptions": True}, monkeypatch) / "eval_results.json"
    assert json.loads(results.read_text())["eval_loss"] == pytest.approx(record.clean.mean("loss"), rel=1e-5)


CHAT = [{"messages": [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "good plot"}]}]
TEMPLATED = {"chat_template_path": "template.jinja"}


@pytest.mark.slow
@for_each(
    "rows, given, text, counted",
    [
        ([{"prompt": "the film ", "completion": "good plot"}], {}, "the film good plot </s>", 3),
        ([{"prompt": "the film ", "completion": "good"}], {"completion_only_loss": False}, "the film good </s>", 3),
        ([{"sentence": "the film"}], {"dataset_text_field": "sentence"}, "the film </s>", 2),
        (CHAT, TEMPLATED, "bad film good plot </s>", 4),
        (CHAT, {**TEMPLATED, "assistant_only_loss": True}, "bad film good plot </s>", 3),
    ],
)
def test_which_tokens_are_trained_on(settings, tmp_path, monkeypatch, rows, given, text, counted):
    """The loss of the clean pass is that of so many last tokens of the text."""
    (tmp_path / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    out = run_with(SCRIPT, {**settings, **given, "train_file": "rows.jsonl", "do_eval": False}, monkeypatch)
    model, tokenizer = loaded(settings["model_name_or_path"])
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(text.split())])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert steps_logged(out)[0]["loss_clean"] == pytest.approx(float(losses[-counted:].mean()), rel=1e-5)


@pytest.mark.slow
@for_each(
    "change, says",
    [
        ({"train_file": None}, "expected --train_file or --dataset_name"),
        ({"dataset_text_field": "sentence"}, "expected a column 'sentence'"),
        ({"model_name_or_path": None}, "expected a model on the Hub or a local folder"),
        ({"do_train": False, "do_eval": False}, "expected --do_train"),
        ({"max_train_samples": 0}, "max_train_samples: expected a whole number >= 1, got 0"),
        ({"max_length": 17, "model_name_or_path": "gpt2"}, "expected at most 16 tokens"),
        ({**ADAPTERS, "defense_target_modules": ["base_layer"]}, "expected trainable parameters"),
    ],
)
def test_bad_input(settings, tmp_path, monkeypatch, change, says):
    save_gpt2(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        run_with(SCRIPT, {**settings, **change}, monkeypatch)
    assert not (tmp_path / "out" / "robustness.json").exists()


def test_without_trl_it_says_what_to_install(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, SCRIPT.stem, raising=False)  # imported anew
    with pytest.raises(ImportError, match=r"pip install 'hf-parcor\[trl\]'"):
        run_with(SCRIPT, settings, monkeypatch)
