"""Which weights of a target can be corrupted, and how many cannot: quantized, packed, most offloaded ones.

A corruption is written into plain floating-point memory. Weights that lie elsewhere are weights all the same, so they
are found, counted and said, and never left out in silence: a model that is measured with a fifth of its weights
corrupted looks five times as robust as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from hf_parcor.evaluation.placement.device_map import kept_in_memory
from hf_parcor.injection import obstacle
from hf_parcor.targets import GROUPINGS, Selector, TargetError, sinusoidal_tables

logger = logging.get_logger(__name__)

_IN_MEMORY = "offloaded to main memory, which noise, quantization and flips reach, and no corruption along a gradient"
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Selection:
    """What a target stands for.

    Attributes:
        parameters: Its parameters that can be corrupted, by name, in the order of the model.
        notes: A sentence on those that cannot, if there are any.
    """

    parameters: dict[str, nn.Parameter]
    notes: tuple[str, ...] = ()


class OutOfReachError(TargetError):
    """All weights of a target are out of reach; `described` says how many, and why."""

    def __init__(self, asked: str, described: str) -> None:
        self.described = described
        super().__init__(
            f"target_modules: expected weights that can be corrupted, got {asked}, of which {described}; name other "
            "modules, or load the model in float32 or bfloat16, without quantization and offloading"
        )


def target_of(target_modules: Any, exclude_modules: Any, module_types: Any, layers: Any) -> dict[str, Any]:
    """Return what `Reach.select` takes by name, to be used more than once: an iterator of layers becomes a list."""
    return {
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "module_types": module_types,
        "layers": list(layers) if isinstance(layers, Iterator) else layers,
    }


class Reach:
    """The weights of a model, including those that are not parameters, and which of them can be corrupted.

    These weights cannot be corrupted: parameters that are not floating-point numbers of 16 bits or more (bitsandbytes,
    fp8), parameters of a class of their own (torchao and others), parameters on the meta device (offloaded by
    Accelerate; what it keeps in main memory has no gradient, but can be written there), and weights that are not
    parameters: packed ones (`torch.ao.quantization`), and buffers of small integers in modules without a
    floating-point weight (GPTQ, AWQ).

    Args:
        model: Any model; it is not changed.
        gradients: Whether corruptions may need gradients. Default True. If False, weights offloaded to main memory can
            be corrupted too, and are selected as parameters in that memory (see `kept_in_memory`).
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True) -> None:
        self._unreachable: dict[Tensor, tuple[str, int, str]] = {}  # why, how many weights, the module's name
        in_memory = kept_in_memory(model)
        self._elsewhere = {} if gradients else in_memory

        def why(parameter: nn.Parameter) -> str | None:
            if parameter in in_memory:
                return _IN_MEMORY if gradients else None
            return _why(parameter)

        hidden = {module: list(_hidden_weights(module)) for module in model.modules()}
        self.model = _view(model, hidden) if any(hidden.values()) else model
        """The model or, where weights are no parameters, a view of it in which they stand as parameters."""
        self._selector = Selector(self.model)
        for name, module in self.model.named_modules():
            found = [(part, reason) for part in module.parameters(recurse=False) if (reason := why(part)) is not None]
            for parameter, reason in found:
                count = _count(module, parameter, [part for part, _ in found])
                self._unreachable.setdefault(parameter, (reason, count, name))

    def select(self, target_modules: Any = None, **selection: Any) -> Selection:
        """Select parameters as `select_trainable` does, without those that are out of reach; these are counted.

        Where no target is named, weights that cannot be trained as they are count too, unless other parameters are
        frozen: then it was decided what belongs to the target, as with an adapter on a quantized model. How many
        frozen ones are left out is said.

        Args:
            target_modules: As in `select_trainable`.
            **selection: As in `select_trainable`.

        Raises:
            TargetError: Something finds nothing, or nothing is left.
            OutOfReachError: All that is left is out of reach. A `TargetError`.
        """
        chosen = self._selector.select_trainable(target_modules, **selection)
        notes = self._left_frozen(chosen, selection) if target_modules is None else ()
        if not self._unreachable:
            return self._selection(chosen, notes)
        if target_modules is None and not self._has_frozen():
            everything = self._selector.select("all", **selection)
            chosen = {
                name: parameter
                for name, parameter in everything.items()
                if name in chosen or parameter in self._unreachable
            }
        inside = {name: parameter for name, parameter in chosen.items() if parameter not in self._unreachable}
        outside = [parameter for parameter in chosen.values() if parameter in self._unreachable]
        if not inside:
            asked = "all weights" if target_modules is None else repr(target_modules)
            raise OutOfReachError(asked, self._described(outside))
        if not outside:
            return self._selection(inside, notes)
        within = sum(parameter.numel() for parameter in inside.values())
        count = sum(self._unreachable[parameter][1] for parameter in outside)
        note = f"corrupted {within:,} of {within + count:,} weights: {self._described(outside)}"
        logger.warning_once(f"target_modules: {note}; what is measured holds for the others alone.")
        return self._selection(inside, (note, *notes))

    def _selection(self, chosen: dict[str, nn.Parameter], notes: tuple[str, ...]) -> Selection:
        """Select offloaded parameters as those that they are copied from, each once."""
        if not any(parameter in self._elsewhere for parameter in chosen.values()):
            return Selection(chosen, notes)
        names: dict[nn.Parameter, str] = {}
        for name, parameter in chosen.items():
            names.setdefault(self._elsewhere.get(parameter, parameter), name)
        return Selection({name: parameter for parameter, name in names.items()}, notes)

    def select_groups(
        self, targets: Mapping[str, Mapping[str, Any]] | str
    ) -> tuple[dict[str, Selection], Mapping[str, Mapping[str, Any]]]:
        """Select several targets: those of a grouping without what is out of reach, or those that are named.

        Args:
            targets: What `select` takes, by the name that it shall have; or "layers", "kinds", "modules", "adapters".

        Returns:
            What each target stands for, with a sentence on each that was left out; and the targets.

        Raises:
            TargetError: There is no such grouping, or something finds nothing, or nothing is left.
            OutOfReachError: Nothing of a target that is named can be corrupted. A `TargetError`.
        """
        if not isinstance(targets, str):
            return {label: self.select(**target) for label, target in targets.items()}, targets
        if targets not in GROUPINGS:
            raise TargetError(
                f"targets: expected {', '.join(GROUPINGS)} or targets by name, got {targets!r}; give targets of "
                "your own a name each, {'name': targets}"
            )
        grouped = {label: {"target_modules": group} for label, group in GROUPINGS[targets](self.model).items()}
        found, left_out = {}, []
        for label, target in grouped.items():
            try:
                found[label] = self.select(**target)
            except OutOfReachError as error:
                left_out.append(f"{label} was left out: {error.described}")
        if grouped and not found:
            raise TargetError(
                f"targets: expected parts that can be corrupted, got {'; '.join(left_out)}; load the model in float32 "
                "or bfloat16, without quantization and offloading"
            )
        for sentence in left_out:
            logger.warning_once(f"{sentence}.")
        noted = {label: replace(one, notes=(*one.notes, *left_out)) for label, one in found.items()}
        return noted, grouped

    def _left_frozen(self, chosen: Mapping[str, nn.Parameter], selection: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a sentence on frozen weights that could be corrupted, and are not, if there are any."""
        if not self._has_frozen():
            return ()
        of_no_interest = {*chosen.values(), *self._unreachable, *sinusoidal_tables(self.model)}
        left = self._selector.parameters("all", **selection) - of_no_interest
        count, trained = (sum(one.numel() for one in some) for some in (left, chosen.values()))
        if not left:
            return ()
        note = f"corrupted {trained:,} weights, those that are trained, and none of the {count:,} frozen ones"
        logger.warning_once(f'target_modules: {note}, as under an adapter; for these too: target_modules="all".')
        return (note,)

    def _has_frozen(self) -> bool:
        fixed = sinusoidal_tables(self.model)
        frozen = [
            parameter
            for parameter in self.model.parameters()
            if not parameter.requires_grad and parameter not in self._unreachable and parameter not in fixed
        ]
        return bool(frozen) and any(parameter.requires_grad for parameter in self.model.parameters())

    def _described(self, parameters: list[nn.Parameter]) -> str:
        by_reason: dict[str, dict[str, int]] = {}
        for parameter in parameters:
            why, count, name = self._unreachable[parameter]
            of_reason = by_reason.setdefault(why, {})
            of_reason[name] = of_reason.get(name, 0) + count
        return " and ".join(
            f"{sum(counts.values()):,} {_of_modules(list(counts))} are {why}" for why, counts in by_reason.items()
        )


def packed_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model that are neither parameters nor buffers, with a name for each."""
    for name, module in model.named_modules():
        for index, tensor in enumerate(_packed(module)):
            yield f"{name}.packed.{index}", tensor


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold a tensor's numbers: most often itself; none where they are not in memory.

    Examples:
        >>> plain_parts(torch.ones(2)), plain_parts(torch.ones(2, device="meta"))
        ([tensor([1., 1.])], [])
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        flatten: Any = getattr(tensor, "__tensor_flatten__", None)
        names = [] if flatten is None else flatten()[0]
        return [part for name in names for part in plain_parts(getattr(tensor, name))]
    if tensor.is_meta:
        return []
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]  # the second for the scales
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


