"""Adversarial inputs on real models: every call of the input embedding, each example by itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_parcor import AWP, CorruptionConstraint, select_parameters
from hf_parcor.defenses import DefendedStep
from hf_parcor.defenses.adversarial_inputs import ascend_per_example
from hf_parcor.targets import find_input_embedding


def text(labels):
    return lambda: {"input_ids": torch.randint(3, 20, (4, 6)), "labels": labels()}


def class_labels():
    return torch.randint(2, (4,))


def token_labels():
    return torch.randint(3, 20, (4, 5))


class TwoTowers(nn.Module):
    """One encoder for two texts: a pass calls the embedding twice, with different shapes."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower
        self.get_input_embeddings = tower.get_input_embeddings

    def forward(self, first, second):
        logits = [self.tower(input_ids=ids).logits for ids in (first, second)]
        return SimpleNamespace(loss=(logits[0] - logits[1]).square().mean())


# A family: its model, a batch, and how often a pass calls the input embedding.
FAMILIES = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**tiny.encoder(layers=1))),
        text(class_labels),
        1,
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(**tiny.gpt2(layers=1))),
        text(lambda: torch.randint(3, 20, (4, 6))),
        1,
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(**tiny.t5(layers=1))),
        text(token_labels),
        1,
    ),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**tiny.seq2seq(layers=1))),
        text(token_labels),
        1,
    ),
    "two towers": (
        lambda: TwoTowers(FAMILIES["bert"][0]()),
        lambda: {"first": torch.randint(3, 20, (4, 6)), "second": torch.randint(3, 20, (4, 5))},
        2,
    ),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(**tiny.images(layers=1))),
        lambda: {"pixel_values": torch.randn(4, 3, 8, 8), "labels": class_labels()},
        1,
    ),
}


def defend(model, batch, defense, seen):
    """Run one micro-batch of a defense, and keep what the embedding hands on in each pass."""
    embedding = find_input_embedding(model)

    def run_pass(objective, index):
        seen.append([])
        loss = objective(model(**batch).loss)
        loss.backward()
        return loss.detach()

    selected = select_parameters(model)
    step = DefendedStep(selected, run_pass, defense.passes, embedding=embedding)
    original = embedding.forward
    embedding.forward = lambda *args, **kwargs: seen[-1].append(original(*args, **kwargs)) or seen[-1][-1]
    with step:
        defense.minimize(step)
        perturbations = [perturbation.detach().clone() for perturbation in step._inputs._perturbations]
    embedding.forward = original
    return perturbations, step


@for_each("family", FAMILIES)
def test_every_example_of_every_call_moves_to_its_ball(family):
    build, make_batch, calls = FAMILIES[family]
    model, seen = build().eval(), []
    batch = make_batch()
    perturbations, step = defend(model, batch, AWP(CorruptionConstraint(epsilon=0.01), input_epsilon=0.3), seen)
    assert len(perturbations) == calls == len(seen[0])
    for perturbation, output in zip(perturbations, seen[0], strict=True):
        assert perturbation.shape == output.shape
        norms = perturbation.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.3))
    assert step.losses[-1] > step.losses[0]
    assert not find_input_embedding(model)._forward_hooks


def test_inputs_climb_along_their_own_gradient():
    """One step from zero: each example's δ is its gradient at the clean inputs, of norm ε."""
    build, make_batch, _ = FAMILIES["bert"]
    model, batch = build().double().eval(), make_batch()
    table = model.get_input_embeddings().weight
    embedded = table.detach()[batch["input_ids"]].requires_grad_()
    loss = model(inputs_embeds=embedded, labels=batch["labels"]).loss
    (gradient,) = torch.autograd.grad(loss, [embedded])
    expected = 0.3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    (perturbation,), _ = defend(model, batch, AWP(CorruptionConstraint(epsilon=0.0), input_epsilon=0.3), [])
    torch.testing.assert_close(perturbation, expected)


@for_each("family", ["bert", "gpt2"])
def test_what_runs_without_gradients_is_not_perturbed(family):
    """As Trainers generate while they prepare the batch, in the first pass alone."""
    build, make_batch, _ = FAMILIES[family]
    model, batch, defense = build().eval(), make_batch(), AWP(CorruptionConstraint(epsilon=0.01), input_epsilon=0.3)
    expected, _ = defend(model, batch, defense, [])
    forward, calls = model.forward, []

    def generate_first(**inputs):
        calls.append(inputs)
        if len(calls) == 1:
            with torch.no_grad():
                forward(input_ids=inputs["input_ids"][:, :1])
        return forward(**inputs)

    model.forward = generate_first
    found, _ = defend(model, batch, defense, [])
    assert len(calls) == defense.passes
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_hook_is_gone_and_weights_are_back_after_an_exception(bits_of):
    build, make_batch, _ = FAMILIES["bert"]
    model, batch = build(), make_batch()
    before, embedding, passes = bits_of(model), model.get_input_embeddings(), []

    def run_pass(objective, index):
        passes.append(index)
        if index == 2:
            raise KeyboardInterrupt
        loss = objective(model(**batch).loss)
        loss.backward()
        return loss.detach()

    defense = AWP(CorruptionConstraint(epsilon=0.1))
    step = DefendedStep(select_parameters(model), run_pass, defense.passes, embedding=embedding)
    with pytest.raises(KeyboardInterrupt), step:
        defense.minimize(step)
    assert passes == [0, 1, 2]
    assert not embedding._forward_hooks
    assert bits_of(model) == before


