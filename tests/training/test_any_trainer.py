"""What must hold for any Trainer behind the mixin, whatever it does in the methods that it overrides."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from for_each import for_each
from longhand import longhand
from torch import nn
from trainings import UNMOVED, losses_of, stacked
from transformers import Trainer

from hf_parcor import SAM, CorruptionConstraint, MultiStepRisk, ParameterDefenseMixin
from hf_parcor.overriding import counters_kept

EPSILON = 0.2
L2 = CorruptionConstraint(epsilon=EPSILON)
NEARLY_NONE = CorruptionConstraint(epsilon=1e-9)
ONE_STEP = {**UNMOVED, "max_steps": 1}


def defended(trainer_class):
    return type("Defended", (ParameterDefenseMixin, trainer_class), {})


class Counting(Trainer):
    """Counts in every way that a Trainer may count in."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.tokens = torch.tensor(0)
        self.metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.recent = deque(maxlen=3)
        self.step_started = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        self.tokens += inputs["input_ids"].numel()  # in place
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.metrics["train"]["loss"].append(loss.item())
        self.recent.append(self.calls)
        self.log({"seen": self.calls})
        return loss

    def training_step(self, *args, **kwargs):
        self.step_started += 1
        return super().training_step(*args, **kwargs)

    def books(self):
        logged = [entry["seen"] for entry in self.state.log_history if "seen" in entry]
        return self.calls, int(self.tokens), self.metrics, list(self.recent), self.step_started, logged


@for_each("defense", [MultiStepRisk(L2, steps=2), SAM(L2)])
@for_each("target", ["all", "last-encoder-layer"])  # the second is tried out in the first step
def test_counts_and_logs_a_batch_once_as_the_stock_trainer_does(tiny_bert, train, defense, target):
    options = {"learning_rate": 0.0, "gradient_accumulation_steps": 2}
    stock = train(Counting, tiny_bert(dropout=0.0), options)
    ours = train(defended(Counting), tiny_bert(dropout=0.0), options, defense=defense, target_modules=target)
    assert ours.books() == stock.books()
    assert stock.books()[:2] == (6, 6 * 4 * 8)


