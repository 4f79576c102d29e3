"""Defended training on two gloo ranks: one all-reduce a step, right gradients, the same weights everywhere."""

from __future__ import annotations

import itertools
import os
import tempfile
from functools import partial

import pytest
import tiny
import torch
import transformers as tf
from another_device.device import cases_here, placed, rank_device
from torch import distributed, nn
from trainings import IN_ORDER, QUIET, KeepGradients, logs_of

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    GradientCorruption,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
)
from hf_parcor.defenses import DefendedStep
from hf_parcor.distributed.processes import TrainingProcesses
from hf_parcor.prefix import PrefixError
from hf_parcor.training import shared_prefix

pytestmark = pytest.mark.slow  # ranks are processes of their own

L2 = CorruptionConstraint(epsilon=0.2)
LAST = "last-encoder-layer"
ROWS = 48


def bert(dtype=torch.float64, layers=2):
    torch.manual_seed(0)
    sizes = tiny.encoder(30, 16, layers, inner=24)
    config = tf.BertConfig(**sizes, **tiny.STILL, num_labels=3, initializer_range=0.3)
    return tf.BertForSequenceClassification(config).to(rank_device(), dtype)


def gpt2(dtype=torch.float64, layers=2):
    """The head is tied to the embeddings: one weight at both ends of the model."""
    torch.manual_seed(0)
    config = tf.GPT2Config(**tiny.gpt2(30, 16, layers), **tiny.STILL_GPT2, initializer_range=0.3)
    return placed(tf.GPT2LMHeadModel(config).to(dtype), rank_device())


class Normed(nn.Module):
    """BatchNorm before and behind the head that is defended."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.to(rank_device(), torch.float64)

    def forward(self, x, labels):
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Blocks(nn.Module):
    """BatchNorm in each of two blocks alike, which Accelerate compiles each by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(2))
        self.to(rank_device(), torch.float64)

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return {"loss": nn.functional.cross_entropy(x, labels), "logits": x}


def rows_of(model):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(ROWS):
        if isinstance(model, (Normed, Blocks, Sometimes)):
            row = {"x": torch.randn(4, generator=generator, dtype=torch.float64)}
        else:
            row = {"input_ids": torch.randint(30, (8,), generator=generator)}
        row["labels"] = int(torch.randint(3, (), generator=generator))
        if isinstance(model, tf.GPT2LMHeadModel):  # labels are missing in some rows: uneven counts on the ranks
            row["labels"] = row["input_ids"].clone()
            row["labels"][: 6 if len(rows) % 4 < 2 else 0] = -100
        rows.append(row)
    return rows


class Watch(KeepGradients):
    """Counts what DDP reduces, beside the gradients."""

    def __init__(self):
        super().__init__()
        self.reduced, self.trainer = [], None

    def on_train_begin(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(self, Watch.reduce)

    def reduce(self, bucket):
        self.reduced.append(bucket.buffer().nbytes)
        sent = distributed.all_reduce(bucket.buffer() / distributed.get_world_size(), async_op=True)
        return sent.get_future().then(lambda future: future.value()[0])


def train(build, kind=ParameterDefenseTrainer, ddp=None, prepare=None, batch=2, **settings):
    """Train on the rows in their order, and return what is to be compared."""
    options = {
        "max_steps": 2,
        "average_tokens_across_devices": False,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        **IN_ORDER,
        "per_device_train_batch_size": batch,
        "ddp_bucket_cap_mb": 0.004,  # several buckets
        "logging_steps": 1,
        **settings.pop("options", {}),
    }
    if kind is tf.Trainer:
        settings = {}

    class Wrapping(kind):
        def _build_accelerator_args(self, **kwargs):
            built = super()._build_accelerator_args(**kwargs)
            for name, value in (ddp or {}).items():
                setattr(built["kwargs_handlers"][0], name, value)
            return built

    model, watch = build(), Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            output_dir=folder,
            **QUIET,
            **options,
        )
        trainer = Wrapping(model, arguments, train_dataset=rows_of(model), callbacks=[watch], **settings)
        watch.trainer = trainer
        if prepare is not None:
            prepare(model)
        trainer.train()
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "gradients": watch.kept,
        "reduced": watch.reduced,
        "reuses": getattr(trainer, "shared_prefix", None) is not None,
        "logs": logs_of(trainer),
    }


