"""The prefix that passes share, inside the real Trainer: the same training, less computed, or a reason why not."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
import transformers as tf
from accelerate.utils import compare_versions
from for_each import for_each
from operations import count_operations
from torch import nn
from trainings import QUIET

from hf_parcor import (
    ACRT,
    SAM,
    CorruptionConstraint,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
)
from hf_parcor.prefix import PrefixReuse, RecomputedPrefix
from hf_parcor.training.shared_prefix import find_shared_prefix

L2 = CorruptionConstraint(epsilon=0.2)
LAST = "last-encoder-layer"
OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "clipping": {"max_grad_norm": 0.01},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
DEFENSES = {
    "multi_step_risk": MultiStepRisk(L2, steps=2),
    "acrt": ACRT(L2),
    "sam": SAM(L2),
    "multi_step_risk on a part": MultiStepRisk(L2, steps=2, batch_share=0.5),
    "sam on a part": SAM(L2, batch_share=0.25),
}


class HiddenStatesLater(ParameterDefenseTrainer):
    """Looks into the prefix from its second step on, and takes the labels out of its batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, late = inputs.pop("labels"), self.state.global_step > 0
        found = model(**inputs, output_hidden_states=late)
        loss = nn.functional.cross_entropy(found.logits, labels)
        return loss + found.hidden_states[0].square().mean() if late else loss


@for_each("name", ["multi_step_risk", "sam", "sam on a part"])
def test_what_the_first_step_did_not_use_is_kept_once_a_later_one_does(name, tiny_bert, train, said):
    options = {"max_steps": 3, "learning_rate": 1e-3, "optim": "sgd"}
    settings, before = {"defense": DEFENSES[name], "target_modules": LAST}, len(said("did not use in the first step"))
    reused, full = (
        train(HiddenStatesLater, tiny_bert(dropout=0.0).double(), options, reuse_prefix=reuse, **settings)
        for reuse in (True, False)
    )
    assert reused.shared_prefix is not None
    assert len(said("did not use in the first step")) == before + 1
    for (key, first), second in zip(reused.model.named_parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-13, msg=key)


def calls_of(model):
    calls = {name: [] for name in ("0", "1")}
    for name, of_layer in calls.items():
        model.bert.encoder.layer[int(name)].register_forward_hook(lambda *_, kept=of_layer: kept.append(1))
    return calls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("defense", DEFENSES.values(), ids=list(DEFENSES))
@pytest.mark.parametrize("name", OPTIONS)
def test_trains_as_with_full_passes(tiny_bert, train, name, defense, caplog):
    options = {"max_steps": 3, "learning_rate": 1e-3, "optim": "sgd", **OPTIONS[name]}
    runs = [
        train(
            ParameterDefenseTrainer,
            tiny_bert(dropout=0.0).double(),
            options,
            defense=defense,
            target_modules=LAST,
            reuse_prefix=reuse,
        )
        for reuse in (True, False)
    ]
    assert "Every pass runs all of the model" not in caplog.text
    reused, full = runs
    assert reused.shared_prefix is not None
    assert full.shared_prefix is None
    for (key, first), second in zip(reused.model.named_parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-13, msg=key)
    for entry, other in zip(reused.state.log_history, full.state.log_history, strict=True):
        for key in ("loss", "loss_clean", "loss_corrupted", "corruption_norm", "grad_norm"):
            assert entry.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-6)


def test_lower_layer_runs_once_a_step_and_keeps_one_dropout_mask(tiny_bert, train):
    model, outputs = tiny_bert(dropout=0.5), []
    settings = {"defense": MultiStepRisk(L2, steps=2), "target_modules": LAST}
    trainer = train(ParameterDefenseTrainer, model, {"max_steps": 1}, **settings)
    forward = type(model.bert.encoder.layer[0]).forward
    computed = []

    def watched(*args, **kwargs):
        computed.append(1)
        return forward(model.bert.encoder.layer[0], *args, **kwargs)

    model.bert.encoder.layer[0].forward = watched
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(model, batch)
    assert len(computed) == 1
    assert len(outputs) == 1 + 3  # recorded, and handed on in three passes
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("settings", "reused"),
    [
        ({}, True),
        ({"defense_reuse_prefix": False}, False),
        ({"defense": "awp"}, False),  # the inputs differ from pass to pass
        ({"defense": "awp", "defense_input_steps": 0}, True),
        ({"defense": "gradient_penalty", "defense_epsilon": 0.1}, False),  # one pass
    ],
)
def test_flag(tiny_bert, train, settings, reused, caplog):
    settings = {"max_steps": 1, "defense_target_modules": [LAST], **settings}
    trainer = train(ParameterDefenseTrainer, tiny_bert(), settings, kind=ParameterDefenseTrainingArguments)
    assert (trainer.shared_prefix is not None) == reused
    assert "Every pass" not in caplog.text


