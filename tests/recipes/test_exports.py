"""Files of a recipe, read by the tools that they are for, as far as these are here."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import yaml
from for_each import for_each
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_parcor import (
    FloatQuantization,
    ParameterDefenseTrainingArguments,
    Quantization,
    RecipeRecord,
    export_recipe,
    recipe,
    select_parameters,
    sensitivity,
)
from hf_parcor.corruptions import CORRUPTIONS
from hf_parcor.recipes.exports import _EXPORTS
from hf_parcor.records import Choice, WeightGroup
from hf_parcor.training.training_args import build_defense

FOUR, EIGHT = Quantization(4, 32, code_range="full", arithmetic="weight"), FloatQuantization("fp8_e4m3", "channel")
# What the documentation of compressed-tensors calls the arguments of a quantized weight.
ARGUMENTS = {"num_bits", "type", "symmetric", "group_size", "strategy", "dynamic"}


def recipe_of(*formats: object, names: tuple[str, ...] = ("fc1", "layers.1.fc1", "layers.10.fc1")) -> RecipeRecord:
    """Return a recipe whose modules have names that begin and end each other."""
    known = {
        str(one): {
            "corruption": next(name for name, kind in CORRUPTIONS.items() if type(one) is kind),
            "settings": one.settings(),
        }
        for one in formats
        if one is not None
    }
    groups = {name: WeightGroup({f"{name}.weight": 64}, 16.0) for name in names}
    bits = {None: 16.0, FOUR: 5.0, EIGHT: 8.5}
    choice = {
        name: Choice(None if one is None else str(one), bits.get(one, 2.0))
        for name, one in zip(names, formats, strict=True)
    }
    return RecipeRecord("m", groups, known, choice, {"bits": 6.0}, "loss", outside=("head",))


def test_each_file_says_what_was_chosen(tmp_path) -> None:
    record = recipe_of(None, EIGHT, FOUR, names=("layers.1", "layers.10.fc1", "layers.11.fc1"))
    found = export_recipe(record, tmp_path / "plan")
    assert found.missing == ()
    assert {path.name for path in found.files} == {path.name for path in (tmp_path / "plan").iterdir()}
    assert RecipeRecord.load(tmp_path / "plan" / "recipe.json") == record
    read = {path.stem: yaml.safe_load(path.read_text()) for path in found.files if path.suffix == ".yaml"}
    [modifier] = read["llm_compressor"]["quant_stage"]["quant_modifiers"].items()
    assert modifier[0] == "QuantizationModifier"
    assert modifier[1]["ignore"] == ["head", "layers.1"]
    groups = list(modifier[1]["config_groups"].values())
    assert [group["targets"] for group in groups] == [["layers.10.fc1"], ["layers.11.fc1"]]
    assert [group["weights"]["num_bits"] for group in groups] == [8, 4]
    assert [group["weights"]["type"] for group in groups] == ["float", "int"]
    assert [group["weights"]["strategy"] for group in groups] == ["channel", "group"]
    assert all(set(group["weights"]) <= ARGUMENTS for group in groups)


def test_bitsandbytes_skips_what_has_more_than_4_bits_and_nothing_else(tmp_path) -> None:
    for formats in ((EIGHT, FOUR, FOUR), (FOUR, None, FOUR), (FOUR, FOUR, None)):
        record = recipe_of(*formats)
        export_recipe(record, tmp_path)
        settings = yaml.safe_load((tmp_path / "bitsandbytes.yaml").read_text())
        config = BitsAndBytesConfig(**settings)
        assert config.load_in_4bit
        converted = [name for name in record.groups if should_convert_module(name, config.llm_int8_skip_modules)]
        assert converted == [name for name, one in record.choice.items() if one.format == str(FOUR)]
        assert not should_convert_module("head", config.llm_int8_skip_modules)


def test_a_recipe_that_quantizes_nothing_is_for_no_tool(tmp_path) -> None:
    found = export_recipe(recipe_of(None, None, None), tmp_path)
    assert [path.name for path in found.files] == ["recipe.json"]
    assert {sentence.partition(":")[0] for sentence in found.missing} == set(_EXPORTS)


def test_what_is_spared_is_what_to_defend(tmp_path) -> None:
    export_recipe(recipe_of(FOUR, EIGHT, FOUR), tmp_path)
    flags = yaml.safe_load((tmp_path / "defense.yaml").read_text())
    arguments = ParameterDefenseTrainingArguments(str(tmp_path), **flags)
    assert arguments.defense_target_modules == ["layers.1.fc1"]
    assert build_defense(arguments).corruptions == (FOUR,)


@for_each("name", ["base_model.model.layers.1.fc1", "layers.1.fc1.base_layer"])
def test_under_an_adapter_no_tool_would_find_what_a_recipe_names(name, tmp_path) -> None:
    """A tool is given a model as it is loaded, where none of these names is, and would quantize what is spared."""
    found = export_recipe(recipe_of(FOUR, EIGHT, FOUR, names=("fc1", name, "layers.10.fc1")), tmp_path)
    assert [path.name for path in found.files] == ["recipe.json", "defense.yaml"]
    assert len(found.missing) == 3
    assert all(f"got {name} under an adapter" in sentence for sentence in found.missing)


def test_a_part_that_is_loaded_by_itself_has_names_of_its_own(tmp_path) -> None:
    """As the BERT of a model of sentence-transformers: a tool is given that alone, without the other parts."""
    names = ("fc1", "layers.1.fc1", "layers.10.fc1")
    alone = recipe_of(FOUR, EIGHT, None, names=names)
    inside = recipe_of(FOUR, EIGHT, None, names=tuple(f"0.model.{name}" for name in names))
    inside = replace(inside, outside=("0.model.head", "2.linear"), loaded_part="0.model")
    for record, folder in ((alone, tmp_path / "alone"), (inside, tmp_path / "inside")):
        found = export_recipe(record, folder)
        assert RecipeRecord.load(folder / "recipe.json") == record
        assert found.missing == ()
    for name in set(_EXPORTS) - {"defense.yaml"}:  # which is for the Trainer of the whole
        assert (tmp_path / "alone" / name).read_text() == (tmp_path / "inside" / name).read_text()
    whole = recipe_of(FOUR, FOUR, None, names=("2.linear", "0.model.fc1", "3.linear"))
    found = export_recipe(replace(whole, loaded_part="0.model", outside=()), tmp_path / "whole")
    assert {path.name for path in found.files} == {"recipe.json", "defense.yaml"}
    assert all(
        "expected modules of 0.model, which from_pretrained loads, got 2.linear" in one for one in found.missing
    )


def test_what_ends_other_names_is_defended_alone(tmp_path) -> None:
    """As a name, the first would stand for all three."""
    model = nn.Module()
    for name in ("fc1", "layers.1.fc1", "layers.10.fc1", "fc10"):
        inner = model
        *parents, last = name.split(".")
        for parent in parents:
            inner.add_module(parent, getattr(inner, parent, nn.Module()))
            inner = getattr(inner, parent)
        inner.add_module(last, nn.Linear(8, 8, bias=False))
    export_recipe(recipe_of(EIGHT, FOUR, FOUR), tmp_path)
    flags = yaml.safe_load((tmp_path / "defense.yaml").read_text())
    assert list(select_parameters(model, flags["defense_target_modules"])) == ["fc1.weight"]


@pytest.mark.slow
@for_each("wide, narrow", [(512, 16), (64, 32), (512, 48), (48, 64)])
def test_what_is_spared_takes_more_bits_than_the_base_would_take_in_the_same_weights(wide, narrow, tmp_path) -> None:
    """A format takes other bits in a wide matrix than in a narrow one, and 48 columns are no groups of 32."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(size, 8) for size in (wide, narrow) for name in (f"a{size}", f"b{size}")})
    tried = [Quantization(4, "channel"), Quantization(5, "channel"), Quantization(6, 32)]
    batches = [{name: torch.randn(4, one.in_features) for name, one in model.items()}]

    def loss(model, batch):
        return sum(one(batch[name]).square().mean() for name, one in model.items())

    scores = sensitivity(model, batches, tried, loss=loss, budget=0, progress=False)
    found = set()
    for labels in itertools.product([None, *scores.formats], repeat=len(model)):
        choice = dict(zip(scores.groups, labels, strict=True))
        # What costs nothing is chosen where there is no loss to spend.
        costs = [{"fisher": float(choice[cell.group] != cell.format)} for cell in scores.cells]
        cells = tuple(replace(cell, scores=cost) for cell, cost in zip(scores.cells, costs, strict=True))
        chosen = recipe(replace(scores, cells=cells), loss=0.0, by="fisher")
        for base in (one for one in tried if str(one) == chosen.base):
            expected = [
                name
                for name, one in chosen.choice.items()
                if one.format != chosen.base
                and (base.per == "channel" or model[name].in_features % base.per == 0)
                and one.bits > base.stored_bits(model[name].weight) / model[name].weight.numel()
            ]
            assert RecipeRecord.from_json(chosen.to_json()).spared == expected
            found.update(expected)
    assert found == set(model)