FREE = {"find_unused_parameters": False}
OPTIONS = {
    "plain": {},
    "accumulation": {"options": {"gradient_accumulation_steps": 3}},
    "every parameter used": {"ddp": FREE},
    "buckets hold the gradients": {"ddp": {**FREE, "gradient_as_bucket_view": True}},
    "buckets hold the gradients, accumulation": {
        "ddp": {"gradient_as_bucket_view": True},
        "options": {"gradient_accumulation_steps": 3},
    },
    "checkpointing": {
        "options": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    },
}
DEFENSES = {
    "multi_step_risk": MultiStepRisk(L2, steps=2),
    "acrt": ACRT(L2),
    "sam": SAM(L2),
    "awp": AWP(L2, steps=2),
    "gradient_penalty": GradientPenalty(weight=0.1),
    "corruption": CorruptionRisk([GradientCorruption(L2), Quantization(4)]),
}
CASES = [
    *itertools.product(["plain", "accumulation"], DEFENSES),
    *itertools.product(["every parameter used", "checkpointing"], ["multi_step_risk"]),
    *itertools.product(
        ["buckets hold the gradients", "buckets hold the gradients, accumulation"], ["multi_step_risk", "sam"]
    ),
]


def every_option():
    runs = {}
    for option, name in cases_here(CASES, [case for case in CASES if case[0] == "plain"]):
        if (option, "stock") not in runs:
            runs[option, "stock"] = train(bert, tf.Trainer, **OPTIONS[option])
        runs[option, name] = train(bert, defense=DEFENSES[name], **OPTIONS[option])
    here, moved_apart = torch.device("cpu"), 7 + distributed.get_rank()  # as dropout may move generators
    for shared in (True, False):
        runs["seed", shared] = TrainingProcesses().seed(moved_apart, here, shared=shared)
    runs["seed", "alike"] = TrainingProcesses().seed(7, here, shared=False)
    torch.manual_seed(moved_apart)
    step = DefendedStep({"w": nn.Parameter(torch.ones(1))}, None, 1, [], processes=TrainingProcesses())
    runs["drawn"] = {shared: [step.draw(1000, shared=shared) for _ in range(8)] for shared in (True, False)}
    return runs


@pytest.fixture(scope="module")
def options(run_on_ranks, device_of_ranks):
    return run_on_ranks(every_option, 2, device=device_of_ranks)


@pytest.fixture(scope="module")
def alone():
    """The gradient of each micro-batch on one process: no accumulation, no DDP."""
    settings = {"max_steps": 6, "learning_rate": 0.0}
    return {name: train(bert, defense=defense, options=settings) for name, defense in DEFENSES.items()}


def cases_of(options):
    """Return what was tried on this device; every one has its subtest."""
    return [case for case in CASES if case in options[0]]


@pytest.mark.slow
def test_as_many_reductions_and_bytes_as_the_stock_trainer(options, subtests):
    for option, name in cases_of(options):
        with subtests.test(option=option, name=name):
            for rank in options:
                assert len(rank[option, "stock"]["reduced"]) > 4
                assert rank[option, name]["reduced"] == rank[option, "stock"]["reduced"]


