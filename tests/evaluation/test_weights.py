"""Weights that Accelerate has offloaded count as those in memory do, and never lie in memory together."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader, compare_versions
from for_each import for_each
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_parcor import CorruptionEvaluator, GaussianNoise
from hf_parcor.evaluation import LanguageModelMetric
from hf_parcor.evaluation.identity.fingerprint import fingerprint_of_weights
from hf_parcor.evaluation.placement.replicas import check_same_weights
from hf_parcor.evaluation.placement.weights import weights_of

TOKENS = torch.tensor([[1, 5, 2, 7]])
SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied)).to(torch.bfloat16)


DECODERS = {
    "llama": lambda: llama(False),
    "llama, tied": lambda: llama(True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=4, n_head=4)),
}


@pytest.fixture(params=DECODERS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    DECODERS[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


def skip_unless_all_may_lie_on_the_disk():
    if compare_versions("accelerate", "<", "1.15"):
        pytest.skip("Accelerate before 1.15 leaves a part of each model in memory")


def on_disk(folder, *parts):
    """Load a decoder with some of its parts on the disk; "" for all of it."""
    if "" in parts:
        skip_unless_all_may_lie_on_the_disk()
    whole = load(folder)
    layers = [f"{name}.{index}" for name in ("model.layers", "transformer.h") for index in range(4)]
    others = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    others += ["transformer.wte", "transformer.wpe", "transformer.ln_f"]
    there = {name for name, _ in whole.named_modules()}
    places = {name: "disk" if name in parts else "cpu" for name in [*layers, *others] if name in there}
    return load(folder, device_map={"": "disk"} if "" in parts else places, offload_folder=folder.parent / "offloaded")


HALF = [f"{name}.{index}" for name in ("model.layers", "transformer.h") for index in (1, 3)]


def dispatched(folder):
    """Let Accelerate write what it offloads, embeddings and head too, into files of its own."""
    skip_unless_all_may_lie_on_the_disk()
    places = {name: "disk" for name, _ in load(folder).named_children()}
    return accelerate.dispatch_model(load(folder), places, main_device="cpu", offload_dir=folder.parent / "files")


def in_main_memory(folder, **options):
    return accelerate.cpu_offload(load(folder), execution_device="cpu", **options)


OFFLOADED = {
    "half on the disk": lambda folder: on_disk(folder, *HALF),
    "all on the disk": lambda folder: on_disk(folder, ""),
    "all in files of Accelerate": dispatched,
    "all in main memory": in_main_memory,
    "buffers too": lambda folder: in_main_memory(folder, offload_buffers=True),
    "layers as a whole": lambda folder: in_main_memory(
        folder, preload_module_classes=["LlamaDecoderLayer", "GPT2Block"]
    ),
}


@pytest.mark.slow
@for_each("offload", list(OFFLOADED.values()))
def test_the_fingerprint_is_that_of_the_model_in_memory(folder, offload):
    """Also after a pass, which unties what is offloaded."""
    expected, model = fingerprint_of_weights(load(folder)), offload(folder)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert fingerprint_of_weights(model) == expected
    model(TOKENS)
    assert fingerprint_of_weights(model) == expected
    assert any(parameter.is_meta for parameter in model.parameters())


def change(folder, part):
    """Change one number of a weight in a file of a model."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if part in name and weights[name].ndim > 1)
    weights[name][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})


def test_one_number_on_the_disk_makes_another_fingerprint(folder):
    before = {fingerprint_of_weights(load(folder)), fingerprint_of_weights(on_disk(folder, *HALF))}
    change(folder, ".3.")
    after = {fingerprint_of_weights(load(folder)), fingerprint_of_weights(on_disk(folder, *HALF))}
    assert len(before) == len(after) == 1
    assert before != after


