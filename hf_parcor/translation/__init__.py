"""Translation from scratch or fine-tuned: parallel text, vocabularies, batches of tokens, averages, BLEU."""

from hf_parcor.translation.averaging import average_checkpoints, average_weights, last_checkpoints
from hf_parcor.translation.bleu import BleuScores, tokenize_13a
from hf_parcor.translation.iwslt import IwsltText, read_iwslt
from hf_parcor.translation.iwslt14 import (
    IWSLT14_DE_EN_PAIRS,
    moses_tokenizer,
    prepare_iwslt14_de_en,
    unlike_papers,
)
from hf_parcor.translation.parallel_text import ParallelText, from_rows, read_parallel_files, read_rows
from hf_parcor.translation.shapes import freeze_positions, iwslt_de_en, new_model, wmt_en_de
from hf_parcor.translation.token_batches import TokenBatchesMixin, TokenBatchSampler, sentence_lengths
from hf_parcor.translation.vocabulary import EncodedText, encode, train_bpe, train_unigram

__all__ = [
    "IWSLT14_DE_EN_PAIRS",
    "BleuScores",
    "EncodedText",
    "IwsltText",
    "ParallelText",
    "TokenBatchSampler",
    "TokenBatchesMixin",
    "average_checkpoints",
    "average_weights",
    "encode",
    "freeze_positions",
    "from_rows",
    "iwslt_de_en",
    "last_checkpoints",
    "moses_tokenizer",
    "new_model",
    "prepare_iwslt14_de_en",
    "read_iwslt",
    "read_parallel_files",
    "read_rows",
    "sentence_lengths",
    "tokenize_13a",
    "train_bpe",
    "train_unigram",
    "unlike_papers",
    "wmt_en_de",
]
