"""What cannot be corrupted is counted and said, what can be is measured, and nothing is skipped in silence."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import send_to_device
from for_each import for_each
from torch import Tensor, nn
from trainings import QUIET, losses_of
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.utils import logging

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    WorstBitFlips,
    corrupted,
    sensitivity,
)
from hf_parcor.evaluation import LanguageModelMetric
from hf_parcor.evaluation.identity.fingerprint import fingerprint_of_weights
from hf_parcor.evaluation.placement.device_map import input_device
from hf_parcor.evaluation.placement.reach import OutOfReachError, Reach
from hf_parcor.indicators import measure_indicators
from hf_parcor.injection import Injection
from hf_parcor.targets import TargetError, by_kind

ALONG_GRADIENT = GradientCorruption(CorruptionConstraint(epsilon=1.0))
CORRUPTIONS = [GaussianNoise(0.5), BitFlips(count=5, bits="sign"), ALONG_GRADIENT]
FOLDER = tempfile.TemporaryDirectory()
SIZE = 16 * 64 + 64 + 64 * 2 + 2  # of both linear layers
REST = 20 * 16 + 2 * 64  # of the embedding and the normalization


def hooked(hook: object) -> nn.Module:
    model = nn.Linear(1, 1)
    model._hf_hook = hook
    return model


class Wrapped(Tensor):
    """A tensor of integers and a scale that says it is float32, as torchao's; it knows no view and no write."""

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "detach":
            return cls(args[0].integers, args[0].scale)
        if name in ("view", "copy_", "add_", "_foreach_copy_", "clone"):
            raise NotImplementedError(f"aten.{name}")
        plain = [arg.integers * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


class Int8(nn.Module):
    """A linear layer of integers: as parameters, or as buffers."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax() / 127
        integers = (layer.weight.detach() / scale).round().to(torch.int8)
        if kind == "parameter":
            self.weight = nn.Parameter(integers, requires_grad=False)
        else:
            self.register_buffer("qweight", integers)
            self.register_buffer("qzeros", torch.zeros(1, 2, dtype=torch.int32))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        integers = self.weight if hasattr(self, "weight") else self.qweight
        return nn.functional.linear(x, integers * self.scale, self.bias)


class Model(nn.Sequential):
    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(input_ids).mean(1)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def build() -> Model:
    torch.manual_seed(0)
    return Model(nn.Embedding(20, 16), nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 2))


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Model:
    model = build()
    for index in (1, 4):
        model[index] = make(model[index])
    return model


def dynamic(dtype: torch.dtype) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(build(), {nn.Linear}, dtype=dtype)


def wrapped(layer: nn.Linear) -> nn.Module:
    scale = layer.weight.detach().abs().amax() / 127
    integers = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Wrapped(integers, scale), requires_grad=False)
    layer.bias = None
    return layer


def offloaded() -> Model:
    model = build()
    for index in (1, 4):
        accelerate.disk_offload(model[index], tempfile.mkdtemp(dir=FOLDER.name), execution_device="cpu")
    return model


# How a model is made, how many weights are out of reach, and how these are named.
HOSTILE: dict[str, tuple[Callable[[], Model], int, str]] = {
    "dynamic int8": (lambda: dynamic(torch.qint8), SIZE, "packed as qint8"),
    "dynamic float16": (lambda: dynamic(torch.float16), SIZE, "packed"),
    "integer parameters": (lambda: replaced(lambda layer: Int8(layer, "parameter")), SIZE - 66, "int8"),
    "integer buffers": (lambda: replaced(lambda layer: Int8(layer, "buffer")), SIZE - 66, "int8 buffers"),
    "subclass": (lambda: replaced(wrapped), SIZE - 66, "of the class Wrapped, no plain numbers"),
    "offloaded": (offloaded, SIZE, "on the meta device, as what is offloaded"),
}


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE.keys())
def hostile(request) -> tuple[Model, int, str]:
    make, count, words = request.param
    return make(), count, words


def corruptions_for(model: Model) -> list:
    """Quantized kernels pass no gradient back."""
    return CORRUPTIONS[:2] if hasattr(model[1], "_packed_params") else CORRUPTIONS


@pytest.fixture
def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(20, (4, 6), generator=generator),
            "labels": torch.randint(2, (4,), generator=generator),
        }
        for _ in range(2)
    ]


@pytest.fixture
def metric(data) -> Callable[[nn.Module], dict[str, float]]:
    def loss(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": sum(float(model(**batch)["loss"]) for batch in data)}

    return loss


@pytest.fixture
def loss() -> Callable[..., Tensor]:
    return lambda model, batch: model(**batch)["loss"]


@pytest.fixture
def evaluator_of(data, metric, loss):
    def build(model: nn.Module, target: Any = None) -> CorruptionEvaluator:
        return CorruptionEvaluator(model, metric, data, loss=loss, target_modules=target, progress=False)

    return build


@pytest.mark.parametrize("target", [None, "all"])
def test_the_rest_is_measured_and_the_share_is_said(hostile, evaluator_of, target) -> None:
    model, count, words = hostile
    record = evaluator_of(model, target).evaluate(corruptions_for(model), trials=1)
    (note,) = record.notes
    assert note == f"corrupted {REST:,} of {REST + count:,} weights: {count:,} in 2 modules such as 1 are {words}"
    assert record.parameters == REST
    assert all(0 < row.changed <= REST for row in record.corruptions)
    assert all(row.mean("loss") > record.clean.mean("loss") for row in record.corruptions[2:])


def test_parts_within_reach_are_measured_as_ever(hostile, evaluator_of) -> None:
    """No note, and what an evaluator finds that is told the parameters by their names."""
    model = hostile[0]
    record = evaluator_of(model, ["0", "3"]).evaluate(corruptions_for(model), trials=1)
    assert not record.notes
    everything = evaluator_of(model).evaluate(corruptions_for(model), trials=1)
    assert record.corruptions == everything.corruptions


def test_a_target_out_of_reach_is_refused_before_anything(hostile, evaluator_of) -> None:
    model, _, words = hostile
    for target in (["1"], "all-linear") if "Linear" in type(model[1]).__name__ else (["1"],):
        with pytest.raises(TargetError, match=rf"expected weights that can be corrupted, got .*{words}; name other"):
            evaluator_of(model, target)


def test_probes_and_indicators_say_it_too(hostile, data, metric, loss) -> None:
    model, count, words = hostile
    targets = {"table": ["0"], "most": r"[013]"}
    probe = LayerProbe(model, metric, data, loss=loss, targets=targets, progress=False)
    records = probe.evaluate(corruptions_for(model), trials=1).records
    assert records["table"].notes == ()
    assert words in records["most"].notes[0]
    if corruptions_for(model) is not CORRUPTIONS:
        return
    indicators = measure_indicators(
        model, data, [CorruptionConstraint(epsilon=0.1)], loss=loss, draws=2, probes=0, progress=False
    )
    assert any(f"{count:,} in 2 modules such as 1 are {words}" in note for note in indicators.notes)


def test_gradients_that_are_lost_are_refused(evaluator_of) -> None:
    """PyTorch warns, and they come out as zero: a corruption along them would leave the model clean."""
    model = HOSTILE["dynamic int8"][0]()
    with pytest.raises(ValueError, match=r"gradients: expected a loss .*, got one through quantized.*"):
        evaluator_of(model).evaluate([ALONG_GRADIENT])
    behind = nn.Linear(2, 2)
    model.append(behind)
    record = evaluator_of(model, ["5"]).evaluate([ALONG_GRADIENT])
    assert record.corruptions[0].changed == 6


def test_the_model_is_not_changed(hostile, evaluator_of) -> None:
    model = hostile[0]
    names = [name for name, _ in model.named_parameters()]
    kept = {name: dict(module.__dict__) for name, module in model.named_modules()}
    Reach(model).select()
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == kept
    before = fingerprint_of_weights(model)
    evaluator_of(model).evaluate(corruptions_for(model), trials=1)
    assert fingerprint_of_weights(model) == before


@pytest.mark.parametrize("kind", ["dynamic int8", "integer buffers", "subclass"])
def test_fingerprints_know_weights_that_are_no_parameters(kind, monkeypatch) -> None:
    before = fingerprint_of_weights(HOSTILE[kind][0]())
    assert fingerprint_of_weights(HOSTILE[kind][0]()) == before

    original = build

    def other() -> Model:
        model = original()
        with torch.no_grad():
            model[4].weight[0, 0] += 0.05
        return model

    monkeypatch.setitem(globals(), "build", other)
    assert fingerprint_of_weights(HOSTILE[kind][0]()) != before


@for_each("biased", [False, True])
def test_several_weights_in_one_integer(biased) -> None:
    """A bias beside them is no reason to take them for seen."""

    class Packed4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.infeatures, self.outfeatures = 32, 8
            self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))
            self.register_buffer("qzeros", torch.zeros(1, 1, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(1, 8))
            self.bias = nn.Parameter(torch.zeros(8)) if biased else None

    model = nn.Sequential(Packed4(), nn.LayerNorm(8))
    (note,) = Reach(model).select().notes
    seen = 16 + 8 * biased
    assert note == f"corrupted {seen} of {seen + 256} weights: 256 in 0 are int32 buffers"


def test_quantized_recurrent_layers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.LSTM(4, 4), nn.LayerNorm(4)), {nn.LSTM}, dtype=torch.qint8
        )
    expected = sum(parameter.numel() for parameter in nn.LSTM(4, 4).parameters())
    assert f"8 of {8 + expected} weights" in Reach(model).select().notes[0]


@for_each("kind", ["integer parameters", "integer buffers", "subclass", "dynamic int8"])
def test_an_adapter_on_frozen_weights_is_a_whole_target(kind) -> None:
    """Where other parameters are frozen, what can be trained is what was meant: nothing is missing."""
    model = HOSTILE[kind][0]().requires_grad_(False)
    model.adapter = nn.Linear(2, 2)
    assert [note for note in Reach(model).select().notes if "frozen" not in note] == []
    assert list(Reach(model).select().parameters) == ["adapter.weight", "adapter.bias"]


def test_what_is_frozen_under_an_adapter_is_left_out_and_said() -> None:
    """By default the adapters are corrupted, which are what was trained; "all" are all weights."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    frozen = sum(weight.numel() for weight in base.parameters())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adapters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)

    def metric(model: nn.Module) -> dict[str, float]:
        return {"sum": float(sum(weight.detach().sum() for weight in model.parameters()))}

    by_default, everything = (
        CorruptionEvaluator(model, metric, target_modules=target, progress=False).evaluate([GaussianNoise(0.1)], 1)
        for target in (None, "all")
    )
    assert (by_default.parameters, everything.parameters) == (adapters, adapters + frozen)
    [note] = by_default.notes
    assert [word for word in (f"{adapters} weights", f"{frozen} frozen") if word not in note] == []
    assert everything.notes == ()
    assert Reach(model.requires_grad_(False)).select().notes == ()  # none is trained: all are meant


def ordinary_buffers() -> Iterator[nn.Module]:
    module = nn.Module()
    module.register_buffer("position_ids", torch.arange(9).view(1, 9))
    module.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))
    module.register_buffer("running", torch.ones(3, 3))
    module.register_buffer("causal", torch.ones(3, 3, dtype=torch.uint8), persistent=False)
    yield nn.Sequential(module, nn.Linear(2, 2))
    yield nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    beside_weights = nn.Linear(3, 3)
    beside_weights.register_buffer("mask", torch.ones(3, 3, dtype=torch.int8))
    yield nn.Sequential(beside_weights)


