"""Evaluation on several ranks: every rank has the record of one process, and computes its share of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from another_device.device import cases_here, rank_device
from local_models import SENTENCES, save_gpt2
from operations import count_operations
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from trainings import QUIET, accuracy

import hf_parcor.evaluation.passes.prefixes as prefixes
from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionEvaluator,
    EvaluationRecord,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
    select_parameters,
)
from hf_parcor.distributed.dtensors import local_part
from hf_parcor.distributed.fsdp import drop_gathered
from hf_parcor.evaluation import ClassificationMetric, LmEvalMetric

pytestmark = pytest.mark.slow  # ranks are processes of their own

LM_EVAL = Path(sys.prefix) / "lm-eval"  # where `scripts/set_up.sh` puts it
ROUNDED = [  # the gradient over the data is summed in another order
    GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=0.1)),
    GradientCorruption(CorruptionConstraint(epsilon=0.5, top_n=7)),
]
EXACT = [
    RandomCorruption(CorruptionConstraint(epsilon=2.0)),
    MultiStepCorruption(CorruptionConstraint(epsilon=1.0)),
    MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=0.1), steps=4),
    MultiStepCorruption(CorruptionConstraint(epsilon=0.5), steps=2),
    GaussianNoise(0.1),
    UniformNoise(0.2),
    Quantization(2),
    Quantization(3, "channel", code_range="full"),
    BitFlips(count=5, bits="exponent"),
]
ONE_OF_EACH_WAY = [ROUNDED[0], EXACT[0], EXACT[2], EXACT[4], EXACT[6]]  # in which a corruption comes about
SIZES = (4, 4, 4, 4, 2)  # ranks have different numbers of batches, and batches different numbers of examples


def model() -> nn.Module:
    torch.manual_seed(1)
    config = tf.BertConfig(**tiny.encoder(), initializer_range=0.5)
    return tf.BertForSequenceClassification(config).to(rank_device())


def batches(sizes: Sequence[int] = SIZES) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(1, 20, (size, 6), generator=draw).to(rank_device()),
            "labels": torch.randint(0, 2, (size,), generator=draw).to(rank_device()),
        }
        for size in sizes
    ]


def rows() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": row, "labels": label}
        for batch in batches()
        for row, label in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def bits(network: nn.Module) -> str:
    drop_gathered(network)
    held = [local_part(tensor) for tensor in network.parameters()]
    parts = [tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes() for tensor in held]
    return hashlib.sha256(b"".join(parts)).hexdigest()


prefixes.RUNS_TO_PLAN = prefixes.RUNS_TO_PLAN_ASCENTS = 0  # as in `conftest.py`, which ranks do not read


def evaluated(network: nn.Module, data: Any, corruptions: Sequence[Any], **options: Any) -> str:
    metric, checkpoint = options.pop("metric", None) or ClassificationMetric(data), options.pop("checkpoint", None)
    evaluator = CorruptionEvaluator(network, metric, data, progress=False, **options)
    return evaluator.evaluate(corruptions, trials=2, checkpoint=checkpoint).to_json()


def probed(network: nn.Module, data: Any, corruptions: Sequence[Any]) -> list[str]:
    sweep = LayerProbe(network, ClassificationMetric(data), data, progress=False).evaluate(corruptions, trials=2)
    return [record.to_json() for record in sweep.records.values()]


class InOrder(ClassificationMetric):
    def combine(self, parts):
        return {"loss": sum(index * part["loss"] for index, part in enumerate(parts))}


def loss_of_the_first_batch(network: nn.Module) -> dict[str, float]:
    return {"loss": float(network(**batches()[0]).loss.detach())}


def all_of_them() -> Sequence[Any]:
    return cases_here([*ROUNDED, *EXACT], ONE_OF_EACH_WAY)


def all_records(build: Callable[[], nn.Module] = model) -> dict[str, list[str]]:
    """Return what must be the same for every number of processes, and for a model that is sharded over them."""
    network, data, few = build(), batches(), ONE_OF_EACH_WAY
    before, last = bits(network), {"target_modules": "last-encoder-layer"}
    found = {
        "all weights": [evaluated(network, data, all_of_them(), memory=1)],
        "a part, prefix shared": [evaluated(network, data, few, **last)],
        "each block": probed(network, data, few[:4]),
    }
    if build is model:  # no rank sees which bit of its shards is the worst
        worst = [WorstBitFlips(count, of="int8") for count in (1, 2, 3, 4)]
        found["worst flips"] = [evaluated(network, data, [*worst, Quantization(3)])]
    on_cpu = rank_device().type == "cpu"  # where tensors are does not change who computes what
    if on_cpu:
        found |= {
            "frozen": [evaluated(build().requires_grad_(False), data, few, **last)],
            "nothing that needs a gradient": [evaluated(network, data, EXACT[-4:])],
            "one batch": [evaluated(network, batches((3,)), few)],
            "a batch without labels": [evaluated(network, [*data[:2], unlabeled(data[2]), *data[3:]], few)],
            "any metric": [evaluated(network, data, few, metric=loss_of_the_first_batch)],
        }
    if on_cpu and build is model:  # no prefix is shared on shards
        found["a part, whole passes"] = [evaluated(network, data, few, reuse_prefix=False, **last)]
        found["order of batches"] = [evaluated(network, data, few[1:], metric=InOrder(data))]
    assert bits(network) == before
    return found


def unlabeled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def one_record(build: Callable[[], nn.Module] = model) -> dict[str, list[str]]:
    return {"all weights": [evaluated(build(), batches(), all_of_them())]}


def sharded(replicas: int = 1, **settings: Any) -> Any:
    """Return the model with its layers and the rest sharded over all ranks by FSDP2."""
    shape = (distributed.get_world_size(),) if replicas == 1 else (replicas, distributed.get_world_size() // replicas)
    mesh = init_device_mesh(rank_device().type, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    network = model()
    for layer in network.get_submodule("bert.encoder.layer").children():
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(network, mesh=mesh, **settings)


def gradients_are_kept() -> None:
    network, data = sharded(), batches()
    network(**data[distributed.get_rank()]).loss.backward()
    kept = {name: parameter.grad for name, parameter in network.named_parameters()}
    values = {name: local_part(gradient).clone() for name, gradient in kept.items()}
    evaluated(network, data, [*ROUNDED, *EXACT[:2]])
    for name, parameter in network.named_parameters():
        assert parameter.grad is kept[name]
        assert torch.equal(local_part(parameter.grad), values[name])


def interrupted_and_resumed(folder: str) -> dict[str, list[str]]:
    network, data, both = sharded(reshard_after_forward=False), batches(), all_of_them()
    path, metric = Path(folder) / "checkpoint", InterruptedLater(data)
    with pytest.raises(KeyboardInterrupt):
        evaluated(network, data, both, metric=metric, memory=1, checkpoint=path)
    distributed.barrier()
    assert len(path.read_text().splitlines()) > 4
    return {"all weights": [evaluated(network, data, both, metric=metric, checkpoint=path)]}


class InterruptedLater(ClassificationMetric):
    left = 7

    def combine(self, parts):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().combine(parts)


def records_on_two_ranks(folder: str) -> dict[str, dict[str, list[str]]]:
    return {
        "": all_records(),
        "sharded": all_records(sharded),
        "offloaded": one_record(partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))),
        "interrupted": interrupted_and_resumed(folder),
    }


def records_on_four_ranks() -> dict[str, dict[str, list[str]]]:
    return {"": one_record(), "sharded": one_record(sharded), "replicas": one_record(partial(sharded, 2))}


@pytest.fixture(scope="module")
def alone(run_on_ranks, device_of_ranks):
    (found,) = run_on_ranks(on_one_rank, 1, device=device_of_ranks)
    return found


@pytest.fixture(scope="module")
def two_ranks(run_on_ranks, device_of_ranks, tmp_path_factory):
    """Return a function that takes what a function found on each rank; all of them run in one start of ranks."""
    ranks = run_on_ranks(on_two_ranks, 2, str(tmp_path_factory.mktemp("checkpoints")), device=device_of_ranks)
    return lambda function: [rank[function.__name__] for rank in ranks]


@pytest.mark.slow
def test_two_ranks_have_the_records_of_one_process(two_ranks, alone):
    check_records(two_ranks(records_on_two_ranks), alone["all_records"])


@pytest.mark.slow
@pytest.mark.parametrize("device_of_ranks", ["cpu"], indirect=True)
def test_four_ranks_have_the_records_of_one_process(run_on_ranks, alone):
    check_records(run_on_ranks(records_on_four_ranks, 4), alone["all_records"])


def check_records(ranks: Sequence[dict[str, dict[str, list[str]]]], alone: dict[str, list[str]]) -> None:
    for found in ranks:
        assert found == ranks[0], "every rank returns the same record"
    for way, records in ranks[0].items():
        for name, together in records.items():
            for one, other in zip(alone[name], together, strict=True):
                check_equal(EvaluationRecord.from_json(one), EvaluationRecord.from_json(other), ROUNDED_ON[way])


def share_of_work() -> int:
    return count_operations(lambda: evaluated(model(), batches((4,) * 4), [*ROUNDED, *EXACT[:3], *EXACT[4:5]]))


@pytest.mark.slow
def test_every_rank_computes_its_share(two_ranks, alone):
    """The work is: 4 batches for the clean model, the gradient and 6 measurements; and two ascents of 4 steps."""
    assert two_ranks(share_of_work) == [alone["share_of_work"] / 2] * 2


GRADIENT = ("gradient",)
ON_SHARDS = ("gradient", "random", "multi-step")  # their norms are summed shard by shard
ROUNDED_ON = {
    "": GRADIENT,
    "sharded": ON_SHARDS,
    "replicas": ON_SHARDS,
    "offloaded": ON_SHARDS,
    "interrupted": ON_SHARDS,
}


def without_gradient(record: EvaluationRecord) -> int:
    """Return how many of the weights have a gradient of zero in exact arithmetic, and of zero or rounding here.

    What is added to all keys shifts all scores of a query alike, and a softmax does not see it. Whether such a weight
    moves, and to which side, is left to the order of sums; the loss does not depend on it.
    """
    selected = select_parameters(model(), **{"target_modules": "all", **record.target})
    return sum(weight.numel() for name, weight in selected.items() if name.endswith("key.bias"))


def check_equal(alone: EvaluationRecord, together: EvaluationRecord, rounded: tuple[str, ...] = GRADIENT) -> None:
    assert replace(alone, clean=together.clean, corruptions=together.corruptions) == together
    for one, other in zip(alone.rows(), together.rows(), strict=True):
        assert (one.label, one.seeds) == (other.label, other.seeds)
        to_rounding = one.label.startswith(rounded)
        climbs = to_rounding and not one.label.startswith("random")
        assert abs(one.changed - other.changed) <= (without_gradient(alone) if climbs else 0), one.label
        for name, values in one.metrics.items():
            tolerance = {"rel": 1e-5} if to_rounding else {"rel": 0, "abs": 0}
            assert other.metrics[name] == pytest.approx(values, nan_ok=True, **tolerance), one.label
    assert len({row.metrics["loss"] for row in alone.rows()}) > 4, "they do something"


def what_users_pass(folder: str) -> dict[str, Any]:
    from accelerate import Accelerator

    network, loader = model(), DataLoader(rows(), batch_size=4)
    both = all_of_them()
    prepared = Accelerator(cpu=True).prepare_data_loader(loader)
    assert sum(len(batch["labels"]) for batch in prepared) > 18 / distributed.get_world_size(), "some count twice"
    arguments = tf.TrainingArguments(output_dir=folder, per_device_eval_batch_size=4, **QUIET)
    trainer = tf.Trainer(
        model=network,
        args=arguments,
        eval_dataset=rows(),
        compute_metrics=accuracy,
    )
    return {
        "a loader": evaluated(network, loader, both),
        "a prepared loader": evaluated(network, prepared, both),
        "a Trainer's loader": evaluated(network, trainer.get_eval_dataloader(), both),
        "a model under DDP": evaluated(DistributedDataParallel(network), batches(), both),
        "Trainer.evaluate": evaluated(network, batches(), both, metric=lambda _: trainer.evaluate()),
    }


def test_what_users_pass(two_ranks, alone):
    ranks = two_ranks(what_users_pass)
    assert ranks[0] == ranks[1]
    expected = EvaluationRecord.from_json(alone["all_records"]["all weights"][0])
    of_trainer = EvaluationRecord.from_json(ranks[0].pop("Trainer.evaluate"))
    for record in ranks[0].values():
        check_equal(expected, EvaluationRecord.from_json(record))
    for row, other in zip(expected.rows(), of_trainer.rows(), strict=True):
        assert other.metrics["eval_accuracy"] == pytest.approx(row.metrics["accuracy"])


class FailsOnRank1(ClassificationMetric):
    left = math.inf

    def of_batch(self, model, batch):
        self.left -= distributed.get_rank() == 1
        if not self.left:
            raise OSError("the disk is full")
        return super().of_batch(model, batch)


class FailsLast(ClassificationMetric):
    combined = 0

    def combine(self, parts):
        self.combined += distributed.get_rank()
        if self.combined == 2:  # the clean model, and the only corruption: nothing is exchanged behind it
            raise OSError("the disk is full")
        return super().combine(parts)


class NeedsRank0(GaussianNoise):
    def _choose(self, weights, gradients, generator):
        if distributed.get_rank() == 1:
            raise MemoryError("no room for the noise")
        return super()._choose(weights, gradients, generator)


def failures() -> dict[str, tuple[str, str]]:
    """Return the error of each case, and check that the weights are back and that all can go on."""
    rank, found = distributed.get_rank(), {}

    def fail(name: str, run: Callable[[nn.Module], object]) -> None:
        network = model()
        before = bits(network)
        with pytest.raises(Exception) as caught:  # noqa: PT011, what is raised is the result
            run(network)
        found[name] = (type(caught.value).__name__, str(caught.value))
        assert bits(network) == before

    def with_metric(left: int) -> Callable[[nn.Module], object]:
        metric = FailsOnRank1(batches())
        metric.left = left
        return lambda network: evaluated(network, batches(), [*ROUNDED, *EXACT], metric=metric)

    for left in (1, 4, 30):
        fail(f"metric {left}", with_metric(left))
    fail("last", lambda network: evaluated(network, batches(), EXACT[-2:-1], metric=FailsLast(batches())))
    fail("corruption", lambda network: evaluated(network, batches(), [NeedsRank0(0.1), *ROUNDED]))

    def loss(network, batch):
        if rank == 1 and len(batch["labels"]) == 4:
            raise ArithmeticError("odd batch")
        return network(**batch).loss

    fail("loss", lambda network: evaluated(network, batches(), ROUNDED, loss=loss))

    def other_weights(network):
        network.classifier.bias.data += rank
        try:
            evaluated(network, batches(), EXACT)
        finally:
            network.classifier.bias.data -= rank

    fail("weights", other_weights)
    fail("data", lambda network: evaluated(network, batches((4, 2 + rank)), ROUNDED))
    fail(
        "data of the metric",
        lambda network: evaluated(network, batches(), EXACT, metric=ClassificationMetric(batches((4, 2 + rank)))),
    )
    found["afterwards"] = ("", evaluated(model(), batches(), EXACT[:1]))
    return found


def test_if_one_rank_fails_all_do(two_ranks):
    first, second = two_ranks(failures)
    assert first.pop("afterwards") == second.pop("afterwards")
    own = {
        **{f"metric {left}": ("OSError", "the disk is full") for left in (1, 4, 30)},
        "last": ("OSError", "the disk is full"),
        "corruption": ("MemoryError", "no room for the noise"),
        "loss": ("ArithmeticError", "odd batch"),
    }
    for name, (kind, message) in own.items():
        assert second.pop(name) == (kind, message)
        other, said = first.pop(name)
        assert other == "ProcessError"
        assert f"process 1: {kind}: {message}" in said
    assert first == second
    expected = {"weights": "model: expected the same weights", "data": "batches: expected all data"}
    for name, message in {**expected, "data of the metric": "metric: expected all data"}.items():
        assert first[name][0] == "ValueError"
        assert message in first[name][1]


def a_metric_that_does_not_gather() -> tuple[str, list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_parcor").addHandler(handler)
    rank = distributed.get_rank()
    metric = {"accuracy": 0.5 + rank / 4, "eval_runtime": 1.0 + rank, "rounded": 1 + rank / 1e4, "nan": math.nan}
    return evaluated(model(), batches(), [GaussianNoise(0.1)], metric=lambda _: metric), said


def test_a_metric_that_does_not_gather(two_ranks):
    ranks = two_ranks(a_metric_that_does_not_gather)
    assert ranks[0][0] == ranks[1][0]
    record = EvaluationRecord.from_json(ranks[0][0])
    assert record.clean.metrics["accuracy"] == (0.5,)
    for _, said in ranks:
        (warning,) = [line for line in said if line.startswith("metric:")]
        assert "expected the same 'accuracy' in every process, got [0.5, 0.75]; the first is kept" in warning


def split_weights() -> None:
    mesh = init_device_mesh(rank_device().type, (1, 2), mesh_dim_names=("data", "tensor"))
    left_out, again = model(), model()
    fully_shard(left_out, ignored_params={left_out.get_parameter("classifier.bias")})
    parallelize_module(again.get_submodule("classifier"), mesh["tensor"], ColwiseParallel())
    with pytest.raises(ValueError, match=r"tensor parallelism has split"):
        CorruptionEvaluator(again, lambda _: {"x": 0.0})
    fully_shard(again, mesh=mesh["data"])
    for network, why in ((left_out, "'classifier.bias', which is left out"), (again, "split again by tensor")):
        with pytest.raises(ValueError, match=why):
            CorruptionEvaluator(network, lambda _: {"x": 0.0})
    gathered = sharded(reshard_after_forward=False)
    with torch.no_grad():
        gathered(**batches()[0])
    assert not any(isinstance(parameter, DTensor) for parameter in gathered.get_submodule("bert.encoder").parameters())
    CorruptionEvaluator(gathered, lambda _: {"x": 0.0})
    assert all(isinstance(parameter, DTensor) for parameter in gathered.parameters())


def test_weights_split_in_other_ways_are_refused(two_ranks):
    assert two_ranks(split_weights) == [None, None]


def test_gradients_that_are_there_are_kept(two_ranks):
    assert two_ranks(gradients_are_kept) == [None, None]


def on_one_rank() -> dict[str, Any]:
    return {check.__name__: check() for check in (all_records, share_of_work)}


def on_two_ranks(folder: str) -> dict[str, Any]:
    checks = (
        gradients_are_kept,
        share_of_work,
        failures,
        a_metric_that_does_not_gather,
        split_weights,
    )
    found: dict[str, Any] = {check.__name__: check() for check in checks}
    found |= {check.__name__: check(folder) for check in (what_users_pass, records_on_two_ranks)}
    return found


def lm_eval_record(folder: str) -> tuple[str, int]:
    """Measure a task of lm-eval, and return the record, and how many documents this process has counted."""
    sys.path.append(str(LM_EVAL))
    import datasets
    from lm_eval.api.task import ConfigurableTask

    datasets.config.HF_DATASETS_CACHE = str(Path(folder) / "cache")
    counted = []
    process = ConfigurableTask.process_results
    ConfigurableTask.process_results = lambda task, document, results: (
        counted.append(document) or process(task, document, results)
    )
    try:
        model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)  # so that choices differ
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        metric = LmEvalMetric("films", tokenizer, include_path=folder, batch_size=2)
        batches = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 12).reshape(3, 1, 3)]
        record = CorruptionEvaluator(model, metric, batches, progress=False).evaluate(
            [GaussianNoise(0.5), Quantization(2), GradientCorruption(CorruptionConstraint(epsilon=3.0))], trials=1
        )
    finally:
        ConfigurableTask.process_results = process
    return record.to_json(), len(counted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_task_of_lm_eval_is_the_same_in_every_process(run_on_ranks, tmp_path, monkeypatch):
    """Each has all documents, once a measurement; the gradient of a corruption is that of all ranks' batches."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(LM_EVAL)])
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; `bash scripts/test.sh` puts it there")
    save_gpt2(tmp_path)
    choices = ["film", "plot a", "bad good film"]
    rows = [{"question": text, "choices": choices, "gold": index % 3} for index, text in enumerate(SENTENCES)]
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = {
        **{"task": "films", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
        **{"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "films.jsonl")}},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "films.yaml").write_text(json.dumps(task))
    one, documents = lm_eval_record(str(tmp_path))
    assert documents == 4 * len(rows)
    alone = EvaluationRecord.from_json(one)
    assert len({json.dumps(row.metrics) for row in alone.rows()}) > 1
    for text, of_rank in run_on_ranks(lm_eval_record, 2, str(tmp_path)):
        record = EvaluationRecord.from_json(text)
        assert of_rank == documents
        assert [row.metrics for row in record.rows()] == [row.metrics for row in alone.rows()]
        assert [row.norm for row in record.rows()] == pytest.approx([row.norm for row in alone.rows()], rel=1e-5)


def gathering_loss(rows: int) -> list[float]:
    """The losses that a Trainer measures which counts over all processes in its loss, as those of TRL do."""
    import tiny
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from hf_parcor import CorruptionConstraint, GradientCorruption
    from hf_parcor.evaluation import measure_robustness

    class Counting(Trainer):
        def compute_loss(self, model, inputs, *arguments, **named):
            self.accelerator.gather_for_metrics(inputs["labels"].sum())
            return super().compute_loss(model, inputs, *arguments, **named)

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**tiny.encoder(16)))
    data = [{"input_ids": [row, 3, 5], "labels": row % 2} for row in range(rows)]
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "average_tokens_across_devices": False}
    arguments = TrainingArguments("unused", per_device_eval_batch_size=2, **quiet)
    trainer = Counting(model=model, args=arguments, eval_dataset=data)
    record = measure_robustness(trainer, [GradientCorruption(CorruptionConstraint(epsilon=0.5))])
    return [row.mean("loss") for row in record.rows()]


