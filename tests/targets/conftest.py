"""Tiny models of every architecture family, built once and only read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import tiny
import transformers as tf
from torch import nn

ENCODER, DECODER, SEQ2SEQ = tiny.encoder(), tiny.decoder(), tiny.seq2seq()
DISTILBERT = {"vocab_size": 20, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}
T5, GPT2, VIT = tiny.t5(), tiny.gpt2(), tiny.images()
CLIP = {**ENCODER, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 8}
CAPTION = {**ENCODER, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
WAV2VEC2 = {
    **ENCODER,
    "conv_dim": [8, 8],
    "conv_kernel": [3, 3],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
JAMBA = {
    **DECODER,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 2,
}
MUSICGEN = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "num_codebooks": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 20,
    "bos_token_id": 20,
}


def _bert_pair() -> tf.PreTrainedModel:
    encoder = tf.BertModel(tf.BertConfig(**ENCODER), add_pooling_layer=False)
    decoder = tf.BertLMHeadModel(tf.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True))
    return tf.EncoderDecoderModel(encoder=encoder, decoder=decoder)


def _image_text() -> tf.PreTrainedModel:
    image = tf.ViTModel(tf.ViTConfig(**VIT), add_pooling_layer=False)
    text = tf.BertModel(tf.BertConfig(**ENCODER), add_pooling_layer=False)
    return tf.VisionTextDualEncoderModel(vision_model=image, text_model=text)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    # the families of the word table
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**DISTILBERT)),
    "albert": lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**ENCODER, embedding_size=4)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**SEQ2SEQ)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT)),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
    ),
    # traps
    "bert-base": lambda: tf.BertModel(tf.BertConfig(**ENCODER)),
    "bert-masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)),
    "bert-generates": lambda: tf.BertLMHeadModel(tf.BertConfig(**ENCODER, is_decoder=True)),
    "bert-pair": _bert_pair,
    "image-text": _image_text,
    "bart-decoder": lambda: tf.BartForCausalLM(tf.BartConfig(**SEQ2SEQ)),
    "bart-classifier": lambda: tf.BartForSequenceClassification(tf.BartConfig(**SEQ2SEQ)),
    "albert-groups": lambda: tf.AlbertModel(
        tf.AlbertConfig(**ENCODER, embedding_size=4, num_hidden_groups=2, inner_group_num=2)
    ),
    "gpt2-classifier": lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2)),
    "llama-untied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=False)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "clip-classifier": lambda: tf.CLIPForImageClassification(
        tf.CLIPConfig(text_config=CLIP, vision_config={**VIT, "projection_dim": 8}, projection_dim=8)
    ),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(text_config=CLIP, vision_config={**VIT, "projection_dim": 8}, projection_dim=8)
    ),
    "deit-taught": lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**VIT, num_labels=3)),
    "blip": lambda: tf.BlipForConditionalGeneration(
        tf.BlipConfig(text_config={**CAPTION, "encoder_hidden_size": 8}, vision_config=VIT, projection_dim=8)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=2)),
    "jamba": lambda: tf.JambaForCausalLM(tf.JambaConfig(**JAMBA)),
    "wav2vec2": lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**WAV2VEC2)),
    "musicgen-decoder": lambda: tf.MusicgenForCausalLM(tf.MusicgenDecoderConfig(**MUSICGEN)),
    "torch-seq2seq": lambda: nn.Transformer(
        d_model=4, nhead=2, num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=4, batch_first=True
    ),
}


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], nn.Module]:
    """Return a tiny model by the name of its builder. It is shared by all tests: read it, do not change it."""
    return cache(lambda name: BUILDERS[name]())


@pytest.fixture(scope="session")
def fresh_model_of() -> Callable[[str], nn.Module]:
    """Return a new tiny model by the name of its builder, for a test that changes it."""
    return lambda name: BUILDERS[name]()
