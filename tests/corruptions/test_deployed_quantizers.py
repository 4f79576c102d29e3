"""Quantizers as they are deployed: the corrupted weights are those of torchao and bitsandbytes, to the last bit.

`scripts/set_up.sh` installs both beside the environment, in `.venv/quantizers`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from local_models import save_llama, write_texts
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils.import_utils import is_gguf_available

from hf_parcor import (
    CorruptionEvaluator,
    CorruptionRisk,
    DefendedBackward,
    EvaluationRecord,
    FloatQuantization,
    Interpolation,
    Quantization,
    RecipeReport,
    SweepRecord,
    export_recipe,
    measure_recipes,
    recipe,
    select_parameters,
    sensitivity,
)
from hf_parcor.cli import main
from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.recipes import front

pytestmark = pytest.mark.slow  # importing torchao takes seconds

FOLDER = Path(sys.prefix) / "quantizers"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = 64, 128
WITHOUT = "{} is not installed; `bash scripts/test.sh` puts it into .venv/quantizers"


@pytest.fixture(scope="module", autouse=True)
def _beside_the_environment() -> Iterator[None]:
    """Let both be imported, by these tests alone: what stays imported, later tests would take for installed."""
    sys.path.append(str(FOLDER))
    is_gguf_available.cache_clear()
    yield
    sys.path.remove(str(FOLDER))
    there = {path.name for path in FOLDER.glob("*")}
    for name in [name for name in sys.modules if name.partition(".")[0] in there]:
        del sys.modules[name]
    for remembered in vars(sys.modules.get("peft.import_utils", object)).values():
        getattr(remembered, "cache_clear", list)()
    is_gguf_available.cache_clear()


def hard_weights(dtype: torch.dtype) -> Tensor:
    """Return rows of sizes from 1e-9 to 1e3, and rows of one sign, of ties, of zeros in half of the groups."""
    weights = torch.randn(ROWS, COLUMNS) * torch.logspace(-9, 3, ROWS)[:, None]
    weights[5], weights[6] = weights[5].abs(), -weights[6].abs()
    weights[7, : COLUMNS // 2] = 0
    weights[8] = torch.arange(COLUMNS) - COLUMNS // 2
    weights[9] = torch.arange(COLUMNS) / 16 - 3.5
    weights[10] = 0
    return weights.to(dtype)


def plain_weights(dtype: torch.dtype) -> Tensor:
    return (torch.randn(ROWS, COLUMNS) * torch.logspace(-3, 2, ROWS)[:, None]).to(dtype)


def exported(weights: Tensor, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False, dtype=weights.dtype))
    model[0].weight = nn.Parameter(weights.clone())
    quantize_(model, config)
    return model


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def rounded(corruption: Corruption, weights: Tensor) -> Tensor:
    return corruption({"weight": weights})["weight"]


def integer_configs() -> dict[Corruption, Any]:
    """Return what torchao calls the quantizers to integers, by what they are here."""
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerTensor,
    )

    plain = {"set_inductor_config": False}
    found: dict[Corruption, Any] = {
        Quantization(8, "channel", code_range="full"): Int8WeightOnlyConfig(**plain),
        Quantization(8, code_range="full"): Int8WeightOnlyConfig(granularity=PerTensor(), **plain),
        Quantization(8, 32, code_range="full"): Int8WeightOnlyConfig(granularity=PerGroup(32), **plain),
    }
    mappings = {
        MappingType.SYMMETRIC: {"code_range": "full"},
        MappingType.SYMMETRIC_NO_CLIPPING_ERR: {"code_range": "unclipped"},
        MappingType.ASYMMETRIC: {"symmetric": False},
    }
    for bits in range(2, 9):
        for per, granularity in (("channel", PerAxis(0)), (32, PerGroup(32))):
            for mapping, codes in mappings.items():
                config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity, mapping)
                found[Quantization(bits, per, arithmetic="weight", **codes)] = config
    return found


def test_torchao_integers() -> None:
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    different = [
        f"{corruption}, {dtype}"
        for corruption, config in integer_configs().items()
        for dtype in DTYPES
        for weights in [hard_weights(dtype)]
        if not same(rounded(corruption, weights), exported(weights, config)[0].weight.dequantize())
    ]
    assert different == []


def test_torchao_int4_of_cpus() -> None:
    """This layout tells its weights only by what it multiplies: rows of the identity."""
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    for dtype in DTYPES:
        for size in (32, 64, 128):
            weights = plain_weights(dtype)
            model = exported(weights, PrototypeInt4WeightOnlyConfig(size, set_inductor_config=False))
            with torch.no_grad():
                expected = model(torch.eye(COLUMNS, dtype=dtype)).T
            found = rounded(Quantization(4, size, False, zero_point="float", arithmetic="weight"), weights)
            ulp = torch.finfo(dtype).eps if dtype == torch.float32 else 0.0  # CPUs fuse, or do not
            torch.testing.assert_close(found, expected, rtol=2 * ulp, atol=0, msg=f"{dtype}, {size}")


def test_torchao_floats() -> None:
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.quantization import Float8WeightOnlyConfig, PerGroup, PerRow, PerTensor

    for dtype in DTYPES:
        for name, float8 in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
            for per, granularity in (("tensor", PerTensor()), ("channel", PerRow()), (32, PerGroup(32))):
                # Where a scale is 0, as it is of small rows in float16, torchao has NaN.
                weights = hard_weights(dtype) if per == "tensor" else 100 * plain_weights(dtype)
                config = Float8WeightOnlyConfig(float8, set_inductor_config=False, granularity=granularity)
                expected = exported(weights, config)[0].weight.dequantize()
                assert same(rounded(FloatQuantization(name, per), weights), expected), (dtype, name, per)
    for dtype in (torch.float32, torch.bfloat16):
        weights = hard_weights(dtype)
        expected = exported(weights, NVFP4WeightOnlyConfig())[0].weight.dequantize()
        assert same(rounded(FloatQuantization("nvfp4"), weights), expected), dtype
        held = MXTensor.to_mx(weights, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
        assert same(rounded(FloatQuantization("mxfp4"), weights), held.dequantize(dtype)), dtype


def test_bitsandbytes_nf4() -> None:
    pytest.importorskip("bitsandbytes", reason=WITHOUT.format("bitsandbytes"))
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for dtype in DTYPES:
        for shape in ((ROWS, COLUMNS), (73, 7)):
            weights = hard_weights(dtype).flatten()[: shape[0] * shape[1]].view(shape)
            with torch.compiler.set_stance("force_eager"):
                held = dequantize_4bit(*quantize_4bit(weights, blocksize=64, quant_type="nf4"))
            assert torch.equal(rounded(FloatQuantization("nf4"), weights), held), (dtype, shape)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return a classifier that has learned which of two tokens is the more frequent one, and its test data.

    It is trained for 4 bits, as those are that are exported.
    """
    import transformers as tf

    torch.manual_seed(0)
    # Not narrower: on CPUs Linear4bit takes the scale of another block where a block of 64 spans two rows.
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=12, max_position_embeddings=16, **sizes))

    def batch(size: int) -> dict[str, Tensor]:
        tokens = torch.randint(1, 12, (size, 15))
        tokens[:, ::2] = torch.randint(1, 3, (size, 8))
        return {"input_ids": tokens, "labels": ((tokens == 1).sum(1) > (tokens == 2).sum(1)).long()}

    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    four = CorruptionRisk(Quantization(4, 32, code_range="full", arithmetic="weight"))
    backward = DefendedBackward(Accelerator(cpu=True), four, model, select_parameters(model, "all-linear"))
    for _ in range(120):
        rows = batch(32)
        backward(lambda rows=rows: model(**rows).loss)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [batch(100) for _ in range(4)]


