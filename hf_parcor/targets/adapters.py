"""What adapters of PEFT change: the weights that they will be merged into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.targets.matching import TargetError


def merged_changes(model: nn.Module, selected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Return what merging would add to selected weights now: `\Delta W = \sum s B A` over the active adapters.

    Args:
        model: A model with LoRA adapters of PEFT.
        selected: Weights by name; those without an active adapter, or with one that is merged already, have no change.

    Raises:
        TargetError: None of them has an adapter. A `ValueError`.
        NotImplementedError: An adapter is no plain LoRA (with DoRA the change is not all that is merged), or a weight
            is sharded.
    """
    layers: dict[int, Any] = {id(layer.get_base_layer().weight): layer for layer in _lora_layers(model)}
    found = {name: layers[id(weight)] for name, weight in selected.items() if id(weight) in layers}
    if not found:
        raise TargetError(
            f"merge_adapters: expected weights under LoRA adapters, got none among {len(selected)} such as "
            f"{next(iter(selected))!r}; name them with target_modules=['base_layer'], or leave merge_adapters out"
        )
    changes = {}
    for name, layer in found.items():
        if getattr(layer, "lora_variant", None) or type(selected[name].data) is not Tensor:
            raise NotImplementedError(
                f"merge_adapters: expected plain LoRA on weights that lie whole on each process, got {name!r} with a "
                "variant such as DoRA, or sharded; corrupt the weights alone: leave merge_adapters out"
            )
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if active and not (layer.merged or layer.disable_adapters):
            with torch.no_grad():
                changes[name] = torch.stack([layer.get_delta_weight(adapter) for adapter in active]).sum(0)
    return changes


def _lora_layers(model: nn.Module) -> list[Any]:
    """Return the layers with LoRA; known by name, so that PEFT need not be there."""
    return [module for module in model.modules() if any(kind.__name__ == "LoraLayer" for kind in type(module).__mro__)]