def test_nothing_is_tried_where_all_is_defended_or_nothing_is_active(tiny_bert, train):
    for settings in ({}, {"target_modules": LAST, "defense": MultiStepRisk(L2, start_epoch=9.0)}):
        model = tiny_bert()
        calls = calls_of(model)
        train(ParameterDefenseTrainer, model, {"max_steps": 1}, **settings)
        assert len(calls["0"]) == (2 if not settings else 1)


@pytest.mark.skipif(
    compare_versions("transformers", "<", "5.23"),
    reason="Transformers before 5.23 checkpoints the hooks of a layer too: there the prefix is reused",
)
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_says_once_why_a_model_cannot_be_cut(train, caplog):
    """Router logits that a reentrant checkpoint computes without a graph, say; without checkpoints they are reused."""
    routing = {"num_local_experts": 3, "output_router_logits": True, "experts_implementation": "eager"}
    config = tf.MixtralConfig(**tiny.decoder(30, 16, inner=24), **routing)
    model = tf.MixtralForCausalLM(config)
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(8)]
    tf.utils.logging.enable_propagation()
    settings = {"defense": MultiStepRisk(L2, steps=1), "target_modules": "last-decoder-layer"}
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = train(ParameterDefenseTrainer, model, {"max_steps": 2, **reentrant}, rows=rows, **settings)
    assert trainer.shared_prefix is None
    said = [record.getMessage() for record in caplog.records if "Every pass runs all of the model" in record.message]
    assert len(said) == 1
    assert "where the prefix is reused" in said[0]
    assert '{"use_reentrant": False}' in said[0], "the way out, which is one:"
    once = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert train(ParameterDefenseTrainer, model, {"max_steps": 1, **once}, rows=rows, **settings).shared_prefix
    model.gradient_checkpointing_disable()
    assert train(ParameterDefenseTrainer, model, {"max_steps": 1}, rows=rows, **settings).shared_prefix is not None


@pytest.mark.slow
def test_operations_of_the_last_of_six_layers(tmp_path):
    """DESIGN: 1.17, 1.33, 1.50 stock steps for K = 1, 2, 3 on a BERT of six layers, 384 wide."""
    config = tf.BertConfig(
        vocab_size=100, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = tf.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(100, (1, 64)), "labels": torch.tensor([1])}
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), **QUIET)
    counted = []
    for trainer in (
        tf.Trainer(model, arguments),
        *(
            ParameterDefenseTrainer(model, arguments, defense=MultiStepRisk(L2, steps=steps), target_modules=LAST)
            for steps in (1, 2, 3)
        ),
    ):
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(model, dict(batch))
        counted.append(count_operations(partial(trainer.training_step, model, dict(batch))))
    ratios = [count / counted[0] for count in counted[1:]]
    assert all(ratio <= most for ratio, most in zip(ratios, (1.17, 1.34, 1.51), strict=True)), ratios
    assert ratios[0] > 1.1


@pytest.mark.slow
@for_each(
    ("kind", "settings"),
    [
        (PrefixReuse, {"target_modules": LAST}),
        (RecomputedPrefix, {"target_modules": LAST}),
        (None, {"defense": MultiStepRisk(L2, steps=2, random_start=True)}),  # buffers move in a pass before
    ],
)
def test_the_operations_that_are_logged_are_those_that_are_computed(kind, settings, train, monkeypatch):
    def found(*arguments):
        there = find_shared_prefix(*arguments)
        return None if kind is None else kind(there.prefix, there.starts)

    monkeypatch.setattr("hf_parcor.training.step_runner.find_shared_prefix", found)
    config = tf.BertConfig(**tiny.encoder(30, 64, layers=3, inner=256), num_labels=3)
    counted, logged = [], []

    def count(model, *_):
        model.calls += 1

    settings = {"defense": MultiStepRisk(L2, steps=2), **settings}
    for trainer_class, more in ((tf.Trainer, {}), (ParameterDefenseTrainer, settings)):
        model = tf.BertForSequenceClassification(config)
        model.register_buffer("calls", torch.zeros(()))
        model.register_forward_hook(count)
        trainer = train(trainer_class, model, {"max_steps": 1}, **more)
        logged.append(trainer.state.total_flos)
        batch = next(iter(trainer.get_train_dataloader()))
        counted.append(count_operations(partial(trainer.training_step, trainer.model, batch)))
    # The share of a prefix is that of its parameters, as Transformers estimates: the pooler's see one token alone.
    assert logged[1] / logged[0] == pytest.approx(counted[1] / counted[0], rel=1e-6 if kind is None else 0.025)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Llama"])
