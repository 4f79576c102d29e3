"""Names, tied weights, filters, and every way to ask for what is not there."""

from __future__ import annotations

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor.targets import TargetError, select_parameters


def test_target_error_is_a_value_error() -> None:
    assert issubclass(TargetError, ValueError)


@for_each(
    ("targets", "expected"),
    [
        (["lm_head"], ["shared.weight"]),
        ("lm_head", ["shared.weight"]),
        (r"lm_head\.weight", ["shared.weight"]),
        (["encoder.embed_tokens"], ["shared.weight"]),
        (["lm_head", "shared", "decoder.embed_tokens.weight"], ["shared.weight"]),
        (["decoder.final_layer_norm", "lm_head"], ["shared.weight", "decoder.final_layer_norm.weight"]),
    ],
)
def test_tied_weights_come_once_under_their_first_name(model_of, targets, expected: list[str]) -> None:
    model = model_of("t5")
    selected = select_parameters(model, targets)
    assert list(selected) == expected
    assert selected["shared.weight"] is model.lm_head.weight


def test_tied_weights_are_excluded_under_every_name(model_of) -> None:
    model = model_of("t5")
    for name in ("shared", "lm_head", "encoder.embed_tokens"):
        assert "shared.weight" not in select_parameters(model, "all", exclude_modules=[name])


def test_tied_and_untied_output_layers(model_of) -> None:
    assert list(select_parameters(model_of("llama-tied"), ["lm_head"])) == ["model.embed_tokens.weight"]
    assert list(select_parameters(model_of("llama-untied"), ["lm_head"])) == ["lm_head.weight"]
    # a tied weight belongs to both of its modules
    tied = select_parameters(model_of("llama-tied"), "embedding", module_types=nn.Linear)
    assert list(tied) == ["model.embed_tokens.weight"]
    with pytest.raises(TargetError, match="module_types to leave"):
        select_parameters(model_of("llama-untied"), "embedding", module_types=nn.Linear)


def test_modules_shared_by_two_names_are_found_by_both() -> None:
    linear = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": linear, "second": linear, "other": nn.Linear(2, 2)})
    assert list(select_parameters(model, ["second"])) == ["first.weight", "first.bias"]
    assert list(select_parameters(model, r"second\.bias")) == ["first.bias"]