class TestBadInput:
    def test_step_without_an_embedding(self):
        step = DefendedStep({"w": nn.Parameter(torch.ones(2))}, lambda objective, index: objective(torch.ones(())), 3)
        with step, pytest.raises(ValueError, match="expected the model's input embedding, got None"):
            AWP(CorruptionConstraint(epsilon=0.1)).minimize(step)
        with step, pytest.raises(ValueError, match="expected a probe before"):
            step.displace_inputs(0.1, 0.1)

    def test_model_that_goes_around_its_embedding(self):
        model = FAMILIES["bert"][0]()
        batch = {"inputs_embeds": torch.randn(4, 6, 8), "labels": torch.randint(2, (4,))}
        with pytest.raises(RuntimeError, match="expected the model to call its input embedding"):
            defend(model, batch, AWP(CorruptionConstraint(epsilon=0.1)), [])

    @for_each("use_reentrant", [False, True])
    def test_embedding_that_runs_again_in_backward(self, use_reentrant):
        """As inside a checkpoint, or where a loss is cached: it would get other perturbations there, of zeros."""
        build, make_batch, _ = FAMILIES["bert"]
        model = build()

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.get_input_embeddings = model, model.get_input_embeddings

            def forward(self, input_ids, labels):
                differentiated = torch.ones((), requires_grad=True)  # or a reentrant one finds no gradient at all
                return SimpleNamespace(
                    loss=checkpoint(
                        lambda ids, _: self.inner(input_ids=ids, labels=labels).loss,
                        input_ids,
                        differentiated,
                        use_reentrant=use_reentrant,
                    )
                )

        with pytest.raises(RuntimeError, match="expected an input embedding that runs in forward alone"):
            defend(Checkpointed(), make_batch(), AWP(CorruptionConstraint(epsilon=0.1)), [])

    @for_each(
        "model",
        [
            nn.Linear(2, 2),
            ResNetForImageClassification(
                ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
            ),
        ],
    )
    def test_model_without_an_embedding(self, model):
        with pytest.raises(ValueError, match="expected one whose get_input_embeddings"):
            find_input_embedding(model)

    @for_each(
        ("options", "says"),
        [
            ({"input_epsilon": -1.0}, "input_epsilon: expected"),
            ({"input_steps": -1}, "input_steps: expected a whole number >= 0"),
            ({"per_tensor": True, "random_start": True}, "random_start: expected False with per_tensor"),
        ],
    )
    def test_settings(self, options, says):
        with pytest.raises(ValueError, match=says):
            AWP(CorruptionConstraint(epsilon=0.1), **options)


@settings(max_examples=50)
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 6),
    exponent=st.integers(-150, 150),
    radius=st.floats(0, 10),
    epsilon=st.floats(0, 10),
    seed=st.integers(0, 100),
)
def test_ascent_stays_in_the_ball_and_climbs(rows, width, exponent, radius, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 2.0**exponent
    moved = ascend_per_example(torch.zeros(rows, width, dtype=torch.float64), gradient, radius, epsilon)
    norms = moved.norm(dim=1)
    expected = torch.full_like(norms, min(radius, epsilon))
    torch.testing.assert_close(norms, expected)
    cosine = nn.functional.cosine_similarity(moved, gradient / 2.0**exponent)
    torch.testing.assert_close(cosine, torch.full_like(cosine, 1.0 if min(radius, epsilon) > 1e-6 else cosine[0]))


@for_each("bad", [math.nan, math.inf, 0.0])
def test_example_without_a_direction_stays(bad):
    gradient = torch.tensor([[1.0, 0.0], [bad, bad]])
    moved = ascend_per_example(torch.zeros(2, 2), gradient, 1.0, 2.0)
    assert moved.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@for_each(("radius", "epsilon", "says"), [(-1.0, 1.0, "step_size: expected"), (1.0, math.nan, "epsilon: expected")])
def test_a_radius_that_is_none_is_refused(radius, epsilon, says):
    with pytest.raises(ValueError, match=says):
        ascend_per_example(torch.zeros(2, 2), torch.ones(2, 2), radius, epsilon)
