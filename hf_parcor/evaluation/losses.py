"""The loss of a model on a batch, and how many items it is the mean over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_parcor.batches import IGNORED_LABEL, count_examples, count_labels
from hf_parcor.distributed.fsdp import as_written, class_of
from hf_parcor.evaluation.embeddings import embedding_loss, is_of_texts
from hf_parcor.evaluation.outputs import Output, called, inside_adapters, problem_of, usual_loss
from hf_parcor.overriding import counters_kept, overriding

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]

# Causal models of Transformers whose own loss compares each place with the label of that place.
_UNSHIFTED = {
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM"),
    *("CpmAntForCausalLM", "MarianForCausalLM", "MBartForCausalLM", "MvpForCausalLM", "PegasusForCausalLM"),
    *("PLBartForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM"),
    *("MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel"),
}

# What PEFT learns as vectors before each row, which have a prediction each; a prefix of keys and values has none.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT")


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss that a Transformers model computes itself if its batch has labels.

    If a model returns only logits, bare or by name, this is the usual loss of Transformers for such labels, as in
    `ClassificationMetric`. Of a CTC model that sums its loss over the rows, it is the mean over them. Of batches that
    are for an `EmbeddingMetric`, it is the `embedding_loss`.

    Raises:
        ValueError: The model returned no loss, and there are no labels or no logits to compute one from.
    """
    if is_of_texts(batch):
        return embedding_loss(model, batch)
    output = Output.read(called(model, batch))
    if output.loss is not None:
        return output.loss / count_items(batch, of_rows=True) if _sums_over_rows(model) else output.loss
    labels = batch.get("labels")
    if output.logits is None or labels is None:
        raise ValueError(
            "loss: expected the model to return one, got none; put labels into the batches, or pass loss=; a "
            "Trainer takes other data for its gradients, with labels, as gradient_dataset="
        )
    labels = with_prompt(model, torch.as_tensor(labels))
    return usual_loss(problem_of(model, output.logits, labels), output.logits, labels, shifted=shifts_labels(model))


class TrainerLoss:
    """The loss that a Trainer computes of a batch: with label smoothing, or by a function or a method of its own.

    It is computed as in an evaluation by one process: the Trainer says how many items it is the mean over.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss; nothing of it is counted or logged."""
        trainer, items = self._trainer, self._items(batch)
        inputs = trainer._prepare_inputs(dict(batch))  # a copy: labels are popped
        # Trainers average what they count until their next evaluation is logged, which this is no part of. Those of
        # TRL gather it from all processes, of which some have a batch more than others.
        own = overriding(trainer.accelerator, gather=_as_it_is, gather_for_metrics=_as_it_is)
        with counters_kept(trainer), own, self._alone(), trainer.compute_loss_context_manager():
            return torch.as_tensor(trainer.compute_loss(model, inputs, num_items_in_batch=items))

    def count_items(self, batch: Batch) -> int:
        """Return how many items the loss is the mean over; where the Trainer does not say, as the function does."""
        items = self._items(batch)
        return count_items(batch) if items is None else int(items)

    def _items(self, batch: Batch) -> Tensor | int | None:
        with self._alone():
            return self._trainer._get_num_items_in_batch([batch], self._trainer.args.device)

    def _alone(self) -> AbstractContextManager[None]:
        return overriding(self._trainer.args, average_tokens_across_devices=False, _n_gpu=1)


def _as_it_is(value: Any, *_: Any, **__: Any) -> Any:
    return value


def item_counter(model: nn.Module, loss: Loss) -> Callable[[Batch], int]:
    """Return the function that counts how many items of a batch a mean loss is over."""
    if isinstance(loss, TrainerLoss):
        return loss.count_items
    own = loss is model_loss
    shifted = own and shifts_labels(model) and not _vectors_of_prompt(model)  # the last of these predicts the first
    return partial(count_items, shifted=shifted, of_rows=own and is_ctc(model))


def count_items(batch: Batch, *, shifted: bool = False, of_rows: bool = False) -> int:
    """Return how many items a batch's mean loss is over: labels that count, else its examples.

    Args:
        batch: A mapping of tensors, and of lists with an entry for each example, a sequence of tensors, or one tensor.
        shifted: Whether the loss leaves out the first label of every row, as that of a causal language model does.
        of_rows: Whether each example has one loss, whatever its labels, as in CTC.

    Raises:
        ValueError: The batch has no tensor.
    """
    named = batch if isinstance(batch, Mapping) and not of_rows else {}
    labels = count_labels(named, shifted=shifted)
    if labels is not None:
        return int(labels)
    examples = count_examples(batch)
    if examples is not None:
        return examples
    raise ValueError(
        f"batches: expected tensors in every batch, got {type(batch).__name__} without any; "
        "collate the data into tensors, with a DataLoader say"
    )


def shifts_labels(model: nn.Module) -> bool:
    """Return whether a model's own loss predicts the next token, so that first labels do not count."""
    model = _inside(model)
    kind = class_of(model)
    if any(base.__name__ in _UNSHIFTED for base in kind.__mro__):
        return False
    loss_type = getattr(model, "loss_type", None)
    causal = kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    shifts = causal if loss_type is None else LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    return shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def with_prompt(model: nn.Module, labels: Tensor) -> Tensor:
    """Return labels with −100 before each row for each vector that PEFT has learned to put there.

    The model predicts at these places too, and takes its loss of such labels. Without a prompt they stay as they are.
    """
    vectors = _vectors_of_prompt(model)
    return pad(labels, (vectors, 0), value=IGNORED_LABEL) if vectors else labels


def _vectors_of_prompt(model: nn.Module) -> int:
    """Return how many learned vectors stand before a row's labels; where the model is not causal, none do."""
    settings: Any = getattr(as_written(model), "active_peft_config", None)
    causal = getattr(settings, "task_type", None) == "CAUSAL_LM"
    return int(settings.num_virtual_tokens) if causal and settings.peft_type in _PROMPTS else 0


def without_router_loss(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch with which a mixture of experts returns the loss of the labels alone.

    Its own loss may have that of its routers added, which says how evenly the experts are used.
    """
    taken = inspect.signature(_inside(model).forward).parameters
    return {**batch, "output_router_logits": False} if "output_router_logits" in taken else batch


def _inside(model: nn.Module) -> nn.Module:
    return inside_adapters(as_written(model))


def is_ctc(model: nn.Module) -> bool:
    """Return whether a model aligns frames with letters (CTC), also behind adapters, DDP and FSDP."""
    return any(base.__name__.endswith("ForCTC") for base in class_of(_inside(model)).__mro__)


def _sums_over_rows(model: nn.Module) -> bool:
    config = getattr(_inside(model), "config", None)
    return is_ctc(model) and getattr(config, "ctc_loss_reduction", None) == "sum"
