"""A copy of a batch shares nothing with it that can be written into."""

import math
import threading
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch
from for_each import for_each
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from hf_parcor.batches import count_examples, first_examples, items_of_part, private_copy

Pair = namedtuple("Pair", ["first", "second"])


class Named(dict):
    """With an attribute, as classes of one's own have."""

    name = ""


class Frozen(dict):
    def __copy__(self):
        raise TypeError("not this one")


@dataclass
class Target:
    boxes: torch.Tensor


def tensor():
    return torch.arange(3.0)


HOLDERS = {
    "dict": (lambda t: {"a": t}, lambda b: b["a"]),
    "two deep": (lambda t: {"a": {"b": [t]}}, lambda b: b["a"]["b"][0]),
    "OrderedDict": (lambda t: OrderedDict(a=t), lambda b: b["a"]),
    "defaultdict": (lambda t: defaultdict(list, a=t), lambda b: b["a"]),
    "own dict": (lambda t: Named(a=t), lambda b: b["a"]),
    "own dict that refuses": (lambda t: Frozen(a=t), lambda b: b["a"]),
    "UserDict": (lambda t: UserDict(a=t), lambda b: b["a"]),
    "BatchEncoding": (lambda t: BatchEncoding({"a": t}), lambda b: b["a"]),
    "ModelOutput": (lambda t: BaseModelOutput(last_hidden_state=t), lambda b: b.last_hidden_state),
    "ModelOutput by name": (lambda t: BaseModelOutput(last_hidden_state=t), lambda b: b["last_hidden_state"]),
    "read-only": (lambda t: MappingProxyType({"a": t}), lambda b: b["a"]),
    "list": (lambda t: [1, t], lambda b: b[1]),
    "tuple": (lambda t: ({"a": t},), lambda b: b[0]["a"]),
    "namedtuple": (lambda t: Pair(1, t), lambda b: b.second),
    "PackedSequence": (lambda t: pack_sequence([t]), lambda b: b.data),
    "dataclass": (Target, lambda b: b.boxes),
    "array": (lambda t: {"a": t.numpy()}, lambda b: torch.from_numpy(b["a"])),
    "array of objects": (lambda t: np.array([t, None], dtype=object), lambda b: b[0]),
    "set": (lambda t: [{1, 2}, t], lambda b: b[1]),
}


@for_each("name", HOLDERS)
def test_what_is_written_into_the_copy_does_not_reach_the_batch(name):
    make, tensor_in = HOLDERS[name]
    batch = make(tensor())
    copied = private_copy(batch)
    assert type(copied) is type(batch)
    assert torch.equal(tensor_in(copied), tensor())
    tensor_in(copied).fill_(7.0)
    assert torch.equal(tensor_in(batch), tensor())


@for_each("name", ["dict", "two deep", "OrderedDict", "defaultdict", "UserDict", "BatchEncoding"])
def test_what_is_popped_from_the_copy_stays_in_the_batch(name):
    make, tensor_in = HOLDERS[name]
    batch = make(tensor())
    copied = private_copy(batch)
    (copied["a"] if name == "two deep" else copied).popitem()
    assert torch.equal(tensor_in(batch), tensor())


def test_what_stands_in_two_places_does_so_in_the_copy():
    shared, row = tensor(), [1]
    target = Target(shared)
    copied = private_copy({"c": target, "a": shared, "b": [shared, row], "d": row, "e": target, "f": Target(shared)})
    assert copied["a"] is copied["b"][0] is copied["c"].boxes is copied["f"].boxes is not shared
    assert copied["b"][1] is copied["d"] is not row
    assert copied["c"] is copied["e"] is not target


def test_a_batch_may_hold_itself():
    batch = {"a": tensor()}
    batch["self"] = [batch]
    copied = private_copy(batch)
    assert copied["self"][0] is copied is not batch


def test_what_a_cache_gets_in_one_run_is_not_there_in_the_next():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 0)
    private_copy({"past_key_values": cache})["past_key_values"].update(
        torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0
    )
    assert cache.get_seq_length() == 2


class TestHandedOn:
    def test_tensors_that_require_a_gradient(self):
        leaf = tensor().requires_grad_()
        result = leaf * 2
        copied = private_copy({"leaf": leaf, "result": [result]})
        assert copied["leaf"] is leaf
        assert copied["result"][0] is result

    @for_each("value", [None, True, 3, 0.5, "text", b"bytes", torch.float16, len])
    def test_what_cannot_be_written_into(self, value):
        assert private_copy([value])[0] is value

    def test_modules_and_what_cannot_be_copied(self):
        module, lock, generator = nn.Linear(1, 1), threading.Lock(), (x for x in ())

        class Two(tuple):
            def __new__(cls, first, second):
                return super().__new__(cls, (first, second))

        two = Two(1, tensor())
        assert private_copy([two])[0] is two
        copied = private_copy({"module": module, "held": Pair(lock, generator)})
        assert copied["module"] is module
        assert copied["held"] == (lock, generator)

    def test_a_failed_copy_leaves_no_half_of_one(self):
        class Holder:
            pass

        inner, outer = Holder(), Holder()
        inner.numbers = [1]
        outer.inner, outer.lock = inner, threading.Lock()
        inner.lock = outer.lock
        assert private_copy([outer, inner]) == [outer, inner]


def test_the_rest_of_an_object_is_kept():
    named = Named(a=1)
    named.name = "batch"
    assert private_copy(named).name == "batch"
    assert private_copy(defaultdict(list))["new"] == []


