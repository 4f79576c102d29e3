"""Fingerprints of data and of weights, so that records say what was measured, and on what."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import hashlib
import re
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_parcor.distributed.dtensors import local_part, whole
from hf_parcor.evaluation.placement.reach import plain_parts
from hf_parcor.evaluation.placement.weights import weights_of
from hf_parcor.functional.vectors import bytes_of

TOLD_BY_THEIR_TEXT = (
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID, PurePath, re.Pattern),
    *(torch.dtype, torch.device, torch.layout, np.dtype),
)
_KNOWN_BY_NAME = (type, FunctionType, BuiltinFunctionType, MethodType)


def fingerprint(batches: Iterable[Any]) -> str:
    """Return the SHA-256 of all that is in all batches, at every depth and in order.

    Tensors of every layout and dtype, arrays, images, texts, bytes, numbers, dates and None count by type, shape and
    value; mappings, sequences, sets and dataclasses by what is in them, and by the order where they have one. A list
    is as good as a tuple, and a `BatchEncoding` as a dict, since loaders and collators make one of the other. Of any
    other object its class and its attributes count. What has neither attributes nor one of these types (a lock, a
    generator) cannot be seen: the name of its class stands for it, as that of a function does; and of tensors that
    have no data (on the meta device) their shapes and dtypes.

    Batches that are mappings of dense tensors, with the same names in each, have the fingerprint that published
    records of earlier versions have. Later records have that of the rows, see `data_fingerprint`.

    Examples:
        >>> first = fingerprint([{"input_ids": torch.tensor([1, 2])}])
        >>> first == fingerprint([{"input_ids": torch.tensor([2, 1])}])
        False
        >>> len(first)
        64
        >>> fingerprint([{"texts": ["ab", "c"]}]) == fingerprint([{"texts": ["a", "bc"]}])
        False
    """
    found = Fingerprint()
    for batch in batches:
        found.add(batch)
    return found.hexdigest()


class Fingerprint:
    """The fingerprint of batches that come one after the other.

    Examples:
        >>> found = Fingerprint()
        >>> found.add({"x": torch.ones(2)})
        >>> found.hexdigest() == fingerprint([{"x": torch.ones(2)}])
        True
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._count = 0
        self._names: list[str] | None = None  # of batches of dense tensors, as long as there are no others

    def add(self, batch: Any) -> None:
        """Take the next batch in."""
        for _ in self.marks(batch):
            pass

    def marks(self, batch: Any) -> Iterable[tuple[str, bytes]]:
        """Take the next batch in, and yield the name of each entry with a mark of all that came until its end."""
        dense = is_mapping_of_dense_tensors(batch)
        names = list(batch) if dense else []
        if self._count == 0 and dense:
            self._names = names
        elif self._count == 0 or (self._names is not None and names != self._names):
            # What came before is one word of the general form, which no mapping of tensors begins with.
            before = self._digest.digest()
            self._digest = hashlib.sha256(b"hf_parcor;")
            _put(self._digest, "dense", f"{self._count} {before.hex()}".encode())
            self._names = None
        self._count += 1
        if self._names is not None:
            for name, tensor in batch.items():
                _update(self._digest, name, tensor)
                yield name, self._digest.copy().digest()
            return
        path: list[int] = []
        if isinstance(batch, Mapping):
            _put(self._digest, "mapping", str(len(batch)).encode())
            for key, value in batch.items():
                _feed(self._digest, key, path)
                _feed(self._digest, value, path)
                yield str(key), self._digest.copy().digest()
        elif type(batch) in (list, tuple):
            _put(self._digest, "sequence", str(len(batch)).encode())
            for index, value in enumerate(batch):
                _feed(self._digest, value, path)
                yield str(index), self._digest.copy().digest()
        else:
            _feed(self._digest, batch, path)
        yield "", self._digest.copy().digest()

    def hexdigest(self) -> str:
        """Return the SHA-256 of all batches until now."""
        return self._digest.hexdigest()