def hidden_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the modules of "all-linear"."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "classifier"
    }


def predictions(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=batch["input_ids"]).logits for batch in batches])


def check_end_to_end(
    model: nn.Module, batches: list[dict[str, Tensor]], exports: dict[Corruption, Callable[[nn.Module], None]]
) -> list[float]:
    """Compare what is measured with what the exported models do, and return the accuracies."""
    metric = ClassificationMetric(batches)
    record = CorruptionEvaluator(model, metric, target_modules="all-linear", progress=False).evaluate(list(exports))
    clean = predictions(model, batches)
    assert record.clean.mean("accuracy") > 0.85, "it has learned something"
    for row, export in zip(record.corruptions, exports.values(), strict=True):
        deployed = copy.deepcopy(model)
        export(deployed)
        assert not torch.equal(predictions(deployed, batches), clean), f"{row.label}: nothing was exported"
        measured = metric(deployed)
        assert row.mean("accuracy") == measured["accuracy"], row.label
        assert row.mean("loss") == pytest.approx(measured["loss"], rel=1e-5), row.label
    return [row.mean("accuracy") for row in record.corruptions]


def test_what_is_measured_is_what_torchao_deploys(trained) -> None:
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    model, batches = trained
    wanted = [
        Quantization(8, "channel", code_range="full"),
        *(Quantization(bits, 32, code_range="full", arithmetic="weight") for bits in (4, 3, 2)),
        *(Quantization(bits, "channel", symmetric=False, arithmetic="weight") for bits in (4, 2)),
    ]
    configs = integer_configs()
    chosen = {corruption: configs[corruption] for corruption in wanted}
    chosen[FloatQuantization("fp8_e4m3", "channel")] = Float8WeightOnlyConfig(set_inductor_config=False)
    chosen[FloatQuantization("nvfp4")] = NVFP4WeightOnlyConfig()

    def exporter(config: Any) -> Callable[[nn.Module], None]:
        return lambda copied: quantize_(copied, config, lambda module, name: name in hidden_linears(copied))

    found = check_end_to_end(model, batches, {corruption: exporter(config) for corruption, config in chosen.items()})
    assert len(set(found)) > 2, "formats make a difference"


