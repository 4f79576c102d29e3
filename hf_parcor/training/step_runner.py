"""The defended step, whoever runs the loop: what its passes share, what it costs, and what adapters add to weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.defenses import DefendedStep
from hf_parcor.distributed.ddp import reduction_of
from hf_parcor.distributed.fsdp import is_sharded, on_shards
from hf_parcor.distributed.processes import TrainingProcesses
from hf_parcor.injection import CorruptionNorm
from hf_parcor.model_state import BufferSnapshot
from hf_parcor.overriding import gradients_set_aside, undoing_left
from hf_parcor.prefix import PrefixReuse
from hf_parcor.targets import TargetError
from hf_parcor.training.checks import check_trained, refuse_updates_inside_backward
from hf_parcor.training.passes import Passes
from hf_parcor.training.shared_prefix import find_shared_prefix, suffix_share, with_rows


class StepRunner:
    """Runs the defended steps of one loop, and remembers what the first of them found out.

    That is which part of the model the passes can share, and whether any buffer moves. It is found out anew for
    another model, other parameters, another defense, and when modules changed their mode.

    Args:
        reuse_prefix: Whether what is computed before the first defended parameter is run once for all passes of a
            step; see `PrefixReuse`. Default True.
        devices: How many devices DataParallel splits the batch over. Default 1.

    Attributes:
        shared_prefix: What the passes of a step share; None before the first defended step, or where each runs all.
        cost: What the last defended step cost, in stock steps.
    """

    def __init__(self, *, reuse_prefix: bool = True, devices: int = 1) -> None:
        self.reuse_prefix, self._devices = reuse_prefix, devices
        self.shared_prefix: PrefixReuse | None = None
        self.cost = 1.0
        self._known: tuple[object, ...] | None = None
        self._modes: list[object] = []  # those of all modules when that was found out
        self._buffers_move = True  # until one step has shown that they do not
        self._suffix_share = 1.0  # of what a pass computes, where later passes share the rest

    @undoing_left()
    def run(
        self,
        passes: Passes,
        selected: Mapping[str, nn.Parameter],
        others: Iterable[nn.Parameter],
        embedding: nn.Module | None = None,
        *,
        epoch: float,
        measure_norm: bool = True,
    ) -> tuple[DefendedStep, CorruptionNorm | None]:
        """Run one micro-batch.

        Args:
            passes: The loop's.
            selected: The defended parameters, by name.
            others: All other parameters that are trained, of the model or not.
            embedding: The model's input embedding, for a defense that perturbs the inputs.
            epoch: How many epochs are done.
            measure_norm: Whether to measure the last corruption, which reads and writes all of it. Default True.

        Returns:
            The step, which is over, and the norm of its last corruption; None if that was not measured.

        Raises:
            ValueError: A hook takes gradients inside `backward`, or a parameter is frozen whose gradient is needed.
            TargetError: Adapters are to be merged, and there are none. A `ValueError`.
            NotImplementedError: They cannot be.
        """
        defense, model, others = passes.defense, passes.model, list(others)
        refuse_updates_inside_backward([*selected.values(), *others])
        self._find_out(passes, selected, others)
        if defense.splits_batch and self.shared_prefix is not None and not self.shared_prefix.rows:
            with _left_as_it_was(passes, others):
                self._share(passes, with_rows(passes, self.shared_prefix))
        passes.share(self.shared_prefix)
        self.cost = 1 + (defense.cost - 1) * self._suffix_share
        if self.shared_prefix is not None:  # a forward pass more of it than in a stock step costs a third of it
            self.cost += (self.shared_prefix.forwards - 1) * (1 - self._suffix_share) / 3
        if not defense.first_pass_is_stock and self._buffers_move:
            self._buffers_move = passes.move_buffers()
            self.cost += self._buffers_move / 3
        sharded = is_sharded(model)
        with DefendedStep(
            selected,
            on_shards(passes, model) if sharded else passes,
            defense.passes,
            others,
            embedding=embedding,
            prefix=self.shared_prefix,
            reduction=reduction_of(model),
            # Gradients of shards are means over all processes already.
            processes=TrainingProcesses() if passes.accelerator.num_processes > 1 and not sharded else None,
            epoch=epoch,
            merged=merged_changes(model, selected) if defense.merges_adapters else None,
        ) as step:
            defense.minimize(step)
            norm = step.withdraw(defense.p) if measure_norm else None
            step.restore()  # in the block: an interrupt may come just where it ends, and then nothing ends it
        return step, norm

    def _find_out(self, passes: Passes, selected: Mapping[str, nn.Parameter], others: Iterable[nn.Parameter]) -> None:
        # Ids stay theirs: the prefix holds the model's modules.
        found = (self.reuse_prefix, passes.defense, id(passes.model), *map(id, selected.values()))
        if self._known == found and not self._in_another_mode(passes):
            return
        check_trained(selected, passes.defense)  # another defense than before may need what is frozen
        self._known, self._buffers_move = None, True
        with _left_as_it_was(passes, others):
            self._share(passes, find_shared_prefix(passes, selected, self._devices) if self.reuse_prefix else None)
        self._modes = _modes(passes)
        self._known = found  # at last: what an interrupt breaks off is found out by the next step

    def _share(self, passes: Passes, prefix: PrefixReuse | None) -> None:
        self.shared_prefix, self._suffix_share = None, 1.0  # an interrupt leaves it so
        if prefix is not None:
            self._suffix_share = suffix_share(passes.model, prefix)
            self.shared_prefix = prefix

    def _in_another_mode(self, passes: Passes) -> bool:
        """Say whether modules changed their mode since, such as norms that were frozen, if anything depends on it."""
        if self.shared_prefix is None and passes.defense.first_pass_is_stock:
            return False
        passes.prepare()  # a training step sets the mode
        return self._modes != _modes(passes)


@contextmanager
def _left_as_it_was(passes: Passes, others: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let a trial leave what is beside the model, too: gradients of what its loss trains, buffers of other models."""
    beside = set(passes.moving).difference(passes.modules)
    with gradients_set_aside(others), BufferSnapshot(beside).undone():
        yield


