"""What the tools make of a model with our files is the model that the recipe says, or the file is not written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache, cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from read_by_tools import TOKENS, answers
from torch import Tensor, nn

from hf_parcor import FloatQuantization, Quantization, RecipeRecord, export_recipe, sensitivity
from hf_parcor.recipes import Exports, MixedQuantization
from hf_parcor.records import Choice

pytestmark = pytest.mark.slow  # each program imports a tool, which takes seconds

FOLDER = Path(sys.prefix) / "quantizers"
PROGRAM = Path(__file__).parents[1] / "read_by_tools.py"
FOUR = Quantization(4, 32, code_range="full", arithmetic="weight")
EIGHT = Quantization(8, "channel", code_range="full")
ASYMMETRIC = Quantization(3, "channel", symmetric=False, arithmetic="weight")
FP8, NF4, NVFP4 = FloatQuantization("fp8_e4m3", "channel"), FloatQuantization("nf4"), FloatQuantization("nvfp4")
Format = Quantization | FloatQuantization


def llama(**settings: Any) -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    every = {"vocab_size": 64, "max_position_embeddings": 16, "initializer_range": 0.2, **sizes, **settings}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**every))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def marian() -> nn.Module:
    of_both = {"layers": 1, "attention_heads": 2, "ffn_dim": 128}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in of_both.items()}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "max_position_embeddings": 16}
    return transformers.MarianMTModel(transformers.MarianConfig(vocab_size=64, d_model=64, **special, **sizes))


MODELS = {
    "llama": llama,
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "t5": t5,
    "marian": marian,
    "72 words": lambda: llama(vocab_size=72),
}


class Case:
    """A model, a recipe that gives its parts these formats in turn, and the files that we write of it."""

    def __init__(self, folder: Path, model: str, formats: dict[str, Any] | list[Any]) -> None:
        torch.manual_seed(0)
        self.folder, self.model = folder, MODELS[model]().eval()
        self.model.save_pretrained(folder / "model")
        known = list(formats.values() if isinstance(formats, dict) else formats)
        self.record = recipe_of(self.model, [one for one in known if one is not None], formats)
        self.exports: Exports = export_recipe(self.record, folder / "plan")

    def has(self, name: str) -> bool:
        return (self.folder / "plan" / name).exists()

    def holders(self, weight: str) -> dict[str, str]:
        """Return what holds a weight, with the classes."""
        found = [group.holders[weight] for group in self.record.groups.values() if weight in group.weights]
        return dict(found[0]) if found else {}

    def said(self, name: str) -> str:
        """Return what is said about a file."""
        return " ".join(one for one in (*self.exports.missing, *self.exports.notes) if one.startswith(name))

    @cached_property
    def expected(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return all weights as the recipe says, by all their names, and the logits."""
        weights = dict(self.model.named_parameters())
        rounded = MixedQuantization.of(self.record)({name: weights[name] for name, _ in self.record.weights()})
        with torch.no_grad():
            for name, weight in rounded.items():
                weights[name].copy_(weight)
        every = self.model.named_parameters(remove_duplicate=False)
        return {name: weight.detach().clone() for name, weight in every}, answers(self.model)

    def by(self, tool: str, name: str) -> dict[str, str]:
        paths = {"model": self.folder / "model", "file": self.folder / "plan" / name}
        kept = self.folder / f"{tool}.pt"
        return {"tool": tool, "kept": str(kept), **{one: str(path) for one, path in paths.items()}}


def recipe_of(model: nn.Module, formats: list[Format], given: dict[str, Any] | list[Any]) -> RecipeRecord:
    scores = sensitivity(
        model,
        [{"input_ids": TOKENS, "labels": TOKENS}],
        list(dict.fromkeys(formats)),
        "modules",
        budget=0,
        progress=False,
    )
    each = given if isinstance(given, dict) else dict(zip(scores.groups, cycle(given), strict=False))
    choice = {
        name: Choice(None, 32.0)
        if each.get(name) is None
        else Choice(str(each[name]), scores.by_place[name, str(each[name])].bits)
        for name in scores.groups
    }
    kept = {"outside": scores.outside, "kept_in_float": scores.kept_in_float}
    return RecipeRecord("m", scores.groups, scores.formats, choice, **kept)


def read(*cases: dict[str, str]) -> list[dict[str, Any]]:
    """Return what tools make of models, in a program of their own: here nothing of it is to stay imported."""
    paths = os.pathsep.join([str(FOLDER), *sys.path])
    command = [sys.executable, str(PROGRAM), json.dumps(cases)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(case["kept"], weights_only=True) for case in cases]


@cache
def is_there(name: str) -> bool:
    return (FOLDER / name).is_dir()


def need(name: str) -> None:
    if not is_there(name):
        pytest.skip(f"{name} is not installed; `bash scripts/test.sh` puts it into .venv/quantizers")


def check(case: Case, found: dict[str, Any]) -> None:
    """Compare all weights to the last bit, and the logits."""
    assert "error" not in found, found["error"]
    weights, logits = case.expected
    for name, weight in found["weights"].items():
        assert torch.equal(weight, weights[name]), name
    assert {name for name in weights if name not in found["weights"]} == set()
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)


