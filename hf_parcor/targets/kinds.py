"""What a module is: normalization, attention, embedding, linear layer, output layer, input embedding.

The names of classes decide, because Transformers has hundreds of attention and normalization classes that have no
common ancestor. A class name can mislead (`MllamaSelfAttentionDecoderLayer` is a whole block,
`Wav2Vec2EncoderStableLayerNorm` a whole encoder), so structure has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_parcor.targets.stacks import EMBEDDING_NAME, find_stacks, has_parameters

_LAYER_NORM_NAME = re.compile(r"(Layer|RMS|Rms)Norm")
_NORMALIZATION_NAME = re.compile(r"Norm(?!ed|al(?!iz))")  # not NormedEmbedding, not a normal distribution
_ATTENTION_NAME = re.compile(r"Attention|MLA$")  # multi-head latent attention
_FEED_FORWARD_NAME = re.compile(r"(MLP|FeedForward|FFN)$")
_HEAD_NAMES = ("score", "classifier")


def parameters_below(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters of modules and of everything below them."""
    return {parameter for module in modules for parameter in module.parameters()}


def is_layer_norm(module: nn.Module) -> bool:
    """Tell whether a module is a LayerNorm or RMSNorm of any library: by class name, with parameters of its own only.

    Examples:
        >>> is_layer_norm(nn.LayerNorm(2)), is_layer_norm(nn.RMSNorm(2)), is_layer_norm(nn.BatchNorm1d(2))
        (True, True, False)
    """
    return _is_leaf_called(_LAYER_NORM_NAME, module)


def is_normalization(module: nn.Module) -> bool:
    """Tell whether a module is a normalization layer of any family.

    Examples:
        >>> (
        ...     is_normalization(nn.BatchNorm1d(2)),
        ...     is_normalization(nn.GroupNorm(1, 2)),
        ...     is_normalization(nn.Linear(2, 2)),
        ... )
        (True, True, False)
    """
    return _is_leaf_called(_NORMALIZATION_NAME, module)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules: `nn.MultiheadAttention` and modules with `Attention` or `MLA` in their class name.

    A module that holds a stack of blocks is not attention, whatever its name, nor is a block of a stack that has
    attention inside. Others may hold what is none: see `feed_forward_modules`.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(d_model=4, nhead=1, dim_feedforward=4, batch_first=True)
        >>> [type(module).__name__ for module in attention_modules(layer)]
        ['MultiheadAttention']
    """
    blocks = {block for stack in find_stacks(model) for block in stack.blocks.values()}
    is_model = _model_test(model)

    def is_called_attention(module: nn.Module) -> bool:
        return _ATTENTION_NAME.search(type(module).__name__) is not None and not is_model(module)

    def is_attention(module: nn.Module) -> bool:
        if isinstance(module, nn.MultiheadAttention):
            return True
        inner = (below for below in module.modules() if below is not module)
        return is_called_attention(module) and not (module in blocks and any(map(is_called_attention, inner)))

    return [module for module in model.modules() if is_attention(module)]


def feed_forward_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return what is called an MLP or a feed-forward network in modules, as beside the attention in a pooling head.

    Examples:
        >>> feed_forward_modules([nn.TransformerEncoderLayer(d_model=4, nhead=1, dim_feedforward=4)])
        []
    """
    inside = (below for module in modules for below in module.modules())
    return [module for module in inside if _FEED_FORWARD_NAME.search(type(module).__name__)]


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Return the embeddings: `nn.Embedding` outside attention, and modules called so (ViT's patches and positions).

    Embeddings inside attention, such as T5's table of relative positions, belong to attention.

    Examples:
        >>> [type(module).__name__ for module in embedding_modules(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)))]
        ['Embedding']
    """
    inside_attention = {below for module in attention_modules(model) for below in module.modules()}
    is_model = _model_test(model)

    def is_embedding(module: nn.Module) -> bool:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return True
        return EMBEDDING_NAME.search(type(module).__name__) is not None and not is_model(module)

    return [module for module in model.modules() if module not in inside_attention and is_embedding(module)]


def linear_modules(model: nn.Module) -> list[nn.Module]:
    """Return every `nn.Linear` and every Transformers `Conv1D` (GPT-2's linear layer) outside the output layer.

    As in PEFT, weights that are no module of their own are not meant: the experts of a mixture fused into one tensor,
    the input projection of `nn.MultiheadAttention`. Unlike there, no task type is needed to leave out a classifier.

    Examples:
        >>> linear_modules(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
        [Linear(in_features=2, out_features=3, bias=True)]
    """
    outside = {below for layer in output_layers(model) for below in layer.modules()}
    return [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module not in outside]


def output_layers(model: nn.Module) -> list[nn.Module]:
    """Return the output layer of the Transformers model in `model`: language modelling head, or the head for the task.

    A model without output embeddings has its head outside `base_model`: the last module there that has parameters
    (so DistilBERT's `pre_classifier` is no output layer), whatever its name, and those of its shape beside it. One
    without a base model, as of images and captions, has the output embeddings of the models in it. A plain module has
    no known output layer.

    Examples:
        >>> output_layers(nn.Linear(2, 2))
        []
    """
    return [layer for whole in _outermost_pretrained(model) for layer in _output_layers(whole)]


def _output_layers(model: PreTrainedModel) -> list[nn.Module]:
    output_embeddings = _output_embeddings(model)
    if output_embeddings is not None:
        return [output_embeddings]
    base = model.base_model
    if base is model:  # a base model has no head; a few classifiers are their own base
        heads = [child for name, child in model.named_children() if name in _HEAD_NAMES][:1]
        inner = (below for child in model.children() for below in _outermost_pretrained(child))
        return heads or [layer for one in inner for layer in [_output_embeddings(one)] if layer is not None]
    heads = [child for child in model.children() if child is not base and has_parameters(child)]
    return [head for head in heads if _shapes(head) == _shapes(heads[-1]) and not find_stacks(head)]


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters()]


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    get_output_embeddings: Callable[[], object] = model.get_output_embeddings
    found = get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def _outermost_pretrained(module: nn.Module) -> list[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost_pretrained(child)]


def _is_leaf_called(pattern: re.Pattern[str], module: nn.Module) -> bool:
    if not any(pattern.search(ancestor.__name__) for ancestor in type(module).__mro__):
        return False
    return any(True for _ in module.parameters(recurse=False)) and not any(map(has_parameters, module.children()))


def _model_test(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Return a test for what is (part of) a model and not one layer: the root, and all that holds a stack."""
    lists = {blocks for stack in find_stacks(model) for blocks in stack.lists.values()}
    return lambda module: module is model or any(below in lists for below in module.modules())


def find_input_embedding(model: nn.Module) -> nn.Module:
    """Return the module that `model.get_input_embeddings()` names: of tokens, or of patches of an image.

    Of an encoder–decoder it is the encoder's: the source, not what the decoder has said so far.

    Raises:
        ValueError: The model has none.
    """
    reader: Any = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        reader = reader.get_encoder()
    find = getattr(reader, "get_input_embeddings", None)
    try:
        embedding = None if find is None else find()
    except NotImplementedError:  # how Transformers says that a model has none
        embedding = None
    if not isinstance(embedding, nn.Module):
        raise ValueError(
            f"model: expected one whose get_input_embeddings() returns a module, got {type(model).__name__}, which "
            "has none; choose a defense that leaves the inputs as they are (AWP with input_epsilon=0)"
        )
    return embedding
