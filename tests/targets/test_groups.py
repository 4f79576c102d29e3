"""Groupings: every parameter in one group, and each group selects what it says."""

from __future__ import annotations

import sys

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import LayerProbe, Quantization
from hf_parcor.targets import TargetError, by_adapter, by_kind, by_layer, by_module, find_stacks, select_parameters
from hf_parcor.targets.matching import parameters_by_module

FAMILIES = [
    *("bert", "albert", "t5", "marian", "bart", "gpt2", "llama", "llama-tied", "vit", "resnet", "clip", "mixtral"),
    *("jamba", "wav2vec2", "bert-pair", "torch-seq2seq", "bert-masked", "gpt2-classifier"),
]


def selected(model, groups):
    return {label: list(select_parameters(model, target)) for label, target in groups.items()}


@pytest.mark.slow
@for_each("family", FAMILIES)
@for_each("group", [by_kind, by_module])
def test_every_parameter_is_in_one_group(model_of, family, group):
    model = model_of(family)
    names = [name for of_group in selected(model, group(model)).values() for name in of_group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.slow
@for_each("family", FAMILIES)
def test_modules_hold_their_parameters_themselves(model_of, family):
    model = model_of(family)
    for label, names in selected(model, by_module(model)).items():
        assert {name.rpartition(".")[0] or type(model).__name__ for name in names} == {label}


@for_each("family", FAMILIES)
def test_layers_are_the_blocks(model_of, family):
    model = model_of(family)
    groups = selected(model, by_layer(model))
    assert list(groups) == [f"{stack.name}.{index}" for stack in find_stacks(model) for index in range(len(stack))]
    for label, names in groups.items():
        below = set(model.get_submodule(label).parameters())
        assert names == [name for name, parameter in model.named_parameters() if parameter in below]


KINDS = {
    "bert": {
        "layer-norm": ["embeddings.LayerNorm", "layer.0.output.LayerNorm", "layer.1.attention.output.LayerNorm"],
        "attention": ["layer.0.attention.self.query", "layer.1.attention.output.dense"],
        "embedding": ["word_embeddings", "position_embeddings"],
        "output": ["classifier"],
        "linear": ["layer.0.intermediate.dense", "layer.1.output.dense", "pooler.dense"],
    },
    "t5": {
        "layer-norm": ["encoder.block.0.layer.0.layer_norm", "decoder.final_layer_norm"],
        "attention": ["relative_attention_bias", "block.1.layer.1.EncDecAttention.q"],
        "embedding": ["shared"],
        "linear": ["decoder.block.0.layer.2.DenseReluDense.wi"],
    },
    "gpt2": {
        "layer-norm": ["ln_f"],
        "attention": ["h.1.attn.c_proj"],
        "embedding": ["wte", "wpe"],
        "linear": ["h.0.mlp.c_fc"],
    },
    "resnet": {
        "other normalization": ["embedder.embedder.normalization"],
        "output": ["classifier.1"],
        "embedding": ["embedder.convolution"],
        "convolution": ["stages.1.layers.0.layer.0.convolution"],
    },
}


@for_each("family", KINDS)
def test_kinds(model_of, family):
    model = model_of(family)
    found = selected(model, by_kind(model))
    assert sorted(found) == sorted(KINDS[family])
    for kind, modules in KINDS[family].items():
        for module in modules:
            assert [name for name in found[kind] if f"{module}." in name], (kind, module)


def test_targets_are_short(model_of):
    """As large a module as is of one kind, not a list of all its weights."""
    bert = model_of("bert")
    assert by_layer(bert)["bert.encoder.layer.1"] == ["bert.encoder.layer.1"]
    assert "bert.encoder.layer.0.attention.self" in by_kind(bert)["attention"]
    assert by_kind(bert)["output"] == ["classifier"]


@for_each("group", [by_kind, by_layer, by_module])
def test_groups_of_a_wrapper_are_those_of_what_is_measured(group):
    model = nn.Sequential(nn.Embedding(3, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.LayerNorm(2))
    wrapped = nn.DataParallel(model)
    groups = group(wrapped)
    assert groups == group(model)
    sweep = LayerProbe(wrapped, lambda _: {"nothing": 0.0}, targets=groups, progress=False).evaluate(Quantization(4))
    assert sweep.records.keys() == groups.keys()


def test_a_name_that_is_also_the_end_of_another():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(1, 1)}), "b": nn.Linear(1, 1)})
    assert by_module(model) == {"a.b": ["a.b"], "b": "(?:b)"}
    assert selected(model, by_module(model)) == {"a.b": ["a.b.weight", "a.b.bias"], "b": ["b.weight", "b.bias"]}


