"""Adapters of PEFT: defended in the Trainer, measured by the evaluator, merged, saved and loaded."""

from __future__ import annotations

import math
import re

import pytest
import tiny
import torch
import transformers as tf
from longhand import longhand
from torch import nn
from trainings import IN_ORDER, logs_of, stacked

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRisk,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    Quantization,
)
from hf_parcor.evaluation import DatasetGradients
from hf_parcor.training import build_defense

peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")

EPSILON, STEPS = 0.3, 2
DEFENSE = MultiStepRisk(CorruptionConstraint(epsilon=EPSILON), steps=STEPS)
L2 = CorruptionConstraint(epsilon=0.5)
CORRUPTIONS = [
    GaussianNoise(0.1),
    BitFlips(count=20, bits="sign"),
    GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=0.05)),
    MultiStepCorruption(L2, steps=2),
]


@pytest.fixture
def lora(tiny_bert):
    """Return a builder of tiny BERTs with adapters on the attention, and B large enough to matter, not zero."""

    def build(**settings):
        config = peft.LoraConfig(r=2, **{"target_modules": ["query", "value"], "task_type": "SEQ_CLS", **settings})
        model = peft.get_peft_model(tiny_bert(dropout=0.0), config)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model.double()

    return build


@pytest.fixture
def batch(rows):
    return stacked(rows[:8])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "settings", "defended"),
    [
        (None, {"task_type": None}, r"lora_"),
        (None, {}, r"lora_|modules_to_save"),
        (r".*\.lora_[AB]\..*", {}, r"lora_"),
        (["lora_B"], {}, r"lora_B"),
        (["modules_to_save"], {"task_type": None, "modules_to_save": ["classifier"]}, r"modules_to_save"),
        (r".*layer\.1\..*lora_.*", {"use_rslora": True}, r"layer\.1\..*lora_"),
        (None, {"use_dora": True, "task_type": None}, r"lora_"),
    ],
    ids=["adapters", "adapters and head", "regex", "B alone", "saved head", "layer", "DoRA"],
)
def test_gradient_of_the_adapters_is_that_of_the_risk(
    lora, rows, batch, train, keep_gradients, targets, settings, defended
):
    reference, model = lora(**settings), lora(**settings)
    trained = [name for name, parameter in reference.named_parameters() if parameter.requires_grad]
    selected = [name for name in trained if re.search(defended, name)]
    options = {"per_device_train_batch_size": 8, **IN_ORDER}
    trainer = train(
        ParameterDefenseTrainer,
        model,
        options,
        rows=rows[:8],
        callbacks=[keep_gradients],
        defense=DEFENSE,
        target_modules=targets,
    )
    assert list(trainer.defended_parameters()) == selected

    def loss_of(call):
        return nn.functional.cross_entropy(call(input_ids=batch["input_ids"]).logits, batch["labels"])

    expected = longhand(reference, loss_of, [1 / (STEPS + 1)] * (STEPS + 1), EPSILON, selected)
    (kept,) = keep_gradients.kept
    assert kept.keys() == expected.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
    for (name, weight), before in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(weight, before) == (name not in trained), name


def logits_of(model, batch):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


@pytest.mark.parametrize("targets", ["all", ["base_layer"], ["embeddings"], "layer-norm"])
def test_evaluator_corrupts_the_frozen_model_under_the_adapters(lora, batch, bits_of, targets):
    model = lora()
    before, flags = bits_of(model), [parameter.requires_grad for parameter in model.parameters()]
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        model.get_parameter(name).grad = gradient.clone()
    seen = []

    def metric(measured):
        seen.append(bits_of(measured))
        return {"loss": float(nn.functional.cross_entropy(logits_of(measured, batch), batch["labels"]))}

    record = CorruptionEvaluator(model, metric, [batch], target_modules=targets, progress=False).evaluate(
        CORRUPTIONS, trials=1
    )
    assert seen[0] == before
    assert before not in seen[1:]
    (clean,) = record.clean.metrics["loss"]
    for row in record.corruptions[2:]:  # these climb
        assert row.metrics["loss"][0] > clean
        assert row.norm > 0
    assert bits_of(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if name not in gradients else torch.equal(parameter.grad, gradients[name])


def test_gradient_of_a_wrapped_causal_model_is_that_of_the_model():
    """B = 0: both compute the same. Batches differ in length, so each must count the labels that its loss counts."""
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(**tiny.gpt2(30, 16, layers=1))).eval()
    texts = [torch.randint(3, 30, (3, 9)), torch.randint(3, 30, (2, 2))]
    batches = [{"input_ids": text, "labels": text} for text in texts]
    expected = DatasetGradients(gpt2, {"w": gpt2.transformer.wpe.weight}, batches).over_data()
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(gpt2, config).eval()
    frozen = wrapped.base_model.model.transformer.wpe.weight
    assert not frozen.requires_grad
    gradient = DatasetGradients(wrapped, {"w": frozen}, batches).over_data()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_merged_model_is_the_adapted_one_and_can_be_measured_and_defended(lora, rows, batch, train):
    adapted = train(ParameterDefenseTrainer, lora(), rows=rows, defense=DEFENSE).model
    expected = logits_of(adapted, batch)
    merged = adapted.merge_and_unload().double()
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-9, atol=1e-12)
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    record = CorruptionEvaluator(
        merged, lambda m: {"sum": float(logits_of(m, batch).sum())}, [batch], target_modules="all", progress=False
    ).evaluate(CORRUPTIONS, trials=1)
    assert all(row.changed for row in record.corruptions)
    torch.testing.assert_close(merged.state_dict(), before, rtol=0, atol=0)
    merged.requires_grad_(True)  # PEFT leaves frozen what it froze
    trainer = train(ParameterDefenseTrainer, merged, rows=rows, defense=DEFENSE)
    assert len(trainer.defended_parameters()) == len(before)
    logs = logs_of(trainer)
    assert all(entry["loss_corrupted"] > entry["loss_clean"] for entry in logs)
    assert not torch.equal(
        merged.bert.embeddings.word_embeddings.weight, before["bert.embeddings.word_embeddings.weight"]
    )


