"""Where the layers of a model are: stacks of blocks, found by structure and not by name.

A *stack* is an outermost `nn.ModuleList` whose blocks are of one family. Three observations make this hold beyond
the textbook case:

- Hybrid models alternate two kinds of block (attention and state space, self- and cross-attention). So one
  *family* means that the block classes have a common ancestor of their own below `nn.Module`, not that they are
  the same class; or that all are written in the file of the Transformers model around them (MobileViT's convolutions
  and transformers).
- A list of bare layers (one embedding or one output head per codebook, the convolutions of a feature pyramid, each in
  an `nn.Sequential` of its own) is not a stack of blocks. It counts only in a model that has nothing else, such as a
  plain list of linear layers.
- Blocks contain lists (the experts of a mixture, the sublayers of T5), so the search ends at the outermost list
  that qualifies. What lies in a list that does not qualify is searched.

A model without any such list, but for bare layers, may keep its blocks in an `nn.Sequential`, as most convolutional
networks do. That is a container for anything, so more is asked of it: two blocks or more, all of them with modules
inside that have parameters. Where such containers stand beside each other under numbered names (`layer1`, `layer2`,
...) and hold blocks of one family, they are the stages of one network, and all of their blocks are one stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

__all__ = ["EMBEDDING_NAME", "Role", "Stack", "find_stacks", "has_parameters"]

Role = Literal["encoder", "decoder", "other"]
BlockList: TypeAlias = nn.ModuleList | nn.Sequential

# Words in the components of a name: `decode_head`, `pos_conv_embed`, `encoder_input_proj`, `deepstack_merger_list`,
# `speech_decoder_postnet`, `subsampling.conv_layers`.
_OF_A_HEAD = re.compile(r"(?:^|[._])(?:heads?|neck)(?:[._]|$)")
_OF_INPUT_OR_OUTPUT = re.compile(r"(?:^|[._])(?:embed|proj|merger|pooler|bias|prenet|postnet|stem|subsampl)")
_NUMBER = re.compile(r"\d+")
EMBEDDING_NAME = re.compile(r"Embed(ding|der)?s?(\d[dD])?$")
"""What the names of the classes of embeddings end with."""


@dataclass(frozen=True, eq=False)
class Stack:
    """One stack of blocks.

    Attributes:
        lists: The list that holds the blocks, by its full name in the model; several where a network has stages.
        role: What the stack does. `"other"` stands beside an encoder or decoder without being one, such as the
            convolutions in front of a speech encoder, or the projections in the head of a segmenter.

    Examples:
        >>> stack = Stack({"encoder.layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}, "encoder")
        >>> len(stack), str(stack), list(stack.blocks)
        (2, '"encoder.layers" (encoder, 2 blocks)', ['encoder.layers.0', 'encoder.layers.1'])
    """

    lists: Mapping[str, BlockList]
    role: Role

    @property
    def name(self) -> str:
        """The full name of the list, or those of all lists."""
        return ", ".join(self.lists)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by their full names; one that is used twice has two."""
        return {
            f"{name}.{inner}".removeprefix("."): block
            for name, blocks in self.lists.items()
            for inner, block in blocks._modules.items()  # named_children gives a block that is used twice once
            if block is not None
        }

    def __len__(self) -> int:
        return sum(map(len, self.lists.values()))

    def __str__(self) -> str:
        return f'"{self.name}" ({self.role}, {len(self)} block{"s" if len(self) != 1 else ""})'

    def parameters_of(self, index: int) -> set[nn.Parameter]:
        """Return all parameters of one block (negative indices count from the end)."""
        return set(list(self.blocks.values())[index].parameters())


@dataclass(frozen=True, eq=False)
class _Found:
    """Lists of blocks, with the Transformers model around them (if any): the one nearest to them."""

    lists: Mapping[str, BlockList]
    owner: str
    model: PreTrainedModel | None

    @property
    def name(self) -> str:
        """The name of the first: all have the same parent, and names that differ in their number alone."""
        return next(iter(self.lists))

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for blocks in self.lists.values() for block in blocks]

    @property
    def config(self) -> PreTrainedConfig | None:
        return None if self.model is None else self.model.config


def find_stacks(model: nn.Module) -> list[Stack]:
    """Find the stacks of a model, and which of them encode and which decode.

    The role of a stack is, in this order:

    1. other, when its name says that it belongs to a head or a neck, or, below the Transformers model around it, to
       an embedding (or the class of its blocks does), a projection, a merger, a pooler, a bias, a prenet, a postnet, a
       stem or a subsampling: what these are made of are no layers (unless a model has nothing else);
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
    found = list(_search(model, "", "", None, set(), nn.ModuleList))
    composite = [one for one in found if _is_composite(one.blocks)]
    found = composite or _in_stages(_search(model, "", "", None, set(), nn.Sequential)) or found
    layers = [one for one in found if not _is_beside(one)] or found
    return [Stack(one.lists, _role(one, layers) if one in layers else "other") for one in found]


def has_parameters(module: nn.Module) -> bool:
    """Tell whether a module, or anything below it, has a parameter."""
    return next(module.parameters(), None) is not None


def _search(
    module: nn.Module,
    name: str,
    owner: str,
    model: PreTrainedModel | None,
    seen: set[nn.Module],
    kind: type[BlockList],
) -> Iterator[_Found]:
    if module in seen:  # a stack that two modules share is one stack
        return
    seen.add(module)
    if isinstance(module, PreTrainedModel):
        owner, model = name, module
    if (
        isinstance(module, kind)
        and (_is_family(list(module)) or _is_written_beside(list(module), model))
        and (kind is nn.ModuleList or _is_composite(module, all))
    ):
        yield _Found({name: module}, owner, model)
        return
    for child_name, child in module.named_children():
        yield from _search(child, f"{name}.{child_name}" if name else child_name, owner, model, seen, kind)


def _in_stages(found: Iterable[_Found]) -> list[_Found]:
    """Join the stages of one network, and leave out what is a single block then."""
    joined: dict[str, _Found] = {}
    for one in found:
        parent, _, last = one.name.rpartition(".")
        numbered = _NUMBER.sub("#", last)
        name = f"{parent}.{numbered}" if numbered != last else one.name
        before = joined.get(name)
        if before is not None and not _is_family([*before.blocks, *one.blocks]):
            name, before = one.name, None
        joined[name] = one if before is None else _Found({**before.lists, **one.lists}, one.owner, one.model)
    return [one for one in joined.values() if len(one.blocks) > 1]


def _is_family(blocks: Sequence[nn.Module | None]) -> bool:
    if not _are_blocks(blocks):
        return False
    common = set.intersection(*(set(type(block).__mro__) for block in blocks))
    return any(issubclass(ancestor, nn.Module) and ancestor is not nn.Module for ancestor in common)


def _is_written_beside(blocks: Sequence[nn.Module | None], model: PreTrainedModel | None) -> bool:
    return _are_blocks(blocks) and {type(block).__module__ for block in blocks} == {type(model).__module__}


def _are_blocks(blocks: Sequence[nn.Module | None]) -> bool:
    """Tell whether all of a list has parameters, and is no whole model: an ensemble is no stack."""
    return len(blocks) > 0 and all(
        block is not None and has_parameters(block) and not isinstance(block, PreTrainedModel) for block in blocks
    )


def _is_composite(blocks: Iterable[nn.Module], of_blocks: Callable[[Iterable[bool]], bool] = any) -> bool:
    return of_blocks(any(map(has_parameters, _unwrapped(block).children())) for block in blocks)


def _unwrapped(block: nn.Module) -> nn.Module:
    """Return the only layer of an `nn.Sequential`, which is as bare there as without; else the block."""
    while isinstance(block, nn.Sequential):
        layers = [child for child in block.children() if has_parameters(child)]
        if len(layers) != 1:
            break
        (block,) = layers
    return block


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
    """Tell whether the name, or that of the blocks' class, says that this is no layer of an encoder or decoder."""
    named = _OF_A_HEAD.search(one.name) or _OF_INPUT_OR_OUTPUT.search(_below(one.name, one.owner))
    return bool(named) or all(EMBEDDING_NAME.search(type(block).__name__) for block in one.blocks)


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
