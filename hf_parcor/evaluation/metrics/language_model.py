"""Loss, perplexity and accuracy of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_parcor.arguments import check_count
from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.evaluation.losses import shifts_labels, without_router_loss
from hf_parcor.evaluation.metrics.over_batches import OverLabels
from hf_parcor.records.metric_info import NATS, SHARE, MetricInfo


class LanguageModelMetric(OverLabels):
    """Mean loss of a token, perplexity (its exponential), and the accuracy of the likeliest token.

    A causal model predicts the next token at each position, so the first token of a row is ignored. Masked and
    encoder-decoder models predict the label at its own position. All tokens of all batches count equally, except those
    with the label −100. A prediction that is not finite is never right, as in `ClassificationMetric`.

    Args:
        batches: Mappings of tensors with `labels`, as a list or a `DataLoader`.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or all labels are ignored.
    """

    _infos: ClassVar[Mapping[str, MetricInfo]] = {
        "loss": MetricInfo(False, NATS),
        "perplexity": MetricInfo(False),
        "accuracy": MetricInfo(True, SHARE),
    }

    @classmethod
    def of_text(
        cls,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        stride: int | None = None,
        batch_size: int = 1,
    ) -> LanguageModelMetric:
        """Return the metric of one running text, for a causal model: perplexity with a sliding window.

        The text is tokenized as a whole, with the special tokens that the tokenizer puts around a text. See
        `sliding_windows` for which tokens count.

        Args:
            text: The text, for example the content of a file.
            tokenizer: The model's tokenizer.
            length: Tokens of a window, the context; at most as many as the model has positions.
            stride: As in `sliding_windows`.
            batch_size: Windows a batch. It does not change the numbers.

        Raises:
            ValueError: The stride exceeds the length, or the text has fewer than two tokens.
        """
        check_count("batch_size", batch_size)
        windows = sliding_windows(tokenizer(text, verbose=False)["input_ids"], length, stride)
        if not windows:
            raise ValueError("text: expected two tokens or more, got fewer; name another text")
        batches = [padded_windows(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)]
        return cls(batches)

    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return the sums over the labels of one batch; the loss of routers does not count.

        Raises:
            ValueError: As in `OverLabels`.
        """
        return super().of_batch(model, without_router_loss(model, batch))

    def _shifts(self, model: nn.Module) -> bool:
        """Return whether a model predicts the label of the next place, as causal ones do."""
        return shifts_labels(model)

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return `loss`, `perplexity` and `accuracy` from the sums of all batches.

        If predictions were not finite, their share is returned too, as in `ClassificationMetric`.

        Raises:
            ValueError: All labels are ignored.
        """
        means = super().combine(parts)
        loss, accuracy = means.pop("loss"), means.pop("accuracy")
        return {"loss": loss, "perplexity": _exponential(loss), "accuracy": accuracy, **means}


def sliding_windows(tokens: Sequence[int], length: int, stride: int | None = None) -> list[dict[str, list[int]]]:
    """Return windows over a text, with `input_ids` and `labels`, in which each token counts once.

    A window begins every `stride` tokens. In each window, the tokens that no earlier window has count: after the
    first window, the last `stride` tokens, each with at least `length − stride` tokens of context. A smaller stride
    gives more context, and costs `length / stride` times the passes. The first token of the text is not predicted; if
    windows do not overlap, nor is the first token of each window.

    Args:
        tokens: The whole text.
        length: Tokens of a window, at least 2; the last may have fewer.
        stride: From 1 to `length`. Default `length`, for windows that do not overlap.

    Raises:
        ValueError: The length is not a count of at least 2, or the stride none from 1 to the length, so that tokens
            would be left out.

    Examples:
        >>> for window in sliding_windows([1, 2, 3, 4, 5], 3, stride=1):
        ...     print(window)
        {'input_ids': [1, 2, 3], 'labels': [1, 2, 3]}
        {'input_ids': [2, 3, 4], 'labels': [-100, -100, 4]}
        {'input_ids': [3, 4, 5], 'labels': [-100, -100, 5]}
    """
    check_count("length", length, minimum=2)  # one token alone predicts nothing
    stride = length if stride is None else stride
    check_count("stride", stride)
    if stride > length:
        raise ValueError(
            f"stride: expected at most {length:,}, the tokens of a window, got {stride:,}; lower it, so that no token "
            "is left out"
        )
    windows, seen = [], 0
    for start in range(0, len(tokens), stride):
        window = list(tokens[start : start + length])
        context = seen - start
        seen = start + len(window)
        if len(window) > 1:
            windows.append({"input_ids": window, "labels": [IGNORED_LABEL] * context + window[context:]})
        if seen == len(tokens):
            break
    return windows


def padded_windows(windows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Return windows as a batch; what pads them on the right is masked, and counts for nothing."""
    tokens, labels = ([torch.tensor(window[name]) for window in windows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(window) for window in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def _exponential(loss: float) -> float:
    if loss == -math.inf:  # no loss of a model: a perplexity of 0 would be better than any
        return math.nan
    try:
        return math.exp(loss)
    except OverflowError:  # a destroyed model
        return math.inf
