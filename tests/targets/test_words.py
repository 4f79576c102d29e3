"""Every word on every architecture family: the exact names, written down by hand from the architectures."""

from __future__ import annotations

import re

import pytest
from for_each import for_each

from hf_parcor.targets import WORDS, TargetError, select_parameters

BERT_LAYER = (
    "{attention.self.query,attention.self.key,attention.self.value,attention.output.dense,attention.output.LayerNorm,"
    "intermediate.dense,output.dense,output.LayerNorm}.*"
)
BERT_LINEAR = (
    "{attention.self.query,attention.self.key,attention.self.value,attention.output.dense,intermediate.dense,"
    "output.dense}.*"
)
BERT_ATTENTION = "{attention.self.query,attention.self.key,attention.self.value,attention.output.dense}.*"
DISTILBERT_LAYER = (
    "{attention.q_lin,attention.k_lin,attention.v_lin,attention.out_lin,sa_layer_norm,ffn.lin1,ffn.lin2,"
    "output_layer_norm}.*"
)
ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
T5_ATTENTION = "{q,k,v,o}.weight"
FIRST_T5_ATTENTION = "{q,k,v,o,relative_attention_bias}.weight"
BART_ATTENTION = "{k_proj,v_proj,q_proj,out_proj}.*"
BART_ENCODER_LAYER = (
    "{self_attn.k_proj,self_attn.v_proj,self_attn.q_proj,self_attn.out_proj,self_attn_layer_norm,fc1,fc2,"
    "final_layer_norm}.*"
)
BART_DECODER_LAYER = (
    "{self_attn.k_proj,self_attn.v_proj,self_attn.q_proj,self_attn.out_proj,self_attn_layer_norm,"
    "encoder_attn.k_proj,encoder_attn.v_proj,encoder_attn.q_proj,encoder_attn.out_proj,encoder_attn_layer_norm,"
    "fc1,fc2,final_layer_norm}.*"
)
BART_ENCODER_LINEAR = "{self_attn.k_proj,self_attn.v_proj,self_attn.q_proj,self_attn.out_proj,fc1,fc2}.*"
BART_DECODER_LINEAR = (
    "{self_attn.k_proj,self_attn.v_proj,self_attn.q_proj,self_attn.out_proj,"
    "encoder_attn.k_proj,encoder_attn.v_proj,encoder_attn.q_proj,encoder_attn.out_proj,fc1,fc2}.*"
)
LLAMA_LAYER = (
    "{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.o_proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj,"
    "input_layernorm,post_attention_layernorm}.weight"
)
VIT_LAYER = (
    "{attention.q_proj,attention.k_proj,attention.v_proj,attention.o_proj,layernorm_before,layernorm_after,"
    "mlp.fc1,mlp.fc2}.*"
)
RESNET_LAYER = "{convolution.weight,normalization.weight,normalization.bias}"

NOTHING = None  # the word finds nothing in this architecture, which is an error

