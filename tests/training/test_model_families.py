"""Families of models inside the real Trainer, each against autograd written out at copies of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
import transformers as tf
from longhand import longhand_passes
from torch import nn
from trainings import UNMOVED, KeepGradients

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer

EPSILON, STEPS = 0.5, 2
DEFENSE = MultiStepRisk(CorruptionConstraint(epsilon=EPSILON), steps=STEPS)
ENCODER, DECODER = tiny.encoder(30, 16, inner=24), tiny.decoder(30, 16, inner=24)
SEQ2SEQ = tiny.seq2seq(30, 16, layers=3, inner=24)
EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "experts_implementation": "eager"}
IMAGE = {"num_channels": 3, "num_labels": 3}
WAV2VEC2 = {
    **ENCODER,
    "conv_dim": [8, 8],
    "conv_kernel": [3, 3],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}


def classified(size: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 30, (size, 6)), "labels": torch.randint(3, (size,))}


def written(size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 30, (size, 6))
    return {"input_ids": ids, "labels": ids.clone()}


def translated(size: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 30, (size, 6)), "labels": torch.randint(3, 30, (size, 5))}


def heard(size: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(size, 400).double(), "labels": torch.randint(3, (size,))}


def seen(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(size, 3, 8, 8).double(), "labels": torch.randint(3, (size,))}


@dataclass(frozen=True)
class Family:
    """How to build a model and its data, and how exactly it computes: some norms are in float32 always."""

    model: type[nn.Module]
    config: tf.PreTrainedConfig
    data: object
    rtol: float = 1e-9
    dtype: torch.dtype = torch.float64

    def build(self) -> nn.Module:
        tf.set_seed(0)
        model = self.model(self.config).to(self.dtype)
        for parameter in model.parameters():  # weights of the usual size hardly notice each other
            if parameter.ndim > 1 and parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        return model


IN_FLOAT32 = 2e-5
FAMILIES = {
    "resnet": Family(
        tf.ResNetForImageClassification,
        tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", **IMAGE),
        seen,
    ),
    "vit": Family(tf.ViTForImageClassification, tf.ViTConfig(**tiny.images(16, inner=24), **IMAGE), seen),
    "albert": Family(
        tf.AlbertForSequenceClassification, tf.AlbertConfig(**ENCODER, embedding_size=8, num_labels=3), classified
    ),
    "gpt2": Family(tf.GPT2LMHeadModel, tf.GPT2Config(**tiny.gpt2(30, 16)), written, rtol=IN_FLOAT32),
    "t5": Family(tf.T5ForConditionalGeneration, tf.T5Config(**tiny.t5(30, 16, inner=24)), translated, rtol=IN_FLOAT32),
    "bart": Family(tf.BartForConditionalGeneration, tf.BartConfig(**SEQ2SEQ), translated),
    "bart-layerdrop": Family(
        tf.BartForConditionalGeneration,
        tf.BartConfig(**SEQ2SEQ, encoder_layerdrop=0.5, decoder_layerdrop=0.5),
        translated,
    ),
    "wav2vec2-layerdrop": Family(
        tf.Wav2Vec2ForSequenceClassification,
        tf.Wav2Vec2Config(**WAV2VEC2, layerdrop=0.5, apply_spec_augment=False, num_labels=3),
        heard,
    ),
    "mixtral": Family(
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**DECODER, **EXPERTS, num_local_experts=16, num_experts_per_tok=1),
        written,
        rtol=IN_FLOAT32,
    ),
    "qwen2-moe": Family(
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig(
            **DECODER,
            **EXPERTS,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        written,
        rtol=IN_FLOAT32,
    ),
}


class Passes(KeepGradients):
    """Keeps the inputs and the random generator's state of every forward, beside the gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forwards: list[tuple[dict[str, object], torch.Tensor]] = []
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs):
        self.forwards.append((dict(kwargs), torch.get_rng_state()))


