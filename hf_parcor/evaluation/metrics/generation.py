"""What a model generates, compared with reference texts by any library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_parcor.evaluation.metrics.over_pairs import OverPairs
from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.labels import IGNORED_LABEL

_FOR_THE_LOSS = ("labels", "decoder_input_ids", "decoder_attention_mask")


class GenerationMetric(OverPairs):
    """Generated texts of all batches, scored at once: translations, summaries, answers.

    Made batch by batch, so that the encoder runs once a batch for all corruptions of the decoder. Of a model without
    an encoder, what it generates after the input counts (pad inputs on the left).

    Args:
        tokenizer: Decodes what is generated, and the labels.
        batches: Mappings of tensors that `generate` takes, with the reference as `labels`, −100 for padding.
        score: Called as `score(predictions=..., references=...)` with lists of texts, returns a number or numbers by
            name: `SacrebleuScore("bleu")`, `evaluate.load("rouge").compute`, or a function of your own.
        progress: Whether to show a progress bar.
        **settings: For `generate`. Without sampling, unless `do_sample=True` is among them.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or the score returns no number.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batches: Iterable[Mapping[str, Any]],
        score: Score,
        *,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(batches, score, progress=progress)
        self._tokenizer = tokenizer
        self._settings = {"do_sample": False, **settings}

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return the generated texts of one batch, and its references."""
        labels = self._labels(batch)
        inputs = {name: value for name, value in batch.items() if name not in _FOR_THE_LOSS}
        generating: Any = model
        tokens = generating.generate(**send_to_device(inputs, next(model.parameters()).device), **self._settings)
        if not generating.config.is_encoder_decoder:
            tokens = tokens[:, batch["input_ids"].shape[1] :]
        return self._texts(tokens), self._texts([row[row != IGNORED_LABEL] for row in labels])

    def _texts(self, rows: Iterable[Tensor]) -> list[str]:
        return [str(self._tokenizer.decode(row.tolist(), skip_special_tokens=True)).strip() for row in rows]