@for_each("model", list(ordinary_buffers()))
def test_ordinary_buffers_are_no_weights(model) -> None:
    reach = Reach(model)
    assert reach.model is model
    assert reach.select().notes == ()


@for_each("kind", ["integer parameters", "subclass", "offloaded"])
def test_named_outright_they_are_refused_with_what_to_do(kind) -> None:
    model, _, words = HOSTILE[kind][0](), *HOSTILE[kind][1:]
    weights = dict(model.named_parameters())
    message = (
        rf"1.weight: expected a floating-point weight of 16 bits or more in plain memory, got one that is {words}"
    )
    with pytest.raises(TypeError, match=message):
        Injection(weights)
    with (
        pytest.raises(TypeError, match=message),
        corrupted(weights, {name: torch.ones(weight.shape) for name, weight in weights.items()}),
    ):
        raise AssertionError("the body must not run")
    with corrupted(weights, {"0.weight": torch.ones(20, 16)}) as injection:  # others may be anything
        assert injection.size().changed == 320


@for_each(
    ("weight", "words"),
    [
        (torch.ones(2, 2).to_sparse(), "sparse_coo tensors"),
        (torch.ones(2, device="meta"), "on the meta device"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_other_memory(weight, words) -> None:
    with pytest.raises(TypeError, match=f"w: expected a floating-point weight .* is {words}.*; leave it out"):
        Injection({"w": weight})


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        with corrupted(dict(model.named_parameters()), {"bias": torch.ones(2)}) as injection:
            assert injection.size().changed == 2
    with pytest.raises(TypeError, match=r"got one that is made in inference mode, which forbids writes"):
        Injection(dict(model.named_parameters()))


def test_kinds_of_a_model_with_weights_out_of_reach(data, metric, loss) -> None:
    model = HOSTILE["dynamic int8"][0]()
    probe = LayerProbe(model, metric, data, loss=loss, targets=by_kind(model), progress=False)
    assert set(probe.evaluate(corruptions_for(model), trials=1).records) == {"layer-norm", "embedding"}


def test_layers_out_of_reach_are_left_out_of_a_probe_of_all_layers(data, metric, loss, caplog) -> None:
    logging.enable_propagation()
    model = Model(nn.Embedding(20, 16), nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 2)]))
    model.forward = lambda input_ids, labels: {
        "loss": nn.functional.cross_entropy(model[1][1](model[1][0](model[0](input_ids))).mean(1), labels)
    }
    model[1][0] = wrapped(model[1][0])
    probe = LayerProbe(model, metric, data, loss=loss, progress=False)
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        "1.0 was left out: 256 in 1.0 are of the class Wrapped, no plain numbers."
    ]
    records = probe.evaluate(CORRUPTIONS, trials=1).records
    assert list(records) == ["1.1"]
    assert records["1.1"].notes == ("1.0 was left out: 256 in 1.0 are of the class Wrapped, no plain numbers",)
    model[1][1] = wrapped(model[1][1])
    with pytest.raises(TargetError, match=r"targets: expected parts that can be corrupted"):
        LayerProbe(model, metric, data, loss=loss, progress=False)