def test_torchao_makes_the_model_of_the_recipe_heads_and_tied_weights_included(tmp_path) -> None:
    need("torchao")
    formats = [FOUR, EIGHT, None, FP8, ASYMMETRIC, NVFP4]
    cases = [
        Case(tmp_path / "untied", "llama", formats),
        Case(tmp_path / "tied", "tied", formats),
        Case(tmp_path / "biases", "biases", formats),
        Case(tmp_path / "head", "llama", {"lm_head": FOUR}),
        Case(tmp_path / "words", "gpt2", {"transformer.wte": EIGHT}),
        Case(tmp_path / "bias of the answer", "marian", {"model.encoder.layers.0.fc1": FOUR}),
    ]
    asked = [(case, tool) for case in cases for tool in ("torchao", "torchao, from_pretrained")]
    refused = Case(tmp_path / "72 rows", "72 words", {"lm_head": NVFP4})
    *found, of_refused = read(
        *(case.by(tool, "torchao.json") for case, tool in asked), refused.by("torchao", "torchao.json")
    )
    for (case, _), one in zip(asked, found, strict=True):
        check(case, one)
    assert "divisible by 16" in of_refused["error"]
    assert "NVFP4" in refused.said("torchao.json")


def test_bitsandbytes_quantizes_what_it_can_and_the_others_are_said(tmp_path) -> None:
    need("bitsandbytes")
    cases = [
        Case(tmp_path / "untied", "llama", [None, NF4, NF4]),
        Case(tmp_path / "head", "llama", {"lm_head": NF4}),
        Case(tmp_path / "tied", "tied", [NF4, NF4, None]),
        Case(tmp_path / "gpt2", "gpt2", [NF4]),
        Case(
            tmp_path / "kept in float",
            "t5",
            {f"encoder.block.0.layer.1.DenseReluDense.{n}": NF4 for n in ("wi", "wo")},
        ),
    ]
    found = read(*(case.by("bitsandbytes", "bitsandbytes.yaml") for case in cases))
    for case, one in zip(cases, found, strict=True):
        assert "error" not in one, one["error"]
        weights, _ = case.expected
        small = {name for name, chosen in case.record.weights() if chosen.format is not None}
        assert set(one["quantized"]) <= small
        left = small - set(one["quantized"])
        assert bool(left) == any("in float" in sentence for sentence in case.exports.notes)
        for name in left:
            assert name.removesuffix(".weight") in case.said("bitsandbytes.yaml")
        by_all_names = {f"{module}.weight" for name in left for module in case.holders(name)}
        assert by_all_names.isdisjoint(one["quantized"])
        for name in weights.keys() - by_all_names:
            # A Conv1D's blocks are those of the other dimension.
            turned = "Conv1D" in case.holders(name).values()
            assert turned or torch.equal(one["weights"][name], weights[name]), name


def but_for_ties(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Say whether weights are equal but for few that are as far from what they were, and the last bits."""
    alike = 1e-5 * before.abs().max()
    distance = (found - before).abs() - (expected - before).abs()
    others = ((found - expected).abs() > alike).float().mean()
    return bool((distance.abs() <= alike).all()) and bool(others < 0.02)


def test_llm_compressor_makes_the_model_of_the_recipe(tmp_path) -> None:
    need("llmcompressor")
    mixed = [FOUR, EIGHT, None, FP8, ASYMMETRIC]
    of_float = {f"model.layers.{layer}.{name}_proj": NVFP4 for layer in (0, 1) for name in ("self_attn.o", "mlp.down")}
    cases = [
        Case(tmp_path / "untied", "llama", mixed),
        Case(tmp_path / "tied", "tied", mixed),
        Case(tmp_path / "float", "llama", of_float),
    ]
    before = [{name: one.detach().clone() for name, one in case.model.named_parameters()} for case in cases]
    found = read(*(case.by("llm-compressor", "llm_compressor.yaml") for case in cases))
    for case, one, start in zip(cases, found, before, strict=True):
        assert "error" not in one, one["error"]
        weights, _ = case.expected
        quantized = {
            name for name, chosen in case.record.weights() for name in case.holders(name) if chosen.format is not None
        }
        assert {name.removesuffix(".weight") for name in one["quantized"]} == quantized
        for name, weight in one["weights"].items():
            if name in start:
                assert but_for_ties(weight, weights[name], start[name]), name


@pytest.mark.parametrize(
    ("file", "model", "formats"),
    [
        ("torchao.json", "gpt2", [FOUR, EIGHT]),
        ("llm_compressor.yaml", "gpt2", [FOUR, EIGHT]),
        ("llm_compressor.yaml", "llama", [Quantization(4, 32)]),
        ("llm_compressor.yaml", "llama", [Quantization(4, 32, code_range="unclipped")]),
        ("llm_compressor.yaml", "llama", [NVFP4, FOUR]),
    ],
)
def test_a_tool_that_would_make_another_model_gets_no_file(tmp_path, file, model, formats) -> None:
    case = Case(tmp_path, model, formats)
    assert not case.has(file)
    assert "expected" in case.said(file)
