"""Names mean what they mean in PEFT, and a model that PEFT has wrapped is read like any other."""

from __future__ import annotations

import re

import pytest
from for_each import for_each
from torch import nn

from hf_parcor.evaluation.placement.reach import Reach
from hf_parcor.targets import TargetError, find_stacks, select_parameters, select_trainable

peft = pytest.importorskip("peft")

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists  # noqa: E402


def with_lora(model: nn.Module, **settings: object) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=1, **settings))


def below(model: nn.Module, modules: list[str]) -> list[str]:
    """Name the parameters below some modules, in the order of the model."""
    wanted = {id(parameter) for name in modules for parameter in model.get_submodule(name).parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def matched_by_peft(model: nn.Module, **settings: object) -> list[str]:
    config = peft.LoraConfig(**settings)
    results = {name: check_target_module_exists(config, name) for name, _ in model.named_modules() if name}
    return [name for name, result in results.items() if result and not isinstance(result, _ExcludedModule)]


@for_each(
    ("architecture", "settings"),
    [
        ("bert", {"target_modules": ["query", "value"]}),
        ("bert", {"target_modules": ["attention.output.dense", "bert.pooler.dense"]}),
        ("bert", {"target_modules": ["dense"], "exclude_modules": ["attention.output.dense", "bert.pooler.dense"]}),
        ("bert", {"target_modules": ["dense"], "exclude_modules": r".*\.(pooler|intermediate)\.dense"}),
        ("bert", {"target_modules": r".*\.layer\.\d\.(attention\.self|intermediate)\..*"}),
        ("bert", {"target_modules": r"bert\.encoder\.layer\.1\.output\.dense"}),
        ("bert", {"target_modules": ["query"], "layers_to_transform": 1}),
        ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": [0]}),
        ("roberta", {"target_modules": ["query", "out_proj"]}),
        ("distilbert", {"target_modules": ["q_lin", "lin1"], "layers_to_transform": [1]}),
        ("albert", {"target_modules": ["query", "ffn"]}),
        ("t5", {"target_modules": ["q", "v"]}),
        ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [1]}),
        ("t5", {"target_modules": r"decoder\..*EncDecAttention\.(q|v)"}),
        ("marian", {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [0, 1]}),
        (
            "bart",
            {"target_modules": ["encoder_attn.k_proj"], "exclude_modules": ["decoder.layers.0.encoder_attn.k_proj"]},
        ),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": 0}),
        ("llama", {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]}),
        ("vit", {"target_modules": ["q_proj", "projection"]}),
        ("resnet", {"target_modules": r".*\.convolution"}),
        ("resnet", {"target_modules": ["convolution"], "layers_to_transform": [1]}),
    ],
)
def test_names_match_what_peft_matches(model_of, architecture: str, settings: dict[str, object]) -> None:
    model = model_of(architecture)
    expected = below(model, matched_by_peft(model, **settings))
    ours = {"layers" if key == "layers_to_transform" else key: value for key, value in settings.items()}
    assert list(select_parameters(model, **ours)) == expected
    assert expected


@for_each("targets", [["uery"], ["self.quer"], ["bert.encoder.layer.0.attention.sel"], "query", r".*\.uery", "QUERY"])
def test_what_peft_does_not_match_is_an_error(model_of, targets: object) -> None:
    model = model_of("bert")
    assert matched_by_peft(model, target_modules=targets) == []
    with pytest.raises(TargetError):
        select_parameters(model, targets)