class Adapted(nn.Module):
    """A low-rank adapter beside a layer that is frozen, however its weights are stored."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.linspace(-0.1, 0.1, 32).view(16, 2))
        self.up = nn.Parameter(torch.linspace(-0.1, 0.1, 128).view(2, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down @ self.up


@pytest.mark.parametrize("kind", ["integer parameters", "integer buffers", "subclass"])
def test_a_defense_of_adapters_on_such_weights_trains_as_on_plain_ones(kind, tmp_path) -> None:
    """The independent reference: the same numbers in a frozen layer of float32."""

    def plain(layer: nn.Module) -> nn.Module:
        same = nn.Linear(16, 64)
        with torch.no_grad():
            same.weight.copy_(layer(torch.eye(16)).T - layer(torch.zeros(1, 16)).T)
            same.bias.copy_(layer(torch.zeros(1, 16))[0])
        return same

    def trained(prepare: Callable[[nn.Module], nn.Module]) -> tuple[list[float], list[Tensor]]:
        model = HOSTILE[kind][0]().requires_grad_(False)
        model[1] = Adapted(prepare(model[1]).requires_grad_(False))
        arguments = TrainingArguments(str(tmp_path), logging_steps=1, num_train_epochs=1, **QUIET)
        rows = [{"input_ids": torch.arange(start, start + 6) % 20, "labels": start % 2} for start in range(24)]
        trainer = ParameterDefenseTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            defense=MultiStepRisk(CorruptionConstraint(epsilon=0.5), steps=2),
        )
        trainer.train()
        return losses_of(trainer), [model[1].down.detach(), model[1].up.detach()]

    losses, adapters = trained(lambda layer: layer)
    expected_losses, expected_adapters = trained(plain)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    torch.testing.assert_close(adapters, expected_adapters, rtol=1e-4, atol=1e-6)


class TestDeviceMap:
    """A model that Accelerate has spread takes its batches where it says, and is measured as the whole one."""

    @staticmethod
    def measured(model, batches):
        evaluator = CorruptionEvaluator(
            model,
            lambda model: {"loss": float(model(**send_to_device(batches[0], input_device(model))).loss.detach())},
            batches,
            progress=False,
        )
        return evaluator.evaluate([GaussianNoise(0.1), ALONG_GRADIENT], trials=1)

    def test_where_nothing_is_offloaded(self, classifier, batches, bits_of) -> None:
        alone = self.measured(classifier, batches)
        before = bits_of(classifier)
        map_of_devices = {"bert.embeddings": "cpu", "bert.encoder": "cpu", "bert.pooler": "cpu", "classifier": "cpu"}
        spread = accelerate.dispatch_model(classifier, map_of_devices, force_hooks=True)
        assert self.measured(spread, batches).corruptions == alone.corruptions
        assert bits_of(spread) == before

    def test_where_a_part_is_on_the_disk(self, classifier, batches, tmp_path) -> None:
        map_of_devices = {"bert.embeddings": "disk", "bert.encoder": "cpu", "bert.pooler": "cpu", "classifier": "cpu"}
        spread = accelerate.dispatch_model(classifier, map_of_devices, offload_dir=tmp_path, force_hooks=True)
        assert spread.get_input_embeddings().weight.is_meta
        assert input_device(spread) == torch.device("cpu")
        record = self.measured(spread, batches)
        assert "on the meta device" in record.notes[0]
        assert all(row.changed for row in record.corruptions)

    @pytest.mark.slow
    def test_a_decoder_in_bfloat16_of_which_a_layer_lies_on_the_disk(self, tmp_path) -> None:
        """Corruptions of every kind, a sensitivity and indicators: the numbers are those of the whole model."""
        sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=True)
        tokens = torch.randint(3, 24, (2, 2, 9))
        batches = [{"input_ids": rows, "labels": rows} for rows in tokens]
        alone = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        parts = [f"model.layers.{index}" for index in range(3)]
        here = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", parts[0], parts[2]]
        map_of_devices = {**dict.fromkeys(here, "cpu"), parts[1]: "disk"}
        options = {"main_device": "cpu", "offload_dir": tmp_path, "force_hooks": True}
        spread = accelerate.dispatch_model(copy.deepcopy(alone), map_of_devices, **options)
        targets = {part: part for part in (parts[0], parts[2])}
        constraint = CorruptionConstraint(epsilon=0.5)
        corruptions = [
            *(Quantization(3, "channel"), GaussianNoise(0.05), WorstBitFlips(1)),
            *(GradientCorruption(constraint), MultiStepCorruption(constraint, steps=2)),
        ]
        before = {name: value.clone() for name, value in spread.state_dict().items() if not value.is_meta}
        metric = LanguageModelMetric(batches)

        def found(model: nn.Module) -> list[str]:
            sweep = LayerProbe(model, metric, targets=targets, progress=False).evaluate(corruptions, trials=1)
            scores = sensitivity(model, metric, [Quantization(4, "channel")], targets, progress=False)
            of_last = {"target_modules": parts[2], "progress": False}
            indicators = measure_indicators(model, batches, [constraint], **of_last)
            rows = [f"{label} {row.label} {row.metrics}" for label, row in sweep.rows()]
            return [*rows, str(scores.clean), str(scores.cells), indicators.to_json()]

        assert found(spread) == found(alone)
        assert all(torch.equal(value, before[name]) for name, value in spread.state_dict().items() if name in before)
        by_default = LayerProbe(spread, metric, progress=False).evaluate([Quantization(3)])
        scores = sensitivity(spread, metric, [Quantization(3, "channel")], "layers", budget=0, progress=False)
        assert list(by_default.records) == list(scores.groups) == list(targets)
        assert len([note for note in scores.notes if f"{parts[1]} was left out" in note]) == 1
        with pytest.raises(OutOfReachError, match="on the meta device"):
            LayerProbe(spread, metric, targets={"far": parts[1]}, progress=False)

    @for_each(
        ("model", "expected"),
        [
            (nn.Linear(1, 1, device="meta"), "cpu"),  # nothing is known
            (nn.Sequential(nn.Linear(1, 1, device="meta"), nn.Linear(1, 1)), "cpu"),
            (hooked(SimpleNamespace(execution_device=1)), "cuda:1"),
            (hooked(SimpleNamespace(execution_device="xpu:0")), "xpu:0"),
            (hooked(SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(execution_device=0)])), "cuda:0"),
        ],
    )
    def test_where_batches_go(self, model, expected) -> None:
        assert input_device(model) == torch.device(expected)