def test_a_loss_that_gathers_needs_no_even_share_of_batches(run_on_ranks):
    (alone,) = run_on_ranks(gathering_loss, 1, 6)
    assert alone[1] > alone[0]
    for found in run_on_ranks(gathering_loss, 2, 6, timeout=60.0):
        assert found == pytest.approx(alone, rel=1e-5)


def translated(rows: int) -> tuple[list[int], int]:
    """The first tokens of the references that a Trainer of translation returns, and how many its metrics get."""
    from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    from hf_parcor import Seq2SeqParameterDefenseTrainer

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    arguments = Seq2SeqTrainingArguments(
        "unused", per_device_eval_batch_size=2, predict_with_generate=True, generation_max_length=3, **QUIET
    )
    trainer = Seq2SeqParameterDefenseTrainer(
        model=T5ForConditionalGeneration(config), args=arguments, compute_metrics=lambda found: {"n": len(found[1])}
    )
    found = trainer.predict([{"input_ids": [row + 3, 1], "labels": [row + 3, 1]} for row in range(rows)])
    return found.label_ids[:, 0].tolist(), found.metrics["test_n"]


def test_a_trainer_of_translation_counts_each_row_once(run_on_ranks):
    assert run_on_ranks(translated, 2, 5) == 2 * [([3, 4, 5, 6, 7], 5)]
