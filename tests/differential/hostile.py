"""Models, data and Trainers that do what user code does between passes. A new report is one more row."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import transformers as tf
from torch import nn

from hf_parcor import ParameterDefenseMixin
from hf_parcor.evaluation import ClassificationMetric, DetectionMetric, LanguageModelMetric

WORDS, WIDTH, CLASSES = 12, 8, 3


class Body(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(WORDS, WIDTH), body, nn.Linear(WIDTH, CLASSES)

    def hidden(self, input_ids):
        return self.body(self.embedding(input_ids).mean(1))

    def answer(self, logits, labels):
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return tf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)

    def forward(self, input_ids, labels=None):
        return self.answer(self.head(self.hidden(input_ids)), labels)


def plain():
    return Body(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))


class WritesIntoItsInput(Body):
    def forward(self, input_ids, labels=None):
        input_ids.sub_(3).clamp_(min=0)  # from a tokenizer with other special tokens
        if labels is not None:
            labels.sub_(1).remainder_(CLASSES)
        return super().forward(input_ids, labels)


class Counts(Body):
    """Counts its runs, keeps an average, and replaces a buffer, in evaluation too; the average is used."""

    def __init__(self, body):
        super().__init__(body)
        self.register_buffer("runs", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(WIDTH))
        self.register_buffer("last", torch.zeros(WIDTH), persistent=False)

    def forward(self, input_ids, labels=None):
        self.runs += 1
        hidden = self.hidden(input_ids)
        scale = self.average.clone()
        with torch.no_grad():
            self.average.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        self.last = hidden.detach().mean(0)
        return self.answer(self.head(hidden * scale), labels)


class Queue(Body):
    """A memory of features that is larger than what is copied without being asked."""

    def __init__(self, body):
        super().__init__(body)
        self.register_buffer("queue", torch.zeros(10_000, WIDTH))

    def forward(self, input_ids, labels=None):
        hidden = self.hidden(input_ids)
        if self.training:
            self.queue.copy_(torch.cat([hidden.detach(), self.queue[: -len(hidden)]]))
        return self.answer(self.head(hidden + self.queue[:50].mean(0)), labels)


class ByHand(nn.Module):
    """Batch normalisation as a function, whose writes no version counter shows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.variance, self.weight, training=self.training)


class Reply:
    def __init__(self, hidden):
        self.hidden = hidden


class RepliesWithAnObject(nn.Module):
    """What it returns cannot be recorded, so a prefix computes it again in every pass."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return Reply(self.linear(self.norm(x)))


class Unwraps(Body):
    def hidden(self, input_ids):
        return super().hidden(input_ids).hidden


class NormsTwice(Body):
    """One batch normalisation before what is defended, and behind it."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, labels=None):
        return self.answer(self.body(self.head(self.hidden(input_ids)))[:, :CLASSES], labels)


class LeavesAMask(nn.Module):
    """Leaves something in an attribute, which outer code takes and clears: side losses of MoE and VAE layers."""

    def __init__(self):
        super().__init__()
        self.table, self.left = nn.Embedding(WORDS, WIDTH), None

    def forward(self, input_ids):
        self.left = (input_ids > 5).to(self.table.weight.dtype).mean(1)
        return self.table(input_ids)


class TakesTheMask(Body):
    def __init__(self, body):
        super().__init__(body)
        self.embedding = LeavesAMask()

    def forward(self, input_ids, labels=None):
        logits = self.head(self.hidden(input_ids))
        left, self.embedding.left = self.embedding.left, None
        return self.answer(logits if left is None else logits * (1 + left[:, None]), labels)


class CollectsByHook(Body):
    """Features of an inner layer, collected by a hook, in a list that is cleared when a run begins."""

    def __init__(self, body):
        super().__init__(body)
        self.kept = []
        self.body[0].register_forward_hook(lambda module, inputs, output: self.kept.append(output))

    def forward(self, input_ids, labels=None):
        self.kept.clear()
        logits = self.head(self.hidden(input_ids))
        return self.answer(logits + self.kept[0][:, :CLASSES], labels)


class AsksWhoRan(Body):
    """Asserts in a run what only a run of all its layers fulfils, as Reformer does."""

    def __init__(self, body):
        super().__init__(body)
        self.body[0].register_forward_hook(self._note)

    def _note(self, module, inputs, output):
        self.ran = True

    def forward(self, input_ids, labels=None):
        self.ran = False
        logits = self.head(self.hidden(input_ids))
        assert self.ran
        return self.answer(logits, labels)