def test_random_numbers_are_not_drawn():
    before = torch.get_rng_state()
    private_copy({"a": tensor(), "b": Target(tensor())})
    assert torch.equal(torch.get_rng_state(), before)


TARGETS = [{"boxes": torch.rand(7, 4)}, {"boxes": torch.rand(0, 4)}, UserDict(boxes=torch.rand(3, 4))]


@for_each(
    ("batch", "count"),
    [
        ({"labels": TARGETS, "pixel_values": torch.rand(3, 2, 5, 5)}, 3),
        ({"pixel_values": [torch.rand(1, 5, 5), torch.rand(1, 6, 5), torch.rand(1, 5, 7)], "labels": TARGETS}, 3),
        ({"labels": tuple(TARGETS[:1])}, 1),
        ({"pixel_values": torch.rand(5, 2), "names": []}, 5),
        ([torch.rand(4, 2), torch.rand(4)], 4),
        (torch.rand(6, 2), 6),
        ({"texts": ["a", "b"]}, None),
    ],
)
def test_how_many_examples(batch, count):
    assert count_examples(batch) == count


class TestFirstOfLists:
    def test_images_of_their_own_sizes_beside_targets(self):
        images = [torch.full((3, side, 4), float(side)) for side in (5, 6, 7)]  # three of three channels
        batch = {"pixel_values": images, "labels": TARGETS, "scale": 2.0, "pair": [torch.zeros(3, 2)] * 2}
        part = first_examples(batch, 0.5)
        assert [image.shape[1] for image in part["pixel_values"]] == [5, 6]
        assert [len(target["boxes"]) for target in part["labels"]] == [7, 0]
        assert (part["scale"], [len(one) for one in part["pair"]]) == (2.0, [2, 2])

    def test_a_padded_batch(self):
        batch = {"labels": TARGETS, "pixel_values": torch.arange(3).view(3, 1)}
        part = first_examples(batch, 0.1)
        assert (part["pixel_values"].tolist(), len(part["labels"])) == ([[0]], 1)


def test_kinds_of_tensors():
    kinds = [
        torch.ones(2).expand(3, 2),
        torch.eye(3).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex64),
        nn.Buffer(torch.ones(2)),
        nn.Parameter(torch.ones(2), requires_grad=False),
    ]
    for kind, copied in zip(kinds, private_copy(kinds), strict=True):
        assert copied is not kind
        assert (copied.shape, copied.dtype, copied.layout, copied.device) == (
            kind.shape,
            kind.dtype,
            kind.layout,
            kind.device,
        )


def test_a_packed_sequence_still_unpacks():
    copied = private_copy(pack_sequence([tensor(), tensor()[:2]]))
    assert isinstance(copied, PackedSequence)
    assert copied.batch_sizes.tolist() == [2, 2, 1]


class TestAShareOfABatch:
    @for_each(("share", "count"), [(0.1, 1), (0.5, 3), (0.6, 3), (0.61, 4), (0.99, 5)])
    def test_first_examples(self, share, count):
        rows, words = torch.arange(10.0).reshape(5, 2), list("abcde")
        batch = {
            "rows": rows,
            "nested": BatchEncoding({"words": words, "pair": Pair(rows, rows + 1), "list": [rows]}),
            "settings": {"scale": torch.tensor(2.0), "name": "abcde", "shape": [1, 2, 3, 4], "none": None},
        }
        found = first_examples(batch, share)
        assert torch.equal(found["rows"], rows[:count])
        assert found["nested"]["words"] == words[:count]
        assert torch.equal(found["nested"]["pair"].second, rows[:count] + 1)
        assert torch.equal(found["nested"]["list"][0], rows[:count])
        assert found["settings"] == batch["settings"], "what is not per example stays"

    @pytest.mark.slow
    def test_rounding_adds_no_example(self):
        for examples in range(1, 65):
            batch = torch.zeros(examples)
            for share in {Fraction(part, whole) for whole in (*range(1, 65), 100) for part in range(1, whole + 1)}:
                assert len(first_examples(batch, float(share))) == math.ceil(share * examples)
        assert len(first_examples(torch.zeros(3), 1e-300)) == 1

    def test_all_of_it_is_the_batch_itself(self):
        batch = {"rows": tensor()}
        assert first_examples(batch, 1) is batch
        assert items_of_part(7, batch, 1) == 7

    @for_each("batch", [{}, {"words": ["a"]}, {"rows": torch.ones(2, 3), "scores": torch.ones(3)}])
    def test_refused(self, batch):
        with pytest.raises(ValueError, match="set batch_share to 1"):
            first_examples(batch, 0.5)

    @for_each(
        ("labels", "shifted", "expected"),
        [
            ([[1, 2], [3, -100], [-100, -100], [4, 5]], False, 12 * 3 / 5),
            ([[1, 2], [3, -100], [-100, -100], [4, 5]], True, 12 * 1 / 2),
            ([[-100, -100], [-100, -100], [1, 2], [3, 4]], False, 1.0),
            ([[-100, -100]] * 4, False, 1.0),
            ([[1.0], [-100.0], [2.0], [3.0]], False, 6.0),
        ],
    )
    def test_a_part_is_divided_by_its_share_of_the_labels(self, labels, shifted, expected):
        batch = {"labels": torch.tensor(labels)}
        assert float(items_of_part(12, batch, 0.5, shifted)) == pytest.approx(expected)

    def test_what_has_no_labels_is_divided_as_ever(self):
        assert items_of_part(12, {"rows": torch.ones(4)}, 0.5) == 12
        assert items_of_part(12, [torch.ones(4)], 0.5) == 12
        assert items_of_part(None, {"labels": torch.ones(4)}, 0.5) is None
