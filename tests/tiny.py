"""Sizes of tiny models with two heads, by the names that the configurations of each family have for them."""

from __future__ import annotations

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""BERT and ViT without dropout."""
STILL_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def images(width: int = 8, layers: int = 2, inner: int = 16) -> dict[str, int]:
    """ViT, for images of 8 x 8 pixels."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": inner}
    return {**sizes, "image_size": 8, "patch_size": 4}


def encoder(words: int = 20, width: int = 8, layers: int = 2, inner: int = 16) -> dict[str, int]:
    """BERT, and most that came after it."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": inner}
    return {**sizes, "vocab_size": words, "max_position_embeddings": 16}


def decoder(words: int = 20, width: int = 8, layers: int = 2, inner: int = 16) -> dict[str, int]:
    """Llama, and most that came after it."""
    return {**encoder(words, width, layers, inner), "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}


def gpt2(words: int = 20, width: int = 8, layers: int = 2) -> dict[str, int]:
    sizes = {"vocab_size": words, "n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 16}
    return {**sizes, "bos_token_id": 1, "eos_token_id": 2}


def t5(words: int = 20, width: int = 8, layers: int = 2, inner: int = 16) -> dict[str, int]:
    sizes = {"vocab_size": words, "d_model": width, "d_kv": width // 2, "d_ff": inner}
    return {**sizes, "num_layers": layers, "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0}


def seq2seq(words: int = 20, width: int = 8, layers: int = 2, inner: int = 16) -> dict[str, int]:
    """BART and Marian."""
    sizes = {"layers": layers, "attention_heads": 2, "ffn_dim": inner}
    return {
        **{"vocab_size": words, "d_model": width, "max_position_embeddings": 32},
        **{f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in sizes.items()},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"decoder_start_token_id": 1, "forced_eos_token_id": 2},
    }
