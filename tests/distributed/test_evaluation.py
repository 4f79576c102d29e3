"""Evaluation on several ranks: every rank has the record of one process, and computes its share of it."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

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
)
from hf_parcor.evaluation import ClassificationMetric

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
    BitFlips(count=5, bits="exponent"),
]
SIZES = (4, 4, 4, 4, 2)  # ranks have different numbers of batches, and batches different numbers of examples


def model() -> nn.Module:
    torch.manual_seed(1)
    config = tf.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    return tf.BertForSequenceClassification(config)


def batches(sizes: Sequence[int] = SIZES) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(1, 20, (size, 6), generator=draw),
            "labels": torch.randint(0, 2, (size,), generator=draw),
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
    parts = [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in network.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def evaluated(network: nn.Module, data: Any, corruptions: Sequence[Any], **options: Any) -> str:
    metric = options.pop("metric", None) or ClassificationMetric(data)
    evaluator = CorruptionEvaluator(network, metric, data, progress=False, **options)
    return evaluator.evaluate(corruptions, trials=2).to_json()


def probed(network: nn.Module, data: Any, corruptions: Sequence[Any]) -> list[str]:
    sweep = LayerProbe(network, ClassificationMetric(data), data, progress=False).evaluate(corruptions, trials=2)
    return [record.to_json() for record in sweep.records.values()]


def operations(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


class InOrder(ClassificationMetric):
    def combine(self, parts):
        return {"loss": sum(index * part["loss"] for index, part in enumerate(parts))}


def all_records() -> dict[str, list[str]]:
    """Return what must be the same for every number of processes."""
    network, data, both = model(), batches(), [*ROUNDED, *EXACT]
    before, last = bits(network), {"target_modules": "last-encoder-layer"}
    found = {
        "all weights": [evaluated(network, data, both, memory=1)],
        "a part, prefix shared": [evaluated(network, data, both, **last)],
        "a part, whole passes": [evaluated(network, data, both, reuse_prefix=False, **last)],
        "order of batches": [evaluated(network, data, EXACT, metric=InOrder(data))],
        "one batch": [evaluated(network, batches((3,)), both)],
        "each block": probed(network, data, [*ROUNDED[:1], *EXACT[:3]]),
    }
    assert bits(network) == before
    return found


def one_record() -> dict[str, list[str]]:
    return {"all weights": [evaluated(model(), batches(), [*ROUNDED, *EXACT])]}


@pytest.mark.parametrize(("records", "world_size"), [(all_records, 2), (one_record, 4)])
def test_every_rank_has_the_record_of_one_process(run_on_ranks, records, world_size):
    (expected,), ranks = run_on_ranks(records, 1), run_on_ranks(records, world_size)
    for found in ranks:
        assert found == ranks[0], "every rank returns the same record"
    for name, alone in expected.items():
        for one, together in zip(map(EvaluationRecord.from_json, alone), ranks[0][name], strict=True):
            check_equal(one, EvaluationRecord.from_json(together))


def share_of_work() -> int:
    return operations(lambda: evaluated(model(), batches((4,) * 4), [*ROUNDED, *EXACT[:3], *EXACT[4:5]]))


def test_every_rank_computes_its_share(run_on_ranks):
    """The work is: 4 batches for the clean model, the gradient and 6 measurements; and two ascents of 4 steps."""
    computed, alone = run_on_ranks(share_of_work, 2), share_of_work()
    assert computed == [alone / 2] * 2


def check_equal(alone: EvaluationRecord, together: EvaluationRecord) -> None:
    assert (alone.data, alone.target, alone.parameters) == (together.data, together.target, together.parameters)
    for one, other in zip(alone.rows(), together.rows(), strict=True):
        assert (one.label, one.seeds, one.changed) == (other.label, other.seeds, other.changed)
        for name, values in one.metrics.items():
            tolerance = {"rel": 1e-5} if one.label.startswith("gradient") else {"rel": 0, "abs": 0}
            assert other.metrics[name] == pytest.approx(values, nan_ok=True, **tolerance)
    assert len({row.metrics["loss"] for row in alone.rows()}) > 4, "they do something"


def what_users_pass() -> dict[str, Any]:
    from accelerate import Accelerator

    network, loader = model(), DataLoader(rows(), batch_size=4)
    both = [*ROUNDED, *EXACT]
    prepared = Accelerator(cpu=True).prepare_data_loader(loader)
    assert sum(len(batch["labels"]) for batch in prepared) > 18 / distributed.get_world_size(), "some count twice"
    arguments = tf.TrainingArguments(
        output_dir="unused", per_device_eval_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = tf.Trainer(
        model=network,
        args=arguments,
        eval_dataset=rows(),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    return {
        "a loader": evaluated(network, loader, both),
        "a prepared loader": evaluated(network, prepared, both),
        "a Trainer's loader": evaluated(network, trainer.get_eval_dataloader(), both),
        "a model under DDP": evaluated(DistributedDataParallel(network), batches(), both),
        "Trainer.evaluate": evaluated(network, batches(), both, metric=lambda _: trainer.evaluate()),
    }


def test_what_users_pass(run_on_ranks):
    (alone,), ranks = run_on_ranks(one_record, 1), run_on_ranks(what_users_pass, 2)
    assert ranks[0] == ranks[1]
    expected = EvaluationRecord.from_json(alone["all weights"][0])
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


def test_if_one_rank_fails_all_do(run_on_ranks):
    first, second = run_on_ranks(failures, 2)
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


def test_a_metric_that_does_not_gather(run_on_ranks):
    ranks = run_on_ranks(a_metric_that_does_not_gather, 2)
    assert ranks[0][0] == ranks[1][0]
    record = EvaluationRecord.from_json(ranks[0][0])
    assert record.clean.metrics["accuracy"] == (0.5,)
    for _, said in ranks:
        (warning,) = [line for line in said if line.startswith("metric:")]
        assert "expected the same 'accuracy' in every process, got [0.5, 0.75]; the first is kept" in warning


def split_weights() -> str:
    from torch.distributed.fsdp import fully_shard

    network = fully_shard(model())
    with pytest.raises(ValueError, match="weights that FSDP or tensor parallelism has split") as caught:
        CorruptionEvaluator(network, lambda _: {"x": 0.0})
    return str(caught.value)


def test_split_weights_are_refused(run_on_ranks):
    assert "from_pretrained" in run_on_ranks(split_weights, 2)[0]