def fingerprint_of_weights(model: nn.Module, *, gather: bool = True) -> str:
    """Return the SHA-256 of all parameters, buffers and packed weights: names, shapes, dtypes and bytes, in order.

    It is the same wherever the weights are: those that Accelerate has offloaded, to the CPU or the disk, are read from
    there, one at a time, and count once where a Transformers model ties them. Of weights on the meta device that no
    hook of Accelerate has the values of, only names, shapes and dtypes count.

    Args:
        model: Any model.
        gather: Gather shards tensor by tensor, for which all processes must call this; else hash this process's.

    Raises:
        OSError: A file of offloaded weights is gone.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> before = fingerprint_of_weights(model)
        >>> _ = nn.init.constant_(model.bias, 3.0)
        >>> fingerprint_of_weights(model) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in weights_of(model):
        held = whole(tensor.detach()) if gather else local_part(tensor.detach())
        if _is_dense(held) and not plain_parts(held):  # a class of its own that does not say what it is made of
            digest.update(f"{name} {tuple(held.shape)} {held.dtype};".encode())
        else:
            _update(digest, name, held)
        del tensor, held  # before the next one is read
    return digest.hexdigest()


def is_mapping_of_dense_tensors(batch: Any) -> bool:
    """Return whether a batch is one whose names, shapes and bytes, one after the other, can be read in one way."""
    return (
        isinstance(batch, Mapping)
        and bool(batch)
        and all(isinstance(name, str) and " " not in name for name in batch)
        and all(isinstance(value, Tensor) and _is_dense(value) for value in batch.values())
    )


def _is_dense(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
        and not hasattr(tensor, "__tensor_flatten__")  # a subclass that is made of other tensors
    )


def _update(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
    if _is_dense(tensor):
        digest.update(bytes_of(tensor))
    else:
        _feed_tensor(digest, tensor, [])


def _put(digest: hashlib._Hash, tag: str, content: bytes = b"") -> None:
    """Add one word: what it is, how long it is, and itself, so that no two lists of words are alike."""
    digest.update(f"{tag}:{len(content)};".encode())
    digest.update(content)


def _feed(digest: hashlib._Hash, value: Any, path: list[int]) -> None:
    """Add a value at any depth; `path` has the containers that it is in, since a container may hold itself."""
    if isinstance(value, Tensor):
        _feed_tensor(digest, value, path)
    elif isinstance(value, (np.ndarray, np.generic)):
        _feed_array(digest, np.asarray(value), path)
    elif isinstance(value, enum.Enum):
        _put(digest, "enum", f"{_name(type(value))} {value.name}".encode())
    elif value is None or isinstance(value, bool):
        _put(digest, "constant", str(value).encode())
    elif isinstance(value, int):
        _put(digest, "int", f"{value:x}".encode())
    elif isinstance(value, float):
        _put(digest, "float", struct.pack(">d", value))
    elif isinstance(value, complex):
        _put(digest, "complex", struct.pack(">dd", value.real, value.imag))
    elif isinstance(value, str):
        _put(digest, "text", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _put(digest, "bytes", bytes(value))
    elif isinstance(value, TOLD_BY_THEIR_TEXT):
        _put(digest, "object", f"{_name(type(value))} {value}".encode())
    elif isinstance(value, _KNOWN_BY_NAME):
        _put(digest, "named", _name(value).encode())
    elif isinstance(value, ModuleType):
        _put(digest, "named", value.__name__.encode())
    elif id(value) in path:
        _put(digest, "again", str(len(path) - path.index(id(value))).encode())
    else:
        _feed_container(digest, value, [*path, id(value)])


def _feed_container(digest: hashlib._Hash, value: Any, path: list[int]) -> None:
    if isinstance(value, Mapping):
        _put(digest, "mapping", str(len(value)).encode())
        for key, entry in value.items():
            _feed(digest, key, path)
            _feed(digest, entry, path)
    elif isinstance(value, Sequence):
        fields = getattr(value, "_fields", ())  # of a named tuple
        _put(digest, "sequence", " ".join([str(len(value)), *map(str, fields)]).encode())
        for entry in value:
            _feed(digest, entry, path)
    elif isinstance(value, Set):
        members = []
        for entry in value:
            member = hashlib.sha256()
            _feed(member, entry, path)
            members.append(member.digest())
        _put(digest, "set", b"".join(sorted(members)))
    elif hasattr(value, "__array_interface__") or hasattr(value, "__array__"):  # images, arrays of other libraries
        _put(digest, "object", f"{_name(type(value))} {getattr(value, 'mode', '')}".encode())
        _feed_array(digest, np.asarray(value), path)
    else:
        attributes = _attributes(value)
        _put(digest, "object", f"{len(attributes)} {_name(type(value))}".encode())
        for name, entry in attributes.items():
            _feed(digest, name, path)
            _feed(digest, entry, path)


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object: the fields of a dataclass in their order, others by name."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    found = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
    return dict(sorted(found.items()))


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if name not in ("__dict__",))


def _feed_array(digest: hashlib._Hash, array: np.ndarray[Any, Any], path: list[int]) -> None:
    _put(digest, "array", f"{array.dtype if array.dtype.names else array.dtype.str} {array.shape}".encode())
    if array.dtype.hasobject:
        for entry in array.reshape(-1).tolist():
            _feed(digest, entry, path)
    else:
        _put(digest, "bytes", array.tobytes())


def _feed_tensor(digest: hashlib._Hash, tensor: Tensor, path: list[int]) -> None:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = local_part(tensor)
    parts: list[Any] = []
    if tensor.is_nested:
        parts = list(tensor.unbind())
    elif tensor.is_meta:
        pass
    elif tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        parts = [tensor.indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    elif tensor.layout is not torch.strided:
        parts = [tensor.to_dense()]
    elif tensor.is_quantized:
        parts = [tensor.int_repr(), str(tensor.qscheme()), *_quantizer(tensor)]
    elif hasattr(tensor, "__tensor_flatten__"):
        subclass: Any = tensor
        names, context = subclass.__tensor_flatten__()
        parts = [_name(type(tensor)), context, *({name: getattr(tensor, name)} for name in names)]
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)
    device = "meta" if tensor.is_meta else ""
    _put(digest, "tensor", f"{tensor.layout} {shape} {tensor.dtype} {device} {len(parts)}".encode())
    if _is_dense(tensor):
        digest.update(bytes_of(tensor))
    for part in parts:
        _feed(digest, part, path)


def _quantizer(tensor: Tensor) -> list[Any]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.q_scale(), tensor.q_zero_point()]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