def test_a_tool_that_lacks_a_format_gets_no_file_and_it_is_said(tmp_path) -> None:
    found = export_recipe(recipe_of(FloatQuantization("nf4"), FOUR, FOUR), tmp_path)
    assert not (tmp_path / "torchao.json").exists()
    assert any("torchao.json" in sentence and "NF4" in sentence for sentence in found.missing)
    five = export_recipe(recipe_of(Quantization(5, "channel"), None, None), tmp_path / "five")
    assert any("bitsandbytes.yaml" in sentence for sentence in five.missing), "it has 4 bits, or 8 and more"
    found = export_recipe(recipe_of(FOUR, FOUR, FOUR), tmp_path / "alike")
    assert any("defense" in sentence for sentence in found.missing), "nothing is spared"


NF4, NVFP4 = FloatQuantization("nf4"), FloatQuantization("nvfp4")


@for_each(
    "formats, kind, bits, notes",
    [
        ((FOUR, EIGHT, None), "Linear", 32.0, set()),
        ((FOUR, EIGHT, None), "Linear", 16.0, {("llm_compressor.yaml", "dtype of the weights")}),
        ((NVFP4, NVFP4, None), "Linear", 32.0, {("torchao.json", "multiple of 16")}),
        ((NF4, FOUR, None), "Linear", 16.0, set()),
        ((NF4, None, None), "Conv1D", 16.0, {("bitsandbytes.yaml", "other dimension")}),
        ((FOUR, None, None), "Conv1D", 16.0, set()),
        ((FOUR, EIGHT, None), "Embedding", 32.0, set()),
    ],
)
def test_what_a_tool_does_otherwise_than_the_recipe_is_noted(formats, kind, bits, notes, tmp_path_factory) -> None:
    """Only of files that are written."""
    record = recipe_of(*formats)
    groups = {
        name: replace(group, bits=bits, holders={f"{name}.weight": {name: kind}})
        for name, group in record.groups.items()
    }
    found = export_recipe(replace(record, groups=groups), tmp_path_factory.mktemp("plan"))
    known = {("torchao.json", "multiple of 16"), ("bitsandbytes.yaml", "other dimension")}
    known |= {("llm_compressor.yaml", "dtype of the weights"), ("bitsandbytes.yaml", "leaves in float")}
    said = {(file, words) for file, words in known for note in found.notes if note.startswith(file) and words in note}
    assert said == notes
    assert len(found.notes) == len(notes)
    reasons = [reason for reason in found.missing if reason.startswith("bitsandbytes")]
    if kind == "Embedding":
        assert "fc1 (Embedding)" in reasons[0]


