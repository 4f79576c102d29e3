"""What a model returns for a batch: its loss and its logits, in whatever form, finite or not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_parcor.batches import IGNORED_LABEL, private_copy
from hf_parcor.distributed.fsdp import as_written
from hf_parcor.evaluation.placement.device_map import input_device
from hf_parcor.overriding import overriding


class ForMetrics:
    """What stands beside the inputs of a batch for a metric to read: its subclasses, listed one a row."""


def own_batch(batch: Any, model: nn.Module) -> Any:
    """Return a batch on the model's device that this run of the model may write into, without what is `ForMetrics`.

    It is copied before it moves: a `BatchEncoding` moves in place.
    """
    inputs, _ = inputs_and_rest(batch)
    return send_to_device(private_copy(inputs), input_device(model))


def inputs_and_rest(batch: Any) -> tuple[Any, dict[str, Sequence[ForMetrics]]]:
    """Return what a model takes of a batch, and by name what stands in it for metrics alone."""
    entries = batch.items() if isinstance(batch, Mapping) else ()
    rest = {name: value for name, value in entries if _is_for_metrics(value)}
    return {name: value for name, value in entries if name not in rest} if rest else batch, rest


def _is_for_metrics(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], ForMetrics)


class Output(NamedTuple):
    """What a model returned, as far as metrics need it.

    Attributes:
        loss: Its own loss, a single number; None if it returned none.
        logits: Its logits; None if it returned none.
        kind: The name of its type, for messages.
    """

    loss: Tensor | None
    logits: Tensor | None
    kind: str

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Any]) -> Output:
        """Return what a model returns for its own copy of a batch.

        A tuple is read as Transformers makes it: the loss, if there is one, a single number, then the logits.
        """
        return cls.read(called(model, own_batch(batch, model)))

    @classmethod
    def read(cls, returned: Any) -> Output:
        """Read what a model returned: a mapping, an object with attributes, a tuple, or a tensor of bare logits."""
        kind = type(returned).__name__
        if isinstance(returned, Tensor):
            return cls(None, returned, kind)
        if isinstance(returned, tuple) and not hasattr(returned, "logits"):
            tensors = [part for part in returned if isinstance(part, Tensor)]
            has_loss = bool(tensors) and tensors[0].ndim == 0
            return cls(tensors[0] if has_loss else None, next(iter(tensors[has_loss:]), None), kind)
        found = [
            returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)
            for name in ("loss", "logits")
        ]
        loss, logits = (value if isinstance(value, Tensor) else None for value in found)
        if loss is None and isinstance(found[0], (int, float)):
            loss = torch.tensor(float(found[0]))
        return cls(loss, logits, kind)

    def mean_loss(self, problem: Problem, labels: Tensor, *, shifted: bool = False) -> float:
        """Return the model's own loss; the usual one of its logits where it returned none.

        Args:
            problem: The kind of labels.
            labels: Those of the batch.
            shifted: As in `usual_loss`.

        Raises:
            ValueError: It is not one number.
        """
        if self.loss is None:
            return float(usual_loss(problem, self.checked_logits(), labels, shifted=shifted))
        return self.own_loss()

    def own_loss(self) -> float:
        """Return the model's own loss.

        Raises:
            ValueError: There is none, or it is not one number.
        """
        if self.loss is None:
            raise ValueError(
                f"loss: expected the model to return one for this batch, got a {self.kind} without; let forward "
                "return it when a batch has labels, in evaluation mode too"
            )
        if self.loss.numel() != 1:
            raise ValueError(
                f"loss: expected one number, the mean over the batch, got shape {tuple(self.loss.shape)}; let the "
                "model return the mean, and take the model out of DataParallel (model.module)"
            )
        return float(self.loss)

    def checked_logits(self) -> Tensor:
        """Return the logits.

        Raises:
            ValueError: There are none.
        """
        if self.logits is None or not self.logits.ndim:
            raise ValueError(
                f"logits: expected the model to return a tensor of scores, got a {self.kind} without; use a model "
                "with a head for the task, or measure with a function of your own: model -> numbers by name"
            )
        return self.logits


def inside_adapters(model: nn.Module) -> nn.Module:
    """Return the model that PEFT wraps; one without adapters as it is."""
    inner: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return inner


def called(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return what a model returns for a batch, without the labels where its `forward` has no place for them.

    Accelerate tells the model of no other process: each is at another batch, or has none. Detectors of Transformers
    would divide their loss by the mean number of boxes over all processes, and wait for them. Of a model that a
    corruption destroyed they refuse the boxes that are NaN; the loss is NaN then, as everywhere else.

    Examples:
        >>> called(nn.Linear(2, 1), {"input": torch.ones(3, 2), "labels": torch.zeros(3)}).shape
        torch.Size([3, 1])
    """
    if "labels" in batch:
        taken = inspect.signature(as_written(model).forward).parameters
        if "labels" not in taken and all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
            batch = {name: value for name, value in batch.items() if name != "labels"}
    state: dict[str, Any] = PartialState._shared_state
    if state.get("num_processes", 1) == 1:
        return _with_a_loss(model, batch)
    with overriding(PartialState(), num_processes=1, distributed_type=DistributedType.NO):
        return _with_a_loss(model, batch)


