"""Fingerprints see all of the data: values, types and names at every depth, and nothing else."""

from __future__ import annotations

import copy
import datetime
import enum
import hashlib
import struct
import threading
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass, make_dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from hf_parcor.evaluation.identity.fingerprint import Fingerprint, fingerprint, fingerprint_of_weights


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class Pair:
    x: object
    y: object = 0


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class OneSlot:
    __slots__ = "only"

    def __init__(self, only):
        self.only = only


class Image:
    """As images of PIL: an array, and how it is to be read."""

    def __init__(self, values, mode="L"):
        self.mode, self._values = mode, np.array(values, dtype=np.uint8)

    @property
    def __array_interface__(self):
        return self._values.__array_interface__


Named, Other = namedtuple("Named", "x y"), namedtuple("Other", "x z")
ONE = torch.tensor([1.0, 2.0])


def quantized(scale=0.1, kind=torch.qint8):
    return torch.quantize_per_tensor(ONE, scale, 0, kind)


def by_channel(scale):
    return torch.quantize_per_channel(ONE[None].T, torch.tensor([scale, 1.0]), torch.tensor([0, 0]), 0, torch.qint8)


def looped(*, inner: bool):
    """Return a list of one list that holds itself, or the outer one."""
    outer: list[object] = [[]]
    outer[0].append(outer[0] if inner else outer)
    return outer


