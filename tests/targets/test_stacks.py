"""Which lists are stacks of layers, and which of them encode and decode: the traps."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
import transformers as tf
from for_each import for_each
from torch import nn

from hf_parcor.targets import TargetError, by_layer, find_stacks, select_parameters

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


@for_each("architecture", STACKS)
def test_stacks(model_of, architecture: str) -> None:
    assert described(model_of(architecture)) == STACKS[architecture]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Feed(Block):
    """A second kind of block, with an ancestor in common."""


class Other(nn.Module):
    """A block of another family."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


def blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList([Block() for _ in range(count)])


def test_plain_modules_are_named_by_their_path() -> None:
    model = nn.ModuleDict({"text_encoder": nn.ModuleDict({"layers": blocks(3)}), "decoder_blocks": blocks(1)})
    assert described(model) == ["text_encoder.layers encoder 3", "decoder_blocks decoder 1"]


@for_each(
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
    assert described(nn.ModuleList([nn.Linear(2, 2), None])) == []  # as Informer's convolutions between layers end
    assert described(nn.ModuleList()) == []


def test_bare_layers_are_a_stack_only_where_there_is_nothing_else() -> None:
    bare = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    assert described(nn.ModuleDict({"dense": bare})) == ["dense encoder 3"]
    assert described(nn.ModuleDict({"dense": bare, "layers": blocks()})) == ["layers encoder 2"]


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


def sequence(count: int = 2, kind: type[nn.Module] = Block) -> nn.Sequential:
    return nn.Sequential(*(kind() for _ in range(count)))


def pyramid() -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()) for _ in range(3)])


@for_each(
    ("parts", "expected"),
    [
        # numbered stages are one stack: the last layer is the last of all
        ({"conv1": nn.Linear(2, 2), "layer1": sequence(2), "layer2": sequence(1)}, ["layer1, layer2 encoder 3"]),
        ({"layer1": sequence(2), "layer2": sequence(2, Feed)}, ["layer1, layer2 encoder 4"]),
        ({"stage1": sequence(), "stage2": sequence(2, Other)}, ["stage1 encoder 2", "stage2 encoder 2"]),
        ({"encoder": sequence(), "decoder": sequence(3)}, ["encoder encoder 2", "decoder decoder 3"]),
        ({"left": sequence(), "right": sequence()}, ["left encoder 2", "right encoder 2"]),
        ({"head1": sequence(), "blocks": sequence(3)}, ["head1 encoder 2", "blocks encoder 3"]),
        ({"only": sequence(1)}, ["only.0.experts encoder 2"]),  # a container of anything: what lies inside, as before
        ({"mlp": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))}, []),
        ({"mlp": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}, []),  # bare layers
        ({"mixed": nn.Sequential(Block(), nn.TransformerEncoderLayer(2, 1, 2))}, ["mixed.0.experts encoder 2"]),
        ({"layers": blocks(), "features": sequence(3)}, ["layers encoder 2"]),  # beside a list, it is no stack
        # a pyramid's layers, each in a container of its own, hide no stages
        ({"layer1": sequence(2), "layer2": sequence(2), "fpn": pyramid()}, ["layer1, layer2 encoder 4"]),
        ({"fpn": pyramid()}, ["fpn encoder 3"]),  # but there is nothing else
    ],
)
def test_blocks_in_sequence(parts: dict[str, nn.Module], expected: list[str]) -> None:
    assert described(nn.ModuleDict(parts)) == expected


def test_numbered_stages_are_numbered_through() -> None:
    model = nn.ModuleDict({"layer1": sequence(2), "layer2": sequence(3), "linear": nn.Linear(2, 2)})
    assert list(by_layer(model)) == ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2"]
    whole = set(select_parameters(model, layers=range(5)))
    assert whole == {name for name, _ in model.named_parameters() if name.startswith("layer")}
    last = {name for name, _ in model.named_parameters() if name.startswith("layer2.2.")}
    assert set(select_parameters(model, "last-encoder-layer")) == set(select_parameters(model, layers=-1)) == last
    assert set(select_parameters(model, layers=2)) == {name.replace("layer2.2", "layer2.0") for name in last}
    for name, target in by_layer(model).items():
        assert all(one.startswith(f"{name}.") for one in select_parameters(model, target))


def test_names_of_blocks_that_have_names() -> None:
    blocks = nn.Sequential(OrderedDict(first=Block(), second=Block()))
    assert list(by_layer(nn.ModuleDict({"encoder": blocks}))) == ["encoder.first", "encoder.second"]
    block = Block()
    assert list(by_layer(nn.Sequential(block, block, Block()))) == ["0", "1", "2"]  # a block used twice


