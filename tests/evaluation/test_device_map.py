"""Weights that Accelerate keeps in main memory are corrupted there: the numbers are those of the model in memory."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
import transformers as tf
from for_each import for_each

from hf_parcor import (
    BitFlips,
    ConductanceDrift,
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    Pruning,
    Quantization,
    RandomCorruption,
    WorstBitFlips,
    measure_flips_to_break,
)
from hf_parcor.evaluation import LanguageModelMetric
from hf_parcor.evaluation.placement.device_map import kept_in_memory
from hf_parcor.evaluation.placement.reach import OutOfReachError

L2 = CorruptionConstraint(epsilon=0.5)
WITHOUT_GRADIENTS = [
    *(GaussianNoise(0.1), GaussianNoise(0.1, relative_to="channel"), RandomCorruption(L2), ConductanceDrift(86_400)),
    *(Quantization(3), Quantization(4, "channel"), BitFlips(count=9), BitFlips(rate=1e-3)),
    *(Pruning(0.5), Pruning(0.3, "all"), Pruning(0.5, 4)),
    WorstBitFlips(2, search="data-free"),
]
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(tied: bool = False) -> tf.LlamaForCausalLM:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=24,
            num_hidden_layers=3,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            pad_token_id=0,
            **LLAMA,
        )
    )


DECODERS = {
    "llama": llama,
    "llama in bfloat16": lambda: llama().to(torch.bfloat16),
    "llama, tied": lambda: llama(tied=True),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=3, n_head=4)),
}


def half_away(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """Offload the middle layer, as `dispatch_model` does beside an accelerator."""
    base = model.base_model
    accelerate.cpu_offload((base.layers if hasattr(base, "layers") else base.h)[1], execution_device="cpu")
    return model


OFFLOADED = {
    "all": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
    "half": half_away,
    "layers as a whole": lambda model: accelerate.cpu_offload(
        model, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer", "GPT2Block"]
    ),
}


@pytest.fixture(params=DECODERS)
def model(request) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return DECODERS[request.param]().eval()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(3, 24, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": rows, "labels": rows} for rows in tokens]


def bits_of(model: tf.PreTrainedModel) -> list[torch.Tensor]:
    away = kept_in_memory(model)
    return [away.get(weight, weight).detach().clone() for weight in model.parameters()]


def measured(network: tf.PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> list[str]:
    metric = LanguageModelMetric(batches)
    record = CorruptionEvaluator(network, metric, progress=False).evaluate(WITHOUT_GRADIENTS, trials=2)
    sweep = LayerProbe(network, metric, progress=False).evaluate(WITHOUT_GRADIENTS[:2], trials=1)
    flips = measure_flips_to_break(network, metric, search="data-free", most=2, progress=False)
    assert len({row.mean("loss") for row in record.rows()}) > 6, "they do something"
    return [record.to_json(), sweep.to_json(), flips.to_json()]


@pytest.fixture
def in_memory(model, batches) -> list[str]:
    return measured(copy.deepcopy(model), batches)


@pytest.mark.slow
@for_each("offload", list(OFFLOADED.values()))
def test_the_records_are_those_of_the_model_in_memory(model, batches, in_memory, offload) -> None:
    away = offload(copy.deepcopy(model))
    assert any(weight.is_meta for weight in away.parameters())
    before = bits_of(away)
    assert measured(away, batches) == in_memory
    assert all(torch.equal(one, other) for one, other in zip(bits_of(away), before, strict=True))


def test_bits_are_back_after_an_error(model, batches) -> None:
    away = OFFLOADED["all"](model)
    before = bits_of(away)

    def metric(network: tf.PreTrainedModel) -> dict[str, float]:
        changed = any(not torch.equal(one, other) for one, other in zip(bits_of(network), before, strict=True))
        if changed:
            raise KeyboardInterrupt
        return {"loss": float(network(**batches[0]).loss.detach())}

    with pytest.raises(KeyboardInterrupt):
        CorruptionEvaluator(away, metric, progress=False).evaluate(GaussianNoise(0.1))
    assert all(torch.equal(one, other) for one, other in zip(bits_of(away), before, strict=True))


def test_where_a_gradient_is_needed_they_are_left_as_they_are_in_all_rows(model, batches) -> None:
    """One record is of one set of weights."""
    away, metric = half_away(copy.deepcopy(model)), LanguageModelMetric(batches)
    both = [GaussianNoise(0.1), GradientCorruption(L2)]
    record = CorruptionEvaluator(away, metric, progress=False).evaluate(both, trials=1)
    ours = [name for name, weight in away.named_parameters() if not weight.is_meta]
    expected = CorruptionEvaluator(model, metric, target_modules=ours, progress=False).evaluate(both, trials=1)
    assert record.corruptions == expected.corruptions
    assert record.parameters == expected.parameters < sum(weight.numel() for weight in model.parameters())
    assert "offloaded to main memory" in record.notes[0]
    evaluator = CorruptionEvaluator(OFFLOADED["all"](model), metric, progress=False)
    with pytest.raises(OutOfReachError, match="which noise, quantization and flips reach"):
        evaluator.check(both)
    evaluator.check(both[:1])


def test_of_a_tied_weight_with_a_copy_of_its_own_neither_is_written(batches) -> None:
    """Who writes one of two copies measures a model that nobody has."""
    away = accelerate.cpu_offload(llama(tied=True), execution_device="cpu")
    tied = {away.model.embed_tokens.weight, away.lm_head.weight}
    together = kept_in_memory(away)
    assert len({together[weight] for weight in tied}) == 1
    away.lm_head._hf_hook.weights_map = {"weight": together[away.lm_head.weight].detach().clone()}
    assert not tied & kept_in_memory(away).keys()
    record = CorruptionEvaluator(away, LanguageModelMetric(batches), progress=False).evaluate(GaussianNoise(0.1))
    assert "on the meta device" in record.notes[0]


def test_what_a_file_or_a_cast_stands_between_is_out_of_reach(tmp_path) -> None:
    model = torch.nn.ModuleDict({"file": torch.nn.Linear(2, 2), "memory": torch.nn.Linear(2, 2)})
    accelerate.disk_offload(model["file"], tmp_path, execution_device="cpu")
    accelerate.cpu_offload(model["memory"], execution_device="cpu")
    assert kept_in_memory(model).keys() == set(model["memory"].parameters())
    for hook in model["memory"]._hf_hook.hooks:
        if hook.weights_map is not None:
            hook.weights_map = {name: hook.weights_map[name].double() for name in ("weight", "bias")}
    assert kept_in_memory(model) == {}