class Sums(Body):
    """Two parameters whose gradient autograd returns as one tensor."""

    def __init__(self, body):
        super().__init__(body)
        self.one, self.other = (nn.Parameter(torch.randn(CLASSES)) for _ in range(2))

    def forward(self, input_ids, labels=None):
        return self.answer(self.head(self.hidden(input_ids)) + (self.one + self.other), labels)


class Tuples(Body):
    def answer(self, logits, labels):
        return super().answer(logits, labels).to_tuple()


def normed(body):
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), body, nn.Tanh())


def of_torchscript(compiled, *examples):
    """It runs no hooks, or is no mapping of its buffers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compiled(normed(nn.BatchNorm1d(WIDTH)), *examples)


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


def spectral_by_hook():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


def observed():
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255), nn.Tanh()
    )


def bert(**options):
    config = tf.BertConfig(**tiny.encoder(WORDS, WIDTH, inner=12), **tiny.STILL, num_labels=CLASSES, **options)
    return tf.BertForSequenceClassification(config)


def routed():
    """Router losses that are recorded inside of the prefix, and are 1e-5 of the loss."""
    config = tf.Qwen3MoeConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=12,
        moe_intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=1e-4,
        experts_implementation="eager",
    )
    return tf.Qwen3MoeForCausalLM(config)


class NormedForObjectDetection(tf.YolosForObjectDetection):
    """Losses in a dict, targets in a list of dicts, a matching in each run, and statistics of its images."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, pixel_values, labels=None):
        before = torch.get_default_dtype()
        torch.set_default_dtype(pixel_values.dtype)  # the loss makes the weights of the classes in it
        try:
            return super().forward(self.norm(pixel_values), labels=labels)
        finally:
            torch.set_default_dtype(before)


def detector():
    config = tf.YolosConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=[8, 8],
        patch_size=4,
        num_detection_tokens=5,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = NormedForObjectDetection(config)
    for parameter in model.parameters():  # weights of the usual size match all boxes alike
        nn.init.normal_(parameter, std=0.3)
    return model


def boxed(count):
    """Return what an image of so many objects is compared with."""
    center, size = torch.rand(count, 2, dtype=torch.float64), 0.1 + 0.4 * torch.rand(count, 2, dtype=torch.float64)
    return {"class_labels": torch.randint(CLASSES, (count,)), "boxes": torch.cat([center, size], -1)}


def photographs():
    torch.manual_seed(1)
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    return [{"pixel_values": image, "labels": boxed(index % 4)} for index, image in enumerate(images)]  # some empty


def listed(rows):
    return {
        "labels": [dict(row["labels"]) for row in rows],
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
    }


