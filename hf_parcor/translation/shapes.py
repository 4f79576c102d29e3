"""The papers' Transformers as configurations of Marian, and new models as fairseq starts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MarianConfig, MarianMTModel

from hf_parcor.targets import sinusoidal_tables
from hf_parcor.translation.vocabulary import END, PADDING, SPECIAL, START

_START, _PADDING, _END = (SPECIAL.index(token) for token in (START, PADDING, END))


def iwslt_de_en(vocabulary: int, **changes: Any) -> MarianConfig:
    """Return fairseq's `transformer_iwslt_de_en` with the dropout of paper 2, for a shared vocabulary.

    6 + 6 layers, 512 wide, 1,024 in the feed-forward part, 4 heads, one embedding for encoder, decoder and output.

    Args:
        vocabulary: How many subwords there are: 10,149 in the papers.
        **changes: Settings of `MarianConfig` that are to differ.

    Examples:
        >>> config = iwslt_de_en(10_149)
        >>> config.encoder_layers, config.d_model, config.decoder_ffn_dim, config.dropout
        (6, 512, 1024, 0.3)
    """
    settings = {**_transformer(512, 1024, 4), "dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1}
    return MarianConfig(vocab_size=vocabulary, **{**settings, **changes})


def wmt_en_de(source_vocabulary: int, target_vocabulary: int, **changes: Any) -> MarianConfig:
    """Return fairseq's `transformer_wmt_en_de`, which the papers use for En-Vi, with a vocabulary for each language.

    6 + 6 layers, 512 wide, 2,048 in the feed-forward part, 8 heads; decoder and output share an embedding.

    Args:
        source_vocabulary: How many subwords the source language has: 7,669 in the papers.
        target_vocabulary: How many the target language has: 6,669.
        **changes: Settings of `MarianConfig` that are to differ.
    """
    settings = {
        **_transformer(512, 2048, 8),
        "dropout": 0.1,
        "vocab_size": source_vocabulary,
        "decoder_vocab_size": target_vocabulary,
        "share_encoder_decoder_embeddings": False,
    }
    return MarianConfig(**{**settings, **changes})


def _transformer(width: int, inner: int, heads: int) -> dict[str, Any]:
    sizes = {"layers": 6, "ffn_dim": inner, "attention_heads": heads}
    return {
        **{f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in sizes.items()},
        "d_model": width,
        "activation_function": "relu",
        "scale_embedding": True,
        "max_position_embeddings": 1024,
        "bos_token_id": _START,
        "pad_token_id": _PADDING,
        "eos_token_id": _END,
        "decoder_start_token_id": _END,  # as fairseq does
        "forced_eos_token_id": None,
    }


@torch.no_grad()
def new_model(config: MarianConfig) -> MarianMTModel:
    """Return a model with weights as fairseq draws them, to be trained from scratch.

    Embeddings are normal with deviation 1/sqrt(width), zero for padding; matrices uniform after Glorot. Generation
    never writes padding or `<s>`.

    Args:
        config: Its shape.

    Examples:
        >>> model = new_model(iwslt_de_en(100, encoder_layers=1, decoder_layers=1, d_model=64))
        >>> f"{model.get_input_embeddings().weight[3:].std():.3f}"
        '0.12...'
    """
    model = MarianMTModel(config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            nn.init.xavier_uniform_(module.weight)  # biases are zero already
    for stack in (model.model.encoder, model.model.decoder):
        embedding = stack.embed_tokens
        nn.init.normal_(embedding.weight, std=config.d_model**-0.5)
        embedding.weight[config.pad_token_id] = 0
    model.generation_config.suppress_tokens = [_START, _PADDING]
    return model


def freeze_positions(model: nn.Module) -> nn.Module:
    """Freeze the sinusoidal position tables of a model, which are computed and not trained, and return the model.

    `from_pretrained` of Transformers 5 forgets that Marian's are fixed: an optimizer would change them, and since they
    are never saved, a model that is loaded again would not be the one that was trained.

    Args:
        model: Any model; one without such tables stays as it is.
    """
    for table in sinusoidal_tables(model):
        table.requires_grad_(False)
    return model