# All are different from each other, and each is the same when it is made again.
VALUES = {
    "none": lambda: None,
    "true": lambda: True,
    "one": lambda: 1,
    "large": lambda: 10**5000,
    "float": lambda: 1.0,
    "minus zero": lambda: -0.0,
    "zero": lambda: 0.0,
    "nan": lambda: float("nan"),
    "complex": lambda: 1j,
    "other complex": lambda: 2j,
    "text": lambda: "1",
    "no text": lambda: "",
    "half a pair": lambda: "\ud800",
    "bytes": lambda: b"1",
    "two bytes": lambda: b"12",
    "list": lambda: [1],
    "nested": lambda: [[1]],
    "two": lambda: [[1], []],
    "empty": lambda: [],
    "ab c": lambda: ["ab", "c"],
    "a bc": lambda: ["a", "bc"],
    "abc": lambda: ["abc"],
    "mapping": lambda: {"x": 1},
    "mapping of ints": lambda: {1: 1},
    "mapping of text": lambda: {"1": 1},
    "order": lambda: {"x": 1, "y": 2},
    "other order": lambda: {"y": 2, "x": 1},
    "an empty one beside it": lambda: [{"x": 1, "y": 2}, {}],
    "one each": lambda: [{"x": 1}, {"y": 2}],
    "holds itself": lambda: [looped(inner=True)],
    "holds what it is in": lambda: [looped(inner=False)],
    "set": lambda: {"b", "a"},
    "no set": lambda: set(),
    "named": lambda: Named(1, 2),
    "other names": lambda: Other(1, 2),
    "dataclass": lambda: Pair(1),
    "another": lambda: Pair(1, 1),
    "object": lambda: SimpleNamespace(x=1, y=0),
    "slots": lambda: Slotted(1),
    "other slots": lambda: Slotted(2),
    "one slot": lambda: OneSlot(1),
    "other slot": lambda: OneSlot(2),
    "fields of arrays": lambda: np.array([(1, 2)], dtype=[("x", "i4"), ("y", "i4")]),
    "other fields": lambda: np.array([(1, 2)], dtype=[("x", "i4"), ("z", "i4")]),
    "zero point": lambda: torch.quantize_per_tensor(ONE - 0.3, 0.1, 3, torch.qint8),
    "enum": lambda: Color.RED,
    "other enum": lambda: Color.BLUE,
    "date": lambda: datetime.date(2020, 1, 2),
    "decimal": lambda: Decimal("1.0"),
    "path": lambda: PurePosixPath("x"),
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "class": lambda: Pair,
    "function": lambda: fingerprint,
    "image": lambda: Image([[1]]),
    "other image": lambda: Image([[2]]),
    "palette": lambda: Image([[1]], "P"),
    "array": lambda: np.array([1.0, 2.0]),
    "other array": lambda: np.array([1.0, 3.0]),
    "float32": lambda: np.array([1, 2], dtype=np.float32),
    "other bytes": lambda: np.array([1, 2], dtype=">f4"),
    "scalar": lambda: np.float64(1),
    "texts": lambda: np.array(["ab", "c"]),
    "objects": lambda: np.array(["ab", [1]], dtype=object),
    "other objects": lambda: np.array(["ab", [2]], dtype=object),
    "records": lambda: np.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f8")]),
    "days": lambda: np.array(["2020-01-02"], dtype="datetime64[D]"),
    "tensor": lambda: ONE.clone(),
    "bfloat16": lambda: ONE.bfloat16(),
    "float8": lambda: ONE.to(torch.float8_e4m3fn),
    "bool": lambda: ONE.bool(),
    "complex tensor": lambda: ONE * 1j,
    "conjugate": lambda: (ONE * 1j).conj(),
    "row": lambda: ONE[None],
    "scalar tensor": lambda: ONE[0],
    "empty tensor": lambda: ONE[:0],
    "meta": lambda: ONE.to("meta"),
    "other meta": lambda: ONE[None].to("meta"),
    "coo": lambda: ONE.to_sparse(),
    "other coo": lambda: (2 * ONE).to_sparse(),
    "csr": lambda: ONE[None].to_sparse_csr(),
    "csc": lambda: ONE[None].to_sparse_csc(),
    "bsr": lambda: torch.eye(2).to_sparse_bsr((1, 1)),
    "quantized": quantized,
    "other scale": lambda: quantized(0.2),
    "by channel": lambda: by_channel(0.1),
    "other channel": lambda: by_channel(0.2),
    "jagged": lambda: torch.nested.nested_tensor([ONE, ONE[:1]], layout=torch.jagged),
    "ragged": lambda: torch.nested.nested_tensor([ONE, ONE[:1]], layout=torch.strided),
    "other ragged": lambda: torch.nested.nested_tensor([ONE[:1], ONE], layout=torch.strided),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@for_each("depth", ["batch", "entry", "deep"])
def test_every_value_has_a_fingerprint_of_its_own(depth):
    at = {"batch": lambda x: x, "entry": lambda x: {"x": x}, "deep": lambda x: {"x": [{"y": (0, x)}]}}[depth]
    found = {name: fingerprint([at(make())]) for name, make in VALUES.items()}
    assert found == {name: fingerprint([at(make())]) for name, make in VALUES.items()}
    of_each: dict[str, list[str]] = {}
    for name, digest in found.items():
        of_each.setdefault(digest, []).append(name)
    assert [names for names in of_each.values() if len(names) > 1] == []


@for_each(
    ("one", "other"),
    [
        ([ONE, ONE], (ONE, ONE)),
        (deque(["a"]), ["a"]),
        (range(2), [0, 1]),
        ({"x": ONE, "y": "a"}, OrderedDict(x=ONE, y="a")),
        ({"x": ONE, "y": "a"}, BatchEncoding({"x": ONE, "y": "a"})),
        ({"x": ONE}, UserDict({"x": ONE})),
        ({"x": {"y": [ONE]}}, UserDict(x=UserDict(y=(ONE,)))),
        ({"a", "b", "c"}, frozenset("cba")),
        ({"x": torch.ones(2, 3).T}, {"x": torch.ones(3, 2)}),
        ({"x": torch.ones(1).expand(3)}, {"x": torch.ones(3)}),
        ({"x": torch.from_numpy(np.zeros(0))}, {"x": torch.zeros(0, dtype=torch.float64)}),
        ({"x": torch.as_strided(torch.ones(1), (1,), (0,))}, {"x": torch.ones(1)}),
        ({"x": nn.Parameter(ONE)}, {"x": ONE}),
        ({"x": np.ones((2, 3)).T, "y": 1}, {"x": np.ones((3, 2)), "y": 1}),
        (
            torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (2,)),
            torch.sparse_coo_tensor([[0]], [3.0], (2,)),
        ),
    ],
)
def test_what_is_the_same_data(one, other):
    assert fingerprint([one]) == fingerprint([other])