EXPECTED: dict[str, dict[str, str | None]] = {
    "bert": {
        "all": f"""
            bert.embeddings.{{word_embeddings,position_embeddings,token_type_embeddings}}.weight
            bert.embeddings.LayerNorm.*
            bert.encoder.layer.{{0,1}}.{BERT_LAYER}
            bert.pooler.dense.*
            classifier.*""",
        "all-linear": f"bert.encoder.layer.{{0,1}}.{BERT_LINEAR} bert.pooler.dense.*",
        "layer-norm": """
            bert.embeddings.LayerNorm.*
            bert.encoder.layer.{0,1}.{attention.output,output}.LayerNorm.*""",
        "attention": f"bert.encoder.layer.{{0,1}}.{BERT_ATTENTION}",
        "embedding": "bert.embeddings.{word_embeddings,position_embeddings,token_type_embeddings}.weight",
        "last-decoder-layer": NOTHING,
        "last-encoder-layer": f"bert.encoder.layer.1.{BERT_LAYER}",
    },
    "roberta": {
        "all": f"""
            roberta.embeddings.{{word_embeddings,token_type_embeddings}}.weight
            roberta.embeddings.LayerNorm.*
            roberta.embeddings.position_embeddings.weight
            roberta.encoder.layer.{{0,1}}.{BERT_LAYER}
            classifier.{{dense,out_proj}}.*""",
        "all-linear": f"roberta.encoder.layer.{{0,1}}.{BERT_LINEAR}",
        "layer-norm": """
            roberta.embeddings.LayerNorm.*
            roberta.encoder.layer.{0,1}.{attention.output,output}.LayerNorm.*""",
        "attention": f"roberta.encoder.layer.{{0,1}}.{BERT_ATTENTION}",
        "embedding": "roberta.embeddings.{word_embeddings,token_type_embeddings,position_embeddings}.weight",
        "last-decoder-layer": NOTHING,
        "last-encoder-layer": f"roberta.encoder.layer.1.{BERT_LAYER}",
    },
    "distilbert": {
        "all": f"""
            distilbert.embeddings.{{word_embeddings,position_embeddings}}.weight
            distilbert.embeddings.LayerNorm.*
            distilbert.transformer.layer.{{0,1}}.{DISTILBERT_LAYER}
            pre_classifier.*
            classifier.*""",
        "all-linear": """
            distilbert.transformer.layer.{0,1}.{attention.q_lin,attention.k_lin,attention.v_lin,attention.out_lin,ffn.lin1,ffn.lin2}.*
            pre_classifier.*""",
        "layer-norm": """
            distilbert.embeddings.LayerNorm.*
            distilbert.transformer.layer.{0,1}.{sa_layer_norm,output_layer_norm}.*""",
        "attention": "distilbert.transformer.layer.{0,1}.attention.{q_lin,k_lin,v_lin,out_lin}.*",
        "embedding": "distilbert.embeddings.{word_embeddings,position_embeddings}.weight",
        "last-decoder-layer": NOTHING,
        "last-encoder-layer": f"distilbert.transformer.layer.1.{DISTILBERT_LAYER}",
    },
    # ALBERT's two layers are one group of parameters: its last layer is the shared one.
    "albert": {
        "all": f"""
            albert.embeddings.{{word_embeddings,position_embeddings,token_type_embeddings}}.weight
            albert.embeddings.LayerNorm.*
            albert.encoder.embedding_hidden_mapping_in.*
            {ALBERT_LAYER}.full_layer_layer_norm.*
            {ALBERT_LAYER}.attention.{{query,key,value,dense,LayerNorm}}.*
            {ALBERT_LAYER}.{{ffn,ffn_output}}.*
            albert.pooler.*
            classifier.*""",
        "all-linear": f"""
            albert.encoder.embedding_hidden_mapping_in.*
            {ALBERT_LAYER}.attention.{{query,key,value,dense}}.*
            {ALBERT_LAYER}.{{ffn,ffn_output}}.*
            albert.pooler.*""",
        "layer-norm": f"""
            albert.embeddings.LayerNorm.*
            {ALBERT_LAYER}.full_layer_layer_norm.*
            {ALBERT_LAYER}.attention.LayerNorm.*""",
        "attention": f"{ALBERT_LAYER}.attention.{{query,key,value,dense}}.*",
        "embedding": "albert.embeddings.{word_embeddings,position_embeddings,token_type_embeddings}.weight",
        "last-decoder-layer": NOTHING,
        "last-encoder-layer": f"""
            {ALBERT_LAYER}.full_layer_layer_norm.*
            {ALBERT_LAYER}.attention.{{query,key,value,dense,LayerNorm}}.*
            {ALBERT_LAYER}.{{ffn,ffn_output}}.*""",
    },
    # T5's table of relative positions is an nn.Embedding in attention: it counts as attention. lm_head is tied.
    "t5": {
        "all": f"""
            shared.weight
            encoder.block.0.layer.0.SelfAttention.{FIRST_T5_ATTENTION}
            encoder.block.0.layer.0.layer_norm.weight
            encoder.block.0.layer.1.{{DenseReluDense.wi,DenseReluDense.wo,layer_norm}}.weight
            encoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            encoder.block.1.layer.0.layer_norm.weight
            encoder.block.1.layer.1.{{DenseReluDense.wi,DenseReluDense.wo,layer_norm}}.weight
            encoder.final_layer_norm.weight
            decoder.block.0.layer.0.SelfAttention.{FIRST_T5_ATTENTION}
            decoder.block.0.layer.0.layer_norm.weight
            decoder.block.0.layer.1.EncDecAttention.{T5_ATTENTION}
            decoder.block.0.layer.1.layer_norm.weight
            decoder.block.0.layer.2.{{DenseReluDense.wi,DenseReluDense.wo,layer_norm}}.weight
            decoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            decoder.block.1.layer.0.layer_norm.weight
            decoder.block.1.layer.1.EncDecAttention.{T5_ATTENTION}
            decoder.block.1.layer.1.layer_norm.weight
            decoder.block.1.layer.2.{{DenseReluDense.wi,DenseReluDense.wo,layer_norm}}.weight
            decoder.final_layer_norm.weight""",
        "all-linear": f"""
            encoder.block.0.layer.0.SelfAttention.{T5_ATTENTION}
            encoder.block.0.layer.1.DenseReluDense.{{wi,wo}}.weight
            encoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            encoder.block.1.layer.1.DenseReluDense.{{wi,wo}}.weight
            decoder.block.0.layer.0.SelfAttention.{T5_ATTENTION}
            decoder.block.0.layer.1.EncDecAttention.{T5_ATTENTION}
            decoder.block.0.layer.2.DenseReluDense.{{wi,wo}}.weight
            decoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            decoder.block.1.layer.1.EncDecAttention.{T5_ATTENTION}
            decoder.block.1.layer.2.DenseReluDense.{{wi,wo}}.weight""",
        "layer-norm": """
            encoder.block.{0,1}.layer.{0,1}.layer_norm.weight
            encoder.final_layer_norm.weight
            decoder.block.{0,1}.layer.{0,1,2}.layer_norm.weight
            decoder.final_layer_norm.weight""",
        "attention": f"""
            encoder.block.0.layer.0.SelfAttention.{FIRST_T5_ATTENTION}
            encoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            decoder.block.0.layer.0.SelfAttention.{FIRST_T5_ATTENTION}
            decoder.block.0.layer.1.EncDecAttention.{T5_ATTENTION}
            decoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            decoder.block.1.layer.1.EncDecAttention.{T5_ATTENTION}""",
        "embedding": "shared.weight",
        "last-decoder-layer": f"""
            decoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            decoder.block.1.layer.0.layer_norm.weight
            decoder.block.1.layer.1.EncDecAttention.{T5_ATTENTION}
            decoder.block.1.layer.1.layer_norm.weight
            decoder.block.1.layer.2.{{DenseReluDense.wi,DenseReluDense.wo,layer_norm}}.weight""",
        "last-encoder-layer": f"""
            encoder.block.1.layer.0.SelfAttention.{T5_ATTENTION}
            encoder.block.1.layer.0.layer_norm.weight
            encoder.block.1.layer.1.{{DenseReluDense.wi,DenseReluDense.wo,layer_norm}}.weight""",
    },
    # Marian's sinusoidal positions are frozen, but parameters all the same.
    "marian": {
        "all": f"""
            model.shared.weight
            model.encoder.embed_positions.weight
            model.encoder.layers.{{0,1}}.{BART_ENCODER_LAYER}
            model.decoder.embed_positions.weight
            model.decoder.layers.{{0,1}}.{BART_DECODER_LAYER}""",
        "all-linear": f"""
            model.encoder.layers.{{0,1}}.{BART_ENCODER_LINEAR}
            model.decoder.layers.{{0,1}}.{BART_DECODER_LINEAR}""",
        "layer-norm": """
            model.encoder.layers.{0,1}.{self_attn_layer_norm,final_layer_norm}.*
            model.decoder.layers.{0,1}.{self_attn_layer_norm,encoder_attn_layer_norm,final_layer_norm}.*""",
        "attention": f"""
            model.encoder.layers.{{0,1}}.self_attn.{BART_ATTENTION}
            model.decoder.layers.{{0,1}}.{{self_attn,encoder_attn}}.{BART_ATTENTION}""",
        "embedding": "model.shared.weight model.{encoder,decoder}.embed_positions.weight",
        "last-decoder-layer": f"model.decoder.layers.1.{BART_DECODER_LAYER}",
        "last-encoder-layer": f"model.encoder.layers.1.{BART_ENCODER_LAYER}",
    },
    "bart": {
        "all": f"""
            model.shared.weight
            model.encoder.embed_positions.weight
            model.encoder.layers.{{0,1}}.{BART_ENCODER_LAYER}
            model.encoder.layernorm_embedding.*
            model.decoder.embed_positions.weight
            model.decoder.layers.{{0,1}}.{BART_DECODER_LAYER}
            model.decoder.layernorm_embedding.*""",
        "all-linear": f"""
            model.encoder.layers.{{0,1}}.{BART_ENCODER_LINEAR}
            model.decoder.layers.{{0,1}}.{BART_DECODER_LINEAR}""",
        "layer-norm": """
            model.encoder.layers.{0,1}.{self_attn_layer_norm,final_layer_norm}.*
            model.encoder.layernorm_embedding.*
            model.decoder.layers.{0,1}.{self_attn_layer_norm,encoder_attn_layer_norm,final_layer_norm}.*
            model.decoder.layernorm_embedding.*""",
        "attention": f"""
            model.encoder.layers.{{0,1}}.self_attn.{BART_ATTENTION}
            model.decoder.layers.{{0,1}}.{{self_attn,encoder_attn}}.{BART_ATTENTION}""",
        "embedding": "model.shared.weight model.{encoder,decoder}.embed_positions.weight",
        "last-decoder-layer": f"model.decoder.layers.1.{BART_DECODER_LAYER}",
        "last-encoder-layer": f"model.encoder.layers.1.{BART_ENCODER_LAYER}",
    },
    "gpt2": {
        "all": """
            transformer.{wte,wpe}.weight
            transformer.h.{0,1}.{ln_1,attn.c_attn,attn.c_proj,ln_2,mlp.c_fc,mlp.c_proj}.*
            transformer.ln_f.*""",
        "all-linear": "transformer.h.{0,1}.{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}.*",
        "layer-norm": "transformer.h.{0,1}.{ln_1,ln_2}.* transformer.ln_f.*",
        "attention": "transformer.h.{0,1}.attn.{c_attn,c_proj}.*",
        "embedding": "transformer.{wte,wpe}.weight",
        "last-decoder-layer": "transformer.h.1.{ln_1,attn.c_attn,attn.c_proj,ln_2,mlp.c_fc,mlp.c_proj}.*",
        "last-encoder-layer": NOTHING,
    },
    "llama": {
        "all": f"model.embed_tokens.weight model.layers.{{0,1}}.{LLAMA_LAYER} model.norm.weight lm_head.weight",
        "all-linear": """
            model.layers.{0,1}.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.o_proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj}.weight""",
        "layer-norm": "model.layers.{0,1}.{input_layernorm,post_attention_layernorm}.weight model.norm.weight",
        "attention": "model.layers.{0,1}.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight",
        "embedding": "model.embed_tokens.weight",
        "last-decoder-layer": f"model.layers.1.{LLAMA_LAYER}",
        "last-encoder-layer": NOTHING,
    },
    "vit": {
        "all": f"""
            vit.embeddings.{{cls_token,position_embeddings}}
            vit.embeddings.patch_embeddings.projection.*
            vit.layers.{{0,1}}.{VIT_LAYER}
            vit.layernorm.*
            classifier.*""",
        "all-linear": """
            vit.layers.{0,1}.{attention.q_proj,attention.k_proj,attention.v_proj,attention.o_proj,mlp.fc1,mlp.fc2}.*""",
        "layer-norm": "vit.layers.{0,1}.{layernorm_before,layernorm_after}.* vit.layernorm.*",
        "attention": "vit.layers.{0,1}.attention.{q_proj,k_proj,v_proj,o_proj}.*",
        "embedding": """
            vit.embeddings.{cls_token,position_embeddings}
            vit.embeddings.patch_embeddings.projection.*""",
        "last-decoder-layer": NOTHING,
        "last-encoder-layer": f"vit.layers.1.{VIT_LAYER}",
    },
    # A block of ResNet's stack is a stage. Its only linear layer is the output layer; it normalizes with BatchNorm.
    "resnet": {
        "all": f"""
            resnet.embedder.embedder.{RESNET_LAYER}
            resnet.encoder.stages.0.layers.0.layer.{{0,1}}.{RESNET_LAYER}
            resnet.encoder.stages.1.layers.0.shortcut.{RESNET_LAYER}
            resnet.encoder.stages.1.layers.{{0,1}}.layer.{{0,1}}.{RESNET_LAYER}
            classifier.1.*""",
        "all-linear": NOTHING,
        "layer-norm": NOTHING,
        "attention": NOTHING,
        "embedding": "resnet.embedder.embedder.convolution.weight",
        "last-decoder-layer": NOTHING,
        "last-encoder-layer": f"""
            resnet.encoder.stages.1.layers.0.shortcut.{RESNET_LAYER}
            resnet.encoder.stages.1.layers.{{0,1}}.layer.{{0,1}}.{RESNET_LAYER}""",
    },
}


