"""The risk under any corruption in the real Trainer: against training loops that know nothing of it."""

from __future__ import annotations

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn
from trainings import logs_of
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, get_scheduler

from hf_parcor import (
    CorruptionConstraint,
    CorruptionRisk,
    DefendedBackward,
    GaussianNoise,
    GradientCorruption,
    ParameterDefenseTrainer,
    Quantization,
    select_parameters,
)

STEPS = {"max_steps": 6, "learning_rate": 1e-2}


class StraightThrough(torch.autograd.Function):
    """Rounded to n-bit integers going forward; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, weight, bits):
        step = weight.abs().max() / torch.tensor(2.0 ** (bits - 1) - 1)
        return torch.round(weight / step) * step if step > 0 else weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Kept(Trainer):
    """Keeps the batches that it trains on."""

    def training_step(self, model, inputs, *args):
        self.batches = [*getattr(self, "batches", ()), {name: tensor.clone() for name, tensor in inputs.items()}]
        return super().training_step(model, inputs, *args)


def test_it_is_quantization_aware_training_to_the_last_bit(tiny_bert, train):
    ours = train(
        ParameterDefenseTrainer, tiny_bert(dropout=0.0), STEPS, defense=CorruptionRisk(Quantization(4), clean_weight=0)
    )
    batches = train(Kept, tiny_bert(dropout=0.0), STEPS).batches

    model = tiny_bert(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    schedule = get_scheduler("linear", optimizer, 0, len(batches))
    for batch in batches:
        rounded = {name: StraightThrough.apply(parameter, 4) for name, parameter in model.named_parameters()}
        torch.func.functional_call(model, rounded, kwargs=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for (name, found), expected in zip(ours.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    (logged, *_) = logs_of(ours)
    assert "loss_clean" not in logged  # no pass is at the clean weights
    assert logged["loss"] == pytest.approx(logged["loss_corrupted"], rel=1e-4)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_strength_grows_with_the_epochs_of_the_trainer(tiny_bert, train, start):
    """Each step with the share of the epochs done before it, to the last step of the ramp and beyond."""
    defense = CorruptionRisk(GradientCorruption(CorruptionConstraint(epsilon=0.2)), start_epoch=start, ramp_epochs=1.5)
    trainer = train(ParameterDefenseTrainer, tiny_bert(), {"num_train_epochs": 3}, defense=defense)
    logged = logs_of(trainer)
    steps_an_epoch = len(logged) / 3
    shares = {
        place: min(1.0, (place / steps_an_epoch - start) / 1.5)
        for place in range(len(logged))
        if place / steps_an_epoch >= start
    }
    assert {0.0, 1.0} < set(shares.values())
    norms = {place: entry["corruption_norm"] for place, entry in enumerate(logged) if "corruption_norm" in entry}
    assert norms == pytest.approx({place: 0.2 * share for place, share in shares.items()}, rel=1e-4)


@pytest.mark.parametrize("clean_weight", [0.0, 0.4])
def test_the_log_of_several_corruptions_is_the_mean_over_them(tiny_bert, train, clean_weight):
    """So the risk is the weighted mean of what is logged, and the worst direction is seen in it."""
    corruptions = [GradientCorruption(CorruptionConstraint(epsilon=0.5)), Quantization(3), GaussianNoise(0.1)]
    defense = CorruptionRisk(corruptions, clean_weight=clean_weight)
    trainer = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), STEPS, defense=defense)
    for entry in trainer.state.log_history[: STEPS["max_steps"]]:
        risk = clean_weight * entry["loss_clean"] + (1 - clean_weight) * entry["loss_corrupted"]
        assert entry["loss"] == pytest.approx(risk, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["all", "last-encoder-layer"])
def test_a_corruption_too_small_to_matter_is_the_stock_step(tiny_bert, train, target):
    tiny = [GaussianNoise(1e-9), GradientCorruption(CorruptionConstraint(epsilon=1e-9))]
    steps = {**STEPS, "optim": "sgd"}  # AdamW makes steps of what rounding leaves of a key's bias, whose gradient is 0
    stock = train(Trainer, tiny_bert(dropout=0.0), steps)
    ours = train(
        ParameterDefenseTrainer, tiny_bert(dropout=0.0), steps, defense=CorruptionRisk(tiny), target_modules=target
    )
    assert (ours.shared_prefix is None) == (target == "all")
    for found, expected in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_prefix_reused_is_one_computed(tiny_bert, train):
    defense = CorruptionRisk([Quantization(4), GaussianNoise(0.05)], clean_weight=0.2)
    runs = [
        train(
            ParameterDefenseTrainer,
            tiny_bert(dropout=0.0),
            {**STEPS, "optim": "sgd"},
            defense=defense,
            target_modules="last-encoder-layer",
            reuse_prefix=reuse,
        )
        for reuse in (True, False)
    ]
    assert [run.shared_prefix is None for run in runs] == [False, True]
    for found, expected in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_adapters_learn_beside_a_base_that_is_rounded(tiny_bert, train, said):
    """The base is frozen, and comes back bit for bit; the gradient of the adapters is that beside the rounded base."""
    peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        torch.manual_seed(1)
        return peft.get_peft_model(tiny_bert(dropout=0.0), config)

    defense = CorruptionRisk(Quantization(3), clean_weight=0)
    options = {
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    base = {name: p.clone() for name, p in adapted().named_parameters() if not p.requires_grad}
    trainer = train(ParameterDefenseTrainer, adapted(), options, defense=defense, target_modules=["base_layer"])
    found = dict(trainer.model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in base.items())
    assert trainer.defense_config.defended_steps == 2
    assert not said("did nothing")

    rounded = adapted()  # trained by the stock Trainer beside a base that stays rounded
    with torch.no_grad():
        for weight in select_parameters(rounded, ["base_layer"]).values():
            weight.copy_(Quantization(3)({"w": weight})["w"])
    expected = dict(train(Trainer, rounded, options).model.named_parameters())
    trained = [name for name, parameter in found.items() if parameter.requires_grad]
    assert trained
    assert all(torch.equal(found[name], expected[name]) for name in trained)


def test_a_defense_along_gradients_still_refuses_what_is_frozen(tiny_bert, train):
    model = tiny_bert()
    model.bert.requires_grad_(False)
    defense = CorruptionRisk([Quantization(4), GradientCorruption(CorruptionConstraint(epsilon=0.1))])
    with pytest.raises(ValueError, match="expected trainable parameters"):
        train(ParameterDefenseTrainer, model, defense=defense, target_modules="attention")


def test_adapters_learn_for_what_they_will_be_merged_into(tiny_bert, train):
    """The gradient beside `Q(W + BA)`, which is that of the merged and rounded model with respect to `BA`."""
    peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", lora_alpha=6)
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny_bert(dropout=0.0), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return model.double()

    defense = CorruptionRisk(Quantization(3), clean_weight=0, merge_adapters=True)
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    (batch,) = train(Kept, adapted(), options).batches
    before = {name: p.detach().clone() for name, p in adapted().named_parameters()}
    ours = train(ParameterDefenseTrainer, adapted(), options, defense=defense, target_modules=["base_layer"])
    steps = {name: before[name] - p.detach() for name, p in ours.model.named_parameters()}

    merged = adapted().merge_and_unload()
    with torch.no_grad():
        for weight in select_parameters(merged, ["query", "value"]).values():
            weight.copy_(Quantization(3)({"w": weight})["w"])
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged(**batch).loss.backward()
    layers = [name.removesuffix(".lora_A.default.weight") for name in before if name.endswith("lora_A.default.weight")]
    assert len(layers) == 4
    for layer in layers:
        slope = merged.get_submodule(layer.removeprefix("base_model.model.")).weight.grad
        first, second = (before[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        torch.testing.assert_close(steps[f"{layer}.lora_A.default.weight"], 3 * second.T @ slope)
        torch.testing.assert_close(steps[f"{layer}.lora_B.default.weight"], 3 * slope @ first.T)
        assert torch.equal(
            ours.model.get_parameter(f"{layer}.base_layer.weight"), before[f"{layer}.base_layer.weight"]
        )


@pytest.mark.parametrize(
    ("kind", "adapted"),
    [
        ("bert", {"target_modules": ["query"]}),
        ("bert", {"target_modules": ["word_embeddings"]}),
        ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_what_is_corrupted_is_what_merging_makes(tiny_bert, kind, adapted):
    peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")
    words = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    if kind == "bert":
        model, batch = tiny_bert(dropout=0.0), {"input_ids": words, "labels": torch.tensor([0, 2])}
    else:
        torch.manual_seed(0)
        experts = {"num_local_experts": 2, "experts_implementation": "eager"}  # others know no float64
        model = MixtralForCausalLM(MixtralConfig(**tiny.decoder(), **experts))
        batch = {"input_ids": words, "labels": words}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **adapted)).double()
    weights = {name: one for name, one in select_parameters(model, ["base_layer"]).items() if "lora_" not in name}
    defense = CorruptionRisk(Quantization(3), clean_weight=0, merge_adapters=True)
    risk = DefendedBackward(Accelerator(cpu=True), defense, model, weights)(lambda: model(**batch).loss).risk

    model.merge_adapter()
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(Quantization(3)({"w": weight})["w"])
    torch.testing.assert_close(risk, model(**batch).loss.detach())


@pytest.mark.parametrize(
    ("settings", "target", "error"),
    [
        ({"use_dora": True}, ["base_layer"], NotImplementedError),
        ({"lora_bias": True}, ["base_layer"], NotImplementedError),  # which moves the bias beside the weight
        ({"trainable_token_indices": {"word_embeddings": [3]}}, ["base_layer"], NotImplementedError),
        ({}, ["lora_A"], ValueError),
        ({}, None, ValueError),
        ({}, "all-linear", ValueError),  # adapters are linear layers too, which merging takes away
    ],
)
def test_what_cannot_be_merged_is_refused(tiny_bert, train, settings, target, error):
    peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"], **settings))
    defense = CorruptionRisk(Quantization(4), merge_adapters=True)
    with pytest.raises(error, match="merge_adapters"):
        train(ParameterDefenseTrainer, model, defense=defense, target_modules=target)