def test_ranks_hold_the_same_weights(options, subtests):
    for case in cases_of(options):
        with subtests.test(case=case):
            first, second = (rank[case]["weights"] for rank in options)
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.slow
def test_gradient_is_the_mean_of_what_each_rank_would_step_along_alone(options, alone, subtests):
    """Under accumulation the stock Trainer adds up this model's losses, and does not divide them."""
    for option, name in cases_of(options):
        batches = 2 * OPTIONS[option].get("options", {}).get("gradient_accumulation_steps", 1)
        with subtests.test(option=option, name=name):
            for key, value in options[0][option, name]["gradients"][0].items():
                gradients = [gradient[key] for gradient in alone[name]["gradients"][:batches]]
                expected = torch.stack(gradients).sum(dim=0) / 2
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=key)


def test_random_corruptions_are_shared_or_not_as_asked(options):
    first, second = options
    assert first["seed", True] == second["seed", True] == 7
    for key in (False, "alike"):
        assert first["seed", key] != second["seed", key]
    assert first["drawn"][True] == second["drawn"][True]
    assert first["drawn"][False] != second["drawn"][False]


K2 = MultiStepRisk(L2, steps=2)
TO_LAST = {"target_modules": LAST, "defense": K2}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager", "ddp_bucket_cap_mb": None}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
REUSES = {
    "plain": (bert, TO_LAST),
    "sam": (bert, {**TO_LAST, "defense": SAM(L2)}),
    "a part of the batch": (bert, {**TO_LAST, "defense": MultiStepRisk(L2, steps=2, batch_share=0.5)}),
    "sam on a part": (bert, {**TO_LAST, "defense": SAM(L2, batch_share=0.5)}),
    "accumulation": (bert, {**TO_LAST, **OPTIONS["accumulation"]}),
    "every parameter used": (bert, {**TO_LAST, **OPTIONS["every parameter used"]}),
    "buckets hold the gradients": (bert, {**TO_LAST, **OPTIONS["buckets hold the gradients"]}),
    "checkpointing": (bert, {**TO_LAST, **OPTIONS["checkpointing"]}),
    "reentrant checkpointing": (bert, {**TO_LAST, "ddp": FREE, "options": REENTRANT}),
    "every second step": (bert, {**TO_LAST, "defense": SAM(L2, interval=2), "options": {"max_steps": 3}}),
    "uneven last batch": (bert, {**TO_LAST, "batch": 5, "options": {"max_steps": 6}}),
    "shared corruption": (bert, {**TO_LAST, "defense": MultiStepRisk(L2, steps=2, sync_perturbation=True)}),
    "compiled in regions": (bert, {**TO_LAST, "options": {**COMPILED, "gradient_accumulation_steps": 3}}),
    "compiled in regions, running statistics": (
        Blocks,
        {"defense": K2, "target_modules": ["blocks.1"], "options": {**COMPILED, "gradient_accumulation_steps": 2}},
    ),
    "tied head": (gpt2, {**TO_LAST, "target_modules": "last-decoder-layer"}),
    "tied head, every parameter used": (gpt2, {**TO_LAST, "target_modules": "last-decoder-layer", "ddp": FREE}),
}


def cannot_be_cut(*args, **settings):
    raise PrefixError("the model of this process cannot be cut")


def every_reuse():
    runs = {}
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
    for name in cases_here(list(REUSES), ["plain", "sam on a part", "accumulation", "shared corruption", "tied head"]):
        build, settings = REUSES[name]
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"  # which stays as a run has set it
        runs[name] = [train(build, **settings, reuse_prefix=reuse) for reuse in (True, False)]
        runs[name].append(train(build, tf.Trainer, **settings))
    if distributed.get_rank() == 1:
        shared_prefix.plan_prefix = cannot_be_cut
    runs["one cannot"] = train(bert, **TO_LAST)
    return runs


@pytest.fixture(scope="module")
def reuses(run_on_ranks, device_of_ranks):
    return run_on_ranks(every_reuse, 2, device=device_of_ranks)