def replayed(family, forwards):
    """The gradient of each pass of paper 2, Eq. 24, at the inputs and with the random numbers that it had."""
    kept = iter(forwards)

    def loss_of(call):
        inputs, generator = next(kept)
        torch.set_rng_state(generator)
        return call(**inputs).loss

    return longhand_passes(family.build().train(), loss_of, len(forwards) - 1, EPSILON)


def one_step(family, train, trainer_class=ParameterDefenseTrainer, **options):
    model, batch = family.build(), family.data(6)
    passes = Passes(model)
    settings = {**UNMOVED, "max_steps": 1, "per_device_train_batch_size": 6}
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return train(trainer_class, model, settings, rows=rows, callbacks=[passes], **options), passes


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_is_that_of_the_risk(name, train):
    """Dropout is on: the reference replays the random numbers of each pass."""
    family = FAMILIES[name]
    trainer, passes = one_step(family, train, defense=DEFENSE)
    expected = replayed(family, passes.forwards)
    assert len(expected) == STEPS + 1
    assert passes.kept[0].keys() == {key for part in expected for key in part}
    scale = max(float(value.abs().max()) for value in passes.kept[0].values())
    for key, gradient in passes.kept[0].items():
        total = sum(part[key] for part in expected if key in part) / (STEPS + 1)
        torch.testing.assert_close(
            gradient,
            total,
            rtol=family.rtol,
            atol=family.rtol * scale,
            msg=lambda text, key=key: f"{key}: {text}",
        )
    for (key, weight), before in zip(trainer.model.named_parameters(), family.build().parameters(), strict=True):
        assert torch.equal(weight, before), key


@pytest.mark.parametrize("name", ["bart-layerdrop", "wav2vec2-layerdrop"])
def test_layers_may_take_part_in_some_passes_only(name, train):
    """What the table is there for: some layer must have a gradient in one pass and none in another."""
    _, passes = one_step(FAMILIES[name], train, defense=DEFENSE)
    expected = replayed(FAMILIES[name], passes.forwards)
    count = {key: sum(key in part for part in expected) for key in passes.kept[0]}
    assert {key for key, passes_of_key in count.items() if passes_of_key <= STEPS and ".layers." in key}
    assert {key for key, passes_of_key in count.items() if passes_of_key == STEPS + 1}


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_experts_may_take_part_in_some_passes_only(name, train):
    """All experts of a layer are one tensor: an expert without a token has a gradient of zero, not none."""
    _, passes = one_step(FAMILIES[name], train, defense=DEFENSE)
    expected = replayed(FAMILIES[name], passes.forwards)
    keys = [key for key in passes.kept[0] if key.endswith("experts.down_proj")]
    busy = torch.stack([torch.stack([part[key].flatten(1).any(1) for key in keys]) for part in expected]).sum(0)
    assert ((busy > 0) & (busy <= STEPS)).any()


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_tied_embeddings_are_one_parameter(name, train):
    trainer, _ = one_step(FAMILIES[name], train, defense=DEFENSE)
    model, defended = trainer.model, trainer.defended_parameters()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(defended) == len({id(parameter) for parameter in defended.values()})
    assert sum(p.numel() for p in defended.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_running_statistics_of_resnet_are_those_of_the_stock_trainer(train):
    family = FAMILIES["resnet"]
    (stock, _), (ours, _) = one_step(family, train, tf.Trainer), one_step(family, train, defense=DEFENSE)
    before, after = dict(family.build().named_buffers()), dict(ours.model.named_buffers())
    for name, buffer in stock.model.named_buffers():
        assert torch.equal(buffer, after[name]), name
        assert not torch.equal(buffer, before[name]), name


def test_experts_in_one_grouped_multiplication(train):
    """The experts' default kernel has no float64: the same gradient as with a loop over the experts, in float32."""
    gradients = []
    for kernel in ("eager", "grouped_mm"):
        config = tf.MixtralConfig(**DECODER, **{**EXPERTS, "experts_implementation": kernel}, num_local_experts=4)
        family = Family(tf.MixtralForCausalLM, config, written, dtype=torch.float32)
        gradients.append(one_step(family, train, defense=DEFENSE)[1].kept[0])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)
