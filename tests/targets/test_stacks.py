"""Which lists are stacks of layers, and which of them encode and decode: the traps."""

from __future__ import annotations

import pytest
from torch import nn

from hf_parcor.targets import TargetError, find_stacks, select_parameters

STACKS = {
    "bert-base": ["encoder.layer encoder 2"],
    "bert-generates": ["bert.encoder.layer decoder 2"],  # is_decoder beats the path
    "bert-pair": ["encoder.encoder.layer encoder 2", "decoder.bert.encoder.layer decoder 2"],
    "image-text": ["vision_model.layers encoder 2", "text_model.encoder.layer encoder 2"],
    "clip": ["text_model.encoder.layers encoder 2", "vision_model.encoder.layers encoder 2"],
    "t5": ["encoder.block encoder 2", "decoder.block decoder 2"],  # not T5Block's own list of sublayers
    "bart": ["model.encoder.layers encoder 2", "model.decoder.layers decoder 2"],  # is_decoder is False for the whole
    "bart-decoder": ["model.decoder.layers decoder 2"],
    "albert": ["albert.encoder.albert_layer_groups encoder 1"],
    "albert-groups": ["encoder.albert_layer_groups encoder 2"],  # not the two layers inside each group
    "distilbert": ["distilbert.transformer.layer encoder 2"],
    "vit": ["vit.layers encoder 2"],
    "gpt2": ["transformer.h decoder 2"],
    "gpt2-classifier": ["transformer.h decoder 2"],
    "llama": ["model.layers decoder 2"],
    "mixtral": ["model.layers decoder 2"],
    "jamba": ["model.layers decoder 2"],  # blocks of two classes
    "wav2vec2": ["feature_extractor.conv_layers other 2", "encoder.layers encoder 2"],
    "musicgen-decoder": ["model.decoder.layers decoder 2"],  # not the embedding and the head of each codebook
    "torch-seq2seq": ["encoder.layers encoder 2", "decoder.layers decoder 3"],
}


def described(model: nn.Module) -> list[str]:
    return [f"{stack.name} {stack.role} {len(stack)}" for stack in find_stacks(model)]


@pytest.mark.parametrize("architecture", STACKS)
def test_stacks(model_of, architecture: str) -> None:
    assert described(model_of(architecture)) == STACKS[architecture]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Feed(Block):
    """A second kind of block, with an ancestor in common."""


def blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList([Block() for _ in range(count)])


def test_plain_modules_are_named_by_their_path() -> None:
    model = nn.ModuleDict({"text_encoder": nn.ModuleDict({"layers": blocks(3)}), "decoder_blocks": blocks(1)})
    assert described(model) == ["text_encoder.layers encoder 3", "decoder_blocks decoder 1"]


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("decoder.bert.encoder", "decoder"),  # the outermost word says what the stack is to the model
        ("encoder_decoder.decoder", "decoder"),  # a word that says both says nothing
        ("autoencoder.decoder", "decoder"),
        ("transformer", "encoder"),
    ],
)
def test_role_of_a_path(path: str, role: str) -> None:
    model: nn.Module = nn.ModuleDict({"layers": blocks()})
    for component in reversed(path.split(".")):
        model = nn.ModuleDict({component: model})
    assert described(model) == [f"{path}.layers {role} 2"]


def test_role_of_a_plain_list_is_in_the_class_of_its_blocks() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 4, batch_first=True), 2)
    assert described(decoder) == ["layers decoder 2"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 2)
    assert described(encoder) == ["layers encoder 2"]


def test_blocks_of_one_family_are_a_stack_and_unrelated_modules_are_not() -> None:
    assert described(nn.ModuleList([Block(), Feed()])) == [" encoder 2"]
    # nothing in common below nn.Module: a container, searched further
    container = nn.ModuleList([nn.Sequential(blocks(2)), nn.ModuleDict({"layers": blocks(3)})])
    assert described(container) == ["0.0 encoder 2", "1.layers encoder 3"]


def test_list_with_a_module_without_parameters_is_no_stack() -> None:
    assert described(nn.ModuleList([nn.ReLU(), nn.Linear(2, 2)])) == []
    assert described(nn.ModuleList()) == []


def test_bare_layers_are_a_stack_only_where_there_is_nothing_else() -> None:
    heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    assert described(nn.ModuleDict({"heads": heads})) == ["heads encoder 3"]
    assert described(nn.ModuleDict({"heads": heads, "layers": blocks()})) == ["layers encoder 2"]


def test_models_of_an_ensemble_are_no_blocks(fresh_model_of) -> None:
    ensemble = nn.ModuleList([fresh_model_of("bert-base"), fresh_model_of("gpt2")])
    assert described(ensemble) == ["0.encoder.layer encoder 2", "1.transformer.h decoder 2"]
    twins = nn.ModuleList([fresh_model_of("bert-base"), fresh_model_of("bert-base")])
    assert described(twins) == ["0.encoder.layer encoder 2", "1.encoder.layer encoder 2"]


def test_shared_stack_is_found_once() -> None:
    shared = blocks()
    assert described(nn.ModuleDict({"encoder": shared, "again": nn.ModuleDict({"encoder": shared})})) == [
        "encoder encoder 2"
    ]


def test_block_used_twice_keeps_its_numbers() -> None:
    block = Block()
    model = nn.ModuleDict({"layers": nn.ModuleList([block, block, Block()])})
    expected = [f"layers.0.{name}" for name, _ in block.named_parameters()]
    assert list(select_parameters(model, layers=1)) == expected


@pytest.mark.parametrize(
    ("architecture", "word", "prefixes"),
    [
        ("bert-generates", "last-decoder-layer", ["bert.encoder.layer.1."]),
        ("bert-pair", "last-decoder-layer", ["decoder.bert.encoder.layer.1."]),
        ("bert-pair", "last-encoder-layer", ["encoder.encoder.layer.1."]),
        ("bart-decoder", "last-decoder-layer", ["model.decoder.layers.1."]),
        ("albert-groups", "last-encoder-layer", ["encoder.albert_layer_groups.1."]),
        ("image-text", "last-encoder-layer", ["vision_model.layers.1.", "text_model.encoder.layer.1."]),
        ("wav2vec2", "last-encoder-layer", ["encoder.layers.1."]),
        ("mixtral", "last-decoder-layer", ["model.layers.1."]),
        ("jamba", "last-decoder-layer", ["model.layers.1."]),
        ("torch-seq2seq", "last-decoder-layer", ["decoder.layers.2."]),
    ],
)
def test_last_layer_is_the_whole_last_block(model_of, architecture: str, word: str, prefixes: list[str]) -> None:
    model = model_of(architecture)
    expected = [name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))]
    assert list(select_parameters(model, word)) == expected
    assert expected


@pytest.mark.parametrize(
    ("architecture", "word"),
    [
        ("bert-generates", "last-encoder-layer"),
        ("bart-decoder", "last-encoder-layer"),
        ("jamba", "last-encoder-layer"),
        ("wav2vec2", "last-decoder-layer"),
    ],
)
def test_there_is_no_other_last_layer(model_of, architecture: str, word: str) -> None:
    with pytest.raises(TargetError, match="got the stack"):
        select_parameters(model_of(architecture), word)