def _with_a_loss(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    try:
        return model(**batch)
    except ValueError:
        if not isinstance(batch.get("labels"), (list, tuple)):  # of objects, one entry an image
            raise
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
        boxes = getattr(output, "pred_boxes", None)
        if not isinstance(boxes, Tensor) or not boxes.isnan().any():
            raise
        output["loss"] = boxes.sum()  # its gradient is NaN, too
        return output


def usual_loss(problem: Problem, logits: Tensor, labels: Tensor, *, shifted: bool = False) -> Tensor:
    """Return the mean loss that models of Transformers have for a kind of labels, for a model that returns none.

    That is cross-entropy where labels are classes (those of −100 do not count), binary cross-entropy where any number
    of them may be right, and the squared error of numbers.

    Args:
        problem: The kind of labels.
        logits: What the model returned.
        labels: In the shape of what it predicts; dimensions of size 1 may be more or fewer.
        shifted: Whether the model predicts the label of the next place.

    Examples:
        >>> usual_loss(Problem.NUMBERS, torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    labels, logits = labels.to(logits.device), logits.float()
    if problem is Problem.CLASSES:
        labels = aligned(labels, logits[..., 0], "a class for each")
        if shifted:
            labels, logits = labels[..., 1:], logits[..., :-1, :]
        flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
        return nn.functional.cross_entropy(*flat, ignore_index=IGNORED_LABEL)
    if problem is Problem.LABELS:
        labels = aligned(labels, logits, "a 0 or 1 for each label of a row")
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    return nn.functional.mse_loss(logits, aligned(labels, logits, "a number for each output").float())


def aligned(labels: Tensor, predictions: Tensor, what: str) -> Tensor:
    """Return labels in the shape of the predictions; dimensions of size 1 may be more or fewer.

    Raises:
        ValueError: The shapes differ otherwise, so that it is not known which label is whose.

    Examples:
        >>> aligned(torch.tensor([[0], [1]]), torch.tensor([1, 1]), "one class for each sequence")
        tensor([0, 1])
    """
    if _shape(labels) != _shape(predictions):
        raise ValueError(
            f"labels: expected the shape of what the model predicts, {tuple(predictions.shape)}, {what}, got "
            f"{tuple(labels.shape)}; collate one label for each prediction, or measure with a function of your own"
        )
    return labels.reshape(predictions.shape)


def _shape(tensor: Tensor) -> list[int]:
    """Return the shape without dimensions of size 1."""
    return [size for size in tensor.shape if size != 1]


NOT_FINITE = "predictions_not_finite"
"""The share of predictions that were not finite: among the numbers of a metric where there was any."""


def chosen_class(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest class, and whether it is one: there is no NaN, and the largest logit is finite.

    Logits of −∞ rule classes out, which models do on purpose; where nothing else is left, or one is +∞, there is no
    answer. PyTorch's `argmax` would call the place of the first NaN a class.

    Args:
        logits: Scores, a class each along the last dimension.

    Examples:
        >>> inf, nan = float("inf"), float("nan")
        >>> chosen_class(torch.tensor([[0.0, 1.0, -inf], [0.0, nan, 2.0], [0.0, inf, 1.0], [-inf, -inf, -inf]]))
        (tensor([1, 1, 1, 0]), tensor([ True, False, False, False]))
    """
    largest, index = logits.max(-1)  # NaN if there is one
    return index, torch.isfinite(largest)


def chosen_labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each label whether it is chosen, its sigmoid above 1/2, and whether that is an answer.

    It is none where the logit is NaN or +∞; −∞ rules a label out.

    Examples:
        >>> chosen_labels(torch.tensor([1.0, 0.0, float("-inf"), float("nan")]))
        (tensor([ True, False, False, False]), tensor([ True,  True,  True, False]))
    """
    return logits > 0, ~(logits.isnan() | logits.isposinf())


def share_not_finite(count: int, total: int) -> dict[str, float]:
    """Return the share by its name, or nothing where all predictions were finite.

    Examples:
        >>> share_not_finite(1, 4), share_not_finite(0, 4)
        ({'predictions_not_finite': 0.25}, {})
    """
    return {NOT_FINITE: count / total} if count else {}


class Problem(Enum):
    """The values of `config.problem_type` in Transformers."""

    CLASSES = "single_label_classification"
    LABELS = "multi_label_classification"
    NUMBERS = "regression"


def stated_problem(config: Any) -> Problem | None:
    """Return what a configuration's `problem_type` says; None if it says nothing.

    Raises:
        ValueError: It names no such type.
    """
    named = getattr(config, "problem_type", None)
    try:
        return None if named is None else Problem(named)
    except ValueError:
        raise ValueError(
            f"config.problem_type: expected one of {', '.join(one.value for one in Problem)}, got {named!r}; set "
            "that of the model"
        ) from None


def problem_of(model: nn.Module, logits: Tensor, labels: Tensor) -> Problem:
    """Return what a model's labels are: what its `config.problem_type` says, else what Transformers infers.

    That is: numbers if there is one output, one class if labels are integers, any number of classes otherwise. Truth
    values are any number of classes if there is one for each output, and one class of two if there are fewer.

    Args:
        model: After it has run: models of Transformers write down then what they inferred.
        logits: What it returned.
        labels: Those of the batch.

    Raises:
        ValueError: The configuration names no such type.

    Examples:
        >>> problem_of(nn.Identity(), torch.zeros(4, 3), torch.ones(4, dtype=torch.long))
        <Problem.CLASSES: 'single_label_classification'>
        >>> problem_of(nn.Identity(), torch.zeros(4, 1), torch.ones(4))
        <Problem.NUMBERS: 'regression'>
        >>> problem_of(nn.Identity(), torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool))
        <Problem.LABELS: 'multi_label_classification'>
    """
    stated = stated_problem(getattr(as_written(model), "config", None))
    if stated is not None:
        return stated
    one_output = logits.shape[-1] == 1 or (logits.ndim == labels.ndim == 1)
    if one_output:
        return Problem.NUMBERS
    for_each_output = labels.dtype is torch.bool and _shape(labels) == _shape(logits)
    return Problem.LABELS if labels.is_floating_point() or for_each_output else Problem.CLASSES