def _of_modules(names: list[str]) -> str:
    first = names[0].removesuffix("._packed_params") or "the model itself"
    return f"in {first}" if len(names) == 1 else f"in {len(names)} modules such as {first}"


class _Hidden(nn.Parameter):
    """Stands for a weight that is no parameter."""

    why: str


def _why(parameter: Tensor) -> str | None:
    return parameter.why if isinstance(parameter, _Hidden) else obstacle(parameter)


def _count(module: nn.Module, parameter: Tensor, unreachable: list[Tensor]) -> int:
    """Return how many weights a tensor holds: several in one integer, where modules pack them."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)  # bitsandbytes' 4 bits
    if shape is not None:
        return math.prod(shape)
    largest = max(unreachable, key=Tensor.numel)
    if parameter is largest and not parameter.is_floating_point():
        for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
            sizes = [size for name in names if isinstance(size := getattr(module, name, None), int)]
            if len(sizes) == len(names):
                return math.prod(sizes)
    return parameter.numel()


def _hidden_weights(module: nn.Module) -> Iterator[_Hidden]:
    """Yield what stands for the weights of a module itself that are no parameters."""
    together = _packed(module)
    quantized = next((tensor for tensor in together if tensor.is_quantized), None)
    for tensor in together:  # a bias is float32, and packed with its weight
        yield _standing_for(tensor, "packed" if quantized is None else f"packed as {_plain(quantized.dtype)}")
    if any(parameter.is_floating_point() and parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
        return
    packed = [
        buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and buffer.dtype in _PACKED and buffer.ndim > 1
    ]
    if packed:  # beside the weights lie their zero points
        largest = max(packed, key=Tensor.numel)
        yield _standing_for(largest, f"{_plain(largest.dtype)} buffers")


def _standing_for(tensor: Tensor, why: str) -> _Hidden:
    integer = tensor.dtype in _PACKED
    dtype = tensor.dtype if integer else torch.float32
    hidden = _Hidden(torch.empty(tensor.shape, dtype=dtype, device="meta"), requires_grad=False)
    hidden.why = why
    return hidden


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module saves and that are neither parameters nor buffers, if a kernel packed them."""
    if isinstance(module, torch.jit.ScriptModule) or type(module)._save_to_state_dict is (
        nn.Module._save_to_state_dict
    ):
        return []
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=False)
    values = [value for name, value in saved.items() if name not in {**module._parameters, **module._buffers}]
    if not any(isinstance(value, (tuple, torch.ScriptObject)) or _is_quantized(value) for value in values):
        return []  # what others save beside their parameters are constants, such as scales
    return [tensor for value in values for tensor in _tensors(value) if tensor.ndim]  # scales have no dimension