def _modes(passes: Passes) -> list[object]:
    """Return which modules train, and which are checkpointed: no prefix ends inside of such a one."""
    return [(module.training, vars(module).get("gradient_checkpointing")) for module in passes.modules]


def merged_changes(model: nn.Module, selected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Return what merging would add to selected weights now: `\Delta W = \sum s B A` over the active adapters.

    Args:
        model: A model with LoRA adapters of PEFT.
        selected: Weights by name; those without an active adapter, or with one that is merged already, have no change.

    Raises:
        TargetError: None of them has an adapter, or some are of one, which merging takes away. A `ValueError`.
        NotImplementedError: An adapter is no plain LoRA (with DoRA the change is not all that is merged, and tokens
            that are trained replace rows), or it changes a selected bias too, or a weight is sharded.
    """
    every = _layers(model, "LoraLayer")
    layers: dict[int, Any] = {id(_adapted(layer)): layer for layer in every}
    found = {name: layers[id(weight)] for name, weight in selected.items() if id(weight) in layers}
    if not found:
        raise TargetError(
            f"merge_adapters: expected weights under LoRA adapters, got none among {len(selected)} such as "
            f"{next(iter(selected))!r}; name them with target_modules=['base_layer'], or leave merge_adapters out"
        )
    bases = {id(weight) for layer in every for weight in layer.get_base_layer().parameters()}
    added = {id(weight) for layer in every for weight in layer.parameters()} - bases
    vanishing = [name for name, weight in selected.items() if id(weight) in added]
    if vanishing:
        raise TargetError(
            f"merge_adapters: expected weights that are there when adapters are merged, got {len(vanishing)} of "
            f"adapters such as {vanishing[0]!r}; leave them out with exclude_modules=[r'.*\\.lora_.*'], or name others"
        )
    others = [layer for layer in _layers(model, "BaseTunerLayer") if layer not in every or _adapted(layer) is None]
    replaced = {id(weight) for layer in others for weight in layer.get_base_layer().parameters(recurse=False)}
    for name, weight in selected.items():
        variant = id(weight) in replaced or getattr(found.get(name), "lora_variant", None)
        if variant or (name in found and type(weight.data) is not Tensor):
            raise NotImplementedError(
                f"merge_adapters: expected plain LoRA on weights that lie whole on each process, got {name!r} with a "
                "variant such as DoRA, with tokens that are trained, or sharded; leave it out with exclude_modules, "
                "or corrupt the weights alone: leave merge_adapters out"
            )
    changes = {}
    for name, layer in found.items():
        active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
        bias = getattr(layer.get_base_layer(), "bias", None)
        if any(layer.lora_bias.get(adapter) for adapter in active) and any(one is bias for one in selected.values()):
            raise NotImplementedError(
                f"merge_adapters: expected LoRA without biases of its own, got some beside {name!r} with the bias; "
                "name the weights alone: target_modules=['base_layer.weight']"
            )
        if active and not (layer.merged or layer.disable_adapters):
            with torch.no_grad():
                changes[name] = torch.stack([layer.get_delta_weight(adapter) for adapter in active]).sum(0)
    return changes


def _adapted(layer: Any) -> Tensor | None:
    """Return the weight that a layer with LoRA adds to, which of experts has a name of its own."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)


def _layers(model: nn.Module, kind: str) -> list[Any]:
    """Return the layers of a kind of PEFT's; known by name, so that it need not be there."""
    return [module for module in model.modules() if any(one.__name__ == kind for one in type(module).__mro__)]
