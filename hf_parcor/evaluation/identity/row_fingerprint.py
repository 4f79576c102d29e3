"""Fingerprints of the rows of data, whatever batches they come in and however these are padded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.evaluation.identity.fingerprint import fingerprint, is_mapping_of_dense_tensors
from hf_parcor.evaluation.outputs import ForMetrics, inputs_and_rest
from hf_parcor.functional.vectors import bytes_of
from hf_parcor.records import OF_ROWS

Spans: TypeAlias = Sequence[tuple[int, int]]  # of each row: where its content begins, and where it has ended

_MASK, _DECODER_MASK, _POSITIONS = "attention_mask", "decoder_attention_mask", "position_ids"
_LABELS = ("labels", "shift_labels")
_OF_DECODER = "decoder_"


def data_fingerprint(batches: Iterable[Any]) -> str:
    """Return what records keep of data: the fingerprint of its rows, or, where they cannot be told apart, of batches.

    The same rows in the same order have the same one in batches of any size, padded at either side to any length. What
    is padding is known by `attention_mask` and `decoder_attention_mask`, and of labels by −100; where a batch has
    neither, all in it is content.

    Rows can be told apart where every batch is a mapping of dense tensors with one first dimension, beside lists of as
    many `ForMetrics`, and none is packed: `position_ids` that begin again within a row say that it is several.

    Args:
        batches: Such as a list, or a `DataLoader` that does not shuffle; it is walked through twice at most.

    Examples:
        >>> ids, mask = torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> together = [{"input_ids": ids, "attention_mask": mask}]
        >>> apart = [
        ...     {"input_ids": ids[:1, :2], "attention_mask": mask[:1, :2]},
        ...     {"input_ids": ids[1:], "attention_mask": mask[1:]},
        ... ]
        >>> data_fingerprint(together) == data_fingerprint(apart)
        True
        >>> data_fingerprint(together) == data_fingerprint(apart[::-1])
        False
    """
    rows = RowFingerprint()
    for batch in batches:
        rows.add(batch)
    return rows.text() or fingerprint(batches)


def is_data(batches: Iterable[Any], kept: str) -> bool:
    """Return whether batches are the data of which a record keeps this, those of earlier versions as well.

    Args:
        batches: As in `data_fingerprint`.
        kept: What a record keeps of its data.
    """
    return (data_fingerprint(batches) if kept.startswith(OF_ROWS) else fingerprint(batches)) == kept


class RowFingerprint:
    """The fingerprint of the rows of batches that come one after the other.

    Examples:
        >>> rows = RowFingerprint()
        >>> rows.add({"x": torch.ones(2)})
        >>> rows.text() == data_fingerprint([{"x": torch.ones(1)}, {"x": torch.ones(1)}])
        True
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._told_apart = True

    def add(self, batch: Any) -> None:
        """Take the next batch in."""
        inputs, beside = inputs_and_rest(batch)
        tensors = _by_row(inputs, beside) if self._told_apart else None
        if tensors is None:
            self._told_apart = False
            return
        attended = _attended(tensors, _MASK, "input_ids")
        if _is_packed(tensors, attended):
            self._told_apart = False
            return
        spans = {name: _spans(name, tensors, attended) for name in tensors}
        for row in range(len(next(iter(tensors.values())))):
            self._digest.update(f"row {len(tensors)};".encode())
            for name, tensor in tensors.items():
                axis, of_rows, offsets = spans[name]
                content = tensor[row]
                if of_rows is not None:
                    begin, end = of_rows[row]
                    content = content.narrow(axis - 1, begin, end - begin)
                offset = 0 if offsets is None else offsets[row]
                self._digest.update(f"{name} {tuple(content.shape)} {content.dtype} {offset};".encode())
                self._digest.update(bytes_of(content))
            for name in sorted(beside):
                self._digest.update(f"{name} {fingerprint([beside[name][row]])};".encode())

    def text(self) -> str:
        """Return the SHA-256 of all rows until now, marked as one of rows; "" where they cannot be told apart."""
        return f"{OF_ROWS}{self._digest.hexdigest()}" if self._told_apart else ""