def test_what_is_measured_is_what_bitsandbytes_deploys(trained) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=WITHOUT.format("bitsandbytes"))

    def export(copied: nn.Module) -> None:
        for name, linear in hidden_linears(copied).items():
            settings = {"compute_dtype": torch.float32, "compress_statistics": False, "quant_type": "nf4"}
            held = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, **settings)
            held.load_state_dict(linear.state_dict())
            copied.set_submodule(name, held.to("cpu"))

    with torch.compiler.set_stance("force_eager"):
        check_end_to_end(*trained, {FloatQuantization("nf4"): export})


def test_adapters_trained_beside_a_rounded_base_do_beside_a_real_one_what_was_measured(trained) -> None:
    """The base is NF4 of bitsandbytes; the adapters were trained beside what the library makes of it."""
    pytest.importorskip("bitsandbytes", reason=WITHOUT.format("bitsandbytes"))
    pytest.importorskip("torchao.quantization", reason=WITHOUT.format("torchao"))  # which PEFT imports, and warns
    import bitsandbytes

    peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")
    model, batches = copy.deepcopy(trained[0]), trained[1]
    settings = peft.LoraConfig(r=2, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, settings)
    base = select_parameters(model, ["base_layer.weight"])
    defense = CorruptionRisk(FloatQuantization("nf4"), clean_weight=0)
    backward = DefendedBackward(Accelerator(cpu=True), defense, model, base)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 5e-3)
    for step in range(8):
        backward(lambda batch=batches[step % 4]: model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    metric = ClassificationMetric(batches)
    evaluator = CorruptionEvaluator(model, metric, target_modules=["base_layer.weight"], progress=False)
    clean, measured = (row.mean("loss") for row in evaluator.evaluate([FloatQuantization("nf4")]).rows())
    for name, linear in list(model.named_modules()):
        if name.endswith("base_layer"):
            held = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                compute_dtype=torch.float32,
                compress_statistics=False,
                quant_type="nf4",
            )
            held.load_state_dict(linear.state_dict())
            model.set_submodule(name, held.to("cpu"))
    with torch.compiler.set_stance("force_eager"):
        deployed = metric(model)["loss"]
    assert deployed == pytest.approx(measured, rel=1e-5)
    assert abs(measured - clean) > 1e-4 * clean, "rounding the base changes it"