@for_each(
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


@for_each(
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


# The last layers of real models, by hand from their architectures; their traps are lists beside the layers: in heads
# and necks, embeddings, projections of features, prediction heads of each decoder layer.
LAST_LAYERS: dict[str, tuple[list[str], list[str]]] = {
    "Segformer/SemanticSegmentation": (["segformer.stages.3"], []),
    "UperNet/SemanticSegmentation": (["backbone.encoder.stages.3"], []),
    "Data2VecVision/SemanticSegmentation": (["data2vec_vision.encoder.layer.11"], []),
    "DPT/DepthEstimation": (["dpt.encoder.layer.11"], []),
    "DepthAnything/DepthEstimation": (["backbone.encoder.layer.11"], []),
    "ZoeDepth/DepthEstimation": (["backbone.beit.layers.23"], []),
    "GLPN/DepthEstimation": (["glpn.encoder.block.3"], ["decoder.stages.3"]),
    "MobileViT/ImageClassification": (["mobilevit.encoder.layer.4"], []),  # layers of two families
    "SwiftFormer/ImageClassification": (["swiftformer.encoder.network.6"], []),
    "PoolFormer/ImageClassification": (["poolformer.encoder.block.3"], []),
    "Pvt/ImageClassification": (["pvt.encoder.block.3"], []),
    "ViTMAE/PreTraining": (["vit.layers.11"], ["decoder.decoder_layers.7"]),
    "Data2VecAudio/CTC": (["data2vec_audio.encoder.layers.11"], []),
    "Wav2Vec2/XVector": (["wav2vec2.encoder.layers.11"], []),
    "EfficientLoFTR/KeypointMatching": (
        ["efficientloftr.backbone.stages.3", "efficientloftr.local_feature_transformer.layers.3"],
        [],
    ),
    "Mask2Former/UniversalSegmentation": (
        ["model.pixel_level_module.encoder.swin.encoder.layers.3"],
        ["model.pixel_level_module.decoder.encoder.layers.5", "model.transformer_module.decoder.layers.8"],
    ),
    "GroundingDino/ObjectDetection": (
        [
            "model.backbone.conv_encoder.model.swin.encoder.layers.3",
            "model.text_backbone.encoder.layer.11",
            "model.encoder.layers.5",
        ],
        ["model.decoder.layers.5"],
    ),
    "Udop/ConditionalGeneration": (["encoder.block.23"], ["decoder.block.23"]),
    "Electra/MaskedLM": (["electra.encoder.layer.11"], []),
    "Florence2/ConditionalGeneration": (
        ["model.vision_tower.blocks.3", "model.language_model.encoder.layers.11"],
        ["model.language_model.decoder.layers.11"],
    ),
    "VibeVoiceAsr/ConditionalGeneration": (
        ["model.acoustic_tokenizer_encoder.conv_layers.5", "model.semantic_tokenizer_encoder.conv_layers.5"],
        ["model.language_model.layers.31"],
    ),
    "OmniASR/ConditionalGeneration": (["model.audio_tower.layers.23"], ["model.language_model.layers.11"]),
    "Whisper/ConditionalGeneration": (["model.encoder.layers.3"], ["model.decoder.layers.3"]),
    "OPT/CausalLM": ([], ["model.decoder.layers.11"]),
    "GPTNeo/CausalLM": ([], ["transformer.h.23"]),
}


def unfilled(kind: str, **settings: object) -> nn.Module:
    """A model of the default size without memory for its weights."""
    family, task = kind.split("/")
    if not hasattr(tf, f"{family}Config"):
        pytest.skip(f"{family} is not in Transformers {tf.__version__}")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is initialized
        return getattr(tf, f"{family}For{task}")(getattr(tf, f"{family}Config")(**settings))


@pytest.mark.slow
@for_each("kind", LAST_LAYERS)
def test_last_layers_of_real_models(kind: str) -> None:
    model = unfilled(kind)
    for word, blocks in zip(("last-encoder-layer", "last-decoder-layer"), LAST_LAYERS[kind], strict=True):
        expected = [name for block in blocks for name, _ in model.get_submodule(block).named_parameters(prefix=block)]
        if not expected:
            with pytest.raises(TargetError):
                select_parameters(model, word)
        else:
            assert set(select_parameters(model, word)) == set(expected)


@pytest.mark.slow
@for_each(
    ("kind", "base"),
    [
        ("Segformer/SemanticSegmentation", "segformer"),
        ("DPT/DepthEstimation", "dpt"),
        ("Data2VecVision/SemanticSegmentation", "data2vec_vision"),
        ("Wav2Vec2/XVector", "wav2vec2"),
        ("UniSpeechSat/XVector", "unispeech_sat"),
        ("RTDetr/ObjectDetection", "model"),
        ("LwDetr/ObjectDetection", "model"),
        ("Deberta/SequenceClassification", "deberta"),
    ],
)
def test_a_head_adds_no_layer(kind: str, base: str) -> None:
    """What has a head has the layers of what has none."""
    model = unfilled(kind)
    for selection in ({"target_modules": "last-encoder-layer"}, {"layers": -1}):
        whole = set(select_parameters(model, **selection))
        assert whole == {f"{base}.{name}" for name in select_parameters(model.get_submodule(base), **selection)}
        assert whole


@for_each(
    "part",
    ["decode_head", "auxiliary_head.0", "neck", "heads", "bbox_embed", "input_proj", "prenet", "postnet", "subsample"],
)
def test_lists_in_a_part_beside_the_encoder_are_no_layers(part: str) -> None:
    model: nn.Module = nn.ModuleDict({"stages": blocks()})
    inner = blocks()
    for component in reversed(part.split(".")):
        inner = nn.ModuleDict({component: inner})
    model.update(inner)
    assert described(model) == ["stages encoder 2", f"{part} other 2"]
    assert set(select_parameters(model, layers=-1)) == set(select_parameters(model, "last-encoder-layer"))
    assert all(name.startswith("stages.1.") for name in select_parameters(model, layers=1))
    with pytest.raises(TargetError, match="index inside"):
        select_parameters(model, layers=2)
    del model["stages"]
    assert described(model) == [f"{part} encoder 2"], "beside nothing"
