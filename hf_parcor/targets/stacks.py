"""Where the layers of a model are: stacks of blocks, found by structure and not by name.

A *stack* is an outermost `nn.ModuleList` whose blocks are of one family. Three observations make this hold beyond
the textbook case:

- Hybrid models alternate two kinds of block (attention and state space, self- and cross-attention). So one
  *family* means that the block classes have a common ancestor of their own below `nn.Module`, not that they are
  the same class.
- A list of bare layers (one embedding or one output head per codebook) is not a stack of blocks. It counts only in
  a model that has nothing else, such as a plain list of linear layers.
- Blocks contain lists (the experts of a mixture, the sublayers of T5), so the search ends at the outermost list
  that qualifies. What lies in a list that does not qualify is searched.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

__all__ = ["Role", "Stack", "find_stacks", "has_parameters"]

Role = Literal["encoder", "decoder", "other"]

# Words in the components of a name: `decode_head`, `pos_conv_embed`, `encoder_input_proj`, `deepstack_merger_list`.
_OF_A_HEAD = re.compile(r"(?:^|[._])(?:heads?|neck)(?:[._]|$)")
_OF_INPUT_OR_OUTPUT = re.compile(r"(?:^|[._])(?:embed|proj|merger|pooler|bias)")


@dataclass(frozen=True, eq=False)
class Stack:
    """One stack of blocks.

    Attributes:
        name: The full name of the list in the model.
        blocks: The list itself.
        role: What the stack does. `"other"` stands beside an encoder or decoder without being one, such as the
            convolutions in front of a speech encoder, or the projections in the head of a segmenter.

    Examples:
        >>> stack = Stack("encoder.layers", nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "encoder")
        >>> len(stack), str(stack)
        (2, '"encoder.layers" (encoder, 2 blocks)')
    """

    name: str
    blocks: nn.ModuleList
    role: Role

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        return f'"{self.name}" ({self.role}, {len(self)} block{"s" if len(self) != 1 else ""})'

    def parameters_of(self, index: int) -> set[nn.Parameter]:
        """Return all parameters of one block (negative indices count from the end)."""
        return set(self.blocks[index].parameters())


@dataclass(frozen=True, eq=False)
class _Found:
    """A list of blocks, with the Transformers model around it (if any): the one nearest to the list."""

    name: str
    blocks: nn.ModuleList
    owner: str
    model: PreTrainedModel | None

    @property
    def config(self) -> PreTrainedConfig | None:
        return None if self.model is None else self.model.config


def find_stacks(model: nn.Module) -> list[Stack]:
    """Find the stacks of a model, and which of them encode and which decode.

    The role of a stack is, in this order:

    1. other, when its name says that it belongs to a head or a neck, or, below the Transformers model around it, to
       an embedding, a projection, a merger, a pooler or a bias: what these are made of are no layers (unless a model
       has nothing else);
    2. decoder, when the configuration of the model around it says `is_decoder` (a BERT that generates keeps the
       path `bert.encoder.layer`, and is a decoder all the same);
    3. other, when its name says nothing below that model, and another stack there says that it has the role of 6: the
       feature extractors beside `encoder.layers` are not the encoder;
    4. what the first component of its name says that speaks of an `encoder` or a `decoder`;
    5. other, when it lies outside of that model's `base_model`, where there are stacks too: it is of the head;
    6. decoder for architectures that Transformers lists for causal language modelling and not for masked, encoder
       for those it lists for masked; else decoder when the class of the blocks is called so
       (`nn.TransformerDecoderLayer`), else encoder.

    Args:
        model: Any module; it need not be a Transformers model.

    Returns:
        The stacks in the order of the model.

    Examples:
        >>> model = nn.Transformer(
        ...     4, nhead=2, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=4, batch_first=True
        ... )
        >>> for stack in find_stacks(model):
        ...     print(stack)
        "encoder.layers" (encoder, 2 blocks)
        "decoder.layers" (decoder, 1 block)
    """
    found = list(_search(model, "", "", None, set()))
    if any(_is_composite(one.blocks) for one in found):
        found = [one for one in found if _is_composite(one.blocks)]
    layers = [one for one in found if not _is_beside(one)] or found
    return [Stack(one.name, one.blocks, _role(one, layers) if one in layers else "other") for one in found]


def has_parameters(module: nn.Module) -> bool:
    """Tell whether a module, or anything below it, has a parameter."""
    return next(module.parameters(), None) is not None


def _search(
    module: nn.Module, name: str, owner: str, model: PreTrainedModel | None, seen: set[nn.Module]
) -> Iterator[_Found]:
    if module in seen:  # a stack that two modules share is one stack
        return
    seen.add(module)
    if isinstance(module, PreTrainedModel):
        owner, model = name, module
    if isinstance(module, nn.ModuleList) and _is_family(module):
        yield _Found(name, module, owner, model)
        return
    for child_name, child in module.named_children():
        yield from _search(child, f"{name}.{child_name}" if name else child_name, owner, model, seen)


def _is_family(blocks: nn.ModuleList) -> bool:
    if len(blocks) == 0 or not all(map(has_parameters, blocks)):
        return False
    if any(isinstance(block, PreTrainedModel) for block in blocks):  # an ensemble is no stack
        return False
    common = set.intersection(*(set(type(block).__mro__) for block in blocks))
    return any(issubclass(ancestor, nn.Module) and ancestor is not nn.Module for ancestor in common)


def _is_composite(blocks: nn.ModuleList) -> bool:
    return any(has_parameters(child) for block in blocks for child in block.children())


def _role(one: _Found, found: Collection[_Found]) -> Role:
    if getattr(one.config, "is_decoder", False) and not getattr(one.config, "is_encoder_decoder", False):
        return "decoder"
    implied = _implied_role(one)
    if _stated_role(_below(one.name, one.owner)) is None and any(
        _stated_role(_below(other.name, one.owner)) == implied for other in found if _is_inside(other.name, one.owner)
    ):
        return "other"
    stated = _stated_role(one.name)
    if stated is not None:
        return stated
    return "other" if _is_in_head(one, found) else implied


def _is_beside(one: _Found) -> bool:
    """Tell whether the name says that this is no layer of an encoder or decoder."""
    return bool(_OF_A_HEAD.search(one.name) or _OF_INPUT_OR_OUTPUT.search(_below(one.name, one.owner)))


def _is_in_head(one: _Found, found: Collection[_Found]) -> bool:
    if one.model is None or one.model.base_model is one.model:
        return False
    base = f"{one.owner}.{one.model.base_model_prefix}".removeprefix(".")
    return not _is_inside(one.name, base) and any(_is_inside(other.name, base) for other in found)


def _is_inside(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(f"{owner}.")


def _below(name: str, owner: str) -> str:
    return name.removeprefix(owner).removeprefix(".")


def _stated_role(name: str) -> Role | None:
    for component in name.lower().split("."):
        encodes, decodes = "encoder" in component.replace("autoencoder", ""), "decoder" in component
        if encodes != decodes:
            return "encoder" if encodes else "decoder"
    return None


def _implied_role(found: _Found) -> Role:
    for architecture in type(found.config).__mro__ if found.config is not None else ():
        if architecture in MODEL_FOR_MASKED_LM_MAPPING:
            return "encoder"
        if architecture in MODEL_FOR_CAUSAL_LM_MAPPING:
            return "decoder"
    return "decoder" if any("Decoder" in type(block).__name__ for block in found.blocks) else "encoder"