class Net(nn.Module):
    """Layers `block.0`, `block.1` with `query` and `norm`, a parameter of the root, a `subquery` beside `query`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.block = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(2, 2), "subquery": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
            for _ in "ab"
        )
        self.query = nn.Bilinear(2, 2, 2, bias=False)
        self.dropout = nn.Dropout()


QUERY = ["block.0.query.weight", "block.0.query.bias", "block.1.query.weight", "block.1.query.bias"]


@for_each(
    ("targets", "expected"),
    [
        (["query"], [*QUERY, "query.weight"]),  # exact and suffix, never "subquery"
        (["0.query"], QUERY[:2]),
        (("1.query", "scale"), ["scale", *QUERY[2:]]),
        ({"1.query.bias"}, ["block.1.query.bias"]),
        (
            ["block.1"],
            [f"block.1.{name}.{end}" for name in ("query", "subquery", "norm") for end in ("weight", "bias")],
        ),
        (["norm.weight"], ["block.0.norm.weight", "block.1.norm.weight"]),
        ("query", ["query.weight"]),  # a string matches the full name only
        (r"(.*\.)?query", [*QUERY, "query.weight"]),
        (r"block\.\d\.query\.bias", ["block.0.query.bias", "block.1.query.bias"]),
        ("scale", ["scale"]),
        ([r".*\.query\.bias", "scale"], ["scale", "block.0.query.bias", "block.1.query.bias"]),  # in a list too
        (["layer-norm", "scale"], ["scale", *(f"block.{i}.norm.{end}" for i in (0, 1) for end in ("weight", "bias"))]),
    ],
)
def test_names(targets, expected: list[str]) -> None:
    assert list(select_parameters(Net(), targets)) == expected


def test_every_parameter_is_matched_by_a_regex_for_everything() -> None:
    model = Net()
    assert select_parameters(model, ".*") == dict(model.named_parameters())


@for_each(
    ("exclude", "expected"),
    [
        (["block"], ["scale", "query.weight"]),
        (r"block\..*", ["scale", "query.weight"]),
        (
            "layer-norm",
            [
                "scale",
                *(f"block.{i}.{n}.{e}" for i in (0, 1) for n in ("query", "subquery") for e in ("weight", "bias")),
                "query.weight",
            ],
        ),
        (["all-linear", "layer-norm", "scale"], ["query.weight"]),
        (["bias", "norm", "subquery"], ["scale", "block.0.query.weight", "block.1.query.weight", "query.weight"]),
    ],
)
def test_exclude(exclude, expected: list[str]) -> None:
    assert list(select_parameters(Net(), exclude_modules=exclude)) == expected


def test_excluding_an_empty_list_excludes_nothing() -> None:
    assert len(select_parameters(Net(), exclude_modules=[])) == 14


@for_each(
    ("types", "expected"),
    [
        (nn.LayerNorm, ["block.0.norm.bias", "block.1.norm.bias"]),
        ("LayerNorm", ["block.0.norm.bias", "block.1.norm.bias"]),
        (
            [nn.LayerNorm, "Linear"],
            [f"block.{i}.{name}.bias" for i in (0, 1) for name in ("query", "subquery", "norm")],
        ),
    ],
)
def test_module_types(types, expected: list[str]) -> None:
    assert list(select_parameters(Net(), ["bias"], module_types=types)) == expected


def test_module_types_are_owners_and_not_containers(model_of) -> None:
    assert list(select_parameters(Net(), module_types=Net)) == ["scale"]
    names = select_parameters(model_of("resnet"), module_types="BatchNorm2d")
    assert all(".normalization." in name for name in names)
    # a name matches derived classes too: BartScaledWordEmbedding is an Embedding
    assert "model.shared.weight" in select_parameters(model_of("bart"), module_types="Embedding")


@for_each(
    ("layers", "indices"),
    [(0, [0]), (-1, [1]), ([0], [0]), ([0, 1], [0, 1]), ((-2,), [0]), (range(2), [0, 1]), ({1}, [1])],
)
def test_layers(layers, indices: list[int]) -> None:
    assert list(select_parameters(Net(), ["query"], layers=layers)) == [
        f"block.{index}.query.{end}" for index in indices for end in ("weight", "bias")
    ]


def test_layers_of_every_stack_that_is_long_enough(model_of) -> None:
    model = model_of("torch-seq2seq")
    names = [name for name, _ in model.named_parameters()]
    for layers, prefixes in {
        0: ("encoder.layers.0.", "decoder.layers.0."),
        2: ("decoder.layers.2.",),
        -1: ("encoder.layers.1.", "decoder.layers.2."),
        -3: ("decoder.layers.0.",),
    }.items():
        assert list(select_parameters(model, layers=layers)) == [name for name in names if name.startswith(prefixes)]


def test_filters_combine(model_of) -> None:
    selected = select_parameters(
        model_of("bert"),
        ["attention", "layer-norm"],
        exclude_modules=["value", "bias"],
        module_types="Linear",
        layers=-1,
    )
    layer = "bert.encoder.layer.1.attention"
    assert list(selected) == [f"{layer}.self.query.weight", f"{layer}.self.key.weight", f"{layer}.output.dense.weight"]


def test_frozen_parameters_are_selected(fresh_model_of) -> None:
    model = fresh_model_of("bert").requires_grad_(False)
    assert len(select_parameters(model, "layer-norm")) == 10


def test_model_is_not_changed(fresh_model_of) -> None:
    model = fresh_model_of("bert")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    selected = select_parameters(model, "all-linear", layers=0)
    assert all(before[name][0] is parameter for name, parameter in selected.items())
    assert all(torch.equal(parameter, copy) and parameter.grad is None for parameter, copy in before.values())


ERRORS = {
    # nothing there: the nearest real names
    "suffix misspelt": ("bert", {"target_modules": ["querry"]}, r'got "querry", .* nearest names "query"'),
    "one of the list": ("bert", {"target_modules": ["query", "valeu"]}, r'got "valeu", .* nearest names "value"'),
    "word misspelt": ("bert", {"target_modules": "all_linear"}, r'got "all_linear", .* nearest names "all-linear"'),
    "full name misspelt": (
        "bert",
        {"target_modules": ["bert.encoder.layer.7.attention"]},
        r'use one of the nearest names "bert\.encoder\.layer\.[01]\.attention"',
    ),
    "regex misspelt": ("bert", {"target_modules": r".*\.querry"}, r'which matches nothing, use .* "query"'),
    "string without the front": (
        "bert",
        {"target_modules": "attention.self"},
        r'only the end of names, pass the list \["attention\.self"\] or the expression r"\.\*\\\.attention\\\.self"',
    ),
    "nothing alike": (
        "bert",
        {"target_modules": ["zzzz"]},
        r'got "zzzz", which matches nothing, use a word \("all", .*\) or .*\(at the top: "bert", "classifier"\)',
    ),
    "expression in a list": ("bert", {"target_modules": [r".*\.querry"]}, r'which matches nothing, use .* "query"'),
    "expression in a list that does not compile": ("bert", {"exclude_modules": ["*.query"]}, r"does not compile"),
    "a dot in a list is a dot": ("bert", {"target_modules": ["bert.embeddings.word.embeddings"]}, r"matches nothing"),
    "empty name": ("bert", {"target_modules": [""]}, r'got "", which matches nothing, use'),
    "empty string": ("bert", {"target_modules": ""}, r'got "", which matches nothing, use'),
    "part of a component": ("t5", {"target_modules": ["Attention"]}, r'got "Attention", which matches nothing, use'),
    "no parameters": ("bert", {"target_modules": ["dropout"]}, r'got "dropout", which matches nothing'),
    "regex does not compile": (
        "bert",
        {"target_modules": "*.query"},
        r'got "\*\.query", which does not compile \(nothing to repeat.*\), escape .* or pass a list',
    ),
    "empty list": ("bert", {"target_modules": []}, r"at least one name in target_modules, got an empty list, pass"),
    # words
    "decoder of BERT": (
        "bert",
        {"target_modules": "last-decoder-layer"},
        r'expected a stack of decoder blocks .* got the stack "bert\.encoder\.layer" \(encoder, 2 blocks\), '
        r'use "last-encoder-layer" or layers=-1$',
    ),
    "encoder of GPT-2": (
        "gpt2",
        {"target_modules": ["c_attn", "last-encoder-layer"]},
        r'got the stack "transformer\.h" \(decoder, 2 blocks\), use "last-decoder-layer" or layers=-1$',
    ),
    "layer norm of ResNet": (
        "resnet",
        {"target_modules": "layer-norm"},
        r'got a model that normalizes with BatchNorm2d, select these with module_types="BatchNorm2d"$',
    ),
    "linear layers of ResNet": (
        "resnet",
        {"target_modules": "all-linear"},
        r"besides the output layer .* got a model whose .* classes Conv2d, BatchNorm2d, Linear, select .*Conv2d",
    ),
    "attention of ResNet": (
        "resnet",
        {"target_modules": "attention"},
        r"expected .*MultiheadAttention .* got .*Conv2d",
    ),
    # exclusion
    "everything excluded": (
        "bert",
        {"target_modules": ["query"], "exclude_modules": "attention"},
        r"expected exclude_modules to leave some of the 4 selected parameters, got 'attention', .*, exclude less",
    ),
    "unknown exclusion": ("bert", {"exclude_modules": ["poler"]}, r'in exclude_modules, got "poler", .* "pooler"'),
    "unknown exclusion by regex": ("bert", {"exclude_modules": "p(oler"}, r"in exclude_modules, .* does not compile"),
    # types
    "unknown type": ("bert", {"module_types": "LayerNrom"}, r"got LayerNrom, which no such module .* use LayerNorm"),
    "type without parameters": ("bert", {"module_types": nn.Dropout}, r"got Dropout, .*, use Embedding"),
    "container": ("bert", {"module_types": "BertLayer"}, r"parameters of their own in module_types, got BertLayer"),
    "empty types": ("bert", {"module_types": []}, r"at least one class in module_types, got an empty list, pass None"),
    "no parameter of the type": (
        "bert",
        {"target_modules": ["query"], "module_types": nn.LayerNorm},
        r"expected module_types to leave some of the 4 .* belong to modules of the classes Linear, use",
    ),
    # layers
    "layer out of range": (
        "t5",
        {"layers": 7},
        r'got 7 .* the stacks "encoder\.block" \(encoder, 2 blocks\), "decoder\.block" \(decoder, 2 blocks\), use an',
    ),
    "negative out of range": (
        "bert",
        {"layers": [0, -3]},
        r'got -3 for a model with the stack "bert\.encoder\.layer"',
    ),
    "second ALBERT layer": (
        "albert",
        {"layers": 1},
        r'got 1 .* "albert\.encoder\.albert_layer_groups" \(encoder, 1 block\)',
    ),
    "empty layers": ("bert", {"layers": []}, r"at least one index in layers, got an empty list, pass None"),
    "outside the layers": (
        "bert",
        {"target_modules": "embedding", "layers": 0},
        r"expected layers to leave some of the 3 .* lie outside the blocks of that number in the stack",
    ),
}


@for_each("case", ERRORS)
def test_errors_say_what_to_do(model_of, case: str) -> None:
    architecture, arguments, message = ERRORS[case]
    with pytest.raises(TargetError, match=message) as raised:
        select_parameters(model_of(architecture), **arguments)
    assert str(raised.value).startswith("expected ")
    assert ", got " in str(raised.value)


def test_models_without_stacks_or_parameters() -> None:
    with pytest.raises(TargetError, match=r"^expected layers in a model with stacks, got no stack .*, select by name"):
        select_parameters(nn.Linear(2, 2), layers=0)
    with pytest.raises(TargetError, match=r'"last-encoder-layer", got no stack .*, select by name$'):
        select_parameters(nn.Linear(2, 2), "last-encoder-layer")
    with pytest.raises(TargetError, match=r'^expected parameters for the word "all", got a model without parameters'):
        select_parameters(nn.ReLU())


@for_each(
    ("arguments", "message"),
    [
        (
            {"target_modules": None},
            r"a string or a list of strings in target_modules, got None of type NoneType, pass",
        ),
        ({"target_modules": 3}, r"in target_modules, got 3 of type int, pass a word"),
        ({"target_modules": b"query"}, r"got b'query' of type bytes"),
        ({"target_modules": ["query", 3]}, r"expected strings in target_modules, got 3 of type int, pass names"),
        ({"exclude_modules": 3}, r"in exclude_modules, got 3 of type int"),
        ({"exclude_modules": [None]}, r"expected strings in exclude_modules, got None"),
        (
            {"module_types": 3},
            r"expected classes or their names in module_types, got 3 of type int, pass one or a list",
        ),
        ({"module_types": [nn.Linear(1, 1)]}, r"expected classes or class names in module_types, got Linear"),
        ({"layers": "0"}, r"expected integers in layers, got '0' of type str, pass one or a list"),
        ({"layers": 1.0}, r"expected integers in layers, got 1.0 of type float"),
        ({"layers": [0, "1"]}, r"expected integers in layers, got '1' of type str, pass block numbers"),
        ({"layers": True}, r"expected integers in layers, got True of type bool"),
    ],
)
def test_wrong_types(model_of, arguments, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        select_parameters(model_of("bert"), **arguments)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got dict, pass the model itself"):
        select_parameters({})
