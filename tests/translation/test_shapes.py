"""The papers' shapes: parameters counted on paper, fairseq's start, two vocabularies, fixed positions."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each
from transformers import AutoModelForSeq2SeqLM

from hf_parcor.targets import select_trainable
from hf_parcor.translation import freeze_positions, iwslt_de_en, new_model, wmt_en_de

WIDTH = 512


def layers(inner):
    """The weights of 6 + 6 layers: attention with biases, feed-forward, and two or three normalizations."""
    attention, feed_forward = 4 * (WIDTH**2 + WIDTH), 2 * WIDTH * inner + inner + WIDTH
    encoder, decoder = attention + feed_forward + 4 * WIDTH, 2 * attention + feed_forward + 6 * WIDTH
    return 6 * (encoder + decoder)


@for_each(
    ("config", "weights", "heads"),
    [
        (iwslt_de_en(10_149), 10_149 * WIDTH + layers(1024), 4),
        (wmt_en_de(7_669, 6_669), (7_669 + 6_669) * WIDTH + layers(2048), 8),
    ],
)
def test_the_weights_of_the_papers(config, weights, heads):
    with torch.device("meta"):
        model = type(new_model(iwslt_de_en(8, encoder_layers=1, decoder_layers=1, d_model=8)))(config)
    model.tie_weights()
    positions = {id(stack.embed_positions.weight) for stack in (model.model.encoder, model.model.decoder)}
    assert sum(p.numel() for p in model.parameters() if id(p) not in positions) == weights
    assert {config.encoder_attention_heads, config.decoder_attention_heads} == {heads}
    assert (config.activation_function, config.scale_embedding) == ("relu", True)


def test_dropout_of_the_papers():
    config = iwslt_de_en(10_149)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.3, 0.1, 0.1)
    assert wmt_en_de(9, 9).dropout == 0.1


def test_starts_as_fairseq():
    model = new_model(iwslt_de_en(500, d_model=64, encoder_layers=1, decoder_layers=1))
    model.requires_grad_(False)
    embedding, layer = model.get_input_embeddings().weight, model.model.encoder.layers[0]
    assert float(embedding.std()) == pytest.approx(1 / 8, rel=0.05)
    assert not embedding[1].any(), "padding"
    bound = math.sqrt(6 / (64 + 1024))
    assert bound * 0.95 < float(layer.fc1.weight.abs().max()) <= bound
    assert not layer.fc1.bias.any()
    assert embedding is model.lm_head.weight is model.model.decoder.embed_tokens.weight, "one embedding"


@pytest.fixture(params=["shared", "separate"])
def model(request):
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "max_position_embeddings": 32}
    shape = iwslt_de_en(30, **sizes) if request.param == "shared" else wmt_en_de(40, 30, **sizes)
    return new_model(shape).eval()


def test_saved_and_loaded(model, tmp_path):
    batch = {"input_ids": torch.tensor([[5, 29, 2]]), "labels": torch.tensor([[7, 2]])}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.generation_config.suppress_tokens == [0, 1]


def test_positions_are_no_weights_to_corrupt_or_to_train(model, tmp_path):
    tables = {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}

    def trained(model):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    selected = set(select_trainable(model))
    assert selected == trained(model) == set(dict(model.named_parameters())) - tables
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert trained(loaded) == selected | tables, "Transformers mends it: freeze_positions may go"
    assert set(select_trainable(loaded)) == selected
    assert set(select_trainable(loaded, ["embed_positions"])) == tables, "what is named is taken as it is"
    assert trained(freeze_positions(loaded)) == selected


def test_generates_neither_padding_nor_a_start(model):
    with torch.no_grad():
        model.final_logits_bias[0, :2] += 100.0  # they would win
    tokens = model.generate(torch.tensor([[5, 6, 2]]), max_new_tokens=8, num_beams=2, do_sample=False)
    assert tokens[0, 0] == 2, "a translation starts with the end of a sentence, as in fairseq"
    assert not torch.isin(tokens, torch.tensor([0, 1])).any()
