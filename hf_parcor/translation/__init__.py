"""Translation from scratch or fine-tuned: parallel text, vocabularies, batches of tokens, averages, BLEU."""

from hf_parcor.translation.averaging import average_checkpoints, average_weights, last_checkpoints
from hf_parcor.translation.encoding import EncodedText, encode
from hf_parcor.translation.files import read_parallel_files, read_rows
from hf_parcor.translation.parallel_text import ParallelText, from_rows
from hf_parcor.translation.scores import BleuScores, tokenize_13a
from hf_parcor.translation.shapes import freeze_positions, iwslt_de_en, new_model, wmt_en_de
from hf_parcor.translation.token_batches import TokenBatchSampler
from hf_parcor.translation.trainer import TokenBatchesMixin, sentence_lengths
from hf_parcor.translation.vocabulary import train_bpe, train_unigram

__all__ = [
    "BleuScores",
    "EncodedText",
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
    "new_model",
    "read_parallel_files",
    "read_rows",
    "sentence_lengths",
    "tokenize_13a",
    "train_bpe",
    "train_unigram",
    "wmt_en_de",
]