def _by_row(inputs: Any, beside: Mapping[str, Sequence[ForMetrics]]) -> dict[str, Tensor] | None:
    """Return the tensors of a batch by name, in alphabetical order; None where they have no common first dimension.

    Args:
        inputs: What a model takes.
        beside: What metrics read, which has to have as many entries.
    """
    if not is_mapping_of_dense_tensors(inputs):
        return None
    tensors = {name: inputs[name].detach().cpu() for name in sorted(inputs)}
    counts = {len(tensor) if tensor.dim() else None for tensor in tensors.values()}
    counts |= set(map(len, beside.values()))
    return tensors if len(counts) == 1 and None not in counts else None


def _attended(tensors: Mapping[str, Tensor], name: str, of: str) -> tuple[Tensor, Spans] | None:
    """Return a mask of tokens with the span of each row that it leaves; None where there is no such mask."""
    mask = tensors.get(name)
    if mask is None or mask.dim() < 2 or (mask.dim() > 2 and (of not in tensors or tensors[of].shape != mask.shape)):
        return None
    length = mask.size(-1)
    seen = mask != 0
    found = _ends(seen.flatten(1, -2).any(dim=1) if seen.dim() > 2 else seen)
    return mask, [(begin, end) if end else (0, length) for begin, end in found]


def _is_packed(tensors: Mapping[str, Tensor], attended: tuple[Tensor, Spans] | None) -> bool:
    """Return whether positions begin again within what a row attends to."""
    positions = tensors.get(_POSITIONS)
    if positions is None or positions.dim() != 2:
        return False
    spans: Spans = [(0, positions.size(1))] * len(positions)
    if attended is not None and attended[0].shape == positions.shape:
        spans = attended[1]
    return any(bool((row[begin:end].diff() < 0).any()) for row, (begin, end) in zip(positions, spans, strict=True))


def _spans(
    name: str, tensors: Mapping[str, Tensor], attended: tuple[Tensor, Spans] | None
) -> tuple[int, Spans | None, Sequence[int] | None]:
    """Return along which dimension each row's content lies, where, and how far from the first token it begins.

    Lengths alone do not say what belongs together: sources and targets of one batch may be of the same length by
    chance. So names count as well.
    """
    tensor = tensors[name]
    if name in _LABELS:
        counted = _counted(tensor)
        if counted is None:
            return 0, None, None
        begins = [0] * len(tensor)
        if attended is not None and attended[0].shape == tensor.shape:
            begins = [begin for begin, _ in attended[1]]
        return 1, counted, [max(0, first - begin) for (first, _), begin in zip(counted, begins, strict=True)]
    if name.startswith(_OF_DECODER):
        attended = _attended(tensors, _DECODER_MASK, "decoder_input_ids")
        if attended is None:
            return _until_the_last_label(tensor, tensors)
    if attended is None or tensor.shape[: attended[0].dim()] != attended[0].shape:
        return 0, None, None
    return attended[0].dim() - 1, attended[1], None


def _until_the_last_label(tensor: Tensor, tensors: Mapping[str, Tensor]) -> tuple[int, Spans | None, None]:
    """Return the spans of a decoder's inputs without a mask: no input after the last label tells on any label."""
    labels = next((tensors[name] for name in _LABELS if name in tensors), None)
    counted = None if labels is None else _counted(labels)
    if labels is None or counted is None or tensor.shape[:2] != labels.shape:
        return 0, None, None
    return 1, [(0, end) for _, end in counted], None


def _counted(labels: Tensor) -> Spans | None:
    """Return the span of each row from its first label that counts to its last; None for labels without padding."""
    if labels.dim() != 2 or labels.is_floating_point():
        return None
    return _ends(labels != IGNORED_LABEL)


def _ends(counted: Tensor) -> Spans:
    """Return where the first of each row is true and the place after the last; (0, 0) where none is."""
    length = counted.size(1)
    if not counted.numel():
        return [(0, 0)] * len(counted)
    places = torch.arange(length, device=counted.device)
    first = torch.where(counted, places, length).amin(dim=1)
    end = torch.where(counted, places + 1, 0).amax(dim=1)
    return [(min(one, other), other) for one, other in zip(first.tolist(), end.tolist(), strict=True)]
