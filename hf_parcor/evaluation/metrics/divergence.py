"""How far a model's answers are from those that it gave before: a metric that needs no labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.distributed.fsdp import as_written
from hf_parcor.evaluation.identity.fingerprint import fingerprint
from hf_parcor.evaluation.losses import shifts_labels, with_prompt
from hf_parcor.evaluation.metrics.ctc import frames_of
from hf_parcor.evaluation.metrics.over_batches import ANSWERS, AroundMetric, BatchMetric
from hf_parcor.evaluation.outputs import Output, Problem
from hf_parcor.model_state import evaluation_mode, undone
from hf_parcor.overriding import hook_after
from hf_parcor.records.metric_info import MetricInfo, stated_by
from hf_parcor.records.sensitivity import DIVERGENCE

_MEMORY = 2**30  # bytes of answers that are kept
_INFO = MetricInfo(greater_is_better=False, unit="nats")
_OTHER_PROBLEMS = {Problem.NUMBERS.value, Problem.LABELS.value}  # whose logits are no distribution
_OF_MAPS = 4  # dimensions: classes of the pixels of images, before their height and width


class NotFiniteError(ValueError):
    """The unchanged model already answers with NaN or infinities, so that nothing can be measured."""


class _Part(NamedTuple):
    """What one batch adds: what it adds to the metric, the sum of divergences, and of how many predictions."""

    of_metric: Any
    total: float
    predictions: int


class WithDivergence(AroundMetric):
    r"""A `BatchMetric`, and how far the model's answers are from those of the model as it was.

    ::

        D = mean over predictions of KL(p₀ ‖ p) = Σ_c p₀(c) (log p₀(c) − log p(c)),    p = softmax(logits)

    where p₀ are the answers of the model when this object was made. D is never below 0, and is 0 for the same answers;
    to second order it is ½ δᵀFδ with the Fisher information F of the model's own answers. D tells small harm from
    none: unlike a loss it does not fall by chance when weights change, and unlike an accuracy it does not change in
    steps of a row.

    Predictions are rows of logits with two or more classes, or the pixels of a segmentation (B, C, H, W). Of an
    `EmbeddingMetric` they are the documents of a batch for each query, see `embedding_loss`. Of a model with encoder
    and decoder that generates texts, they are each token of the reference, given those before it. If labels or an
    attention mask have their shape, only predictions with a label other than −100 (of the next token, for a causal
    language model), or that are attended to, count; of frames of sound, those that are not of padding. For a model
    without such logits, only the metric is returned. D is NaN if answers are NaN, and infinite if they rule out what
    was possible before.

    Args:
        metric: For example a `ClassificationMetric`.
        model: The unchanged model. It is run over all batches whose answers are kept, in evaluation mode.
        memory: How many bytes of answers are kept in main memory. The divergence ignores batches beyond that, and a
            note says so; the metric is over all.

    Raises:
        NotFiniteError: The model's own answers are not finite. A `ValueError`.

    Examples:
        >>> from hf_parcor.evaluation import ClassificationMetric
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> metric = WithDivergence(
        ...     ClassificationMetric([{"input": torch.ones(1, 2), "labels": torch.tensor([0])}]), model
        ... )
        >>> metric(model)["divergence"]
        0.0
        >>> model.weight.data = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
        >>> round(metric(model)["divergence"], 3)
        0.462
    """

    def __init__(self, metric: BatchMetric, model: nn.Module, *, memory: int = _MEMORY) -> None:
        super().__init__(metric)
        self._answers: dict[str, Tensor] = {}
        self._known = 0
        kept = 0
        parts = []
        with evaluation_mode(model), undone(model):
            for number, batch in enumerate(metric.batches, start=1):
                found, logits = self._answered(model, batch)
                if logits is None:
                    parts.append(_Part(found, 0.0, 0))
                    continue
                counts = _that_count(model, batch, logits)
                _check_finite(logits[counts], number)
                kept += logits.numel() * logits.element_size()
                if kept > memory:
                    break
                self._answers[fingerprint([batch])] = logits
                self._known = number
                parts.append(_Part(found, 0.0, int(counts.sum())))
        self._truncated = kept > memory
        self._clean = None if self._truncated else self.combine(parts)

    @property
    def clean(self) -> dict[str, float] | None:
        """The metrics of the model as it was, measured when answers were kept; None if not all were kept."""
        return None if self._clean is None else dict(self._clean)

    @property
    def batches(self) -> Iterable[Mapping[str, Any]]:
        """The data."""
        batches: Iterable[Mapping[str, Any]] = self._metric.batches
        return batches

    @property
    def kept_bytes(self) -> int:
        """The metric's own."""
        return int(getattr(self._metric, "kept_bytes", 0))

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the metric, and one if not all answers could be kept."""
        said = super().notes
        if not self._truncated:
            return said
        if not self._known:
            return (*said, "There is no divergence: the answers on one batch take more memory than is given.")
        first = "batch" if self._known == 1 else f"{self._known} batches"
        return (*said, f"The divergence is that of the first {first}, whose answers were kept.")

    def identity(self) -> Mapping[str, Any]:
        """Return the metric; the answers follow from weights and data."""
        return {"metric": self._metric, DIVERGENCE: True}

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the metric states; of the divergence, that small is good."""
        return _INFO if name == DIVERGENCE else stated_by(self._metric, name)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics over all batches."""
        return self.combine([self.of_batch(model, batch) for batch in self.batches])

    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> _Part:
        """Return what one batch adds."""
        found, logits = self._answered(model, batch)
        before = self._answers.get(fingerprint([batch]))
        if before is None or logits is None or logits.shape != before.shape:
            return _Part(found, 0.0, 0)
        counts = _that_count(model, batch, logits)
        first, second = (one[counts].double().log_softmax(-1) for one in (before, logits))
        chance = first.exp()
        terms = (chance * (first - second)).masked_fill(chance == 0, 0.0)  # 0 log 0 is 0
        total = float(terms.sum().clamp(min=0.0))  # rounding may leave less than nothing; NaN stays NaN
        return _Part(found, total, len(first))

    def combine(self, parts: Sequence[_Part]) -> dict[str, float]:
        """Return the metrics from what all batches add."""
        found = dict(self._metric.combine([part.of_metric for part in parts]))
        count = sum(part.predictions for part in parts)
        return {**found, DIVERGENCE: sum(part.total for part in parts) / count} if count else found

    def _answered(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Tensor | None]:
        """Return what the metric finds on a batch, and the logits on the host; None where they are no distribution."""
        seen: list[Tensor | None] = []
        with ExitStack() as hooks:
            hook_after(hooks, model, lambda _, __, output: seen.append(Output.read(output).logits))
            found = self._metric.of_batch(model, batch)
        logits = seen[0] if len(seen) == 1 else None  # a generated text takes many calls, and other ones each time
        reference = _reference(model, batch)
        if isinstance(found, Mapping) and ANSWERS in found:
            logits = found[ANSWERS]
        elif reference is not None and (logits is None or logits.shape[:-1] != reference.shape):
            with torch.no_grad():
                logits = Output.of(model, batch).logits
        said = getattr(getattr(as_written(model), "config", None), "problem_type", None)
        inferred = found.get("problem") if isinstance(found, Mapping) else None
        if logits is None or {said, inferred} & _OTHER_PROBLEMS or logits.ndim < 2:
            return found, None
        if logits.ndim == _OF_MAPS:
            logits = logits.movedim(1, -1)
        if logits.shape[-1] < 2:
            return found, None
        return found, logits.detach().float().cpu()


def _reference(model: nn.Module, batch: Any) -> Tensor | None:
    """Return the labels of a batch if they are texts that an encoder-decoder writes."""
    config = getattr(as_written(model), "config", None)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(labels, Tensor):
        return None
    return labels if labels.ndim == 2 and not labels.is_floating_point() else None


def _check_finite(logits: Tensor, number: int) -> None:
    """Refuse answers of a model as it is that are no distribution, such as those of weights that are NaN."""
    if logits.log_softmax(-1).isnan().any():
        found = "NaN" if logits.isnan().any() else "infinities"
        raise NotFiniteError(
            f"model: expected finite answers, got {found} on batch {number} of the data, with the weights as they "
            "are; look for NaN among the weights, or load them in another precision (dtype='float32')"
        )


def _that_count(model: nn.Module, batch: Any, logits: Tensor) -> Tensor:
    """Return which predictions count, as a mask; where labels are shifted, each is of the place before its label."""
    shape = logits.shape[:-1]
    if isinstance(batch, Mapping):
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if isinstance(labels, Tensor) and (labels := with_prompt(model, labels)).shape == shape:
            counts = (labels != IGNORED_LABEL).cpu()
            return pad(counts[..., 1:], (0, 1)) if shifts_labels(model) else counts
        if isinstance(mask, Tensor) and mask.shape == shape:
            return (mask != 0).cpu()
        if isinstance(mask, Tensor) and len(shape) == 2 and mask.ndim == 2:
            counts = torch.tensor(frames_of(model, batch, *shape))
            return torch.arange(shape[1]) < counts[:, None]
    return torch.ones(shape, dtype=torch.bool, device=logits.device)