def test_a_name_that_is_a_word():
    model = nn.ModuleDict({"embedding": nn.Linear(2, 2), "all": nn.LayerNorm(2), "table": nn.Embedding(2, 2)})
    assert {label: names[0] for label, names in selected(model, by_module(model)).items() if label != "table"} == {
        "embedding": "embedding.weight",
        "all": "all.weight",
    }


def test_parameters_of_the_model_itself():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.inner = nn.Linear(2, 2)

    assert selected(Scaled(), by_module(Scaled())) == {
        "Scaled": ["weight", "bias"],
        "inner": ["inner.weight", "inner.bias"],
    }


class TestAdapters:
    @pytest.fixture
    def adapted(self, fresh_model_of):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=1, target_modules=["query", "word_embeddings"], task_type="SEQ_CLS")
        model = peft.get_peft_model(fresh_model_of("bert"), config)
        model.add_adapter("french", peft.LoraConfig(r=2, target_modules=["value"]))
        return model

    def test_each_adapter(self, adapted):
        found = selected(adapted, by_adapter(adapted))
        assert list(found) == ["default", "french"]
        for label, names in found.items():
            assert names == [name for name, _ in adapted.named_parameters() if f".{label}" in name]
        assert any("lora_embedding_A.default" in name for name in found["default"])
        assert any("modules_to_save.default" in name for name in found["default"])
        assert sum(adapted.get_parameter(name).numel() for name in found["french"]) == 2 * 2 * (8 + 8) + 2 * (8 + 1), (
            "and its head"
        )

    def test_no_adapter(self, model_of):
        with pytest.raises(TargetError, match="expected a model with PEFT adapters, got BertForSequenceClass"):
            by_adapter(model_of("bert"))


@for_each("group", [by_kind, by_module])
def test_no_parameters(group):
    with pytest.raises(TargetError, match="expected a model with parameters, got ReLU without any"):
        group(nn.ReLU())


def test_no_stack():
    with pytest.raises(TargetError, match="expected a model with stacks of blocks, got Linear without any"):
        by_layer(nn.Linear(2, 2))


def test_a_shared_weight_comes_once():
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["table"].weight
    assert list(by_module(model)) == ["table"]
    assert list(by_kind(model)) == ["embedding"]
    assert list(select_parameters(model, ["table"]).values()) == [model["head"].weight]


def test_a_model_of_many_modules_is_walked_through_once(monkeypatch) -> None:
    """One part after the other was looked for in all of the model: 291 parts of a Llama of 32 layers took 10 s."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    walks = []
    walked = parameters_by_module
    for module in ("matching", "groups"):
        monkeypatch.setattr(
            sys.modules[f"hf_parcor.targets.{module}"],
            "parameters_by_module",
            lambda model: walks.append(model) or walked(model),
        )
    groups = by_module(model)
    assert len(groups) == 50
    assert len(walks) == 2  # for the names that can be matched, and for the names that are found
    model.to_empty(device="cpu")
    LayerProbe(model, lambda model: {"score": 1.0}, targets=groups, progress=False)
    assert len(walks) == 3