def _is_quantized(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_quantized


def _tensors(value: Any) -> Iterator[Tensor]:
    leaves = tree_leaves(value.__getstate__() if isinstance(value, torch.ScriptObject) else value)
    packed = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
    if packed:  # beside them lie copies of what they hold
        for leaf in packed:
            yield from _tensors(leaf)
    else:
        yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _view(model: nn.Module, hidden: Mapping[nn.Module, list[_Hidden]]) -> nn.Module:
    """Return a model of the same modules and parameters, and in addition of the hidden ones; the model is not changed.

    So words, names, kinds and positions find hidden weights as they find others.
    """
    made: dict[nn.Module, nn.Module] = {}

    def view(module: nn.Module) -> nn.Module:
        if module in made or isinstance(module, torch.jit.ScriptModule):
            return made.get(module, module)
        children = list(module.modules())[1:]
        holds = any(hidden[below] for below in (module, *children))
        is_linear = holds and "Linear" in type(module).__name__ and not isinstance(module, nn.Linear)
        seen = made[module] = object.__new__(nn.Linear if is_linear else type(module))
        seen.__dict__.update(module.__dict__)
        seen.__dict__["_modules"] = {
            name: None if child is None else view(child) for name, child in module._modules.items()
        }
        own = {f"hidden_{index}": parameter for index, parameter in enumerate(hidden[module])}
        seen.__dict__["_parameters"] = {**module._parameters, **own}
        return seen

    return view(model)
