"""What the last decoder layer of the papers' Transformer costs to defend: 1 + K f, f worked out on paper."""

from __future__ import annotations

import pytest
import torch
from operations import count_operations
from transformers import MarianConfig, MarianMTModel

from hf_parcor import CorruptionConstraint, MultiStepRisk, select_parameters
from hf_parcor.defenses import DefendedStep
from hf_parcor.prefix import plan_prefix

WIDTH, INNER, LAYERS, VOCABULARY = 512, 1024, 6, 10_149
ROWS, SOURCE, TARGET = 2, 5, 4


def multiplications():
    """Those of one forward pass in the last decoder layer and the head behind it, and of all of the model."""
    projections, feed_forward = WIDTH**2, 2 * WIDTH * INNER
    encoder_layer = SOURCE * (4 * projections + feed_forward) + 2 * SOURCE**2 * WIDTH
    own_attention = TARGET * 4 * projections + 2 * TARGET**2 * WIDTH
    cross_attention = 2 * (TARGET + SOURCE) * projections + 2 * TARGET * SOURCE * WIDTH
    decoder_layer = own_attention + cross_attention + TARGET * feed_forward
    suffix = decoder_layer + TARGET * WIDTH * VOCABULARY
    return ROWS * suffix, ROWS * (LAYERS * encoder_layer + (LAYERS - 1) * decoder_layer + suffix)


@pytest.fixture(scope="module")
def model():
    sizes = {f"{stack}_{what}": value for stack in ("encoder", "decoder") for what, value in
             (("layers", LAYERS), ("attention_heads", 4), ("ffn_dim", INNER))}  # fmt: skip
    config = MarianConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, pad_token_id=0, decoder_start_token_id=0, **sizes,
        attn_implementation="eager", dropout=0.0, max_position_embeddings=16,
    )  # fmt: skip
    return MarianMTModel(config)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_one_plus_k_times_the_share_of_the_suffix(model, steps):
    """f = 0.21: of 40.7 million multiplications for each target token, 3.3 in the layer and 5.2 in the head."""
    batch = {
        name: torch.randint(2, 99, (ROWS, length)) for name, length in (("input_ids", SOURCE), ("labels", TARGET))
    }
    selected = select_parameters(model, "last-decoder-layer")
    prefix = plan_prefix(model, selected, lambda: model(**batch))

    def run_pass(objective, index):
        loss = objective(model(**batch).loss)
        loss.backward()
        return loss.detach()

    def defended_step():
        with DefendedStep(selected, run_pass, defense.passes, others, prefix=prefix) as step:
            defense.minimize(step)

    stock = count_operations(lambda: run_pass(lambda loss: loss, 0))
    others = [p for name, p in model.named_parameters() if name not in selected]
    defense = MultiStepRisk(CorruptionConstraint(epsilon=0.1), steps=steps)
    ours = count_operations(defended_step)
    model.zero_grad()
    suffix, whole = multiplications()
    assert stock == 3 * 2 * whole
    assert ours == 3 * 2 * (whole + steps * suffix)
    assert suffix / whole == pytest.approx(0.21, abs=0.005)
