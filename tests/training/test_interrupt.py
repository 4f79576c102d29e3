"""An interrupt, wherever it comes, leaves the uncorrupted weights."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from for_each import for_each
from interrupts import MAY_BE_IGNORED, interrupted_at_lines, state_of

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer, corrupted
from hf_parcor.defenses import AWP, GradientPenalty
from hf_parcor.evaluation.metrics import WithDivergence
from hf_parcor.evaluation.metrics.loss import LossMetric
from hf_parcor.model_state import StepBuffers, evaluation_mode, modules_of
from hf_parcor.overriding import override, overriding, undoing_left

K1 = MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=1)


@pytest.fixture
def interruptible():
    """Let SIGINT raise KeyboardInterrupt: a process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("targets", ["all", "last-encoder-layer"])
def test_interrupt_by_signal_in_a_corrupted_pass_and_then_saving(
    tiny_bert, rows, arguments, tmp_path, targets, share, call
):
    """Ctrl-C and then `save_model()`, which is what people do: what is saved are the weights, not w + a."""
    model, calls = tiny_bert(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    corrupted = []

    def interrupt(module, args, output):
        is_corrupted = any(not torch.equal(value, before[n]) for n, value in model.state_dict().items())
        calls.append(is_corrupted)
        if sum(calls) == call:
            corrupted.append(is_corrupted)
            signal.raise_signal(signal.SIGINT)

    handle = model.bert.encoder.layer[0].register_forward_hook(interrupt)
    defense = MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=2, batch_share=share)
    trainer = ParameterDefenseTrainer(model, arguments(), train_dataset=rows, defense=defense, target_modules=targets)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert (trainer.shared_prefix is None) == (targets == "all")
    trainer.save_model()
    assert corrupted == [True]
    saved = type(model).from_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(saved, dict(before), rtol=0, atol=0)


