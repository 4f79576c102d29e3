"""Rows have one fingerprint however they are put into batches and padded, and other rows have another."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from for_each import for_each

from hf_parcor.evaluation.identity.fingerprint import fingerprint
from hf_parcor.evaluation.identity.row_fingerprint import data_fingerprint, is_data
from hf_parcor.records import OF_ROWS

PAD = 7  # a token like others, so that nothing but a mask tells it apart
FILL = {"labels": -100, "attention_mask": 0, "decoder_attention_mask": 0, "input_ids": PAD, "decoder_input_ids": PAD}


def drawn(seed, *, decoder=False, choices=False, tokens=False, images=False):
    """Return rows as mappings of lists, of 1 to 6 tokens each."""
    draw, rows = random.Random(seed), []
    for _ in range(7):
        length = draw.randint(2, 6)
        row = {"input_ids": [draw.randint(0, 9) for _ in range(length)]}
        if tokens:  # some of a prompt, which do not count
            row["labels"] = [-100 if draw.random() < 0.4 else draw.randint(0, 3) for _ in range(length - 1)] + [1]
        elif decoder:
            target = [draw.randint(0, 9) for _ in range(draw.randint(1, 6))]
            row |= {"labels": target, "decoder_input_ids": [0, *target[:-1]]}
        else:
            row["labels"] = draw.randint(0, 1)
        if choices:
            row["input_ids"] = [[draw.randint(0, 9) for _ in range(draw.randint(1, length))] for _ in range(2)]
        if images:
            row |= {"pixel_values": [[draw.random()] * 2] * 2}
        rows.append(row)
    return rows


def padded(values, name, length, side):
    room = [FILL.get(name, 0)] * (length - len(values))
    return room + values if side == "left" else values + room


def tensor_of(name, entries, more, side):
    """Return the entries of some rows as one tensor, padded to the longest and so many places more."""
    if not isinstance(entries[0], list) or name == "pixel_values":
        return torch.tensor(entries)
    nested = isinstance(entries[0][0], list)
    flat = [choice for entry in entries for choice in entry] if nested else entries
    length = max(map(len, flat)) + more
    found = torch.tensor([padded(entry, name, length, side) for entry in flat])
    return found.reshape(len(entries), -1, length) if nested else found


def ones_like(entry):
    return [ones_like(part) for part in entry] if isinstance(entry, list) else 1


def batches_of(rows, sizes, more=0, side="right", *, mask=True):
    found, rows = [], list(rows)
    while rows:
        size = sizes[len(found) % len(sizes)]
        some, rows = rows[:size], rows[size:]
        entries = {name: [row[name] for row in some] for name in some[0]}
        if mask:
            entries["attention_mask"] = [ones_like(row["input_ids"]) for row in some]
        found.append({name: tensor_of(name, values, more, side) for name, values in entries.items()})
    return found


KINDS = {
    "classes": {},
    "tokens": {"tokens": True},
    "targets": {"decoder": True},
    "choices": {"choices": True},
    "images": {"images": True},
}
BOTH_SIDES = ("classes", "tokens")


@for_each("kind", KINDS)
@for_each("seed", range(3))
def test_neither_batches_nor_padding_count(kind, seed):
    rows = drawn(seed, **KINDS[kind])
    expected = data_fingerprint(batches_of(rows, [1]))
    assert expected.startswith(OF_ROWS)
    for side in ["right", "left"] if kind in BOTH_SIDES else ["right"]:
        for sizes in ([2], [3, 1], [7]):
            for more in (0, 1, 4):
                assert data_fingerprint(batches_of(rows, sizes, more, side)) == expected, (side, sizes, more)
    names = [dict(reversed(batch.items())) for batch in batches_of(rows, [3])]
    assert data_fingerprint(names) == expected


def changed(rows):
    """Yield the rows with each number another, each row gone, and every two rows or labels swapped."""
    for place, row in enumerate(rows):
        yield rows[:place] + rows[place + 1 :]
        for name, value in row.items():
            for path in _paths(value):
                other = copy.deepcopy(rows)
                holder, last = other[place], name
                for step in path:
                    holder, last = holder[last], step
                holder[last] += 1 if holder[last] != -100 else 101
                yield other
        for second in range(place):
            other = list(rows)
            other[place], other[second] = other[second], other[place]
            yield other
            other = copy.deepcopy(rows)
            other[place]["labels"], other[second]["labels"] = other[second]["labels"], other[place]["labels"]
            yield other


def _paths(value):
    if not isinstance(value, list):
        yield ()
        return
    for place, part in enumerate(value):
        yield from ((place, *path) for path in _paths(part))


@for_each("kind", [kind for kind in KINDS if kind != "tokens"])
def test_every_other_row_has_another(kind):
    """Compared with the rows themselves, written as Python writes them."""
    rows = drawn(4, **KINDS[kind])
    found = {repr(other): data_fingerprint(batches_of(other, [3], 1)) for other in [rows, *changed(rows)]}
    assert len(set(found.values())) == len(found) > 50


def test_where_labels_lie_counts():
    """A prompt that is not counted is no padding."""
    places = [[5, 5, -100, -100], [-100, 5, 5, -100], [-100, -100, 5, 5], [5, -100, 5, -100], [-100] * 4]
    rows = [[{"input_ids": [1, 2, 3, 4], "labels": labels}] for labels in places]
    for side in ("left", "right"):
        assert len({data_fingerprint(batches_of(row, [1], 3, side)) for row in rows}) == len(places)


def test_tokens_within_a_row_that_are_masked_are_no_padding():
    masks = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]]
    ids = [[1, 2, 3, 4], [1, 3, 2, 4]]
    found = {
        data_fingerprint([{"input_ids": torch.tensor([row]), "attention_mask": torch.tensor([mask])}])
        for row in ids
        for mask in masks
    }
    assert len(found) == len(masks) * len(ids)


def test_shapes_types_and_names_count():
    ids = torch.tensor([[1, 2], [3, 4]])
    others = [{"x": ids}, {"y": ids}, {"x": ids.int()}, {"x": ids.reshape(2, 1, 2)}, {"x": ids, "y": ids}]
    others += [{"x": ids.reshape(4)}, {"x": ids.reshape(1, 4)}]
    assert len({data_fingerprint([batch]) for batch in others}) == len(others)


def test_of_a_regression_every_number_is_a_label():
    labels = torch.tensor([[-100.0, 1.0], [1.0, -100.0]])
    assert data_fingerprint([{"labels": labels}]) != data_fingerprint([{"labels": labels[:, :1]}])


ONE = torch.ones(2, 3)
PACKED = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}


@for_each(
    "batch",
    [
        (ONE, ONE),
        ONE,
        {"x": ONE, "texts": ["a", "b"]},
        {"x": ONE, "length": torch.tensor(3)},
        {"x": ONE, "cu_seq_lens_q": torch.tensor([0, 1, 2])},
        {"labels": [{"boxes": ONE}], "pixel_values": ONE},
        PACKED,
        {},
    ],
)
@for_each("before", [0, 1])
def test_where_rows_cannot_be_told_apart_batches_count(batch, before):
    batches = [{"x": ONE}] * before + [batch]
    assert data_fingerprint(batches) == fingerprint(batches)
    assert is_data(batches, fingerprint(batches))


def test_positions_that_padding_begins_with_are_not_packed():
    left = {
        "input_ids": torch.tensor([[7, 7, 1, 2]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1]]),
        "position_ids": torch.tensor([[1, 1, 0, 1]]),
    }
    right = {
        "input_ids": torch.tensor([[1, 2, 7]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 0]]),
    }
    assert data_fingerprint([left]) == data_fingerprint([right]) != fingerprint([right])


def test_what_earlier_records_keep_is_known_again():
    batches = batches_of(drawn(0), [2])
    for kept in (fingerprint(batches), data_fingerprint(batches)):
        assert is_data(batches, kept)
        assert not is_data(batches[1:], kept)
    assert is_data(batches_of(drawn(0), [3], 2), data_fingerprint(batches))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_count():
    batches = batches_of(drawn(0), [2])
    moved = [{name: tensor.cuda() for name, tensor in batch.items()} for batch in batches]
    assert data_fingerprint(moved) == data_fingerprint(batches)
