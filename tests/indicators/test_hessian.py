"""The trace of the Hessian against Hessians that are known, written out in full, or from differences of gradients."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hf_parcor.functional import random_signs
from hf_parcor.indicators import LossOverData, hessian_trace

EXACT = {"rel": 1e-9}
SMALL = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 4, "num_attention_heads": 2}


def joined(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def signs_of(parameters, seed):
    return joined(random_signs(list(parameters.values()), torch.Generator().manual_seed(seed)))


class TestKnownHessian:
    def test_quadratic_forms_of_the_mean_over_unequal_batches(self, known):
        found = hessian_trace(known.loss, probes=5, seed=3).values
        signs = [signs_of(known.loss.parameters, seed).double() for seed in range(3, 8)]
        assert found == pytest.approx([float(v @ known.hessian @ v) for v in signs], **EXACT)

    def test_the_mean_is_the_trace(self, known):
        found = hessian_trace(known.loss, probes=500)
        trace = float(known.hessian.trace())
        deviation = math.sqrt(2 * float((known.hessian - known.hessian.diag().diag()).square().sum()))
        assert abs(found.mean - trace) < 4 * found.standard_error
        assert found.standard_error == pytest.approx(deviation / math.sqrt(500), rel=0.1)

    def test_a_diagonal_needs_one_probe(self):
        model = nn.Linear(3, 1, bias=False).double()
        batches = [torch.eye(3).double()]
        loss = LossOverData(
            model, dict(model.named_parameters()), batches, lambda m, x: (m(x)[:, 0] ** 3).sum() + m(x).sum()
        )
        assert hessian_trace(loss, probes=1).mean == pytest.approx(6 * model.weight.sum().item(), **EXACT)

    def test_linear_and_unused_parameters_have_no_curvature(self):
        model = nn.ModuleDict({"linear": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
        loss = LossOverData(
            model, dict(model.named_parameters()), [torch.ones(3, 2)], lambda m, x: m["linear"](x).mean()
        )
        assert hessian_trace(loss, probes=2).values == (0.0, 0.0)

    def test_they_add_none_to_that_of_others(self):
        model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("curved", "linear", "unused")})
        loss = LossOverData(
            model,
            dict(model.named_parameters()),
            [torch.tensor([[3.0]])],
            lambda m, x: (m["curved"](x).square() + m["linear"](x)).sum(),
        )
        assert hessian_trace(loss, probes=2).values == (18.0, 18.0)

    def test_no_probes(self, known):
        assert hessian_trace(known.loss, probes=0).values == ()
        with pytest.raises(ValueError, match="probes: expected a whole number >= 0, got -1"):
            hessian_trace(known.loss, probes=-1)


@pytest.mark.slow
def test_the_full_hessian_of_a_bert():
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, max_position_embeddings=4, initializer_range=0.5)
    ).double()
    parameters = dict(model.named_parameters())
    inputs, labels = torch.randint(8, (3, 4)), torch.tensor([0, 1, 1])
    batches = [{"input_ids": inputs[rows], "labels": labels[rows]} for rows in (slice(0, 2), slice(2, 3))]
    found = hessian_trace(LossOverData(model, parameters, batches), probes=3)
    assert model.training

    model.eval()
    model.set_attn_implementation("eager")
    sizes = [parameter.numel() for parameter in parameters.values()]

    def loss_at(flat):
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        weights = {name: part.view_as(parameter) for (name, parameter), part in parts}
        return cross_entropy(functional_call(model, weights, (inputs,)).logits, labels)

    hessian = torch.autograd.functional.hessian(loss_at, joined(parameters.values()).detach())
    signs = [signs_of(parameters, seed).double() for seed in range(3)]
    assert found.values == pytest.approx([float(v @ hessian @ v) for v in signs], rel=1e-7)


class TestFamilies:
    """vᵀHv against differences of gradients, without a second derivative."""

    def test_differences_of_gradients(self, family):
        model, batches, loss = family
        parameters = dict(model.named_parameters())
        clean = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        over_data = LossOverData(model, parameters, batches, loss)
        (found,) = hessian_trace(over_data, probes=1).values
        signs = random_signs(list(parameters.values()), torch.Generator().manual_seed(0))
        assert all(torch.equal(parameter, clean[name]) for name, parameter in parameters.items())
        assert all(parameter.grad is None for parameter in parameters.values())

        step = 1e-3 if type(model).__name__.startswith("T5") else 1e-5  # T5 normalises in float32
        gradients = []
        for direction in (1, -1):
            with torch.no_grad():
                for (name, parameter), sign in zip(parameters.items(), signs, strict=True):
                    parameter.copy_(clean[name] + direction * step * sign)
            gradients.append(joined(LossOverData(model, parameters, batches, loss).gradient().values()))
        expected = (gradients[0] - gradients[1]) @ joined(signs).double() / (2 * step)
        assert found == pytest.approx(float(expected), rel=2e-3)


def test_frozen_weights_are_frozen_again(known):
    expected = hessian_trace(known.loss, probes=2)
    known.model.requires_grad_(False)
    assert hessian_trace(known.loss, probes=2) == expected
    assert not any(parameter.requires_grad for parameter in known.model.parameters())
