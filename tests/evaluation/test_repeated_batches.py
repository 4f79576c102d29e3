"""Data that differs from walk to walk is refused before anything is measured; walks change nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, WeightedRandomSampler

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    measure_indicators,
)
from hf_parcor.evaluation import ClassificationMetric, DatasetGradients, GenerationMetric
from hf_parcor.evaluation.identity.fingerprint import fingerprint
from hf_parcor.evaluation.identity.repeated_batches import RepeatedBatches, drawn_once
from hf_parcor.evaluation.identity.row_fingerprint import data_fingerprint
from hf_parcor.indicators import LossOverData

ROWS = [{"input_ids": torch.arange(row, row + 6) % 19 + 1, "labels": torch.tensor(row % 2)} for row in range(10)]


class Once(IterableDataset):
    """All its walks share one iterator."""

    def __init__(self):
        self.rows = iter(ROWS)

    def __iter__(self):
        return self.rows


class Walks:
    """Batches that are made anew in each walk, by the number of the walk."""

    def __init__(self, make):
        self.make, self.walks = make, 0

    def __iter__(self):
        self.walks += 1
        return iter(self.make(self.walks))


def collated(rows, **others):
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, **others}


def masked(draw):
    def collate(rows):
        batch = collated(rows)
        batch["input_ids"] = torch.where(torch.as_tensor(draw(tuple(batch["input_ids"].shape)) < 0.5), 0, 1)
        return batch

    return collate


def failing(walk):
    if walk > 1:
        raise RuntimeError("the file is read")
    yield collated(ROWS)


def batches_of(size=4):
    return [collated(ROWS[start : start + size]) for start in range(0, len(ROWS), size)]


DIFFERENT = {
    "shuffle": (lambda: DataLoader(ROWS, 4, shuffle=True), "a DataLoader that shuffles (RandomSampler)"),
    "shuffle of a single batch": (lambda: DataLoader(ROWS, 10, shuffle=True), "that shuffles (RandomSampler)"),
    "a subset": (lambda: DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(10))), "(SubsetRandomSampler)"),
    "weights": (lambda: DataLoader(ROWS, 4, sampler=WeightedRandomSampler([1.0] * 10, 10)), "(WeightedRandomSampler)"),
    "masks of torch": (
        lambda: DataLoader(ROWS, 4, collate_fn=masked(torch.rand)),
        "another 'input_ids' in batch 0 of the second walk",
    ),
    "masks of numpy": (
        lambda: DataLoader(ROWS, 4, collate_fn=masked(lambda shape: np.random.random(shape))),  # noqa: NPY002
        "another 'input_ids' in batch 0 of the second walk",
    ),
    "masks of python": (
        lambda: DataLoader(ROWS, 4, collate_fn=masked(lambda _: np.array(random.random()))),
        "another 'input_ids' in batch",
    ),
    "one iterator": (lambda: DataLoader(Once(), 4), "got 0 batches in the second walk and 3 in the first"),
    "fewer": (lambda: Walks(lambda walk: batches_of()[: 4 - walk]), "got 2 batches in the second walk and 3 in the"),
    "more": (lambda: Walks(lambda walk: batches_of()[: 1 + walk]), "got more than the 2 batches of the first walk"),
    "labels": (
        lambda: Walks(lambda walk: [*batches_of()[:2], {**batches_of()[2], "labels": torch.tensor([1, walk % 2])}]),
        "another 'labels' in batch 2",
    ),
    "texts": (lambda: Walks(lambda walk: [collated(ROWS, texts=["a", f"{walk}"])]), "another 'texts' in batch 0"),
    "tuples": (lambda: Walks(lambda walk: [(torch.ones(2), torch.tensor([walk]))]), "another '1' in batch 0"),
    "a failure": (lambda: Walks(failing), "can be walked through again, got RuntimeError('the file is read') in the"),
}
LOADERS = {name: make for name, (make, _) in DIFFERENT.items() if name != "tuples"}


@pytest.fixture(params=DIFFERENT)
def different(request):
    make, found = DIFFERENT[request.param]
    return make(), found


def test_what_differs_is_told(different):
    batches, found = different
    with pytest.raises(ValueError, match=r"^data: expected .*pass list\(loader\)") as told:
        RepeatedBatches(batches, "data").check()
    assert found in str(told.value)


NOISE, GRADIENT = [GaussianNoise(0.1)], [GradientCorruption(CorruptionConstraint(epsilon=0.1))]
WALKERS = {
    "evaluator": lambda m, x: CorruptionEvaluator(m, lambda _: {"x": 0.0}, x, progress=False).evaluate(GRADIENT),
    "metric": lambda m, x: CorruptionEvaluator(m, ClassificationMetric(x), progress=False).evaluate(NOISE),
    "probe": lambda m, x: LayerProbe(m, ClassificationMetric(x), x, progress=False).evaluate(NOISE),
    "gradients": lambda m, x: DatasetGradients(m, dict(m.named_parameters()), x),
    "loss": lambda m, x: LossOverData(m, dict(m.named_parameters()), x),
    "indicators": lambda m, x: measure_indicators(m, x, [CorruptionConstraint(epsilon=0.1)], progress=False),
}


@pytest.mark.parametrize("kind", ["shuffle", "masks of torch", "one iterator", "labels"])
@pytest.mark.parametrize("walker", WALKERS)
def test_all_that_walks_again_notices_before_the_model_runs(classifier, walker, kind):
    classifier.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="expected the same batches in every walk, got"):
        WALKERS[walker](classifier, LOADERS[kind]())


def test_what_is_read_only_once_cannot_be_drawn():
    with pytest.raises(ValueError, match="got 0 batches in the second walk"):
        drawn_once(DataLoader(Once(), 4))


@pytest.mark.slow
@pytest.mark.parametrize("walker", ["evaluator", "probe", "indicators"])
def test_a_loader_and_its_list_have_one_record(classifier, walker):
    loader = DataLoader(ROWS, 4, collate_fn=collated)
    assert WALKERS[walker](classifier, loader) == WALKERS[walker](classifier, list(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_generator_is_another_afterwards(workers):
    own = torch.Generator().manual_seed(3)
    batches = RepeatedBatches(DataLoader(ROWS, 4, generator=own, num_workers=workers))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), own.get_state()  # noqa: NPY002
    assert batches.fingerprint() == fingerprint(batches_of())
    assert batches.data() == data_fingerprint(batches_of())
    DatasetGradients(nn.Identity(), {}, batches)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), own.get_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


@pytest.mark.parametrize("owned", [False, True])
def test_making_a_metric_moves_no_generator(owned):
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(ROWS, 4, collate_fn=collated, generator=own if owned else None)
    before = torch.get_rng_state(), own.get_state()
    ClassificationMetric(loader)
    GenerationMetric(None, loader, len)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], own.get_state())


class TestTheCost:
    def test_a_list_is_not_walked(self):
        class Counted(Dataset):
            read = 0

            def __len__(self):
                return 10

            def __getitem__(self, index):
                Counted.read += 1
                return ROWS[index]

        data = Counted()
        batches = RepeatedBatches(DataLoader(data, 5))
        batches.check()
        batches.check()
        batches.fingerprint()
        batches.data()
        assert Counted.read == 20, "two walks, of which the first has the fingerprint"
        fixed = RepeatedBatches([ROWS[0]])
        fixed.check()
        assert next(iter(fixed)) is ROWS[0]

    def test_a_walk_that_was_not_ended_is_no_walk(self):
        walks = Walks(lambda walk: batches_of())
        batches = RepeatedBatches(walks)
        for _ in range(3):
            assert next(iter(batches))["labels"].tolist() == [0, 1, 0, 1]
        one, other = iter(batches), iter(batches)
        assert sum(1 for _ in zip(one, other, strict=True)) == 3
        batches.check()
        assert walks.walks == 5

    def test_data_may_change_between_two_runs(self, classifier):
        rows = list(ROWS)
        loader = DataLoader(rows, 4, collate_fn=collated)
        evaluator = CorruptionEvaluator(classifier, ClassificationMetric(loader), loader, progress=False)
        first = evaluator.evaluate(GRADIENT)
        del rows[5:]
        assert evaluator.evaluate(GRADIENT).data != first.data == data_fingerprint(batches_of())