class Mine(nn.Linear):
    """A linear layer of somebody's own: llm-compressor takes it, the others no class but two."""


class Attention(nn.Module):
    """What holds a matrix that PyTorch reads past the module which tools would replace."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)[0]


@pytest.mark.parametrize(
    ("module", "shape", "written"),
    [
        (nn.Linear(32, 32), (3, 32), {"torchao.json", "bitsandbytes.yaml", "llm_compressor.yaml"}),
        (Mine(32, 32), (3, 32), {"bitsandbytes.yaml", "llm_compressor.yaml"}),
        (nn.utils.spectral_norm(nn.Linear(32, 32)), (3, 32), {"bitsandbytes.yaml"}),
        (nn.Conv1d(32, 32, 32), (32, 32), set()),
        (Attention(), (3, 32), set()),
    ],
)
def test_only_tools_that_quantize_what_holds_the_weights_get_a_file(tmp_path, module, shape, written) -> None:
    model = nn.Sequential(module, nn.Linear(32, 32)) if isinstance(module, nn.Linear) else nn.Sequential(module)
    scores = sensitivity(
        model, [torch.randn(shape)], [FOUR], {"all": "all"}, budget=0, loss=lambda m, x: m(x).sum(), progress=False
    )
    chosen = RecipeRecord("m", scores.groups, scores.formats, {"all": Choice(str(FOUR), 5.0)}, outside=scores.outside)
    assert RecipeRecord.from_json(chosen.to_json()) == chosen
    tools = {"torchao.json", "bitsandbytes.yaml", "llm_compressor.yaml"}
    for name in tools:
        (tmp_path / name).write_text("of an earlier recipe")
    found = export_recipe(chosen, tmp_path)
    if isinstance(module, Mine):
        assert any("bitsandbytes.yaml" in note and "Mine(Linear)" in note for note in found.notes), "one of two stays"
    assert {path.name for path in found.files} & tools == written
    assert {path.name for path in tmp_path.iterdir()} & tools == written
    for name in tools - written:
        assert any(sentence.startswith(name) for sentence in found.missing)


def test_what_no_tool_quantizes_is_in_no_group_unless_named(tmp_path) -> None:
    """As the attention of SigLIP's head, for which no recipe of PaliGemma was for torchao or llm-compressor."""
    model = nn.Sequential(Attention(), nn.Linear(32, 32))
    scores = sensitivity(
        model, [torch.randn(3, 32)], [FOUR], budget=0, loss=lambda m, x: m(x).square().mean(), progress=False
    )
    assert list(scores.groups) == ["1"]
    assert [note for note in scores.notes if "0.inner.out_proj" in note]
    found = export_recipe(recipe(scores, bits=5.5, keep=False), tmp_path)
    assert {"torchao.json", "bitsandbytes.yaml", "llm_compressor.yaml"} <= {path.name for path in found.files}
    left = yaml.safe_load((tmp_path / "llm_compressor.yaml").read_text())["quant_stage"]["quant_modifiers"]
    assert left["QuantizationModifier"]["ignore"] == ["0.inner.out_proj"]