def test_adapter_is_saved_and_loaded(lora, rows, batch, train, tiny_bert, tmp_path):
    trainer = train(ParameterDefenseTrainer, lora(), rows=rows, defense=DEFENSE)
    trainer.save_model(str(tmp_path / "adapter"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base = tiny_bert(dropout=0.0)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).double()
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(trainer.model, batch), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(logits_of(loaded, batch), logits_of(lora(), batch)), "nothing was learned"


def test_adapters_that_are_not_trained_are_refused_by_the_trainer(lora, arguments):
    with pytest.raises(ValueError, match=r"expected trainable parameters, got .* frozen ones"):
        ParameterDefenseTrainer(model=lora(), args=arguments(), target_modules=["base_layer"])


def test_the_adapters_of_a_layer_are_named_as_the_refusal_of_all_of_it_says(lora, arguments):
    with pytest.raises(ValueError, match="frozen") as caught:
        ParameterDefenseTrainer(model=lora(), args=arguments(), target_modules="last-encoder-layer")
    named = eval(re.search(r"target_modules=(\[.*?\])", str(caught.value))[1])
    trainer = ParameterDefenseTrainer(model=lora(), args=arguments(), target_modules=named)
    assert all("lora_" in name for name in trainer.defended_parameters())
    with pytest.raises(ValueError, match="frozen") as caught:
        ParameterDefenseTrainer(model=lora(), args=arguments(), target_modules=["base_layer"])
    assert "lora_A" not in str(caught.value).partition("need")[2]


def test_adapters_that_are_frozen_are_excluded_as_their_refusal_says(lora, arguments):
    """As of the one that TRL adds to adapters that were trained before, to be the reference."""
    model = lora()
    model.add_adapter("ref", model.peft_config["default"])
    adapters = ["lora_A", "lora_B"]
    with pytest.raises(ValueError, match="8 frozen") as caught:
        ParameterDefenseTrainer(model=model, args=arguments(), target_modules=adapters)
    assert "name the adapters" not in str(caught.value)
    assert "exclude them with exclude_modules" in str(caught.value)
    trainer = ParameterDefenseTrainer(model=model, args=arguments(), target_modules=adapters, exclude_modules=["ref"])
    assert len(trainer.defended_parameters()) == 8


def test_what_the_refusal_of_a_frozen_base_names_is_not_refused(lora, arguments):
    """The class and the flag that it names: neither needs a gradient of what is frozen."""
    with pytest.raises(ValueError, match="frozen") as caught:
        ParameterDefenseTrainer(model=lora(), args=arguments(), target_modules=["base_layer"])
    named = re.search(r"CorruptionRisk\(\w+\(\d+\)\)", str(caught.value))[0]
    defense = eval(named, {"CorruptionRisk": CorruptionRisk, "Quantization": Quantization})
    trainer = ParameterDefenseTrainer(model=lora(), args=arguments(), defense=defense, target_modules=["base_layer"])
    assert not any(weight.requires_grad for weight in trainer.defended_parameters().values())
    flag, word = re.search(r"(--defense) (\w+)", str(caught.value)).groups()
    (parsed,) = tf.HfArgumentParser(ParameterDefenseTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "out", flag, word, "--defense_corruption", "quantization=4"]
    )
    assert build_defense(parsed) == defense