class Controlling(Trainer):
    """Weighs its loss by what it counted in the steps before, as a controller of the entropy does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.window, self.weight, self.sums = None, 1.0, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen = torch.tensor([1.0, inputs["input_ids"].numel()])
        loss = self.weight * super().compute_loss(model, inputs, *args, **kwargs)
        self.window = seen if self.window is None else self.window + seen
        if self.accelerator.sync_gradients:
            self.weight += float(self.window[0])
            self.sums.append(float(self.window[1]))
            self.window = None
        return loss


@for_each("defense", [MultiStepRisk(NEARLY_NONE, steps=2), SAM(NEARLY_NONE)])
@for_each("target", ["all", "last-encoder-layer"])
def test_every_pass_finds_the_counts_that_the_first_one_found(tiny_bert, train, defense, target):
    options = {"gradient_accumulation_steps": 2, "optim": "sgd"}
    stock = train(Controlling, tiny_bert(dropout=0.0), options)
    ours = train(defended(Controlling), tiny_bert(dropout=0.0), options, defense=defense, target_modules=target)
    assert ours.sums == stock.sums
    assert ours.weight == stock.weight > 4
    assert losses_of(ours) == pytest.approx(losses_of(stock), rel=1e-5)


def test_books_come_back_as_they_were_after_an_error_too(tiny_bert, train, arguments):
    trainer = Counting(model=tiny_bert(), args=arguments(), train_dataset=[0.5, 0.25])
    trainer.losses = [torch.ones(3)]
    metrics, data, losses = trainer.metrics, trainer.train_dataset, trainer.losses

    def fail():
        with counters_kept(trainer):
            assert trainer.metrics == metrics
            assert trainer.metrics is not metrics
            assert trainer.train_dataset is data, "data is not copied"
            assert trainer.losses is losses, "tensors are not copied"
            trainer.metrics["train"]["loss"].append(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert trainer.metrics is metrics
    assert metrics == {"train": {}, "eval": {}}


class Unwalkable(list):
    """A list that is taken as a whole: a Python instruction for each of its entries would take a second."""

    def __copy__(self):
        return Unwalkable(self)

    def __deepcopy__(self, memo):
        raise AssertionError("copied entry by entry")


BOOKS = {
    "a number": (3, True),
    "a long list": (Unwalkable([0.5, 1, True]), True),
    "long lists inside": ({"train": Unwalkable([0.5])}, True),
    "a deque": (deque([0.5, 0.25], maxlen=2), True),
    "a default": (defaultdict(list, loss=[0.5]), True),
    "a scalar": (torch.tensor(2.0), True),
    "scalars": ([0.5, torch.tensor(2.0)], True),
    "nothing yet": ([], True),
    "a late text": ([0.5, 0.25, "text"], False),
    "a late vector": ({"a": [0.5], "b": [0.5, torch.ones(3)]}, False),
    "rows": ([{"labels": 1, "text": "a"}], False),
    "a vector": (torch.ones(3), True),
    "a vector inside": ({"train": torch.ones(3)}, True),
    "a large one": (torch.ones(1 << 17), False),
    "a trained scalar": (torch.ones((), requires_grad=True), False),
    "none": (None, True),
}


@for_each("kind", BOOKS)
def test_a_book_is_copied_and_nothing_else_is(kind):
    value, is_book = BOOKS[kind]
    trainer = SimpleNamespace(first=value, second=value, inside={"of": value})
    with counters_kept(trainer):
        assert (trainer.first is not value) == (is_book and not isinstance(value, (int, type(None))))
        assert trainer.first is trainer.second
        assert trainer.first is trainer.inside["of"], "what is one object stays one"
        assert type(trainer.first) is type(value)
        if is_book:
            assert repr(trainer.first) == repr(value)
        trainer.opened = value
    assert trainer.first is value
    assert trainer.inside["of"] is value
    assert hasattr(trainer, "opened") is not is_book


def test_what_is_written_into_a_copied_book_stays_in_the_copy():
    def build():
        return {"train": defaultdict(list, loss=[1.0], n=deque([1], maxlen=2)), "seen": [torch.tensor(1.0), [2]]}

    trainer = SimpleNamespace(metrics=build(), block=1, instance=2, name=3)  # any names
    with counters_kept(trainer):
        trainer.block += 1
        trainer.metrics["train"]["new"].append(1.0)
        trainer.metrics["train"]["n"].extend([2, 3])
        assert list(trainer.metrics["train"]["n"]) == [2, 3]
        trainer.metrics["seen"][0] += 1
        trainer.metrics["seen"][1][0] = 7
    assert trainer.metrics == build()
    assert trainer.block == 1


def masking(trainer_class):
    class Masking(trainer_class):
        """Replaces tokens at random while it prepares a batch, as augmentation does."""

        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            ids = inputs["input_ids"]
            return {**inputs, "input_ids": torch.where(torch.rand(ids.shape) < 0.5, 1, ids)}

    return Masking


@pytest.mark.parametrize("mixin", ["outermost", "inside"])
def test_all_passes_see_the_batch_that_was_prepared_once(tiny_bert, train, mixin):
    trainer_class = defended(masking(Trainer)) if mixin == "outermost" else masking(defended(Trainer))
    model, seen = tiny_bert(dropout=0.0), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    options = {"gradient_accumulation_steps": 2, "max_steps": 1}
    train(trainer_class, model, options, defense=MultiStepRisk(L2, steps=2))
    first, second = seen[:3], seen[3:]
    for passes in (first, second):
        assert len(passes) == 3
        for inputs in passes[1:]:
            assert inputs.keys() == passes[0].keys()
            assert torch.equal(inputs["input_ids"], passes[0]["input_ids"])
            assert torch.equal(inputs["labels"], passes[0]["labels"])
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])


@for_each(
    ("defense", "target"),
    [
        (MultiStepRisk(L2, steps=2), "last-encoder-layer"),  # whose first step finds out what passes can share
        (MultiStepRisk(L2, steps=2), "all"),
        (MultiStepRisk(L2, steps=2, random_start=True), "last-encoder-layer"),  # and moves buffers in a pass before
        (MultiStepRisk(L2, steps=1, batch_share=0.5), "all"),
    ],
)
def test_a_batch_is_prepared_once_a_step(tiny_bert, train, defense, target):
    class Prepares(defended(Trainer)):
        prepared = 0

        def _prepare_inputs(self, inputs):
            self.prepared += 1
            return super()._prepare_inputs(inputs)

    trainer = train(Prepares, tiny_bert(), {"max_steps": 3}, defense=defense, target_modules=target)
    assert trainer.prepared == 3


def test_one_that_looks_at_the_loss_before_it_prepares_the_batch(tiny_bert, train):
    class Looks(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            with torch.no_grad():
                self.first_loss = self.compute_loss(model, dict(inputs))
            return super().training_step(model, inputs, num_items_in_batch)

    settings = {"defense": MultiStepRisk(L2, steps=1), "target_modules": "last-encoder-layer"}
    ours, plain = (
        train(defended(kind), tiny_bert(dropout=0.0), {"max_steps": 2}, **settings) for kind in (Looks, Trainer)
    )
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_evaluation_prepares_its_own_batches(tiny_bert, train, rows):
    trainer = train(defended(Trainer), tiny_bert(), defense=MultiStepRisk(L2, steps=1))
    assert trainer.evaluate(rows[:4])["eval_loss"] != trainer.evaluate(rows[4:8])["eval_loss"]


def regularized(trainer_class, *, calls_super):
    class Regularized(trainer_class):
        """Adds to the loss, or computes all of it, in the outermost class."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, dict(inputs), True) if calls_super else (0.0, None)
            if outputs is None:
                labels = inputs.pop("labels")
                outputs = model(**inputs)
                loss = nn.functional.cross_entropy(outputs.logits, labels)
            return loss + 0.1 * outputs.logits.square().sum()

    return Regularized


