"""Every optimizer and every schedule that TrainingArguments offers: one defended step is one of its steps."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from for_each import for_each
from longhand import longhand
from trainings import IN_ORDER, stacked
from transformers import Trainer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer

DEFENSE = MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=1)
RUNS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
UPDATES_INSIDE_BACKWARD = (
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
)
NEEDS = {
    "torch_xla": ("adamw_torch_xla",),
    "torch_npu": ("adamw_torch_npu_fused",),
    "torchdistx": ("adamw_anyprecision",),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "bitsandbytes": (
        "ademamix",
        "adamw_bnb_8bit",
        "adamw_8bit",
        "ademamix_8bit",
        "lion_8bit",
        "lion_32bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "rmsprop_bnb",
        "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit",
    ),
    "galore_torch": ("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    "grokadamw": ("grokadamw",),
    "schedulefree": ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
    "apollo_torch": ("apollo_adamw",),
    "optimi": ("stable_adamw",),
}


def test_every_optimizer_has_a_row():
    rows = [*RUNS, *UPDATES_INSIDE_BACKWARD, *(name for names in NEEDS.values() for name in names)]
    assert sorted(rows) == sorted(name.value for name in OptimizerNames)


@pytest.mark.parametrize("optim", RUNS)
def test_one_step_is_the_optimizer_on_the_gradient_of_the_risk(tiny_bert, rows, train, arguments, optim):
    options = {"optim": optim, "max_steps": 1, "weight_decay": 0.1, **IN_ORDER}
    model, reference = tiny_bert(dropout=0.0).double(), tiny_bert(dropout=0.0).double()
    before = {name: value.detach().clone() for name, value in reference.named_parameters()}
    inputs = stacked(rows[:4])
    gradient = longhand(reference, lambda call: call(**inputs).loss, [0.5, 0.5])
    by_hand = Trainer(model=reference, args=arguments(**options)).create_optimizer()
    for name, parameter in reference.named_parameters():
        parameter.grad = gradient[name]
    by_hand.step()
    train(ParameterDefenseTrainer, model, options, defense=DEFENSE)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # Adaptive steps divide a gradient by its own size: where it is rounding noise, so is the step.
        certain = gradient[name].abs() > 1e-9
        torch.testing.assert_close(ours[certain], theirs[certain], rtol=1e-7, atol=1e-10, msg=name)
    assert not torch.equal(before["classifier.weight"], model.classifier.weight)


@for_each("optim", UPDATES_INSIDE_BACKWARD)
def test_refused(tiny_bert, arguments, optim):
    with pytest.raises(ValueError, match="expected an optimizer that updates after backward"):
        ParameterDefenseTrainer(model=tiny_bert(), args=arguments(optim=optim))


@for_each("optim", UPDATES_INSIDE_BACKWARD)
@for_each(("epsilon", "steps"), [(0.0, 1), (0.2, 0)])
def test_not_refused_where_each_step_is_the_stock_one(tiny_bert, arguments, optim, epsilon, steps):
    defense = MultiStepRisk(CorruptionConstraint(epsilon=epsilon), steps=steps)
    ParameterDefenseTrainer(model=tiny_bert(), args=arguments(optim=optim), defense=defense)


@pytest.mark.parametrize("package", NEEDS)
def test_without_its_package_the_error_is_the_stock_one(tiny_bert, arguments, package):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    model = tiny_bert()
    for optim in NEEDS[package]:
        settings = arguments(optim=optim, optim_target_modules=["query"])
        with pytest.raises((ImportError, ValueError)) as stock:
            Trainer(model=model, args=settings).create_optimizer()
        with pytest.raises(stock.type) as ours:
            ParameterDefenseTrainer(model=model, args=settings, defense=DEFENSE).create_optimizer()
        assert str(ours.value) == str(stock.value)


class ScheduleFree(torch.optim.SGD):
    """Trains at one point and evaluates at another, as schedule-free optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.training = True

    @torch.no_grad()
    def _move(self, training):
        if self.training != training:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(2.0 if training else 0.5)
            self.training = training

    def train(self):
        self._move(True)

    def eval(self):
        self._move(False)


def test_schedule_free_optimizer_enters_training_before_the_first_pass(tiny_bert, arguments, rows):
    """A random start is written before the first pass; moved within a pass, the weights would be put back wrong."""
    model = tiny_bert(dropout=0.0)
    optimizer = ScheduleFree(model.parameters(), lr=0.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = ParameterDefenseTrainer(
        model=model,
        args=arguments(max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        defense=MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=1, random_start=True),
    )
    trainer.train()
    optimizer.train()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


# Schedules with the arguments that they cannot do without, or that let them move within three epochs.
SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {},
    "polynomial": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "reduce_lr_on_plateau": {"patience": 0},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "greedy": {"patience": 0},
}


def test_every_schedule_has_a_row():
    assert SCHEDULES.keys() == {name.value for name in SchedulerType}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_the_stock_ones(tiny_bert, rows, train, schedule):
    """Passes are no steps: three epochs of three steps, each of two micro-batches."""
    options = {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": SCHEDULES[schedule],
        "warmup_steps": 1,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
    }
    if schedule in ("reduce_lr_on_plateau", "greedy"):  # they follow the evaluation's loss, so weights must not move
        options |= {"eval_strategy": "epoch", "metric_for_best_model": "loss", "optim": "sgd", "learning_rate": 1e-5}
    stock, ours = (
        train(kind, tiny_bert(dropout=0.0), options, eval_dataset=rows, **extra)
        for kind, extra in ((Trainer, {}), (ParameterDefenseTrainer, {"defense": DEFENSE}))
    )
    rates, expected = ([e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (ours, stock))
    assert len(rates) == 9
    assert rates == expected
    assert len(set(rates)) > 1 or schedule == "constant"
