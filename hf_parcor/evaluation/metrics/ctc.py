"""What a model that labels each frame hears, compared with reference texts: connectionist temporal classification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.evaluation.metrics.over_batches import NO_TEXT, OverPairs, Pairs
from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.evaluation.outputs import NOT_FINITE, Output, chosen_class, inside_adapters

# How models of Transformers say how many frames they make of so many samples, or features.
_COUNTING = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


class CTCMetric(OverPairs):
    r"""A score of transcripts over all batches together, of a model with a head for CTC, such as Wav2Vec 2.0.

    A transcript is the likeliest token of each frame, each of several equal ones in a row once, without the blank: the
    greedy decoding, without a language model. Frames of padding do not count, if the batch has an `attention_mask`.

    If the scores of a frame are not finite (one is NaN or +∞, or all are −∞), the text is replaced by the character
    "\ufffd", which is never right. The share of these texts is `predictions_not_finite`.

    Args:
        tokenizer: Its padding token is the blank. It decodes transcripts and labels.
        batches: Mappings of tensors that the model takes, with the reference as `labels`, −100 for padding.
        score: Called as `score(predictions=..., references=...)` with lists of texts; returns a number or numbers by
            name. For example `TranscriptScore()`.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or the score returns no number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batches: Iterable[Mapping[str, Any]], score: Score) -> None:
        super().__init__(batches, score)
        self._tokenizer = tokenizer

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        """Return the transcripts of one batch, its references, and how many transcripts were not finite.

        Raises:
            ValueError: There are no labels, or the model returns no logits.
        """
        labels = self._labels(batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        predicted, finite = (part.cpu() for part in chosen_class(Output.of(model, inputs).checked_logits()))
        counts = frames_of(model, inputs, *predicted.shape)
        texts = [self._text(row[:count]) for row, count in zip(predicted, counts, strict=True)]
        lost = [not bool(row[:count].all()) for row, count in zip(finite, counts, strict=True)]
        return (
            [NO_TEXT if gone else text for text, gone in zip(texts, lost, strict=True)],
            [self._decoded(row[row != IGNORED_LABEL]) for row in labels],
            {NOT_FINITE: sum(lost)},
        )

    def _text(self, frames: Tensor) -> str:
        once = torch.unique_consecutive(frames)
        return self._decoded(once[once != self._tokenizer.pad_token_id])

    def _decoded(self, tokens: Tensor) -> str:
        # Of tokenizers for CTC, `decode` would join two equal letters of a reference.
        return str(self._tokenizer.decode(tokens.tolist(), group_tokens=False)).strip()


def frames_of(model: nn.Module, inputs: Mapping[str, Any], rows: int, longest: int) -> list[int]:
    """Return how many frames of each recording of a batch are not of padding.

    Args:
        model: What makes frames of samples or features.
        inputs: The batch; if it has no `attention_mask`, or the model does not say how many, all frames count.
        rows: The recordings.
        longest: The frames of the longest.
    """
    mask = inputs.get("attention_mask")
    counts = None if mask is None else count_frames(model, torch.as_tensor(mask).sum(-1))
    return [longest] * rows if counts is None else [min(longest, count) for count in counts]


def count_frames(model: nn.Module, lengths: Tensor) -> list[int] | None:
    """Return how many frames a model makes of recordings; None if it does not say so.

    Args:
        model: A model that hears.
        lengths: How long each recording is, in what the model takes: samples, or features.
    """
    inner: Any = inside_adapters(model)
    counting = next((getattr(inner, name) for name in _COUNTING if hasattr(inner, name)), None)
    return None if counting is None else [max(0, int(count)) for count in counting(lengths)]