def examples():
    """Return examples that all models here can take, from a generator of their own."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, WORDS, (16, 6), generator=generator)
    return [{"input_ids": row, "labels": torch.tensor(index % CLASSES)} for index, row in enumerate(ids)]


def texts():
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in examples()]


# Trainers: what their `compute_loss` does to the batch. A class of each is made with and without the defense.


class Rescales(tf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = inputs.pop("weights").div_(10.0)
        outputs = model(**inputs)
        losses = nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        return (losses * weights).mean()


class PopsWhatIsNested(tf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["extra"].pop("labels", None)
        logits = model(input_ids=inputs["input_ids"]).logits
        if labels is None:
            return logits.square().mean()
        shift = inputs["extra"]["shifts"].pop()
        return nn.functional.cross_entropy(logits + shift, labels)


class LabelsFromOne(tf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["labels"] -= 1
        inputs["labels"] %= CLASSES
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class PreparesInPlace(tf.Trainer):
    """Augments when it prepares, differently each time, and counts."""

    prepared = 0

    def _prepare_inputs(self, inputs):
        self.prepared += 1
        inputs = super()._prepare_inputs(inputs)
        inputs["input_ids"] = (inputs["input_ids"] + self.prepared) % WORDS
        return inputs


class MakesItsOptimizer(tf.Trainer):
    """The stock one looks into modules in a way that TorchScript's are not made for."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class OfEachDevice(tf.Trainer):
    """What `nn.DataParallel` returns on a machine with two GPUs: a loss of each."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args._n_gpu = 2

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return torch.stack([0.5 * loss, 1.5 * loss])


def with_weights(rows):
    batch = tf.default_data_collator(rows)
    return {**batch, "weights": torch.arange(1.0, len(rows) + 1, dtype=torch.float64)}


def nested(rows):
    batch = tf.default_data_collator(rows)
    return {"input_ids": batch["input_ids"], "extra": {"labels": batch["labels"], "shifts": [0.0, 1.0]}}


@dataclass(frozen=True)
class Case:
    """A model, or a Trainer, and what it is given.

    Attributes:
        model: Builds the model.
        trainer: The stock Trainer that it is trained with.
        collator: Makes batches.
        rows: Makes the data.
        head: What is computed last.
        options: Further training arguments.
        reused: Whether a prefix is reused in training; where it is not, full passes are right as well.
        measured: Whether it is measured too.
        metric: By what.
        close: How far numbers that follow from weights may be off; ε = 1e-9, times a curvature, unless a part of the
            model computes in float32.
    """

    model: Callable[[], nn.Module]
    trainer: type[tf.Trainer] = tf.Trainer
    collator: Callable[[list[Any]], dict[str, Any]] = tf.default_data_collator
    rows: Callable[[], list[dict[str, Any]]] = examples
    head: list[str] = field(default_factory=lambda: ["head"])
    options: dict[str, Any] = field(default_factory=dict)
    reused: bool = True
    measured: bool = True
    metric: type = ClassificationMetric
    close: float = 1e-7

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().double()

    def defended(self) -> type[tf.Trainer]:
        return type(f"Defended{self.trainer.__name__}", (ParameterDefenseMixin, self.trainer), {})


CASES = {
    "plain": Case(plain),
    "a model that writes into its input": Case(lambda: WritesIntoItsInput(plain().body)),
    "a counter, an average, a replaced buffer": Case(lambda: Counts(plain().body), measured=True),
    "a queue of features": Case(lambda: Queue(plain().body)),
    "batch normalisation": Case(lambda: Body(normed(nn.BatchNorm1d(WIDTH)))),
    "batch normalisation by hand": Case(lambda: Body(normed(ByHand()))),
    "a part in TorchScript": Case(lambda: Body(of_torchscript(torch.jit.script)), MakesItsOptimizer),
    "a part that was traced": Case(
        lambda: Body(of_torchscript(torch.jit.trace, torch.randn(3, WIDTH))), MakesItsOptimizer
    ),
    "batch normalisation before and behind": Case(NormsTwice, reused=False),
    "normalised inside of what cannot be recorded": Case(lambda: Unwraps(RepliesWithAnObject())),
    "spectral norm": Case(lambda: Body(spectral())),
    "spectral norm by a hook": Case(lambda: Body(spectral_by_hook())),
    "an observer of quantization-aware training": Case(lambda: Body(observed())),
    "a mask left in an attribute": Case(lambda: TakesTheMask(plain().body), reused=False),
    "features collected by a hook": Case(lambda: CollectsByHook(plain().body)),
    "an assertion on what ran": Case(lambda: AsksWhoRan(plain().body)),
    "router losses inside the prefix": Case(
        routed, rows=texts, head=["model.layers.1", "lm_head"], close=1e-5, metric=LanguageModelMetric
    ),
    "one gradient of two parameters": Case(lambda: Sums(plain().body), head=["head", "one", "other"], reused=False),
    "a detector": Case(
        detector,
        collator=listed,
        rows=photographs,
        head=["class_labels_classifier", "bbox_predictor"],
        metric=DetectionMetric,
        measured=importlib.util.find_spec("pycocotools") is not None,
    ),
    "results in a tuple": Case(lambda: Tuples(plain().body), measured=False),
    "checkpoints": Case(bert, head=["classifier"], options={"gradient_checkpointing": True}),
    "weights rescaled in place": Case(plain, Rescales, with_weights, options={"remove_unused_columns": False}),
    "labels popped from nested inputs": Case(
        plain, PopsWhatIsNested, nested, options={"remove_unused_columns": False}, measured=False
    ),
    "labels from one on": Case(plain, LabelsFromOne, measured=False),
    "a batch that is augmented when it is prepared": Case(plain, PreparesInPlace, measured=False),
    "a loss of each device": Case(plain, OfEachDevice, measured=False, reused=False),
}
