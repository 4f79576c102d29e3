"""Words on models whose class names mislead, and the output layer of every kind of head."""

from __future__ import annotations

import pytest
import torch
from for_each import for_each
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_parcor.targets import TargetError, select_parameters


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(2, 2, bias=False)
        self.norm = nn.BatchNorm1d(2)
        self.table = nn.Embedding(3, 2)


class AttentionBlock(nn.Module):
    """A whole block, whatever its name says."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = SelfAttention()
        self.mlp = nn.Linear(2, 2, bias=False)


class GlobalAttentionLayer(nn.Module):
    """Attention with attention inside, as BertAttention has BertSelfAttention: all of it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SelfAttention()
        self.out = nn.Linear(2, 2, bias=False)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)


class LatentMLA(nn.Module):
    """Multi-head latent attention, as LongCat calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2, 2, bias=False)


class AttentionPoolingHead(nn.Module):
    """Attention and what follows it, in no stack: SigLIP's head, and the layer that Zamba's blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.ones(2))
        self.attention = LatentMLA()
        self.mlp = MLP()


class AttentionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.layers = nn.ModuleList([AttentionBlock(), AttentionBlock()])
        self.extra = GlobalAttentionLayer()
        self.latent = LatentMLA()
        self.head = AttentionPoolingHead()


class ScaledRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


class StableLayerNormEncoder(nn.Module):
    """Not a normalization layer: it holds layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(2))
        self.dense = nn.Linear(2, 2, bias=False)
        self.norm = ScaledRMSNorm()
        self.final = nn.LayerNorm(2, bias=False)
        self.unweighted = nn.LayerNorm(2, elementwise_affine=False)


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(2))
        self.projection = nn.Conv2d(1, 2, 2, bias=False)
        self.norm = nn.GroupNorm(1, 2)


class NormedEmbedding(nn.Embedding):
    pass


class TextEmbedder(nn.Module):
    """A model that embeds texts: not an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = NormedEmbedding(3, 2)
        self.patches = PatchEmbed()
        self.bag = nn.EmbeddingBag(3, 2)
        self.layers = nn.ModuleList([AttentionBlock()])


def test_attention_of_misleading_names() -> None:
    assert list(select_parameters(AttentionModel(), "attention")) == [
        *("layers.0.mixer.query.weight", "layers.0.mixer.table.weight"),
        *("layers.1.mixer.query.weight", "layers.1.mixer.table.weight"),
        *("extra.inner.query.weight", "extra.inner.table.weight", "extra.out.weight"),
        *("latent.down.weight", "head.probe", "head.attention.down.weight"),
    ]


def test_torch_attention() -> None:
    model = nn.TransformerEncoderLayer(d_model=2, nhead=1, dim_feedforward=2, batch_first=True)
    names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert list(select_parameters(model, "attention")) == [f"self_attn.{name}" for name in names]
    assert list(select_parameters(nn.MultiheadAttention(2, 1), "attention")) == names


def test_layer_norm_is_a_leaf_with_parameters() -> None:
    assert list(select_parameters(StableLayerNormEncoder(), "layer-norm")) == ["norm.scale", "final.weight"]


@for_each("wrap", [lambda model: model, lambda model: nn.ModuleDict({"text": model})])
def test_embedding_of_misleading_names(wrap) -> None:
    names = [name.removeprefix("text.") for name in select_parameters(wrap(TextEmbedder()), "embedding")]
    assert names == ["tokens.weight", "patches.cls_token", "patches.projection.weight", "bag.weight"]


@pytest.mark.slow
@for_each(
    ("architecture", "output"),
    [
        ("bert-masked", ["cls.predictions.decoder"]),
        ("bert-generates", ["cls.predictions.decoder"]),
        ("bert-pair", ["decoder.cls.predictions.decoder"]),
        ("bart-classifier", ["classification_head"]),
        ("gpt2-classifier", ["score"]),
        ("clip-classifier", ["classifier"]),
        ("musicgen-decoder", ["lm_heads"]),
        ("mixtral", ["lm_head"]),
        ("jamba", ["lm_head"]),
        ("blip", ["text_decoder.cls.predictions.decoder"]),
        ("deit-taught", ["cls_classifier", "distillation_classifier"]),
        ("bert-base", []),
        ("clip", []),
        ("image-text", []),
    ],
)
def test_all_linear_leaves_out_the_output_layer(model_of, architecture: str, output: list[str]) -> None:
    model = model_of(architecture)
    expected = [
        name
        for name, _ in model.named_parameters()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Linear, Conv1D))
        and not name.startswith(tuple(f"{layer}." for layer in output))
    ]
    assert list(select_parameters(model, "all-linear")) == expected
    assert all(list(model.get_submodule(layer).parameters()) for layer in output)


def test_all_linear_of_a_plain_module_is_every_linear() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Linear(2, 1))
    assert list(select_parameters(model, "all-linear")) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_transformers_model_inside_a_plain_module_keeps_its_output_layer_out(fresh_model_of) -> None:
    model = nn.ModuleDict({"policy": fresh_model_of("llama"), "value": nn.Linear(8, 1)})
    names = list(select_parameters(model, "all-linear"))
    assert "value.weight" in names
    assert "policy.model.layers.0.mlp.up_proj.weight" in names
    assert "policy.lm_head.weight" not in names


def test_a_word_that_finds_nothing_points_to_modules_of_that_name() -> None:
    model = nn.ModuleDict({"attention": nn.Linear(2, 2)})
    with pytest.raises(TargetError, match=r'for the modules named attention: r"\(\.\*\\\.\)\?attention"'):
        select_parameters(model, "attention")
    assert list(select_parameters(model, r"(.*\.)?attention")) == ["attention.weight", "attention.bias"]
