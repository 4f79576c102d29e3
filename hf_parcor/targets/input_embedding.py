"""The module whose output is a model's input, as far as small continuous changes go."""

from __future__ import annotations

from typing import Any

from torch import nn


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