@pytest.mark.parametrize("calls_super", [True, False])
@pytest.mark.parametrize("mixin", ["outermost", "inside"])
def test_the_whole_loss_is_weighted_whoever_computes_it(tiny_bert, rows, train, keep_gradients, calls_super, mixin):
    """K = 1: the risk's gradient is the mean of those at w and at w + ε g/‖g‖, of the regularizer too."""
    if mixin == "outermost":
        trainer_class = defended(regularized(Trainer, calls_super=calls_super))
    else:
        trainer_class = regularized(defended(Trainer), calls_super=calls_super)
    model, reference = tiny_bert(dropout=0.0).double(), tiny_bert(dropout=0.0).double()
    defense = MultiStepRisk(L2, steps=1)
    train(trainer_class, model, ONE_STEP, rows=rows[:4], callbacks=[keep_gradients], defense=defense)

    def loss_of(call):
        outputs = call(**stacked(rows[:4]))
        return outputs.loss + 0.1 * outputs.logits.square().sum()

    expected = longhand(reference, loss_of, [0.5, 0.5], EPSILON)
    torch.testing.assert_close(keep_gradients.kept[0], expected, rtol=1e-9, atol=1e-12)


class WithHead(Trainer):
    """Its loss has parameters of its own, which only the optimizer holds."""

    def create_optimizer(self, model=None):
        torch.manual_seed(5)
        self.head = nn.Linear(3, 3).double()
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *self.head.parameters()], lr=0.0)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(self.head(model(**inputs).logits), labels)


def test_a_probe_leaves_no_gradient_in_parameters_outside_the_model(tiny_bert, rows, train):
    """SAM's gradient is that at w + a alone, for the parameters of the loss too."""
    model, reference = tiny_bert(dropout=0.0).double(), tiny_bert(dropout=0.0).double()
    kept = {}

    class Keep(defended(WithHead)):
        def training_step(self, *args, **kwargs):
            risk = super().training_step(*args, **kwargs)
            kept.update({name: p.grad.clone() for name, p in self.head.named_parameters()})
            return risk

    trainer = train(Keep, model, ONE_STEP, rows=rows[:4], defense=SAM(L2))
    batch = stacked(rows[:4])
    labels = batch.pop("labels")

    def gradient(parameters):
        loss = nn.functional.cross_entropy(trainer.head(reference(**batch).logits), labels)
        return torch.autograd.grad(loss, parameters)

    weights = list(reference.parameters())
    clean = gradient(weights)
    norm = torch.sqrt(sum(part.square().sum() for part in clean))
    with torch.no_grad():
        for weight, part in zip(weights, clean, strict=True):
            weight.add_(EPSILON * part / norm)
    for actual, wanted in zip(kept.values(), gradient(list(trainer.head.parameters())), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


def test_a_training_step_without_compute_loss_is_refused(tiny_bert, train):
    class Bypassing(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    model = tiny_bert()
    with pytest.raises(RuntimeError, match="training_step does not call compute_loss cannot be defended"):
        train(defended(Bypassing), model, defense=MultiStepRisk(L2, steps=1))
    for weight, before in zip(model.parameters(), tiny_bert().parameters(), strict=True):
        assert torch.equal(weight, before)


def test_a_loss_that_is_found_in_evaluation_mode_is_found_there_in_every_pass(tiny_bert, train):
    """As of who compares with the answers without dropout: the mode is the loss's own matter, pass by pass."""
    modes = []

    class Comparing(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            model.eval()
            modes.append([module.training for module in model.modules()])
            model.train()
            modes.append([module.training for module in model.modules()])
            return super().compute_loss(model, inputs, *args, **kwargs)

    train(defended(Comparing), tiny_bert(), {"max_steps": 2}, defense=MultiStepRisk(L2, steps=1))
    assert len(modes) >= 8
    assert not any(map(any, modes[::2]))
    assert all(map(all, modes[1::2]))
