"""What is computed on another device, beside the same on the CPU; writes what differs, by check, into a JSON file."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import accelerate
import peft
import tiny
import torch
import transformers
from accelerate.state import AcceleratorState
from another_device.device import placed, register
from local_models import save_bert, save_t5, write_sentences
from torch import Tensor, nn
from trainings import defense_named

import hf_parcor
from hf_parcor import (
    BitFlips,
    ConductanceDrift,
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRisk,
    DefendedBackward,
    FloatQuantization,
    GaussianNoise,
    GradientCorruption,
    Interpolation,
    LayerProbe,
    MultiStepCorruption,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Pruning,
    Quantization,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
    measure_flips_to_break,
    measure_indicators,
    recipe,
    sensitivity,
)
from hf_parcor import devices as devices_of_the_library
from hf_parcor.cli import main as main_of_the_library
from hf_parcor.cli.subject import find_device
from hf_parcor.defenses import DEFENSES
from hf_parcor.evaluation.metrics import ClassificationMetric, GenerationMetric
from scripts.training_steps import quiet_arguments, step_of

CPU = torch.device("cpu")
L2 = CorruptionConstraint(epsilon=0.5)
TINY = {"vocab_size": 30, "num_attention_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 16}
WIDE = {"hidden_size": 32, "intermediate_size": 64}
QUIET = {"progress": False}
SPREAD: list[bool] = []  # whether BERT lies on both devices
Found = Mapping[str, Any]


def bert(device: torch.device, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**TINY, **WIDE, **tiny.STILL, "initializer_range": 0.3, **settings})
    model = transformers.BertForSequenceClassification(config)
    if device == CPU or not SPREAD:
        return model.to(device)
    other = torch.device(device.type, 1)
    layers = {f"bert.encoder.layer.{index}": (other, device)[index % 2] for index in range(config.num_hidden_layers)}
    places = {"bert.embeddings": device, **layers, "bert.pooler": other, "classifier": device}
    return accelerate.dispatch_model(model, places, main_device=device)


def gpt2(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**tiny.gpt2(30, 16), **tiny.STILL_GPT2)
    return placed(transformers.GPT2LMHeadModel(config), device)


def t5(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(**tiny.t5(30, 16, inner=24), dropout_rate=0)
    return placed(transformers.T5ForConditionalGeneration(config), device)


def tokens(rows: int) -> Tensor:
    return torch.randint(1, 30, (rows, 8), generator=torch.Generator().manual_seed(1), device=CPU)


def batches(device: torch.device) -> list[dict[str, Tensor]]:
    labels = torch.arange(12) % 2
    pairs = zip(tokens(12).split(4), labels.split(4), strict=True)
    return [{"input_ids": some.to(device), "labels": of_some.to(device)} for some, of_some in pairs]


def trainer(model: nn.Module, device: torch.device, rows: list[dict[str, Any]], **options: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    arguments = quiet_arguments(
        use_cpu=False,
        logging_strategy="steps",
        logging_steps=1,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        train_sampling_strategy="sequential",
    )
    made = ParameterDefenseTrainer(model=model, args=arguments, train_dataset=rows, **options)
    made.remove_callback(transformers.PrinterCallback)
    return made


def labelled() -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": number % 2} for number, row in enumerate(tokens(8))]


def trained(build: Callable[..., nn.Module], device: torch.device, **options: Any) -> Found:
    """Return the weights after two steps, and what was logged."""
    model = build(device)
    rows = labelled() if build is bert else [{"input_ids": row, "labels": row} for row in tokens(8)]
    run = trainer(model, device, rows, **options)
    run.train()
    assert all(weight.device.type == device.type for weight in model.parameters())
    logged = [
        {name: log[name] for name in ("loss", "corruption_norm") if name in log} for log in run.state.log_history
    ]
    return {**dict(model.named_parameters()), "logged": logged}


def other_constraints(device: torch.device) -> Found:
    few = MultiStepRisk(CorruptionConstraint(epsilon=0.5, top_n=200), steps=3)
    cubes = CorruptionRisk(GradientCorruption(CorruptionConstraint(p=3, epsilon=0.5)))
    largest = MultiStepRisk(CorruptionConstraint(p=math.inf, epsilon=0.01), steps=2)
    return {str(one): trained(bert, device, defense=one) for one in (few, cubes, largest)}


def prefixes(device: torch.device) -> Found:
    """Reused prefixes are full passes, for a part of the batch too; one that draws is reused as well."""
    found = {}
    for name, random, share in (("whole", 0.0, 1.0), ("part", 0.0, 0.5), ("dropout", 0.3, 1.0)):
        of_reuse = []
        for reuse in (True, False):
            model = bert(device, hidden_dropout_prob=random)
            risk = MultiStepRisk(L2, steps=2, batch_share=share)
            run = trainer(
                model, device, labelled(), defense=risk, target_modules="last-encoder-layer", reuse_prefix=reuse
            )
            run.train()
            assert (run.shared_prefix is not None) is reuse, name
            of_reuse.append(dict(model.named_parameters()))
        if not random:
            check_same(*of_reuse)
            found[name] = of_reuse[0]
    return found


def restored(device: torch.device) -> Found:
    """A pass that fails leaves every bit as it was."""
    model = bert(device)
    before = [weight.detach().cpu().clone() for weight in model.parameters()]
    calls: list[int] = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model.classifier.register_forward_pre_hook(stop)
    try:
        trainer(model, device, labelled(), defense=MultiStepRisk(L2, steps=2)).train()
    except KeyboardInterrupt:
        assert all(torch.equal(a.detach().cpu(), b) for a, b in zip(model.parameters(), before, strict=True))
        return {}
    raise AssertionError("the second pass did not come")


def readings(device: torch.device) -> Found:
    """The host asks for no value in a step, but for what its passes ask for: a GPU is not waited for."""
    if device == CPU or not devices_of_the_library.has_float64(device):
        return {}
    arms = {
        "K = 1": MultiStepRisk(L2, steps=1),
        "K = 2": MultiStepRisk(L2, steps=2),
        "top n": MultiStepRisk(CorruptionConstraint(epsilon=0.1, top_n=100), steps=2),
        "SAM": hf_parcor.SAM(L2),
        "4 bits": CorruptionRisk(Quantization(4)),
    }
    for name, one in arms.items():
        model, batch = bert(device), batches(device)[0]
        run = trainer(model, device, labelled(), defense=one)
        step = step_of(run, model, batch)
        for _ in range(3):  # the first may look around
            model.zero_grad()
            torch.ops.another.take_readings()
            step()
        ours = torch.ops.another.take_readings()
        model.zero_grad()
        transformers.Trainer.training_step(run, model, dict(batch))
        stock = torch.ops.another.take_readings()
        assert ours <= stock * one.passes, f"{name}: the host asks {ours} times, the stock step {stock}"
    return {}


FORMATS = [
    *(Quantization(4), Quantization(8, "channel"), Quantization(8, "channel", code_range="full"), Quantization(4, 8)),
    *(Quantization(4, symmetric=False), Quantization(4, "channel", symmetric=False, zero_point="float")),
    *(FloatQuantization(name) for name in ("fp8_e4m3", "fp8_e5m2", "nf4", "mxfp4", "nvfp4")),
]
CORRUPTIONS = [
    *(
        *FORMATS,
        GaussianNoise(0.1),
        GaussianNoise(0.1, relative_to="channel"),
        UniformNoise(0.1),
        RandomCorruption(L2),
    ),
    *(ConductanceDrift(86_400), BitFlips(count=9), BitFlips(rate=1e-3), BitFlips(count=9, of="int8")),
    *(Pruning(0.5), Pruning(0.3, "all"), Pruning(0.4, "channel"), Pruning(0.5, 4)),
    WorstBitFlips(3, search="data-free"),
]


def corruptions(device: torch.device) -> Found:
    """The same seed makes the same corruption of the same weights."""
    weights, source = {}, torch.Generator().manual_seed(2)
    for name, shape in {"a": (96,), "b": (32, 32), "c": (16, 64), "none": (0, 32)}.items():
        weights[name] = torch.randn(shape, generator=source, device=CPU).to(device)
    others = {name: torch.randn(weight.shape, generator=source, device=CPU) for name, weight in weights.items()}
    towards = [Interpolation(share, others) for share in (0.5, 1.0)]
    return {str(one): one(weights, generator=torch.Generator().manual_seed(3)) for one in (*CORRUPTIONS, *towards)}


def record_of(device: torch.device, data: list[dict[str, Tensor]], **options: Any) -> Found:
    arms = [
        *(GaussianNoise(0.1), Quantization(4), BitFlips(count=5), GradientCorruption(L2), RandomCorruption(L2)),
        *(MultiStepCorruption(L2), MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=0.05), steps=3)),
        *(WorstBitFlips(2), GradientCorruption(CorruptionConstraint(epsilon=0.5, top_n=50))),
    ]  # fmt: skip
    evaluator = CorruptionEvaluator(bert(device), ClassificationMetric(data), data, **QUIET, **options)
    return told(evaluator.evaluate(arms, 2))


def measured(device: torch.device) -> Found:
    """An evaluation, whatever lies where."""
    found = record_of(device, batches(device))
    check_same(found, record_of(device, batches(CPU)))
    return found


def kept_on_the_host(device: torch.device) -> Found:
    return record_of(device, batches(device), saved_on="cpu")


def probed(device: torch.device) -> Found:
    data = batches(device)
    probe = LayerProbe(bert(device), ClassificationMetric(data), data, **QUIET)
    return told(probe.evaluate([GradientCorruption(L2), Quantization(3)]))


def indicated(device: torch.device) -> Found:
    model, data = bert(device), batches(device)
    flips = measure_flips_to_break(model, ClassificationMetric(data), data, most=3, **QUIET)
    return {"indicators": told(measure_indicators(model, data, [L2], steps=2, **QUIET)), "flips": told(flips)}


def prescribed(device: torch.device) -> Found:
    model, data = bert(device), batches(device)
    found = sensitivity(model, ClassificationMetric(data), batches=data, probes=2, budget=4, **QUIET)
    return {"scores": told(found), "recipe": told(recipe(found, bits=5))}


def by_default(device: torch.device) -> Found:
    """Who lets PyTorch make all tensors there gets the same numbers."""
    torch.set_default_device(device)
    try:
        return {"measured": record_of(device, batches(device)), "corruptions": corruptions(device)}
    finally:
        torch.set_default_device(None)


def commands(device: torch.device) -> Found:
    """The command line, told of a device by its bare name; it would take the accelerator by itself."""
    assert find_device(None) == torch.device("another", 0)
    model, data = save_bert(Path(FOLDER) / "bert"), write_sentences(Path(FOLDER) / "data.tsv")
    found = {}
    for line in ("evaluate --trials 1", "probe --strengths 0.5", "probe --quick", "probe --recipe bits=14 --cells 3"):
        command, *words = line.split()
        words += [
            "--output-dir",
            tempfile.mkdtemp(dir=FOLDER),
            "--dataset",
            data,
            "--device",
            device.type,
            "--json",
            "--quiet",
        ]
        printed = io.StringIO()
        with redirect_stdout(printed):
            code = main_of_the_library([command, model, *words])
        assert code == 0, line
        found[line] = _lasting(json.loads(printed.getvalue()))
    return found


def generated(device: torch.device) -> Found:
    """Texts that a model generates, corrupted too."""
    folder = save_t5(Path(FOLDER) / "t5")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = [
        {
            **tokenizer(["the good film"], return_tensors="pt"),
            "labels": tokenizer(["a plot"], return_tensors="pt").input_ids,
        }
    ]
    metric = GenerationMetric(tokenizer, data, lambda predictions, references: {"length": float(len(predictions[0]))})
    placed(model, device)
    return told(
        CorruptionEvaluator(model, metric, data, **QUIET).evaluate([GaussianNoise(0.5), GradientCorruption(L2)])
    )


def bfloat16(device: torch.device) -> Found:
    def build(device: torch.device) -> nn.Module:
        return bert(device).to(torch.bfloat16)

    model = build(device)
    data = batches(device)
    evaluator = CorruptionEvaluator(build(device), ClassificationMetric(data), data, **QUIET)
    arms = [Quantization(4), GradientCorruption(L2), MultiStepCorruption(L2)]
    run = trainer(model, device, labelled(), defense=MultiStepRisk(L2, steps=2))
    values = [row.mean("loss") for row in evaluator.evaluate(arms).rows()][:2]  # signs of small gradients are chance
    run.train()
    return {"losses": torch.tensor(values, dtype=torch.bfloat16), **dict(model.named_parameters())}


def offloaded(device: torch.device) -> Found:
    """All weights lie in main memory, whence a hook copies them to the device, layer by layer."""
    model, data = bert(CPU), batches(device)
    if device != CPU:
        accelerate.cpu_offload(model, execution_device=device)
    arms = [
        *FORMATS,
        GaussianNoise(0.1),
        RandomCorruption(L2),
        BitFlips(count=9),
        WorstBitFlips(2, search="data-free"),
    ]
    probe = LayerProbe(model, ClassificationMetric(data), data, **QUIET).evaluate(arms[:2], 2)
    whole = CorruptionEvaluator(model, ClassificationMetric(data), data, **QUIET).evaluate(arms, 2)
    return {"whole": told(whole), "parts": told(probe)}


def under_autocast(device: torch.device) -> Found:
    arms = {
        "K = 2": {"defense": MultiStepRisk(L2, steps=2)},
        "last layer": {"defense": MultiStepRisk(L2, steps=2), "target_modules": "last-encoder-layer"},
        "4 bits": {"defense": CorruptionRisk(Quantization(4))},
    }
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    try:
        found = {name: trained(bert, device, **options) for name, options in arms.items()}
    finally:
        del os.environ["ACCELERATE_MIXED_PRECISION"]
    return {
        name: {part: weight.to(torch.bfloat16) for part, weight in result.items() if part != "logged"}
        for name, result in found.items()
    }


def resumed(device: torch.device) -> Found:
    """A run that is stopped after its first step goes on to the same weights, noise and all."""
    ended = []
    for first in (None, "checkpoint-1"):
        model = bert(device)
        run = trainer(model, device, labelled(), defense=CorruptionRisk(GaussianNoise(0.05)))
        run.args.save_strategy, run.args.save_steps, run.args.output_dir = "steps", 1, str(Path(FOLDER) / device.type)
        run.train(resume_from_checkpoint=first and str(Path(run.args.output_dir) / first))
        ended.append(dict(model.named_parameters()))
    check_same(*ended)
    return ended[0]


def adapters(device: torch.device) -> Found:
    """Adapters that learn to survive what happens to the frozen weights under them."""
    settings = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "init_lora_weights": False}
    model = peft.get_peft_model(bert(CPU), peft.LoraConfig(**settings)).to(device)
    trainer(model, device, labelled(), defense=CorruptionRisk(Quantization(4)), target_modules="all").train()
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def looped(device: torch.device) -> Found:
    """A loop of one's own, before and after its defense starts."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    model = bert(device)
    backward = DefendedBackward(accelerate.Accelerator(), MultiStepRisk(L2, start_epoch=1), model)
    found = {}
    for epoch, batch in enumerate(batches(device)[:2]):
        loss = backward(lambda batch: model(**batch).loss, batch, epoch=epoch)
        numbers = [loss.risk, loss.clean, loss.corrupted, *vars(loss.norm).values()]
        assert loss.defended or len({number.device for number in numbers}) == 1
        found[f"epoch {epoch}"] = [float(number) for number in numbers]
    return {**found, **{name: 0.05 * weight.grad for name, weight in model.named_parameters()}}


