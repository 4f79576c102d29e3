"""A probe finds what a plain loop finds that knows nothing of it: one tensor operation a line, all in float64."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import tiny
import torch
import transformers as tf

from hf_parcor import (
    CorruptionConstraint,
    GradientCorruption,
    LayerProbe,
    Quantization,
    by_adapter,
    by_kind,
    by_layer,
    by_module,
)
from hf_parcor.evaluation import ClassificationMetric, LanguageModelMetric

SIZES = (4, 4, 2)
TEXT = {"input_ids": lambda size: torch.randint(3, 20, (size, 6))}
IMAGE = {"pixel_values": lambda size: torch.randn(size, 3, 8, 8, dtype=torch.float64)}
CLASS = {"labels": lambda size: torch.randint(0, 2, (size,))}
TOKENS = {"labels": lambda size: torch.where(torch.rand(size, 5) < 0.8, torch.randint(3, 20, (size, 5)), -100)}
ROWS = {
    "BERT": (tf.BertForSequenceClassification, tf.BertConfig(**tiny.encoder()), TEXT | CLASS),
    "T5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(**tiny.t5()),
        TEXT | TOKENS,
    ),
    "GPT-2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(**tiny.gpt2()),
        {"input_ids": lambda size: torch.randint(3, 20, (size, 5))} | TOKENS,
    ),
    "ViT": (
        tf.ViTForImageClassification,
        tf.ViTConfig(**tiny.images()),
        IMAGE | CLASS,
    ),
}
GROUPINGS = {"layers": by_layer, "kinds": by_kind, "modules": by_module, "adapters": by_adapter}
CORRUPTIONS = [
    GradientCorruption(CorruptionConstraint(p=2, epsilon=0.7)),
    GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=0.05)),
    Quantization(3),
]


def made(row, adapted):
    """Return a tiny model in float64 with weights that matter, its batches, and how many labels each counts."""
    kind, config, columns = ROWS[row]
    torch.manual_seed(0)
    model = kind(config)
    if adapted:
        peft = pytest.importorskip("peft")
        names = [name for name, part in model.named_modules() if type(part).__name__ in ("Linear", "Conv1D")][1:5]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about its own use of Transformers and of GPT-2's layers
            config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
            model = peft.get_peft_model(model, config, "first")
            model.add_adapter("second", config)
            model.base_model.set_adapter(["first", "second"])
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    batches = [{name: draw(size) for name, draw in columns.items()} for size in SIZES]
    labels = [batch["labels"][..., 1:] if row == "GPT-2" else batch["labels"] for batch in batches]
    return model, batches, [int((of_batch != -100).sum()) for of_batch in labels]


def weights_of(model, target):
    """Return the parameters that a group names: modules and parameters by their names, or by a pattern."""
    found = {}
    for name, part in [*model.named_modules(), *model.named_parameters()]:
        named = name in target if isinstance(target, list) else target == "all" or re.fullmatch(target, name)
        inside = list(part.parameters()) if isinstance(part, torch.nn.Module) else [part]
        found |= {id(parameter): parameter for parameter in inside if named}
    return list(found.values())


def mean_loss(model, batches, counts):
    return sum(model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)


def plain_loop(model, batches, counts, groups):
    """The ten lines."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(mean_loss(model, batches, counts), parameters, allow_unused=True)
    gradient_of = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)}
    found = {"clean": [mean_loss(model, batches, counts).item()]}
    for label, weights in groups.items():
        saved, gradient = [w.detach().clone() for w in weights], [gradient_of[id(w)] for w in weights]
        length = torch.sqrt(sum((g**2).sum() for g in gradient))
        largest = [w.detach().abs().max().clamp(min=1e-300) / 3 for w in weights]
        for corrupted in (
            [w + 0.7 * g / length for w, g in zip(saved, gradient, strict=True)],
            [w + 0.05 * g.sign() for w, g in zip(saved, gradient, strict=True)],
            [torch.round(w / unit) * unit for w, unit in zip(saved, largest, strict=True)],
        ):
            for weight, value in zip(weights, corrupted, strict=True):
                weight.data.copy_(value)
            found.setdefault(label, []).append(mean_loss(model, batches, counts).item())
        for weight, value in zip(weights, saved, strict=True):
            weight.data.copy_(value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("row", ROWS)
def test_numbers_are_those_of_a_plain_loop(row, grouping):
    model, batches, counts = made(row, adapted=grouping == "adapters")
    targets = GROUPINGS[grouping](model)
    metric = (ClassificationMetric if row in ("BERT", "ViT") else LanguageModelMetric)(batches)
    record = LayerProbe(model, metric, batches, targets=targets, progress=False).evaluate(CORRUPTIONS)
    found = {"clean": [record.clean.mean("loss")]}
    for label, row_of in record.rows():
        found.setdefault(label, []).append(row_of.mean("loss"))
    expected = plain_loop(
        model, batches, counts, {label: weights_of(model, target) for label, target in targets.items()}
    )
    assert list(found) == list(expected)
    for label, values in expected.items():
        assert found[label] == pytest.approx(values, rel=1e-6), label
    assert len({round(values[0], 9) for values in found.values()}) > 1, "or nothing was corrupted"
