"""The approximations that cost less: every n-th step, and passes that see a part of the batch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import tiny
import torch
from for_each import for_each
from longhand import longhand
from operations import count_operations
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure
from trainings import UNMOVED, logs_of, stacked
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from hf_parcor import (
    ACRT,
    SAM,
    CorruptionConstraint,
    MultiStepRisk,
    ParameterDefenseMixin,
    ParameterDefenseTrainer,
)
from hf_parcor.batches import count_first, first_examples, items_of_part, repeat_first_examples

L2 = CorruptionConstraint(epsilon=0.2)
LAST = "last-encoder-layer"
# Each defense with the weights of its passes in the risk, and the rows of four that each pass sees.
PARTS = {
    "multi_step_risk, K=1": (MultiStepRisk(L2, steps=1, batch_share=0.5), [1 / 2] * 2, [4, 2]),
    "multi_step_risk, K=2": (MultiStepRisk(L2, steps=2, batch_share=0.3), [1 / 3] * 3, [4, 2, 2]),
    "acrt": (ACRT(L2, alpha=0.3, batch_share=0.25), [0.7, 0.3], [4, 1]),
    "sam": (SAM(L2, batch_share=0.75), [0.0, 1.0], [3, 4]),
}


class Pair(NamedTuple):
    """Two parts of a batch."""

    first: object
    second: object


def tree_all(holds, *trees):
    """Say whether all tensors of trees fulfil something, pair by pair, and all other leaves are equal."""
    pairs = zip(*(tree_leaves(tree) for tree in trees), strict=True)
    return all(holds(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1] for pair in pairs)


def tiny_gpt2():
    return GPT2LMHeadModel(GPT2Config(**tiny.gpt2(), **tiny.STILL_GPT2))


def tiny_llama():
    return LlamaForCausalLM(LlamaConfig(**tiny.decoder()))


# Each model with the first label that Transformers counts: a next token has none at the start, which it does not know
# of every model.
MODELS = {"gpt2": (tiny_gpt2, 0), "llama": (tiny_llama, 1)}


@pytest.fixture
def sentences():
    """Of different length, so that parts of a batch have other shares of the labels than of the rows."""
    generator, rows = torch.Generator().manual_seed(2), []
    for length in (7, 2, 3, 5, 4, 6, 2, 7):
        tokens = torch.randint(1, 20, (7,), generator=generator)
        labels = torch.where(torch.arange(7) < length, tokens, -100)
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def summed_loss(logits, labels):
    """The loss of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_a_part_of_the_batch_keeps_the_scale_of_the_loss(sentences, train, keep_gradients, name, accumulation, family):
    """The model divides by the labels of the whole step; a part stands for its batch, whatever labels it has."""
    defense, weights, seen = PARTS[name]
    build, first = MODELS[family]
    torch.manual_seed(0)
    model = build().double()
    rows = sentences[: 4 * accumulation]
    batches = [stacked(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    items = sum((batch["labels"][:, first:] != -100).sum() for batch in batches)
    expected = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
    for batch in batches:
        passes = iter(seen)

        def loss_of(call, batch=batch, passes=passes):
            count = next(passes)
            labels = batch["labels"]
            share = (labels[:count, first:] != -100).sum() / (labels[:, first:] != -100).sum()
            return summed_loss(call(input_ids=batch["input_ids"][:count]).logits, labels[:count]) / items / share

        for key, part in longhand(model, loss_of, weights).items():
            expected[key] += part
    options = {**UNMOVED, "gradient_accumulation_steps": accumulation}
    trainer = train(ParameterDefenseTrainer, model, options, rows=rows, defense=defense, callbacks=[keep_gradients])
    (kept,) = keep_gradients.kept
    for key, gradient in kept.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7)  # GPT-2's loss is float32
    assert trainer.shared_prefix is None


class KeepPasses(TrainerCallback):
    """Counts the forward passes of every optimizer step."""

    def __init__(self, model):
        self.counts, self.now = [], 0
        model.register_forward_hook(self.count)

    def count(self, *_):
        self.now += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(self.now)
        self.now = 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_third_step_is_defended_and_the_others_are_stock(tiny_bert, train, accumulation):
    model = tiny_bert()
    passes = KeepPasses(model)
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": accumulation, "logging_steps": 1}
    trainer = train(
        ParameterDefenseTrainer, model, options, defense=MultiStepRisk(L2, steps=2, interval=3), callbacks=[passes]
    )
    assert passes.counts == [accumulation * count for count in (3, 1, 1, 3, 1, 1)]
    logs = logs_of(trainer)
    assert ["sharpness" in entry for entry in logs] == [True, False, False] * 2
    stock = train(Trainer, tiny_bert(), options)
    assert trainer.state.total_flos == pytest.approx(stock.state.total_flos * 10 / 6)


def test_operations_count_the_part(tiny_bert, train):
    stock = train(Trainer, tiny_bert())
    ours = train(ParameterDefenseTrainer, tiny_bert(), defense=MultiStepRisk(L2, steps=2, batch_share=0.25))
    assert ours.state.total_flos == pytest.approx(1.5 * stock.state.total_flos)


@pytest.mark.slow
def test_what_a_trainer_counts_is_the_whole_batch_once(tiny_bert, train):
    class Counting(Trainer):
        rows_seen = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.rows_seen += len(inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Defended(ParameterDefenseMixin, Counting):
        pass

    for name, (defense, _, _) in PARTS.items():
        trainer = train(Defended, tiny_bert(), defense=defense)
        assert trainer.rows_seen == 24, name


@pytest.mark.slow
def test_a_training_step_that_prepares_nothing_gets_the_part_too(tiny_bert, train):
    class Plain(Trainer):
        """A step of one's own, on a batch that is where it is needed already."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    class Defended(ParameterDefenseMixin, Plain):
        pass

    defense = PARTS["multi_step_risk, K=1"][0]
    ours, usual = (train(kind, tiny_bert(), defense=defense) for kind in (Defended, ParameterDefenseTrainer))
    for name, weight in usual.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, msg=name)


@pytest.mark.slow
@for_each("defense", [MultiStepRisk(L2, steps=2, batch_share=0.25), SAM(L2, batch_share=0.25)])
def test_operations_of_a_part_behind_a_shared_prefix(defense, train):
    """What is logged is what is computed: the prefix once, on all rows, and the last of three layers on a part."""
    sizes = tiny.encoder(30, 64, layers=3, inner=256)
    counted, logged = [], []
    for kind, settings in ((Trainer, {}), (ParameterDefenseTrainer, {"defense": defense, "target_modules": LAST})):
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
        trainer = train(kind, model, {"max_steps": 1}, **settings)
        logged.append(trainer.state.total_flos)
        batch = next(iter(trainer.get_train_dataloader()))
        counted.append(count_operations(partial(trainer.training_step, trainer.model, batch)))
    assert trainer.shared_prefix is not None
    # The share of a prefix is that of its parameters, as Transformers estimates: the pooler's see one token alone.
    assert logged[1] / logged[0] == pytest.approx(counted[1] / counted[0], rel=0.025)
    assert counted[1] / counted[0] == pytest.approx(1 + (defense.passes - 1) / 3 / 4, rel=0.025)


class Centered(nn.Module):
    """Batch statistics, in a prefix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, input_ids, labels, **unused):
        hidden = self.norm(self.first(input_ids.double()))
        return {"loss": nn.functional.cross_entropy(self.last(hidden), labels)}


@for_each("defense", [MultiStepRisk(L2, steps=2, batch_share=0.5), SAM(L2, batch_share=0.5)])
def test_batch_statistics_in_a_prefix_run_whole_and_it_is_said(defense, train, said):
    settings, before = {"defense": defense, "target_modules": ["last"]}, len(said("examples of the batch"))
    found, full = (
        train(ParameterDefenseTrainer, Centered().double(), {"max_steps": 2}, reuse_prefix=reuse, **settings)
        for reuse in (True, False)
    )
    assert found.shared_prefix is None
    assert len(said("depends on other examples of the batch")) == before + 1
    for (name, value), other in zip(found.model.state_dict().items(), full.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_on_shards_passes_over_a_part_run_whole(tiny_bert, train, said, monkeypatch):
    """There the last pass computes the prefix again, and one of the two sees a part."""
    monkeypatch.setattr("hf_parcor.training.shared_prefix.is_sharded", lambda model: True)
    settings = {"defense": SAM(L2, batch_share=0.5), "target_modules": LAST}
    assert train(ParameterDefenseTrainer, tiny_bert(), {"max_steps": 1}, **settings).shared_prefix is None
    assert len(said("sharded is not reused by passes over a part")) == 1


def test_on_shards_router_losses_run_whole(tiny_bert, train, said, monkeypatch):
    monkeypatch.setattr("hf_parcor.training.shared_prefix.is_sharded", lambda model: True)
    model = tiny_bert()
    model.config.output_router_logits = True
    settings = {"defense": SAM(L2), "target_modules": LAST}
    assert train(ParameterDefenseTrainer, model, {"max_steps": 1}, **settings).shared_prefix is None
    assert len(said("is not reused with router losses")) == 1


class TestFirstExamples:
    def test_what_is_per_example_is_cut(self):
        batch = {"ids": torch.arange(8).view(4, 2), "texts": list("abcd"), "inner": {"x": (torch.arange(4),)}}
        part = first_examples({**batch, "flag": True, "scale": torch.tensor(2.0), "names": ["p", "q"]}, 0.6)
        assert part["ids"].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert part["texts"] == ["a", "b", "c"]
        assert part["inner"]["x"][0].tolist() == [0, 1, 2]
        assert (part["flag"], float(part["scale"]), part["names"]) == (True, 2.0, ["p", "q"])

    @for_each("share", [0.25, 0.5, 0.75])
    def test_repeated_they_are_a_batch_of_the_same_kind(self, share):
        """What stands for an example is that of a first one, wherever it stands; all else is as it was."""
        rows = torch.arange(4)
        batch = {
            "ids": rows.view(4, 1) * 10,
            "texts": tuple("abcd"),
            "inner": Pair(rows, [rows + 5]),
            "names": ["p", "q"],
            "flag": True,
        }
        listed = {"labels": [{"boxes": torch.rand(row, 4)} for row in range(4)], "images": list(torch.rand(4, 2, 2))}
        for whole in (batch, listed):
            count, examples = count_first(whole, share)
            part, found = first_examples(whole, share), repeat_first_examples(whole, share)
            same_beginning = first_examples(found, share)
            assert tree_structure(found) == tree_structure(whole)
            assert (count, examples) == (4 * share, 4)
            assert tree_all(torch.equal, same_beginning, part)
        found = repeat_first_examples(batch, share)
        expected = [place % count for place in range(4)]
        assert found["ids"].flatten().tolist() == [10 * place for place in expected]
        assert "".join(found["texts"]) == "".join("abcd"[place] for place in expected)
        assert found["inner"].second[0].tolist() == [place + 5 for place in expected]
        found = repeat_first_examples(listed, share)
        assert [len(row["boxes"]) for row in found["labels"]] == expected

    @for_each(("share", "count"), [(1e-9, 1), (0.25, 1), (0.26, 2), (0.999, 4), (1.0, 4)])
    def test_how_many(self, share, count):
        assert len(first_examples({"x": torch.zeros(4)}, share)["x"]) == count

    def test_other_layouts_are_refused(self, tiny_bert):
        batch = {"input_ids": torch.zeros(4, 6), "position_ids": torch.zeros(3, 4, 6)}
        with pytest.raises(ValueError, match=r"4 examples in their first dimension, got one of shape \(3, 4, 6\)"):
            first_examples(batch, 0.5)
        with pytest.raises(ValueError, match="expected a batch with tensors"):
            first_examples({"texts": ["a", "b"]}, 0.5)


def test_a_part_without_labels_has_no_loss_and_no_nan():
    labels = torch.tensor([[-100, -100], [1, 2]])
    assert float(items_of_part(torch.tensor(2), {"labels": labels}, 0.5)) == 1
    assert float(items_of_part(8, {"labels": labels.flip(0)}, 0.5)) == 8
    assert items_of_part(None, {"labels": labels}, 0.5) is None
