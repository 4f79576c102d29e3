"""What model and tokenizer take, against forward passes of that length and one more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from for_each import for_each

from hf_parcor.errors import InputError
from hf_parcor.sequence_length import asked_length, fitting_length, generated_length, longest_sequence, positions

ROWS = 20
SIZES = {
    **{"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    **{"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "ffn_dim": 8, "word_embed_proj_dim": 8},
    **{f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{f"{stack}_ffn_dim": 8 for stack in ("encoder", "decoder")},
    **{"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "embedding_size": 8, "embedding_dim": 8},
    **{"attention_heads": 2, "n_embd": 8, "n_layer": 1, "n_head": 2, "attention_window": 4},
}
# Rows of the table that are for no token; None where a longer text is no error.
BEFORE = {
    "bert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2, "data2vec-text": 2, "ibert": 2,
    "longformer": 2, "esm": 2, "distilbert": 0, "albert": 0, "electra": 0, "nystromformer": 0, "gpt2": 0,
    "gpt_neo": 0, "opt": 0, "bart": 0, "mbart": 0, "plbart": 0, "marian": 0, "pegasus": 0, "blenderbot": 0,
    "git": 0,  # beside a table for the parts of an image, which is shorter
    "llama": None, "t5": None, "m2m_100": None, "xlnet": None, "bloom": None,
}  # fmt: skip
WITH_DECODER = ("bart", "mbart", "plbart", "marian", "pegasus", "blenderbot", "t5", "m2m_100")


def tiny(kind, **changes):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind]
    usual = config()
    known = {**SIZES, "max_position_embeddings": ROWS, "pad_token_id": 1, "position_embedding_type": "absolute"}
    if kind == "gpt_neo":
        known |= {"attention_types": [[["global"], 1]], "num_layers": 1}
    if kind == "esm":
        known |= {"mask_token_id": 3}
    if kind == "git":
        known |= {"vision_config": {**SIZES, "image_size": 8, "patch_size": 4}}
    known = {name: value for name, value in known.items() if getattr(usual, name, -1) != -1}
    return transformers.AutoModel.from_config(config(**{**known, **changes})).eval()


def runs(model, length, decoder):
    """Return whether a text of so many tokens, the padding token not among them, passes through a side of a model."""
    side = model
    if model.config.is_encoder_decoder:
        side = model.get_decoder() if decoder else model.get_encoder()
    try:
        with torch.no_grad():
            side(input_ids=torch.full((1, length), 5))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.slow
@for_each(("kind", "decoder"), [*((kind, False) for kind in BEFORE), *((kind, True) for kind in WITH_DECODER)])
def test_a_text_as_long_passes_and_a_longer_one_does_not(kind, decoder):
    model, before = tiny(kind), BEFORE[kind]
    if before is None:
        assert positions(model, decoder=decoder) is None
        assert runs(model, 2 * ROWS, decoder)
        return
    length = longest_sequence(model, decoder=decoder)
    assert length == ROWS - before
    assert length <= positions(model, decoder=decoder)
    assert runs(model, length, decoder)
    if kind not in ("longformer", "nystromformer"):  # these pad, or have rows to spare
        assert not runs(model, length + 1, decoder)
        with pytest.raises(InputError, match=f"at most {length} tokens"):
            fitting_length(model, None, 4, asked=length + 1, decoder=decoder)


def test_sides_of_different_length():
    model = tiny("led", max_encoder_position_embeddings=32, max_decoder_position_embeddings=12, attention_window=4)
    assert (longest_sequence(model), longest_sequence(model, decoder=True)) == (32, 12)


@for_each(
    ("kind", "of_tokenizer", "expected"),
    [
        ("roberta", 512, ROWS - 2),
        ("roberta", 11, 11),
        ("roberta", int(1e30), ROWS - 2),
        ("llama", int(1e30), ROWS),
        ("t5", 512, 512),
        ("t5", int(1e30), None),
        ("xlnet", int(1e30), None),
        ("m2m_100", 1024, ROWS),
    ],
)
def test_the_least_of_model_and_tokenizer(kind, of_tokenizer, expected):
    model, tokenizer = tiny(kind), SimpleNamespace(model_max_length=of_tokenizer)
    assert longest_sequence(model, tokenizer) == expected
    assert fitting_length(model, tokenizer, 10_000) == (expected or 10_000)
    assert fitting_length(model, tokenizer, 4) == 4
    assert fitting_length(model, tokenizer, 4, asked=15) == 15


def test_more_than_there_are_positions_for():
    with pytest.raises(InputError, match=r"at most 18 tokens.* got 19; "):
        fitting_length(tiny("roberta"), None, 4, asked=19)
    assert fitting_length(tiny("llama"), None, 4, asked=10 * ROWS) == 10 * ROWS, "these are computed"


class TestGeneration:
    @for_each(
        ("settings", "own", "expected"),
        [
            ({}, {}, None),
            ({"max_new_tokens": 7}, {}, 7),
            ({"max_length": 7}, {}, 6),
            ({}, {"max_length": 9}, 8),
            ({}, {"max_length": 20}, None),
            ({"max_length": 7}, {"max_length": 9}, 6),
            ({"max_length": 7}, {"max_new_tokens": 9}, 9),
            ({"generation_config": transformers.GenerationConfig(max_length=12)}, {"max_length": 9}, 11),
        ],
    )
    def test_lengths_that_are_asked_for_are_those_that_are_generated(self, settings, own, expected):
        config = transformers.BartConfig(**SIZES, max_position_embeddings=64, decoder_start_token_id=2)
        model = transformers.BartForConditionalGeneration(config).eval()
        model.generation_config.update(**own, eos_token_id=None, forced_eos_token_id=None)
        assert asked_length(model, settings) == expected
        if expected is not None:
            found = model.generate(torch.tensor([[5, 6]]), do_sample=False, eos_token_id=None, **settings)
            assert found.shape[1] - 1 == expected

    def test_what_is_generated_fits_the_model(self):
        model = tiny("bart")
        assert [generated_length(model, longest) for longest in (1, 5, 50)] == [11, 16, ROWS]
        assert generated_length(tiny("gpt2"), 50, start=15) == ROWS - 15 + 1