def test_checkpoints_cost_no_reuse_and_the_first_step_no_more_memory(family, arguments):
    """Models that carry their layers' flag are cut inside; what is tried holds no more activations than a step."""
    options = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
    config = getattr(tf, f"{family}Config")(**options, intermediate_size=32)
    kind = getattr(tf, f"{family}For{'CausalLM' if family == 'Llama' else 'SequenceClassification'}")
    ids = torch.randint(5, 40, (4, 32))
    batch = {"input_ids": ids, "labels": ids if family == "Llama" else torch.tensor([0, 1, 1, 0])}
    defended = {
        "defense": MultiStepRisk(L2, steps=1),
        "target_modules": "last-decoder-layer" if family == "Llama" else LAST,
    }
    operations, saved = [], []
    for trainer_class, settings in ((tf.Trainer, {}), (ParameterDefenseTrainer, defended)):
        torch.manual_seed(0)
        trainer = trainer_class(kind(config), arguments(gradient_checkpointing=True), **settings)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        with SavedActivations() as activations:
            trainer.training_step(trainer.model, dict(batch))
        saved.append(activations.peak)
        operations.append(count_operations(partial(trainer.training_step, trainer.model, dict(batch))))
    assert operations[1] < 1.15 * operations[0]
    assert saved[1] < 1.3 * saved[0]


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that graphs hold at a time."""

    def __init__(self):
        self.held = self.peak = 0
        super().__init__(self.hold, lambda held: held[0])

    def __enter__(self):
        super().__enter__()
        return self

    def hold(self, tensor):
        held = (tensor, Released(self, tensor.nbytes))
        self.held += tensor.nbytes
        self.peak = max(self.peak, self.held)
        return held


class Released:
    def __init__(self, counter, size):
        self.counter, self.size = counter, size

    def __del__(self):
        self.counter.held -= self.size


@for_each("reuse", [True, False])
@for_each(
    ("defense", "early"),
    [
        (MultiStepRisk(L2, steps=2), True),
        (MultiStepRisk(L2, steps=2, batch_share=0.5), False),
        (SAM(L2, batch_share=0.5), False),
    ],
)
def test_statistics_move_as_in_the_stock_trainer_on_both_sides_of_the_cut(reuse, defense, early, rows, train):
    """But for a part of the batch, which reuses no prefix with batch statistics."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(8, 4), nn.BatchNorm1d(4) if early else nn.Tanh()
            self.last, self.late = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, input_ids, labels, **unused):
            hidden = self.norm(self.first(input_ids.float()))
            return {"loss": nn.functional.cross_entropy(self.late(self.last(hidden)), labels)}

    options = {"max_steps": 3, "learning_rate": 0.0}
    stock = train(tf.Trainer, Normed(), options)
    settings = {"defense": defense, "target_modules": ["last"], "reuse_prefix": reuse}
    ours = train(ParameterDefenseTrainer, Normed(), options, **settings)
    assert (ours.shared_prefix is not None) == reuse
    expected = dict(stock.model.named_buffers())
    assert float(expected["late.num_batches_tracked"]) == 3
    for name, buffer in ours.model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_frozen_prefix(tiny_bert, train):
    """Frozen parameters below the cut: no gradient goes through them, and none is missed above."""
    model = tiny_bert(dropout=0.0).double()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.bert.encoder.layer[0].parameters()]
    settings = {"defense": MultiStepRisk(L2, steps=1), "target_modules": LAST}
    trainer = train(ParameterDefenseTrainer, model, {"max_steps": 2}, **settings)
    assert trainer.shared_prefix is not None
    for now, then in zip(model.bert.encoder.layer[0].parameters(), before, strict=True):
        assert torch.equal(now, then)
        assert now.grad is None


class CheckpointsLater(tf.TrainerCallback):
    """Checkpoints layers from the second step on, and no longer from the third."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        """Turn it on, or off."""
        if state.global_step == 1:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if state.global_step == 2:
            model.gradient_checkpointing_disable()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_layers_that_are_checkpointed_later_are_cut_elsewhere(tiny_bert, train):
    settings = {"defense": MultiStepRisk(L2, steps=2), "target_modules": ["layer.1.output"]}
    settings |= {"callbacks": [CheckpointsLater()]}
    reused, full = (
        train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), {"max_steps": 3}, reuse_prefix=reuse, **settings)
        for reuse in (True, False)
    )
    assert reused.shared_prefix is not None
    for (key, first), second in zip(reused.model.named_parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, msg=key)


def test_autocast(tiny_bert, train):
    options = {"max_steps": 3, "learning_rate": 1e-2, "optim": "sgd", "bf16": True}
    settings = {"defense": MultiStepRisk(L2, steps=2), "target_modules": LAST}
    reused, full = (
        train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), options, reuse_prefix=reuse, **settings)
        for reuse in (True, False)
    )
    assert reused.shared_prefix is not None
    assert reused.shared_prefix.boundary == []  # freed
    start = dict(tiny_bert(dropout=0.0).named_parameters())
    for (name, first), second in zip(reused.model.named_parameters(), full.model.parameters(), strict=True):
        moved = float((second - start[name]).detach().abs().max())
        torch.testing.assert_close(first, second, rtol=0, atol=0.02 * moved + 1e-7, msg=name)
