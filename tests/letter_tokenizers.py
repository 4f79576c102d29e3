"""Tokenizers of several kinds that know letters and a few pieces of words."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TokenizerFast = transformers.PreTrainedTokenizerFast


def word_pieces() -> TokenizerFast:
    """As of BERT: [CLS] question [SEP] text [SEP], in lower case, parts of words, padding at the right."""
    letters = "abcdefghij"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "ab", "##cd", "."]
    raw = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return TokenizerFast(tokenizer_object=raw, **names)


def bytes_of_text() -> TokenizerFast:
    """As of GPT-2: bytes, with the space before a word in it, and nothing around; padding at the right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", *alphabet, "Ġa", "ab", "bc"])}
    raw = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("a", "b"), ("b", "c")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    return TokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def unigrams_at_left() -> TokenizerFast:
    """As of XLNet: text <sep> question <sep> <cls>, spaces as a part of words, padding at the left."""
    special = ["<pad>", "<unk>", "<sep>", "<cls>"]
    pieces = [(piece, 0.0) for piece in special] + [
        (piece, -1.0) for piece in ["▁", *"abcdefghijAB.\n", "▁a", "ab", "cde"]
    ]
    raw = Tokenizer(models.Unigram(pieces, unk_id=1))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A:0 <sep>:0 <cls>:2",
        pair="$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2",
        special_tokens=[("<sep>", 2), ("<cls>", 3)],
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "sep_token": "<sep>", "cls_token": "<cls>"}
    return TokenizerFast(tokenizer_object=raw, padding_side="left", **names)