@pytest.mark.slow
def test_a_shared_prefix_changes_nothing_and_costs_no_reduction(reuses, subtests):
    for name in [name for name in REUSES if name in reuses[0]]:
        # DDP fills its buckets in the order in which gradients come, here all of them at once.
        further = 1 if name == "reentrant checkpointing" else 0
        with subtests.test(name=name):
            for rank in reuses:
                reused, full, stock = rank[name]
                assert (reused["reuses"], full["reuses"]) == (True, False)
                for key, gradients in enumerate(full["gradients"]):
                    torch.testing.assert_close(reused["gradients"][key], gradients, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(reused["weights"], full["weights"], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(reused["buffers"], full["buffers"], rtol=1e-9, atol=1e-12)
                assert sum(reused["reduced"]) == sum(stock["reduced"])
                assert len(reused["reduced"]) <= len(stock["reduced"]) + further
            first, second = (rank[name][0]["weights"] for rank in reuses)
            torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_no_process_reuses_a_prefix_that_another_cannot(reuses):
    for rank in reuses:
        assert not rank["one cannot"]["reuses"]
        torch.testing.assert_close(rank["one cannot"]["weights"], rank["plain"][1]["weights"], rtol=0, atol=0)


TWENTY = {"max_steps": 20, "learning_rate": 5e-3, "ddp_bucket_cap_mb": None, "logging_steps": 20}
FIVE = {**TWENTY, "max_steps": 5}
UNEVEN = {**FIVE, "average_tokens_across_devices": True}
SHARED = {
    "multi_step_risk": (bert, MultiStepRisk(L2, steps=2, sync_perturbation=True), TWENTY),
    "acrt": (bert, ACRT(L2, sync_perturbation=True), TWENTY),
    "sam": (bert, SAM(L2, sync_perturbation=True), TWENTY),
    "awp": (bert, AWP(L2, steps=2, sync_perturbation=True), TWENTY),
    "awp, each tensor": (
        bert,
        AWP(CorruptionConstraint(epsilon=0.02), per_tensor=True, sync_perturbation=True),
        FIVE,
    ),
    "accumulation": (
        bert,
        MultiStepRisk(L2, steps=1, sync_perturbation=True),
        {**TWENTY, "max_steps": 4, "gradient_accumulation_steps": 3},
    ),
    "random start": (bert, MultiStepRisk(L2, steps=1, random_start=True, sync_perturbation=True), FIVE),
    "uneven labels": (gpt2, MultiStepRisk(L2, steps=2, sync_perturbation=True), UNEVEN),
}


def every_shared(world_size):
    runs = {}
    for name in cases_here(list(SHARED), ["acrt", "random start", "uneven labels"]):
        build, defense, options = SHARED[name]
        settings = {"defense": defense, "options": options, "batch": 4 // world_size}
        runs[name] = train(partial(build, torch.float32, layers=1), prepare=reseed, **settings)
    return runs


def reseed(model):
    """Let the generators of the ranks differ, as they do where dropout has seen other batches."""
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)


@pytest.fixture(scope="module")
def shared(run_on_ranks, device_of_ranks):
    two, (one,) = (run_on_ranks(every_shared, ranks, ranks, device=device_of_ranks) for ranks in (2, 1))
    return two, one


@pytest.mark.slow
def test_a_shared_corruption_is_that_of_one_process_on_the_joined_batch(shared, subtests):
    ranks, one = shared
    for name in one:
        with subtests.test(name=name):
            torch.testing.assert_close(ranks[0][name]["weights"], ranks[1][name]["weights"], rtol=0, atol=0)
            torch.testing.assert_close(ranks[0][name]["weights"], one[name]["weights"], rtol=0, atol=1e-6)


def bytes_of_a_shared_corruption():
    sent, all_reduce = [], distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    run = train(bert, defense=MultiStepRisk(L2, steps=2, sync_perturbation=True), options={"logging_steps": 100})
    return sum(sent), sum(run["reduced"]), len(sent) - len(run["reduced"])


@pytest.fixture(scope="module")
def others(run_on_ranks, device_of_ranks):
    """Return a function that takes what a function found on each rank; all of them run in one start of ranks."""
    ranks = run_on_ranks(every_other, 2, device=device_of_ranks)
    return lambda function: [rank[function.__name__] for rank in ranks]


@pytest.mark.slow
def test_a_shared_corruption_sends_the_selected_gradients_once_a_corruption_step(others):
    for total, reduced, further in others(bytes_of_a_shared_corruption):
        assert total == 3 * reduced
        assert further == 2 * 2  # one call for each corruption step of two optimizer steps


class Sometimes(nn.Module):
    """A layer is used in one of two passes of a step, and on rank 0 only: as with dropped layers or experts."""

    def __init__(self, used_in=0):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.to(rank_device(), torch.float64)
        self.calls, self.used_in = 0, used_in

    def forward(self, x, labels):
        logits = self.always(x)
        if self.calls % 2 == self.used_in and distributed.get_rank() == 0:
            logits = logits + self.sometimes(x)
        self.calls += 1
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def every_sometimes():
    found = {}
    for used_in in (0, 1):
        build = partial(Sometimes, used_in)
        for sync, radius in ((False, 0.2), (True, 0.2), (False, 1e-12)):
            constraint = CorruptionConstraint(epsilon=radius)
            defense = MultiStepRisk(constraint, steps=1, sync_perturbation=sync)
            found[used_in, sync, radius] = train(build, defense=defense)
    found["SAM"] = train(partial(Sometimes, 1), defense=SAM(CorruptionConstraint(epsilon=1e-12)))
    return found


@pytest.fixture(scope="module")
def sometimes(others):
    return others(every_sometimes)


def test_parameters_without_a_gradient_in_the_last_pass_or_on_a_rank(sometimes):
    """With next to no corruption the gradient is that of the clean batch of rank 0, at half the weight, halved."""
    for first, second in zip(*(rank.values() for rank in sometimes), strict=True):
        torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
        assert "never.weight" not in first["gradients"][0]
    torch.manual_seed(0)
    model = Sometimes()
    rows = rows_of(model)[:2]
    logits = model.always(torch.stack([row["x"] for row in rows])) + model.sometimes(
        torch.stack([row["x"] for row in rows])
    )
    loss = nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in rows]))
    (expected,) = torch.autograd.grad(loss / 2 / 2, model.sometimes.weight)
    for used_in in (0, 1):
        found = sometimes[0][used_in, False, 1e-12]["gradients"][0]["sometimes.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found = sometimes[0]["SAM"]["gradients"][0]["sometimes.weight"]
    torch.testing.assert_close(found, 2 * expected, rtol=1e-9, atol=1e-12)


def every_spoiled():
    runs = {}
    for name, options in (("local", {}), ("shared", {"sync_perturbation": True})):
        seen = []
        settings = {"prepare": partial(spoil, seen=seen, call=2), "options": {"logging_nan_inf_filter": False}}
        runs[name] = train(bert, defense=SAM(L2, **options), **settings)
        runs[name, "weights"] = seen
    runs["risk"] = train(bert, defense=MultiStepRisk(L2, steps=1), prepare=partial(spoil, seen=[], call=2))
    runs["stock"] = train(bert, tf.Trainer, prepare=partial(spoil, seen=[], call=1))
    return runs


def spoil(model, seen, call):
    """Keep the weights that each pass saw; on rank 1 one pass has no number as its result."""

    def hook(module, arguments, output):
        seen.append(module.weight.detach().clone())
        if len(seen) == call + 1 and distributed.get_rank() == 1:
            return output * torch.nan
        return output

    model.classifier.register_forward_hook(hook)


@pytest.fixture(scope="module")
def spoiled(others):
    return others(every_spoiled)


@pytest.mark.parametrize("name", ["local", "shared"])
def test_a_rank_whose_gradient_is_no_number_makes_no_corruption(spoiled, name):
    """Rank 1 has NaN in the first pass of its second step, from which SAM takes nothing but the corruption."""
    moved = [not torch.equal(rank[name, "weights"][2], rank[name, "weights"][3]) for rank in spoiled]
    assert moved == ([True, False] if name == "local" else [False, False])
    first, second = (rank[name]["weights"] for rank in spoiled)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(value.isfinite().all() for value in first.values())


def test_a_rank_without_a_number_spoils_what_it_spoils_in_the_stock_trainer(spoiled):
    stock = {name: value.isnan() for name, value in spoiled[0]["stock"]["weights"].items()}
    assert any(value.any() for value in stock.values())
    for rank in spoiled:
        assert all(torch.equal(value.isnan(), stock[name]) for name, value in rank["risk"]["weights"].items())


STILL = {"options": {"learning_rate": 0.0, "max_steps": 3}}
NORMED = {
    "all": {"defense": K2},
    "head": {"defense": K2, "target_modules": ["head.0", "head.2"]},
    "head, full passes": {"defense": K2, "target_modules": ["head.0", "head.2"], "reuse_prefix": False},
    "sam": {"defense": SAM(L2)},
    "shared": {"defense": MultiStepRisk(L2, steps=1, sync_perturbation=True)},
}


def every_normed():
    runs = {name: train(Normed, **settings, **STILL) for name, settings in NORMED.items()}
    runs["stock"] = train(Normed, tf.Trainer, **STILL)
    return runs


@pytest.fixture(scope="module")
def normed(others):
    return others(every_normed)


@pytest.mark.parametrize("name", NORMED)
def test_running_statistics_are_those_of_the_stock_trainer(normed, name):
    """DDP sends rank 0's at the first pass of a step, and the clean pass alone moves them. Nothing is learned here."""
    for rank in normed:
        assert rank[name]["reuses"] == (name == "head")
        torch.testing.assert_close(rank[name]["buffers"], rank["stock"]["buffers"], rtol=0, atol=0)
    assert not torch.equal(normed[0]["stock"]["buffers"]["body.1.running_mean"], torch.zeros(6))
    assert normed[0]["stock"]["buffers"]["body.1.num_batches_tracked"] == 3


def measured(model, folder):
    """Measure a Trainer's model, after some steps if it was not trained."""
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "optim": "sgd"}
    arguments = tf.TrainingArguments(folder, **QUIET, **options)
    trainer = ParameterDefenseTrainer(model, arguments, train_dataset=rows_of(model), eval_dataset=rows_of(model)[:8])
    if distributed.is_initialized():
        trainer.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = trainer.evaluate_robustness([Quantization(3), GradientCorruption(L2)])
    return before, dict(model.state_dict()), {name: found[name] for name in found if name.endswith("loss")}


def measured_normed():
    with tempfile.TemporaryDirectory() as folder:
        return measured(Normed(), folder)


def test_what_is_measured_has_the_running_statistics_that_are_saved(others, tmp_path):
    """In training each rank has its own, and keeps them; those of the first one are saved."""
    (saved, *first), (other, *second) = others(measured_normed)
    assert not torch.equal(saved["body.1.running_mean"], other["body.1.running_mean"])
    torch.testing.assert_close([first[0], second[0]], [saved, other], rtol=0, atol=0)
    model = Normed()
    model.load_state_dict(saved)
    expected = measured(model, str(tmp_path))[2]
    assert first[1] == second[1] == pytest.approx(expected, rel=1e-6)
    assert len(set(expected.values())) == len(expected) == 4


def static_graph():
    try:
        train(bert, defense=K2, options={"ddp_static_graph": True})
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_static_graph_is_refused(others):
    assert all(said.startswith("ddp_static_graph: expected False, got True") for said in others(static_graph))


def every_other():
    checks = (
        every_sometimes,
        every_spoiled,
        every_normed,
        measured_normed,
        static_graph,
        bytes_of_a_shared_corruption,
    )
    return {check.__name__: check() for check in checks}