def expand(patterns: str) -> list[str]:
    """Expand `a.{b,c}.d` to `a.b.d a.c.d`, the leftmost braces slowest, and a final `*` to `{weight,bias}`."""
    names = []
    for pattern in patterns.split():
        head, brace, tail = re.sub(r"\*$", "{weight,bias}", pattern).partition("{")
        choices, _, rest = tail.partition("}")
        names += [name for choice in choices.split(",") for name in expand(head + choice + rest)] if brace else [head]
    return names


def test_expand_is_understood() -> None:
    assert expand("a.{0,1}.{b,c.d}.* e") == [
        *("a.0.b.weight", "a.0.b.bias", "a.0.c.d.weight", "a.0.c.d.bias"),
        *("a.1.b.weight", "a.1.b.bias", "a.1.c.d.weight", "a.1.c.d.bias"),
        "e",
    ]


@pytest.mark.slow
@for_each("word", WORDS)
@for_each("architecture", EXPECTED)
def test_word_selects_exactly(model_of, architecture: str, word: str) -> None:
    model = model_of(architecture)
    expected = EXPECTED[architecture][word]
    if expected is NOTHING:
        with pytest.raises(TargetError, match=rf'^expected .* for the word "{word}", got .*, (use|select) '):
            select_parameters(model, word)
        return
    selected = select_parameters(model, word)
    assert list(selected) == expand(expected)
    assert all(model.get_parameter(name) is parameter for name, parameter in selected.items())


@for_each("architecture", EXPECTED)
def test_all_is_the_default_and_everything(model_of, architecture: str) -> None:
    model = model_of(architecture)
    assert select_parameters(model) == dict(model.named_parameters())