def of_defense(name: str) -> Callable[[torch.device], Found]:
    return lambda device: trained(bert, device, defense=defense_named(name, L2))


CHECKS: dict[str, Callable[[torch.device], Found]] = {
    **{f"{name} of BERT": of_defense(name) for name in DEFENSES},
    "tied weights": lambda device: trained(gpt2, device, defense=MultiStepRisk(L2, steps=2)),
    "seq2seq": lambda device: trained(t5, device, defense=MultiStepRisk(L2, steps=2)),
    "other constraints": other_constraints,
    "reused prefixes": prefixes,
    "exact bits after an error": restored,
    "what the host asks for": readings,
    "corruptions": corruptions,
    "an evaluation": measured,
    "bits saved on the host": kept_on_the_host,
    "commands": commands,
    "generated texts": generated,
    "weights offloaded to the host": offloaded,
    "autocast": under_autocast,
    "a run that is resumed": resumed,
    "adapters": adapters,
    "a loop": looped,
    "a probe": probed,
    "indicators": indicated,
    "a recipe": prescribed,
    "PyTorch's default device": by_default,
    "bfloat16": bfloat16,
}
NOT_SPREAD = {  # models of their own, which `spread` does not lay on two devices
    *("tied weights", "seq2seq", "corruptions", "commands", "generated texts", "weights offloaded to the host"),
    "adapters",
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def told(record: Any) -> Any:
    """Return what a record says, but for times and places."""
    return _lasting(json.loads(record.to_json()))


def _lasting(value: Any) -> Any:
    passing = ("seconds", "created", "versions", "device", "environment", "memory")
    if isinstance(value, Mapping):
        return {name: _lasting(one) for name, one in value.items() if not any(word in name for word in passing)}
    return [_lasting(one) for one in value] if isinstance(value, list) else value


def check_same(ours: Any, expected: Any, where: str = "") -> None:
    """Raise where two nested results differ."""
    if isinstance(expected, Mapping):
        assert ours.keys() == expected.keys(), f"{where}: {sorted(ours)} and {sorted(expected)}"
        for name in expected:
            check_same(ours[name], expected[name], f"{where} {name}")
    elif isinstance(expected, (list, tuple)):
        assert len(ours) == len(expected), where
        for place, (one, other) in enumerate(zip(ours, expected, strict=True)):
            check_same(one, other, f"{where}[{place}]")
    elif isinstance(expected, Tensor):
        tolerance = TOLERANCES[expected.dtype]
        torch.testing.assert_close(
            ours.detach().cpu(),
            expected.detach().cpu(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda said: f"{where}: {said}",
        )
    elif isinstance(expected, float):
        assert math.isclose(ours, expected, rel_tol=5e-3, abs_tol=5e-3) or (
            math.isnan(ours) and math.isnan(expected)
        ), f"{where}: {ours}, expected {expected}"
    else:
        assert ours == expected, f"{where}: {ours!r}, expected {expected!r}"


@contextmanager
def spread() -> Iterator[None]:
    """Let layers of BERT lie on two devices in turn, as a `device_map` spreads a model that one cannot hold."""
    SPREAD.append(True)
    try:
        yield
    finally:
        SPREAD.clear()


@contextmanager
def without_float64() -> Iterator[None]:
    """Let the device refuse float64, and the library know it, as it knows it of Apple's."""
    own = devices_of_the_library.has_float64
    readers = [
        one for name, one in sys.modules.items() if name.startswith("hf_parcor") and hasattr(one, "has_float64")
    ]

    def has_float64(device: torch.device) -> bool:
        return device.type == "cpu" and own(device)

    torch.ops.another.allow_float64(False)
    for module in readers:
        module.has_float64 = has_float64
    try:
        yield
    finally:
        torch.ops.another.allow_float64(True)
        for module in readers:
            module.has_float64 = own


def problem(check: Callable[[torch.device], Found], device: torch.device, expected: Found) -> str:
    """Return what is wrong, or nothing."""
    try:
        check_same(check(device), expected)
    except Exception as error:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
        ]
        return f"{type(error).__name__}: {error}\n" + "".join(traceback.format_list(frames))
    return ""


def main() -> None:
    another = register()
    gc.freeze()  # the Trainer collects garbage whenever it starts: not among the libraries
    found = {}
    for name, check in CHECKS.items():
        expected = check(CPU)
        with_it = problem(check, another, expected)
        with without_float64():
            found[name] = {"as a GPU": with_it, "without float64": problem(check, another, expected)}
        if name not in NOT_SPREAD:
            with spread():
                found[name]["on two devices"] = problem(check, another, expected)
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as FOLDER:
        main()