def test_one_number_in_main_memory_makes_another_fingerprint(folder):
    model = in_main_memory(folder)
    before = fingerprint_of_weights(model)
    layer = model.base_model.layers if "Llama" in type(model).__name__ else model.base_model.h
    module = next(module for module in layer[2].modules() if getattr(module, "weight", None) is not None)
    module._hf_hook.weights_map["weight"][0] += 1
    assert fingerprint_of_weights(model) != before


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["llama, tied"], indirect=True)
@for_each("offload", [load, lambda folder: on_disk(folder, ""), lambda folder: on_disk(folder, *HALF)])
def test_a_head_with_values_of_its_own_counts_though_the_configuration_ties_it(folder, offload):
    path = folder / "model.safetensors"
    weights, found = load_file(path), []
    for value in (0.25, 0.5):
        save_file(
            {**weights, "lm_head.weight": torch.full((24, 16), value, dtype=torch.bfloat16)}, path, {"format": "pt"}
        )
        found.append(fingerprint_of_weights(offload(folder)))
        assert found[-1] == fingerprint_of_weights(load(folder))
    assert found[0] != found[1]


@for_each("read", [fingerprint_of_weights, lambda model: check_same_weights(model, ALONE)])
def test_one_weight_lies_in_memory_at_a_time(folder, monkeypatch, read):
    model, loaded, original = on_disk(folder, ""), [], OffloadedWeightsLoader.__getitem__

    def load_alone(self, name):
        assert not any(tensor() is not None for tensor in loaded), f"as {name} is read"
        tensor = original(self, name)
        loaded.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", load_alone)
    read(model)
    assert len(loaded) >= len(list(load(folder).parameters()))


ALONE = SimpleNamespace(gather=lambda found: [found])


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_processes_compare_what_is_offloaded(folder):
    found = []
    collecting = SimpleNamespace(gather=lambda hashes: [found.append(hashes) or hashes])
    check_same_weights(on_disk(folder, *HALF), collecting)
    change(folder, ".3.")
    with pytest.raises(ValueError, match=r"got others for 'model\.layers\.3\."):
        check_same_weights(on_disk(folder, *HALF), SimpleNamespace(gather=lambda hashes: [*found, hashes]))


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_checkpoint_of_other_offloaded_weights_is_refused(folder, tmp_path):
    batches = [{"input_ids": TOKENS, "labels": TOKENS}]

    def measure():
        model = on_disk(folder, *HALF)
        evaluator = CorruptionEvaluator(
            model, LanguageModelMetric(batches), target_modules=["model.layers.0"], progress=False
        )
        return evaluator.evaluate([GaussianNoise(0.1)], trials=1, checkpoint=tmp_path / "checkpoint")

    record = measure()
    assert measure() == record
    assert record.weights == fingerprint_of_weights(load(folder))
    change(folder, ".3.")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        measure()


def test_a_module_of_several_hooks():
    layer = nn.Linear(2, 1)
    expected = fingerprint_of_weights(layer)
    accelerate.cpu_offload(layer, execution_device="cpu")
    assert len(layer._hf_hook.hooks) == 2
    assert fingerprint_of_weights(layer) == expected


def test_what_no_hook_keeps_is_yielded_as_it_is():
    model = nn.Linear(2, 1, device="meta")
    without = fingerprint_of_weights(model)
    model._hf_hook = SimpleNamespace(weights_map={"weight": torch.ones(1, 3), "other": torch.ones(1, 2)})
    assert fingerprint_of_weights(model) == without, "neither under another name nor of another shape"
    assert all(tensor.is_meta for _, tensor in weights_of(model))
    model._hf_hook = SimpleNamespace(weights_map={"weight": torch.ones(1, 2)})
    assert [tensor.is_meta for _, tensor in weights_of(model)] == [False, True]
    pair = nn.Sequential(nn.Linear(2, 1, device="meta"), nn.Linear(2, 1, device="meta"))
    pair.all_tied_weights_keys = {"1.weight": "0.weight"}
    assert [name for name, _ in weights_of(pair)] == list(pair.state_dict()), "nobody can say whether they are tied"


def test_a_file_that_is_gone_is_an_error(folder):
    model = on_disk(folder, *HALF)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        fingerprint_of_weights(model)