def test_stored_bits_are_those_of_what_is_stored() -> None:
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    from torchao.quantization import Float8WeightOnlyConfig

    float8 = Float8WeightOnlyConfig(set_inductor_config=False)
    cases = [
        *((one, config) for one, config in integer_configs().items() if one.arithmetic == "weight"),
        (FloatQuantization("fp8_e4m3", "channel"), float8),
    ]
    for one, config in cases:
        for dtype in (torch.float32, torch.bfloat16):
            held = exported(plain_weights(dtype), config)[0].weight
            # Symmetric ones need no zero points; this layout keeps zeros in their place.
            names = ("scale",) if getattr(one, "symmetric", True) else ("scale", "zero_point")
            beside = sum(8 * getattr(held, name).element_size() * getattr(held, name).numel() for name in names)
            codes = ROWS * COLUMNS * getattr(one, "bits", 8)
            assert one.stored_bits(plain_weights(dtype)) == codes + beside, (one, dtype)


def test_stored_bits_of_nvfp4_are_those_of_torchao() -> None:
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    weights = torch.randn(128, 64)  # torchao pads the scales of other shapes to tiles of 128 rows and 4 blocks
    held = exported(weights, NVFP4WeightOnlyConfig())[0].weight
    parts = (held.qdata, held.scale, held.per_tensor_scale)
    assert FloatQuantization("nvfp4").stored_bits(weights) == sum(
        8 * part.element_size() * part.numel() for part in parts
    )


def test_stored_bits_of_nf4_are_those_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason=WITHOUT.format("bitsandbytes"))
    from bitsandbytes.functional import quantize_4bit

    for shape in ((ROWS, COLUMNS), (73, 7)):
        weights = plain_weights(torch.float32).flatten()[: shape[0] * shape[1]].view(shape)
        with torch.compiler.set_stance("force_eager"):
            codes, state = quantize_4bit(weights, blocksize=64, quant_type="nf4")
        found = FloatQuantization("nf4").stored_bits(weights)
        # Two codes share a byte, of which the last may be half empty.
        assert 0 <= 8 * codes.numel() + 32 * state.absmax.numel() - found < 8, shape


def test_a_recipe_does_in_torchao_what_its_report_says(trained, tmp_path) -> None:
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    import json

    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    model, batches = trained
    metric = ClassificationMetric(batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = {**{name: name for name in hidden_linears(model)}, "words": ["word_embeddings"]}
    formats = [
        Quantization(8, "channel", code_range="full"),
        FloatQuantization("fp8_e4m3", "channel"),
        *(Quantization(bits, 32, code_range="full", arithmetic="weight") for bits in (4, 3, 2)),
    ]
    scores = sensitivity(model, metric, formats, groups, progress=False)
    chosen = recipe(scores, bits=4.6, keep=False)
    assert len({one.format for one in chosen.choice.values()}) > 1, "formats are mixed"
    beside = front(scores, chosen, keep=False, points=0)
    measured = measure_recipes(model, metric, beside, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = {row.label: row for row in measured.corruptions}
    for name in ("recipe", "by fisher"):
        export_recipe(beside[name], tmp_path / name)
        written = json.loads((tmp_path / name / "torchao.json").read_text())
        deployed = copy.deepcopy(model)
        quantize_(deployed, config_from_dict(written["quant_type"]["default"]), filter_fn=None)
        found = metric(deployed)
        assert found["accuracy"] == rows[name].mean("accuracy"), name
        assert found["loss"] == pytest.approx(rows[name].mean("loss"), rel=1e-5), name
    said = f"{100 * (rows['recipe'].mean('accuracy') - scores.clean['accuracy']):+.1f} points".replace("-", "−")
    assert said.lstrip("+") in RecipeReport(scores, chosen, measured).answer
    # Within the same bits: one format for all, and the order of the cheap score.
    same = max((one for one in rows.values() if not one.settings["by"] and one.settings["bits"] <= 4.6), key=bits_of)
    assert rows["recipe"].mean("loss") <= same.mean("loss")


def bits_of(row: Any) -> float:
    return row.settings["bits"]


def test_transformers_reads_the_file_for_torchao(tmp_path, monkeypatch) -> None:
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    import json

    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    model = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 2))
    scores = sensitivity(
        model,
        [torch.randn(3, 32)],
        [Quantization(4, 32, code_range="full", arithmetic="weight")],
        {"first": "0"},
        budget=0,
        loss=lambda m, x: m(x).sum(),
        progress=False,
    )
    export_recipe(recipe(scores, bits=6), tmp_path)
    # Transformers has looked before this folder was on the path.
    monkeypatch.setattr("transformers.utils.quantization_config.is_torchao_available", lambda: True)
    config = TorchAoConfig.from_dict(json.loads((tmp_path / "torchao.json").read_text()))
    assert isinstance(config.quant_type, FqnToConfig)
    assert list(config.quant_type.fqn_to_config) == ["0"]