@pytest.mark.slow
@for_each(
    ("architecture", "task"),
    [
        ("bert", "SEQ_CLS"),
        ("roberta", "SEQ_CLS"),
        ("albert", "SEQ_CLS"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("marian", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_2_SEQ_LM"),
        ("gpt2", "CAUSAL_LM"),
        ("llama", "CAUSAL_LM"),
        ("vit", "SEQ_CLS"),
        ("gpt2-classifier", "SEQ_CLS"),
        ("bert-masked", None),
        ("bert-base", None),
        ("jamba", "CAUSAL_LM"),
        ("clip", None),
    ],
)
def test_all_linear_is_what_peft_injects(model_of, fresh_model_of, architecture: str, task: str | None) -> None:
    wrapped = with_lora(
        fresh_model_of(architecture),
        target_modules="all-linear",
        task_type=task,
        fan_in_fan_out=architecture.startswith("gpt2"),  # else PEFT warns that Conv1D is transposed
    )
    model = model_of(architecture)
    assert list(select_parameters(model, "all-linear")) == below(model, wrapped.base_model.targeted_module_names)


@pytest.fixture
def lora_bert(fresh_model_of):
    return with_lora(fresh_model_of("bert"), target_modules=["query"], task_type="SEQ_CLS")


def test_all_linear_of_distilbert_is_what_peft_injects(model_of, fresh_model_of) -> None:
    # get_peft_model stops on the adapter in pre_classifier, whose name ends like that of the head it saves
    config = peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", r=1)
    injected = peft.inject_adapter_in_model(config, fresh_model_of("distilbert"))
    names = [name for name, module in injected.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert "pre_classifier" in names
    assert list(select_parameters(model_of("distilbert"), "all-linear")) == below(model_of("distilbert"), names)


LAYER = "base_model.model.bert.encoder.layer.1"


def test_lora_keeps_words_and_stacks(lora_bert) -> None:
    (stack,) = find_stacks(lora_bert)
    assert str(stack) == '"base_model.model.bert.encoder.layer" (encoder, 2 blocks)'
    for word in ("layer-norm", "embedding"):
        names = select_parameters(lora_bert, word)
        plain = select_parameters(lora_bert.get_base_model(), word)
        assert list(names) == [f"base_model.model.{name}" for name in plain]
    assert list(select_parameters(lora_bert, "attention", layers=-1)) == [
        f"{LAYER}.attention.self.query.base_layer.weight",
        f"{LAYER}.attention.self.query.base_layer.bias",
        f"{LAYER}.attention.self.query.lora_A.default.weight",
        f"{LAYER}.attention.self.query.lora_B.default.weight",
        f"{LAYER}.attention.self.key.weight",
        f"{LAYER}.attention.self.key.bias",
        f"{LAYER}.attention.self.value.weight",
        f"{LAYER}.attention.self.value.bias",
        f"{LAYER}.attention.output.dense.weight",
        f"{LAYER}.attention.output.dense.bias",
    ]
    last = list(select_parameters(lora_bert, "last-encoder-layer"))
    assert last == [name for name, _ in lora_bert.named_parameters() if name.startswith(f"{LAYER}.")]


def test_lora_all_linear_leaves_out_both_copies_of_the_head(lora_bert) -> None:
    names = select_parameters(lora_bert, "all-linear")
    assert f"{LAYER}.attention.self.query.base_layer.weight" in names
    assert f"{LAYER}.attention.self.query.lora_A.default.weight" in names
    assert not [name for name in names if "classifier" in name]
    assert [name for name, _ in lora_bert.named_parameters() if "modules_to_save" in name]


def test_lora_names_are_the_longer_ones(lora_bert) -> None:
    adapters = select_parameters(lora_bert, r".*\.lora_[AB]\..*")
    assert list(adapters) == [name for name, _ in lora_bert.named_parameters() if re.search("lora_", name)]
    assert list(select_parameters(lora_bert, ["self.query"], layers=1)) == [
        f"{LAYER}.attention.self.query.{end}"
        for end in ("base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight")
    ]
    with pytest.raises(TargetError, match="nearest names"):
        select_parameters(lora_bert, [f"{LAYER}.attention.self.query".removeprefix("base_model.")[:-1]])


def test_weights_that_are_made_anew_whenever_modules_are_listed_are_refused() -> None:
    """They would be left out without a word; what is trained can be selected, and so can what lies beside them."""
    model = nn.ModuleDict({"mixer": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 2)})
    adapted = with_lora(model, target_modules=["mixer", "out"])
    for target in ("all", "attention", ["base_layer"]):
        with pytest.raises(NotImplementedError, match=r"got 2 such as .*in_proj_weight.*merge_and_unload"):
            select_parameters(adapted, target)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert select_trainable(adapted).keys() == trained
    assert len(select_parameters(adapted, ["out.base_layer"])) == 2
    assert Reach(adapted).select().notes == (
        "corrupted 30 weights, those that are trained, and none of the 90 frozen ones",
    )
    assert len(select_parameters(adapted.merge_and_unload())) == 6
