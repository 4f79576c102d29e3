"""Models that Accelerate has spread: where they take batches, and where its hooks keep what is offloaded.

An offloaded weight lies on the meta device between two calls of its module. Before each, a hook copies it to where the
module computes: from main memory or, read anew, from the disk. What is written into main memory is seen by the next
call; the copy is gone with its gradient, so only corruptions that use none can be made of such weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn

from hf_parcor.injection import obstacle


def input_device(model: nn.Module) -> torch.device:
    """Return the device that batches are sent to: where the model's input embedding is, or else its first weights.

    Of a model that Accelerate has spread (`device_map`), where it says that the model takes its inputs: weights that
    it has offloaded lie on the meta device between two passes.

    Examples:
        >>> input_device(nn.Linear(1, 1))
        device(type='cpu')
    """
    stated = next(_execution_devices(model), None)
    if stated is not None:
        return stated
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if find is None else find()
    except NotImplementedError:  # how Transformers says that a model has none
        embedding = None
    first = list(embedding.parameters()) if isinstance(embedding, nn.Module) else []
    devices = dict.fromkeys(parameter.device for parameter in [*first, *model.parameters()])
    here = (device for device in devices if device.type != "meta")
    computing = (device for module in model.modules() for device in _execution_devices(module))
    return next(chain(here, computing), torch.device("cpu"))


def _execution_devices(module: nn.Module) -> Iterator[torch.device]:
    """Yield where Accelerate's hooks let a module compute."""
    for hook in _hooks_of(module):
        execution = getattr(hook, "execution_device", None)
        if isinstance(execution, int):  # of the kind that this machine has
            kind = torch.accelerator.current_accelerator()
            yield torch.device("cuda" if kind is None else kind.type, execution)
        elif execution is not None:
            yield torch.device(execution)


def kept_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """Return what a hook of a weight's module, or of a module around it, keeps for it; None where there is none."""
    for weights, key in _keepers_of(model, name):
        try:
            kept = weights[key]
        except KeyError:
            continue
        if isinstance(kept, Tensor) and kept.shape == tensor.shape:
            return kept
    return None


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return the names that Transformers ties, each with that of the weight which it is tied to, or which it is."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for target, source in (getattr(module, "all_tied_weights_keys", None) or {}).items():
            within = f"{name}." if name else ""
            found.setdefault(within + target, within + source)
            found.setdefault(within + source, within + source)
    return found


def kept_in_memory(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Return the offloaded parameters whose numbers lie in main memory, each with a parameter in that memory.

    Names that a Transformers model ties are one weight: they have one such parameter, if they lie in one place. Where
    they do not, because one of them is on a device or there are two copies, none of them is returned.

    Examples:
        >>> import accelerate
        >>> layer = accelerate.cpu_offload(nn.Linear(2, 1), execution_device="cpu")
        >>> [(str(away.device), str(here.device)) for away, here in kept_in_memory(layer).items()]
        [('meta', 'cpu'), ('meta', 'cpu')]
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    offloaded = {name: parameter for name, parameter in parameters.items() if parameter.is_meta}
    if not offloaded:
        return {}
    memory = {name: _in_memory(model, name, parameter) for name, parameter in offloaded.items()}
    together: dict[str, list[str]] = {}
    for name, tied_to in ties_of(model).items():
        together.setdefault(tied_to, []).append(name)
    for names in together.values():
        places = {_address(memory.get(name)) for name in names if name in parameters}
        if len(places) > 1:
            memory.update(dict.fromkeys(names))
    found: dict[nn.Parameter, nn.Parameter] = {}
    at: dict[int, nn.Parameter] = {}
    for name, parameter in offloaded.items():
        kept = memory[name]
        if kept is not None:
            found[parameter] = at.setdefault(kept.data_ptr(), nn.Parameter(kept, requires_grad=False))
    return found


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))


def _keepers_of(model: nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """Yield what hooks keep weights in, from the module that a weight belongs to outwards, with its name there."""
    path = name.split(".")
    for depth in reversed(range(len(path))):
        for hook in _hooks_of(model.get_submodule(".".join(path[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                yield weights, ".".join(path[depth:])


def _in_memory(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor | None:
    """Return the memory that a hook copies a weight from; None where it reads a file, or converts what it reads."""
    for weights, key in _keepers_of(model, name):
        kept = _memory_of(weights, key)
        if isinstance(kept, Tensor) and (kept.shape, kept.dtype) == (parameter.shape, parameter.dtype):
            return kept.detach() if obstacle(kept) is None else None
    return None


def _memory_of(weights: Any, key: str) -> Any:
    if isinstance(weights, PrefixedDataset):
        return _memory_of(weights.dataset, weights.prefix + key)
    held = weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights
    return held.get(key) if isinstance(held, dict) else None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