@MAY_BE_IGNORED
@pytest.mark.slow
def test_interrupt_at_any_line_leaves_the_model_as_it_was(tiny_bert, rows, arguments):
    """Ctrl-C can come between any two lines; here at each 151st line of ours in a step, or of what ends blocks."""
    model = tiny_bert(dropout=0.0)
    settings = {"defense": K1, "target_modules": ["classifier"]}
    trainer = ParameterDefenseTrainer(model, arguments(), train_dataset=rows, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1  # as the loop sets it
    model.train()
    before, tried = state_of(model), 0
    for at in interrupted_at_lines(lambda: trainer.training_step(model, dict(batch)), every=151):
        assert state_of(model) == before, at
        assert not {"compute_loss", "_prepare_inputs"} & set(vars(trainer)), at
        tried += 1
    assert tried > 20


class Same(torch.autograd.Function):
    """A function of somebody's own, whose gradients a penalty checks by hooks on the weights."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OwnLoss(ParameterDefenseTrainer):
    def compute_loss(self, *args, **kwargs):
        return Same.apply(super().compute_loss(*args, **kwargs))


def _step_of(make):
    def prepare(model, rows, arguments):
        trainer = OwnLoss(model, arguments(), train_dataset=rows, defense=make(), target_modules="last-encoder-layer")
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        return lambda: trainer.training_step(model, dict(batch))

    return prepare


@undoing_left()
def _buffers_of_a_wrapped_model(model):
    with StepBuffers(modules_of(model), wrapped=model).moving():
        model(**model.dummy_inputs)


@undoing_left()
def _divergence(model):
    WithDivergence(LossMetric([model.dummy_inputs], lambda model, batch: model(**batch).logits.sum()), model)


HOOKED = {
    "prefix": _step_of(lambda: K1),
    "adversarial inputs": _step_of(lambda: AWP(CorruptionConstraint(epsilon=0.2))),
    "gradient penalty": _step_of(GradientPenalty),
    "buffers under a wrapper": lambda model, rows, arguments: lambda: _buffers_of_a_wrapped_model(model),
    "divergence": lambda model, rows, arguments: lambda: _divergence(model),
}


@for_each("name", HOOKED)
def test_an_interrupt_just_after_a_hook_was_set_leaves_none(name, tiny_bert, rows, arguments, monkeypatch):
    """Each hook in turn: before the next instruction, which says how it is removed."""
    model = tiny_bert(dropout=0.0)
    model.train()
    hooks, before = itertools.count(1), state_of(model)
    interrupted = 0

    def interrupting(register):
        def registering(*args, **kwargs):
            handle = register(*args, **kwargs)
            if next(hooks) == interrupted:
                raise KeyboardInterrupt
            return handle

        return registering

    for owner, method in [
        (torch.nn.Module, "register_forward_hook"),
        (torch.nn.Module, "register_forward_pre_hook"),
        (torch.Tensor, "register_hook"),
    ]:
        monkeypatch.setattr(owner, method, interrupting(getattr(owner, method)))
    HOOKED[name](model, rows, arguments)()
    in_all = next(hooks) - 1
    assert in_all
    for interrupted in range(1, in_all + 1, 1 + in_all // 20):
        hooks = itertools.count(1)
        with pytest.raises(KeyboardInterrupt):
            HOOKED[name](model, rows, arguments)()
        assert state_of(model) == before, interrupted


def test_what_a_block_did_and_could_not_undo():
    """As where an interrupt comes just where the block ends; what another one has undone itself is left alone."""
    layer = torch.nn.Linear(2, 2)
    theirs = contextlib.ExitStack()
    override(theirs, layer, __repr__=lambda: "begun before")

    def interrupted():
        with contextlib.ExitStack() as ended:
            override(ended, layer, extra_repr=lambda: "ours")
        assert "extra_repr" not in vars(layer)
        layer.extra_repr = lambda: "theirs"
        for wrapper in ("first", "second"):
            override(contextlib.ExitStack(), layer, forward=lambda wrapper=wrapper: wrapper)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), undoing_left():
        interrupted()
    assert layer.extra_repr() == "theirs"
    assert layer.forward(torch.zeros(2)).tolist() == layer.bias.tolist()
    assert "__repr__" in vars(layer)
    theirs.close()
    assert "__repr__" not in vars(layer)


@for_each("before", [True, False])
def test_the_gradient_mode_is_what_it_was(before):
    with torch.set_grad_enabled(before):
        with contextlib.suppress(KeyboardInterrupt), undoing_left():
            torch.set_grad_enabled(not before)  # as where the end of `no_grad` was interrupted
            raise KeyboardInterrupt
        assert torch.is_grad_enabled() == before


def test_what_is_left_inside_is_undone_before_what_is_around_it():
    """Two blocks keep the mode and the weights, and only the outer one ends: it has what was before both."""
    layer = torch.nn.Linear(2, 2)
    before = state_of(layer)
    inner = []
    with contextlib.suppress(KeyboardInterrupt), undoing_left(), corrupted_and_evaluated(layer):
        inner.append(corrupted_and_evaluated(layer))
        inner[0].__enter__()
        raise KeyboardInterrupt
    assert state_of(layer) == before
    inner.clear()  # its end comes late, and changes nothing
    assert state_of(layer) == before


@contextlib.contextmanager
def corrupted_and_evaluated(layer):
    noise = {name: torch.ones_like(weight) for name, weight in layer.named_parameters()}
    with evaluation_mode(layer), corrupted(dict(layer.named_parameters()), noise):
        yield


def test_what_another_thread_has_begun_is_left_alone():
    """Two Trainers may run side by side, and one of them may fail."""
    layer, began, failed = torch.nn.Linear(2, 2), threading.Event(), threading.Event()

    def other():
        with overriding(layer, forward=lambda: "theirs"):
            began.set()
            failed.wait(60)
            found.append(layer.forward())

    found = []
    thread = threading.Thread(target=other)
    with contextlib.suppress(KeyboardInterrupt), undoing_left():
        thread.start()
        began.wait(60)
        raise KeyboardInterrupt
    failed.set()
    thread.join()
    assert found == ["theirs"]
    assert "forward" not in vars(layer)


def test_a_prefix_whose_trial_was_interrupted_is_found_by_the_next_step(tiny_bert, rows, arguments):
    model = tiny_bert(dropout=0.0)
    trainer = ParameterDefenseTrainer(
        model, arguments(), train_dataset=rows, defense=K1, target_modules="last-encoder-layer"
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.classifier.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.training_step(model, dict(batch))
    handle.remove()
    trainer.training_step(model, dict(batch))
    assert trainer.shared_prefix is not None


@for_each("ended", range(4))
def test_what_is_replaced_thrice_is_as_before_however_many_blocks_ended(ended):
    """What was broken off is put back where the outer block fails; an end that comes later changes nothing."""
    trainer = SimpleNamespace(loss=0)
    blocks = [overriding(trainer, loss=1), overriding(trainer, loss=2, more=3), overriding(trainer, other=4)]
    with contextlib.suppress(KeyboardInterrupt), undoing_left():
        for block in blocks:
            block.__enter__()
        assert (trainer.loss, trainer.more, trainer.other) == (2, 3, 4)
        for block in reversed(blocks[3 - ended :]):
            block.__exit__(None, None, None)
        raise KeyboardInterrupt
    assert vars(trainer) == {"loss": 0}
    for block in blocks[: 3 - ended]:
        block.__exit__(None, None, None)
    assert vars(trainer) == {"loss": 0}


@pytest.mark.parametrize("call", [2, 4])
def test_out_of_memory_in_a_corrupted_pass_starts_again_with_a_smaller_batch(tiny_bert, train, call):
    """`auto_find_batch_size`: the weights are the uncorrupted ones, and the log has no sums of the failed try.

    What the optimizer learned in the steps of a failed try stays, as it does in the stock Trainer.
    """
    model, calls = tiny_bert(dropout=0.0), []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("CUDA out of memory.")

    model.bert.encoder.layer[0].register_forward_hook(fail)
    options = {"max_steps": 3, "logging_steps": 3}
    first = train(ParameterDefenseTrainer, model, {**options, "auto_find_batch_size": True}, defense=K1)
    assert first._train_batch_size < 4
    entry = first.state.log_history[0]
    assert entry["loss"] == pytest.approx((entry["loss_clean"] + entry["loss_corrupted"]) / 2, rel=1e-5)
    if call == 2:  # in the first step, before any update
        smaller = {**options, "per_device_train_batch_size": first._train_batch_size}
        second = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), smaller, defense=K1)
        assert second.state.log_history[0] == entry
        torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