def test_weights_that_torchao_rounded_are_what_a_probe_replaces_them_by() -> None:
    """Of whatever class they are, at a share between, too."""
    pytest.importorskip("torchao", reason=WITHOUT.format("torchao"))
    config = integer_configs()[Quantization(4, 32, arithmetic="weight", code_range="full")]
    weights = {"0.weight": plain_weights(torch.float32)}
    quantized = exported(weights["0.weight"], config)
    assert type(quantized[0].weight.data) is not Tensor
    expected = Quantization(4, 32, arithmetic="weight", code_range="full")(weights)["0.weight"]
    towards = Interpolation(1.0, quantized.state_dict(), "torchao")
    assert torch.equal(towards(weights)["0.weight"], expected)
    assert towards == Interpolation(1.0, {"0.weight": expected}, "torchao")
    halfway = towards.with_strength(0.5)(weights)["0.weight"]
    torch.testing.assert_close(halfway, (weights["0.weight"] + expected) / 2)


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """Write a Llama as llama.cpp does: vectors stay, and rows of queries and keys in its order of rotation."""
    import gguf

    config, form = model.config, gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = rotated.get(name.split(".")[-2])
        if heads is not None:
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape_as(weight)
        array, known = weight.contiguous().numpy(), names.get_name(name, try_suffixes=(".weight",))
        if weight.ndim < 2:
            writer.add_tensor(known, array)
        else:
            writer.add_tensor(known, gguf.quants.quantize(array, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_probed_part_by_part(tmp_path, capsys) -> None:
    """All parts together are the model that Transformers reads the file as; and near which quantizer it is."""
    pytest.importorskip("gguf", reason=WITHOUT.format("gguf"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    folder = save_llama(tmp_path / "llama", **sizes)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    texts = write_texts(tmp_path / "text.tsv")
    near = {
        "Q8_0": Quantization(8, 32),
        "Q4_0": Quantization(4, 32),
        "Q4_1": Quantization(4, 32, symmetric=False, zero_point="float"),
    }
    for kind, quantization in near.items():
        write_gguf(model, tmp_path / f"model-{kind}.gguf", kind)
        flags = ["--dataset", texts, "--quiet", "--json"]
        parts = ["--target-modules", "all", "layers.0", "layers.1"]
        assert main(["probe", folder, *flags, *parts, "--towards", str(tmp_path / f"model-{kind}.gguf")]) == 0
        sweep = SweepRecord.from_json(capsys.readouterr().out)
        read = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=f"model-{kind}.gguf", dtype=torch.float32)
        assert {row.label for record in sweep.records.values() for row in record.corruptions} == {
            f"weights of model-{kind}.gguf"
        }
        losses = {part: record.corruptions[0].mean("loss") for part, record in sweep.records.items()}
        whole = LlamaForCausalLM.from_pretrained(folder)
        whole.load_state_dict(read.state_dict())
        whole.save_pretrained(tmp_path / "read")  # `read` itself cannot be saved
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "read")
        assert main(["evaluate", str(tmp_path / "read"), *flags, "--corruptions", "quantization=8"]) == 0
        alone = EvaluationRecord.from_json(capsys.readouterr().out)
        assert losses["all"] == alone.clean.mean("loss")
        assert len(set(losses.values())) == 3
        # As far from the model as the quantizer that the docstring calls near; nearer to it than to the model.
        name = "model.layers.0.mlp.up_proj.weight"
        weight, theirs = model.state_dict()[name], read.state_dict()[name]
        ours = quantization({name: weight})[name]
        assert float((theirs - weight).norm() / (ours - weight).norm()) == pytest.approx(1, abs=0.15)
