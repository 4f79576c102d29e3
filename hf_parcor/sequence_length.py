"""How many tokens a model and its tokenizer take, and how many are generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.errors import InputError

_OF_EACH_SIDE = {False: "max_encoder_position_embeddings", True: "max_decoder_position_embeddings"}
_UNBOUNDED = 10**9  # tokenizers say 10^30 where they know no length
_NO_TOKENS = ("pixel_values", "pixel_values_videos", "flattened_patches", "input_features", "input_values")
_DEFAULT = 20  # `max_length` of Transformers where nothing is set; its Seq2SeqTrainer writes it into configurations


def positions(model: Any, *, decoder: bool = False) -> int | None:
    """Return for how many tokens the tables of positions have a row: a longer text ends in an IndexError.

    Not every row is for a token: RoBERTa's begin behind the number of the padding token, BART's behind the second row.

    Args:
        model: Any Transformers model.
        decoder: Of a model with encoder and decoder, whether that of the decoder is asked for.

    Returns:
        The rows; None if positions are not looked up in a table (T5, Llama), or in one that grows (M2M100).

    Examples:
        >>> from transformers import RobertaConfig, RobertaModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
        >>> positions(RobertaModel(RobertaConfig(**sizes, max_position_embeddings=514)))
        512
    """
    rows = [len(table.weight) - _rows_before(table) for table in _tables(_side(model, decoder))]
    return min(rows, default=None)


def longest_sequence(model: Any, tokenizer: Any = None, *, decoder: bool = False) -> int | None:
    """Return how many tokens, special ones included, a model and its tokenizer take.

    That is the least of `positions`, of `max_position_embeddings`, and of the tokenizer's `model_max_length`.

    Args:
        model: Any Transformers model.
        tokenizer: Its tokenizer, if there is one.
        decoder: Of a model with encoder and decoder, whether that of the decoder is asked for.

    Returns:
        The length; None if nothing bounds it.
    """
    config = model.config
    said = (
        positions(model, decoder=decoder),
        getattr(config, _OF_EACH_SIDE[decoder], None),
        getattr(config, "max_position_embeddings", None),
        getattr(getattr(config, "text_config", None), "max_position_embeddings", None),  # of one that takes images too
        getattr(tokenizer, "model_max_length", None),
    )
    return min((int(length) for length in said if length is not None and 0 < length < _UNBOUNDED), default=None)


def fitting_length(
    model: Any, tokenizer: Any, default: int, asked: int | None = None, *, decoder: bool = False
) -> int:
    """Return the length that is asked for, or else a default, or what model and tokenizer take if that is less.

    Args:
        model: Any Transformers model.
        tokenizer: Its tokenizer, or None.
        default: The length where none is asked for.
        asked: The length that is asked for; it may exceed what the tokenizer and the configuration say, since
            positions that are computed go on.
        decoder: Of a model with encoder and decoder, whether that of the decoder is asked for.

    Raises:
        InputError: It is none, or exceeds the model's tables of positions.
    """
    if asked is None:
        return min(default, longest_sequence(model, tokenizer, decoder=decoder) or default)
    if asked < 1:
        raise InputError(f"max_length: expected 1 token or more, got {asked}; ask for more")
    most = positions(model, decoder=decoder)
    if most is not None and asked > most:
        raise InputError(
            f"max_length: expected at most {most:,} tokens, for which the model has positions, got {asked:,}; ask for "
            "fewer"
        )
    return asked


def generated_length(model: Any, longest: int, start: int = 1) -> int:
    """Return how many tokens are to be generated at most, from the longest reference: a fifth and ten more.

    Args:
        model: What generates.
        longest: The tokens of the longest reference.
        start: The tokens that it begins with, which take positions too: one, or the input of a model without encoder.

    Returns:
        The length; no more than the model has positions for.

    Examples:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 9}
        >>> generated_length(T5ForConditionalGeneration(T5Config(**sizes)), 40)
        58
    """
    wanted = longest + longest // 5 + 10
    most = longest_sequence(model, decoder=True)
    return wanted if most is None else max(1, min(wanted, most - start + 1))  # the last token is not read


def asked_length(model: Any, settings: Mapping[str, Any], start: int = 1) -> int | None:
    """Return how many tokens a generation is asked for at most: in its settings, else in the model's configuration.

    Args:
        model: What generates.
        settings: Those of the generation.
        start: The tokens that it begins with, which count in `max_length`.

    Returns:
        The length; None if there is none, so that Transformers would stop after 20 tokens.
    """
    added = generation_settings(model, settings, "max_new_tokens")
    if added:  # it counts before the other one, as in Transformers
        return int(added[0])
    given = settings.get("max_length")
    found = [length for length in generation_settings(model, settings, "max_length") if length != _DEFAULT]
    length = given if given is not None else next(iter(found), None)
    return None if length is None else int(length) - start


def unfinished(tokens: Tensor, length: int, model: Any, settings: Mapping[str, Any]) -> list[bool]:
    """Return for each text whether it did not end within its length; an end that is forced at the last token is none.

    Args:
        tokens: What was generated, without what it began with; a text in a row, with padding behind its end.
        length: How many tokens a text may have.
        model: What generated it.
        settings: Those of the generation.
    """
    if tokens.shape[1] < length:
        return [False] * len(tokens)
    ends, forced, padding = (
        next(iter(generation_settings(model, settings, name)), None)
        for name in ("eos_token_id", "forced_eos_token_id", "pad_token_id")
    )
    own = tokens[:, : length - (forced is not None)]
    ended = torch.isin(own, own.new_tensor([] if ends is None else ends).reshape(-1)).any(-1)
    if padding is not None:  # what stops texts otherwise, such as `stop_strings`, leaves padding
        ended |= tokens[:, length - 1] == padding
    return [not row for row in ended.tolist()]


def generation_settings(model: Any, settings: Mapping[str, Any], name: str) -> list[Any]:
    """Return the values that a setting of `generate` is given, the one that counts first.

    Args:
        model: What generates; its generation configuration counts last.
        settings: What `generate` is called with, perhaps a generation configuration too.
        name: The setting.
    """
    configurations = [settings.get("generation_config"), getattr(model, "generation_config", None)]
    values = [settings.get(name), *(getattr(configuration, name, None) for configuration in configurations)]
    return [value for value in values if value is not None]


def _side(model: Any, decoder: bool) -> nn.Module:
    side = model
    if getattr(model.config, "is_encoder_decoder", False):
        side = model.get_decoder() if decoder else model.get_encoder()
    found: nn.Module = side
    return found


def _tables(module: nn.Module, of_tokens: bool = True) -> Iterator[Any]:
    """Yield the tables of positions, but for those of models inside that take images or sound."""
    for name, inner in module.named_children():
        takes = getattr(inner, "main_input_name", None)
        takes_tokens = of_tokens if takes is None else takes not in _NO_TOKENS
        if takes_tokens and _is_table(name, inner):
            yield inner
        yield from _tables(inner, takes_tokens)


def _is_table(name: str, module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        ("position" in name or name in ("wpe", "pos_emb"))
        and "relative" not in name
        and "Embedding" in type(module).__name__
        and isinstance(weight, Tensor)
        and weight.ndim == 2
    )


def _rows_before(table: Any) -> int:
    """Return how many rows of a table are for no token."""
    offset = getattr(table, "offset", None)
    padding = getattr(table, "padding_idx", None)
    return int(offset) if offset is not None else 0 if padding is None else int(padding) + 1