class TestBatches:
    @for_each(
        ("one", "other"),
        [
            ([{"x": ONE, "y": ONE}], [{"x": ONE}, {"y": ONE}]),
            ([{"x": ONE}, {}], [{"x": ONE}]),
            ([{}], []),
            ([{"x": ONE}, {"x": ONE, "y": "a"}], [{"x": ONE}, {"x": ONE}]),
            ([{"x": ONE}, {"y": ONE}, {"x": ONE}], [{"x": ONE, "y": ONE}, {"x": ONE}]),
            ([[ONE], [ONE]], [[ONE, ONE]]),
            ([ONE], [[ONE]]),
            ([[ONE]], [{"0": ONE}]),
            ([{"x (2,) torch.float32;": ONE}], [{"x": ONE}]),
        ],
    )
    def test_where_one_ends_counts(self, one, other):
        assert fingerprint(one) != fingerprint(other)

    def test_published_records_of_dense_tensors_stay_as_they_are(self):
        batches = [{"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([row])} for row in range(2)]
        digest = hashlib.sha256()
        for row in range(2):
            digest.update(b"input_ids (1, 2) torch.int64;" + struct.pack("<qq", 1, 2))
            digest.update(b"labels (1,) torch.int64;" + struct.pack("<q", row))
        assert fingerprint(batches) == digest.hexdigest()

    @for_each("batch", [{"x": ONE, "y": ONE}, {"x": ONE, "y": "a"}, [ONE, "a"], ONE, "a", {}, Named(ONE, 1)])
    def test_marks_tell_where_batches_differ(self, batch):
        found, other = Fingerprint(), Fingerprint()
        marks = list(found.marks(batch))
        other.add(batch)
        assert found.hexdigest() == other.hexdigest() == fingerprint([batch])
        assert len({mark for _, mark in marks}) >= len(marks) - 1

    def test_what_is_in_itself(self):
        batch: dict[str, object] = {"x": 1}
        batch["self"] = batch
        assert fingerprint([batch]) == fingerprint([batch]) != fingerprint([{"x": 1, "self": {"x": 1}}])

    def test_the_class_stands_for_what_cannot_be_seen(self):
        assert fingerprint([{"x": threading.Lock()}]) == fingerprint([{"x": threading.Lock()}])
        assert fingerprint([{"x": threading.Lock()}]) != fingerprint([{"x": object()}])

    def test_attributes_come_in_any_order(self):
        one, other = SimpleNamespace(x=1, y=2), SimpleNamespace(y=2, x=1)
        assert fingerprint([one]) == fingerprint([other]) != fingerprint([SimpleNamespace(x=2, y=1)])

    def test_fields_that_are_not_set(self):
        kind = make_dataclass("Kind", ["x"])
        value = kind(1)
        del value.x
        assert fingerprint([value]) != fingerprint([kind(1)])


VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(VALUE, max_size=3), st.lists(VALUE, max_size=3))
def test_two_are_alike_only_if_they_are_the_same(one, other):
    """`repr` tells 1 from True and 0.0 from -0.0, as `==` does not."""
    assert fingerprint(copy.deepcopy(one)) == fingerprint(one)
    assert (fingerprint(one) == fingerprint(other)) == (repr(one) == repr(other))


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
class TestWeights:
    def test_of_every_layout(self):
        class Holder(nn.Module):
            def __init__(self, **buffers):
                super().__init__()
                for name, buffer in buffers.items():
                    self.register_buffer(name, buffer)

        values = [ONE, ONE.to_sparse(), (2 * ONE).to_sparse(), quantized(), quantized(0.2), ONE.to("meta")]
        assert len({fingerprint_of_weights(Holder(x=value)) for value in values}) == len(values)

    def test_published_records_stay_as_they_are(self):
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, 2.0)
        nn.init.constant_(model.bias, 3.0)
        content = b"weight (1, 1) torch.float32;" + struct.pack("<f", 2) + b"bias (1,) torch.float32;"
        assert fingerprint_of_weights(model) == hashlib.sha256(content + struct.pack("<f", 3)).hexdigest()


def test_a_text_is_never_the_dense_tensors_that_read_like_it():
    text = "n (1,) torch.uint8;A"
    tensors = {f"text:{len(text)};n": torch.tensor([ord("A")], dtype=torch.uint8)}
    assert fingerprint([text]) != fingerprint([tensors])


def test_what_is_kept_beside_the_fields_of_a_dataclass_is_none_of_them():
    noted = Pair(1)
    noted.kept = "since it was asked for"
    assert fingerprint([noted]) == fingerprint([Pair(1)])
