"""Gradients with the prefix reused against those of full passes, on families of models, and what is computed."""

from __future__ import annotations

import math
import random
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from for_each import for_each
from interrupts import MAY_BE_IGNORED, interrupted_at_lines
from operations import count_operations
from prefix_rows import find_rows_of
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from hf_parcor import ACRT, SAM, CorruptionConstraint, MultiStepRisk, select_parameters
from hf_parcor.batches import first_examples
from hf_parcor.defenses import DefendedStep
from hf_parcor.overriding import undoing_left
from hf_parcor.prefix import (
    NothingToReuse,
    PrefixError,
    PrefixReuse,
    RecomputedPrefix,
    find_prefix,
    plan_prefix,
    recording_together,
    try_prefix,
)
from hf_parcor.prefix.consumers import Consumers, Unkept
from hf_parcor.prefix.reuse import copied

L2 = CorruptionConstraint(epsilon=0.3)
LAYERS = 3
ENCODER, GPT2, VIT = tiny.encoder(layers=LAYERS), tiny.gpt2(layers=LAYERS), tiny.images(layers=LAYERS)


ROWS = 4


def classified():
    return {"input_ids": torch.randint(3, 20, (4, 6)), "labels": torch.randint(2, (4,))}


def written():
    ids = torch.randint(3, 20, (4, 6))
    return {"input_ids": ids, "attention_mask": (ids > 4).long(), "labels": ids}


def translated():
    return {"input_ids": torch.randint(3, 20, (4, 6)), "labels": torch.randint(3, 20, (4, 5))}


def seen():
    return {"pixel_values": torch.randn(4, 3, 8, 8).double(), "labels": torch.randint(2, (4,))}


@dataclass(frozen=True)
class Family:
    model: type[nn.Module]
    config: tf.PreTrainedConfig
    batch: object
    last: str
    head: list[str]
    tolerance: float = 1e-12
    layers: tuple[int, int] = (1, 2)  # a middle one, and the last

    def build(self):
        torch.manual_seed(0)
        model = self.model(self.config).double()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        return model.eval()  # dropout off


FAMILIES = {
    "bert": Family(
        tf.BertForSequenceClassification, tf.BertConfig(**ENCODER), classified, "last-encoder-layer", ["classifier"]
    ),
    "albert": Family(
        tf.AlbertForSequenceClassification,
        tf.AlbertConfig(**ENCODER, embedding_size=8),
        classified,
        "last-encoder-layer",
        ["classifier"],
        layers=(0, 0),  # one layer, called again and again
    ),
    "t5": Family(
        tf.T5ForConditionalGeneration,
        tf.T5Config(**tiny.t5(layers=LAYERS)),
        translated,
        "last-decoder-layer",
        ["decoder.final_layer_norm"],
        tolerance=1e-6,  # its layer norms compute in float32
    ),
    "marian": Family(
        tf.MarianMTModel,
        tf.MarianConfig(**tiny.seq2seq(layers=LAYERS)),
        translated,
        "last-decoder-layer",
        ["decoder.layers.2.final_layer_norm"],
    ),
    "gpt2": Family(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2), written, "last-decoder-layer", ["ln_f"], tolerance=1e-6),
    "llama": Family(
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**ENCODER, num_key_value_heads=1),
        written,
        "last-decoder-layer",
        ["lm_head"],
        tolerance=1e-6,
    ),
    "vit": Family(tf.ViTForImageClassification, tf.ViTConfig(**VIT), seen, "last-encoder-layer", ["classifier"]),
}
TARGETS = {
    "first layer": lambda family, model: select_parameters(model, "all", layers=[0]),
    "middle layer": lambda family, model: select_parameters(model, "all", layers=[family.layers[0]]),
    "last layer": lambda family, model: select_parameters(model, family.last),
    "layer norms": lambda family, model: select_parameters(model, "layer-norm"),
    "upper layer norms": lambda family, model: select_parameters(model, "layer-norm", layers=list(set(family.layers))),
    "head": lambda family, model: select_parameters(model, family.head),
}


# With the number of micro-batches. What a step makes of its passes does not depend on the family: one defense for all
# of them, all defenses for one.
DEFENSES = [
    (MultiStepRisk(L2, steps=2), 2),
    (MultiStepRisk(L2, steps=1), 1),
    (MultiStepRisk(L2, steps=3), 1),
    (ACRT(L2, alpha=0.3), 2),
    (SAM(L2), 2),
    (MultiStepRisk(L2, steps=2, random_start=True), 1),
]
ON_PARTS = [
    (MultiStepRisk(L2, steps=1, batch_share=0.25), 1),
    (MultiStepRisk(L2, steps=2, batch_share=0.5), 2),
    (ACRT(L2, alpha=0.3, batch_share=0.5), 1),
    (SAM(L2, batch_share=0.25), 2),
    (SAM(L2, batch_share=0.5), 1),
    (MultiStepRisk(L2, steps=1, batch_share=0.5, random_start=True), 1),
]


def defended(model, selected, batches, defense, prefix=None):
    """Run micro-batches whose gradients accumulate; return the gradients."""
    model.zero_grad()
    others = [p for p in model.parameters() if not any(p is chosen for chosen in selected.values())]
    for batch in batches:

        def run_pass(objective, index, batch=batch):
            share = 1 if index < 0 else defense.share_of_batch(index)
            count = math.ceil(share * ROWS)
            with nullcontext() if prefix is None else prefix.of_rows(count, ROWS):
                loss = objective(model(**first_examples(batch, share)).loss)
                loss.backward()
            return loss.detach()

        with DefendedStep(selected, run_pass, defense.passes, others, prefix=prefix) as step:
            defense.minimize(step)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * size, msg=name)


def plan(model, selected, batch):
    try:
        return plan_prefix(model, selected, lambda: model(**batch))
    except NothingToReuse:
        return None


def plan_recomputed(model, selected, batch):
    def run_pass(objective):
        result = model(**batch)
        objective(result).backward()
        return result

    prefix = find_prefix(model, selected, lambda: model(**batch), RecomputedPrefix)
    try_prefix(prefix, model, selected, run_pass)
    return prefix


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@for_each("target", TARGETS)
def test_gradients_equal_those_of_full_passes(name, target, bits_of):
    family = FAMILIES[name]
    model, batches = family.build(), [family.batch() for _ in range(2)]
    selected = TARGETS[target](family, model)
    before = bits_of(model)
    prefix = plan(model, selected, batches[0])
    reused = [] if prefix is None else [m for m in prefix.prefix if len(list(m.modules())) > 8]  # layers, and more
    if target in ("head", "last layer", "middle layer"):
        assert bool(reused) == (target == "head" or family.layers != (0, 0))
    reusing = [] if prefix is None else [prefix, plan_recomputed(model, selected, batches[0])]
    assert all(one.prefix == prefix.prefix for one in reusing)
    for defense, accumulation in DEFENSES if name == "bert" else DEFENSES[:1]:
        torch.manual_seed(1)
        expected = defended(model, selected, batches[:accumulation], defense)
        for one in reusing:
            torch.manual_seed(1)
            assert_same(defended(model, selected, batches[:accumulation], defense, one), expected, family.tolerance)
    if prefix is not None:
        find_rows_of(prefix, model, batches[0], 0.25)
        for defense, accumulation in ON_PARTS if name == "bert" else ON_PARTS[1:4:2]:
            torch.manual_seed(1)
            expected = defended(model, selected, batches[:accumulation], defense)
            torch.manual_seed(1)
            found = defended(model, selected, batches[:accumulation], defense, prefix)
            assert_same(found, expected, family.tolerance)
    assert bits_of(model) == before
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def count_calls(module):
    calls = []
    forward = type(module).forward
    module.register_forward_hook(lambda *_: None)
    original = module.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(module, *args, **kwargs)

    module.forward = counted
    assert original is not counted
    return calls


def test_the_prefix_runs_once_and_an_own_forward_of_a_module_is_kept():
    family = FAMILIES["bert"]
    model, batch = family.build(), family.batch()
    calls = [count_calls(layer) for layer in model.bert.encoder.layer]
    own = [layer.forward for layer in model.bert.encoder.layer]
    selected = select_parameters(model, "last-encoder-layer")
    prefix = plan(model, selected, batch)
    for of_layer in calls:
        of_layer.clear()
    defended(model, selected, [batch], MultiStepRisk(L2, steps=3), prefix)
    assert [len(of_layer) for of_layer in calls] == [1, 1, 1 + 4]  # the run that records ends inside the last
    assert [layer.forward for layer in model.bert.encoder.layer] == own


@pytest.mark.slow
@for_each("steps", [1, 2, 3])
@for_each("name", ["bert", "marian"])
def test_operations(name, steps):
    """1 + K f stock steps, f being the share of the suffix, counted by running it alone."""
    family = FAMILIES[name]
    model, batch = family.build(), family.batch()
    selected = select_parameters(model, family.last)
    prefix = plan(model, selected, batch)

    stock = count_operations(lambda: model(**batch).loss.backward())
    with prefix.recording():
        model(**batch)
    with prefix.replaying():
        suffix = count_operations(lambda: model(**batch).loss.backward())
    prefix.forget()
    ours = count_operations(lambda: defended(model, selected, [batch], MultiStepRisk(L2, steps=steps), prefix))
    assert 0 < suffix < 0.5 * stock
    assert ours == stock + steps * suffix
    find_rows_of(prefix, model, batch, 0.25)
    for defense, passes in ((MultiStepRisk(L2, steps=steps, batch_share=0.25), steps), (SAM(L2, batch_share=0.25), 1)):
        ours = count_operations(lambda defense=defense: defended(model, selected, [batch], defense, prefix))
        assert ours == stock + passes * suffix / 4


class TestWhatIsKept:
    """Of a BERT of six layers, the last one defended, one hidden state is needed outside of the prefix."""

    def six_layers(self):
        torch.manual_seed(0)
        model = tf.BertForSequenceClassification(tf.BertConfig(**tiny.encoder(layers=6)))
        return model.eval(), {"input_ids": torch.randint(3, 20, (4, 16)), "labels": torch.tensor([0, 1, 1, 0])}

    def beside_the_graph(self, model, batch, **options):
        """Bytes that a prefix holds, and the graph of the prefix does not."""
        selected = select_parameters(model, "last-encoder-layer")
        prefix = plan_prefix(model, selected, lambda: model(**batch), **options)
        saved, held = set(), {}

        def save(tensor):
            saved.add(tensor.untyped_storage()._cdata)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), prefix.recording():
            model(**batch)
        for tensor in [*prefix.outputs, *(part for parts, _ in prefix.recorded.values() for part in parts)]:
            if type(tensor) is torch.Tensor:
                held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        gradients = len(prefix.boundary)
        prefix.forget()
        return sum(size for storage, size in held.items() if storage not in saved), gradients

    @pytest.mark.parametrize("frozen", [False, True])
    def test_bytes(self, frozen):
        model, batch = self.six_layers()
        for parameter in model.bert.parameters():
            parameter.requires_grad_(not frozen)
        for parameter in model.bert.encoder.layer[5].parameters():
            parameter.requires_grad_()
        hidden = 4 * 16 * ENCODER["hidden_size"] * 4
        everything, leaves = self.beside_the_graph(model, batch)
        assert everything >= 5 * hidden
        assert self.beside_the_graph(model, batch, sparing=True) == (hidden, min(1, leaves))

    def test_what_a_pass_stores_or_returns_is_kept(self):
        model, batch = self.six_layers()
        stored = []
        model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: stored.append(output))
        hidden = 4 * 16 * ENCODER["hidden_size"] * 4
        assert self.beside_the_graph(model, batch, sparing=True)[0] == 2 * hidden
        assert all(torch.equal(output, stored[0]) for output in stored)
        batch["output_hidden_states"] = True
        assert self.beside_the_graph(model, batch, sparing=True)[0] >= 6 * hidden

    def test_buffers_and_draws_of_the_trial_are_those_of_one_pass(self, bits_of):
        """Statistics move before and behind the cut, the suffix draws, and a mode that watches may be refused."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
                self.late, self.dropout, self.aside = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
                self.refuses = self.returns = False
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                if self.refuses and _get_current_dispatch_mode_stack():
                    raise RuntimeError("it is watched")
                self.calls += 1
                early, _ = self.first(x), self.aside(x)
                loss = self.dropout(self.late(self.last(self.norm(early)))).square().mean()
                return {"loss": loss, "early": early if self.returns else None}

        model, x = Model().train(), torch.randn(5, 4)
        before, state = bits_of(model), torch.get_rng_state()
        for refuses, returns, unused in (
            (False, False, {(model.first, 0, 0), (model.aside, 0, 0)}),
            (False, True, {(model.aside, 0, 0)}),
            (True, False, set()),
        ):
            model.refuses, model.returns = refuses, returns
            prefix = plan_prefix(model, {"w": model.last.weight}, lambda: model(x), sparing=True)
            assert prefix.prefix == [model.first, model.aside, model.norm]
            assert prefix.unused == unused
            assert bits_of(model) == before
            assert torch.equal(torch.get_rng_state(), state)

    @for_each("by_turns", [False, True])
    def test_what_only_some_calls_hand_on_or_some_passes_use(self, by_turns):
        """A layer that is called again and again, as ALBERT's: its second output stands beside the last one."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.last, self.passes = nn.Linear(4, 4), nn.Linear(4, 4), 0

            def forward(self, x):
                self.passes += 1
                hidden = [x]
                for _ in range(3):
                    hidden.append(self.layer(hidden[-1]))
                used = [1, 2, 3] if by_turns and self.passes % 2 else [2, 3]
                return {"loss": self.last(hidden[2] + hidden[3] + sum(0 * hidden[i] for i in used)).square().mean()}

        model, x = Model(), torch.randn(2, 4)
        prefix = plan_prefix(model, {"weight": model.last.weight}, lambda: model(x), sparing=True)
        assert prefix.unused == (set() if by_turns else {(model.layer, 0, 0)})
        with prefix.recording():
            model(x)
        for _ in range(2):
            with prefix.replaying():
                model(x)["loss"].backward()
        gradient = model.last.weight.grad
        model.last.weight.grad = None
        model(x)["loss"].backward()
        torch.testing.assert_close(gradient, 2 * model.last.weight.grad)

    @pytest.mark.parametrize("draw", [lambda: float(torch.rand([])), random.random, np.random.rand])
    def test_all_is_kept_where_layers_run_by_chance(self, draw):
        """As with layer drop: what a layer returned that always ran is needed where one behind it was skipped."""

        class Skips(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers, self.last = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 4)

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x) if draw() < 2 else x
                return {"loss": self.last(x).square().mean()}

        model, x = Skips(), torch.randn(2, 4)
        prefix = plan_prefix(model, {"weight": model.last.weight}, lambda: model(x), sparing=True)
        assert prefix.prefix == list(model.layers)
        assert not prefix.unused

    def test_what_was_not_kept_raises_where_it_is_used_after_all(self):
        class Listens(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
                self.skips = False

            def forward(self, x):
                hidden = self.first(x)
                later = self.second(hidden)
                return {"loss": self.last(later + hidden if self.skips else later).square().mean()}

        model, x = Listens(), torch.randn(2, 4)
        prefix = plan_prefix(model, {"weight": model.last.weight}, lambda: model(x), sparing=True)
        assert {module for module, _, _ in prefix.unused} == {model.first}
        everything = nn.modules.module
        for register in (
            everything.register_module_forward_hook,
            everything.register_module_forward_pre_hook,
            model.second.register_forward_hook,
            model.second.register_forward_pre_hook,
        ):
            hook = register(lambda module, args, output=None: None)
            with prefix.recording():
                model(x)
            hook.remove()
            kept = prefix.recorded[model.first, 0][0][0]
            assert torch.equal(kept, model.first(x))  # a hook that came later gets all
        model.skips = True
        with prefix.recording():
            model(x)
        with prefix.replaying(), pytest.raises(RuntimeError, match="reuse_prefix=False"):
            model(x)


MOE = {
    **ENCODER,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 1,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "experts_implementation": "eager",
}
SMALL_EXPERTS = {**MOE, "num_experts": 3, "moe_intermediate_size": 8}
ROUTED = {
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**MOE, num_local_experts=3)),
    "qwen2": (tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig(**SMALL_EXPERTS, shared_expert_intermediate_size=8)),
    "qwen3": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**SMALL_EXPERTS, head_dim=4)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@for_each("checkpointed", [False, True])
@pytest.mark.parametrize("name", ROUTED)
def test_router_losses_that_are_collected_inside_the_prefix(name, checkpointed):
    """They leave the layers by hooks of modules inside, and their gradient goes back through the prefix once."""
    family = Family(*ROUTED[name], written, "last-decoder-layer", [])
    model, batch = family.build(), written()
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    selected = select_parameters(model, family.last)
    prefix = plan_prefix(model, selected, lambda: model(**batch), sparing=True)
    assert prefix.runs_inner_hooks
    find_rows_of(prefix, model, batch, 0.5)
    for defense in (
        MultiStepRisk(L2, steps=2),
        SAM(L2),
        *(kind(L2, batch_share=0.5) for kind in (MultiStepRisk, SAM)),
    ):
        expected = defended(model, selected, [batch], defense)
        assert_same(defended(model, selected, [batch], defense, prefix), expected, 1e-6)


class Collects(nn.Module):
    """Its loss takes what hooks of a module inside of the prefix gathered, as router losses are."""

    def __init__(self, *hooks, outer=(), with_kwargs=False):
        super().__init__()
        self.block, self.last, self.seen = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4), []
        self.with_kwargs = with_kwargs
        for hook in [*hooks, self.collect]:
            self.block[0].register_forward_hook(hook, with_kwargs=with_kwargs)
        for hook in outer:
            self.block.register_forward_hook(hook, with_kwargs=with_kwargs)

    def collect(self, module, *given):
        assert len(given) == 2 + self.with_kwargs
        self.seen.append(given[-1])

    def forward(self, x):
        self.seen.clear()
        hidden = self.block(self.block(x))
        return {"loss": self.last(hidden).square().mean() + sum(part.square().mean() for part in self.seen)}


def doubled(module, *given):
    return 2 * given[-1]


def looks(module, *given):
    return None


@for_each("with_kwargs", [False, True])
@for_each("outer", [(), (doubled, looks)])
@for_each("hooks", [(), (doubled,), (looks, doubled, looks)])
def test_hooks_inside_see_what_they_saw_and_hand_on_what_they_return(hooks, outer, with_kwargs):
    model, x = Collects(*hooks, outer=outer, with_kwargs=with_kwargs).double(), torch.randn(3, 4).double()
    selected = {"weight": model.last.weight}
    prefix = plan_prefix(model, selected, lambda: model(x), sparing=True)
    assert prefix.runs_inner_hooks
    expected = torch.autograd.grad(model(x)["loss"], list(model.parameters()))
    with prefix.recording():
        model(x)
    with prefix.replaying():
        model(x)["loss"].backward()
    prefix.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14, msg=name)


def test_it_says_why_the_plain_way_failed_if_running_hooks_inside_fails_too():
    def needs_arguments(module, arguments, output):
        assert arguments, "only a call that computes has them"

    model, x = Collects(needs_arguments), torch.randn(3, 4)
    with pytest.raises(PrefixError, match="the result differs") as failure:
        plan_prefix(model, {"w": model.last.weight}, lambda: model(x), sparing=True)
    assert "only a call" not in str(failure.value)


def test_a_hook_inside_that_comes_later_is_not_run_without_arguments():
    """As one of a profiler or a logger."""
    model, x, seen = Collects().double(), torch.randn(3, 4).double(), []
    prefix = plan_prefix(model, {"weight": model.last.weight}, lambda: model(x), sparing=True)
    model.block[0].register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    expected = model(x)["loss"]
    with prefix.recording():
        model(x)
    with prefix.replaying():
        assert torch.equal(model(x)["loss"], expected)
    assert all(torch.equal(*pair) for pair in zip(seen[:2], seen[2:], strict=True))  # of the run that records


def test_hooks_inside_that_nobody_needs_do_not_run():
    model, x, ran = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)), torch.randn(3, 4), []
    prefix = plan_prefix(model, {"w": model[1].weight}, lambda: {"loss": model(x).square().mean()})
    model[0][0].register_forward_hook(lambda *_: ran.append(1))
    with prefix.recording():
        model(x)
    with prefix.replaying():
        model(x)
    assert len(ran) == 1


def test_after_the_trial_what_is_replayed_draws_nothing_and_holds_nothing():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)), torch.randn(3, 4)
    prefix = plan_prefix(model, {"w": model[2].weight}, lambda: {"loss": model(x).square().mean()}, sparing=True)
    handed_on = []
    with prefix.recording():
        model(x)
    torch.rand(1)
    state = torch.get_rng_state()
    model[2].register_forward_pre_hook(lambda module, arguments: handed_on.append(weakref.ref(*arguments)))
    with prefix.replaying(), torch.no_grad():
        model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert handed_on[0]() is None


def two_layers():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double(), torch.randn(3, 4).double()
    return model, x, PrefixReuse([model[0], model[1]], [model[2]])


@for_each("frozen", [False, True])
@for_each("reentrant", [False, True])
def test_what_waits_goes_backward_with_the_prefix_which_is_free_then(frozen, reentrant):
    """With reentrant checkpoints after it: they run backward by themselves, before what waits begins to."""
    model, x, prefix = two_layers()
    x.requires_grad_()  # a reentrant checkpoint needs an input that does
    model[:2].requires_grad_(not frozen)
    expected = torch.autograd.grad(model(x).sum(), [p for p in model.parameters() if p.requires_grad])
    if reentrant:
        layer, forward = model[1], model[1].forward
        layer.forward = lambda hidden: checkpoint(forward, hidden, use_reentrant=True)
    other = torch.ones(2, requires_grad=True)

    def prepare():
        prepared.append(x.grad is not None)
        return (5 * other).sum()

    for waits in (None, prepare):
        prepared: list[bool] = []
        model.zero_grad()
        x.grad = None
        with prefix.recording():
            model(x)
        with prefix.replaying():
            model(x).sum().backward()
        prefix.backward(waits)
        found = [p.grad for p in model.parameters() if p.requires_grad]
        for gradient, right in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, right)
        assert prefix.recorded == {}
        assert prefix.outputs == prefix.boundary == []
        assert prepared == ([] if waits is None else [reentrant])
    assert other.grad.tolist() == [5, 5]


def test_values_alone_have_no_gradient_and_what_is_spared_none_either():
    model, x, prefix = two_layers()
    with prefix.recording(gradients=False):
        model(x)
    assert prefix.outputs == prefix.boundary == []
    with prefix.recording():
        model(x)
    assert len(prefix.outputs) == len(prefix.boundary) == 2
    prefix.spare({(model[0], 0, 0)})
    assert len(prefix.outputs) == len(prefix.boundary) == 1
    assert prefix.boundary[0] is prefix.recorded[model[1], 0][0][0]


def test_a_recording_that_fails_leaves_nothing():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    prefix = plan_prefix(model, {"w": model[1].weight}, lambda: {"loss": model(x).square().mean()})

    def failing():
        model[0](x)
        raise KeyError

    with pytest.raises(KeyError), prefix.recording():
        failing()
    assert prefix.recorded == {}
    assert prefix.outputs == prefix.boundary == []


def test_what_cannot_be_handed_on_is_computed_in_every_pass():
    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x), object()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.first, self.last = nn.Linear(4, 4), Named(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return {"loss": self.last(self.first(self.early(x))[0]).square().mean()}

    model, x = Model(), torch.randn(3, 4)
    prefix = plan_prefix(model, {"w": model.last.weight}, lambda: model(x))
    with prefix.recording():
        model(x)
    assert [module for module, _ in prefix.recorded] == [model.early]


def test_under_autocast_the_prefix_computes_in_its_precision_whatever_it_returns():
    class Widened(nn.Linear):
        def forward(self, x):
            return super().forward(x).float()

    model = nn.Sequential(Widened(4, 4), nn.Linear(4, 4))
    prefix = PrefixReuse([model[0]], [model[1]])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), prefix.recording():
            model(torch.ones(1, 4))
        assert (torch.bfloat16 in prefix.precisions) == enabled
        assert prefix.recorded[model[0], 0][0][0].dtype == torch.float32


def test_recorded_together_each_holds_what_was_done_before_its_start():
    """And nothing of another batch, whose run it did not take part in."""
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    early, late = PrefixReuse([layers[0]], [layers[1]]), PrefixReuse([layers[0], layers[1]], [layers[2]])

    def run(*order):
        x = torch.ones(1, 2)
        for place in order:
            x = layers[place](x)

    with recording_together([early, late]):
        run(0, 1, 0, 2, 3)
        pytest.fail("it ends with the last of them")
    assert list(early.recorded) == [(layers[0], 0)]
    assert list(late.recorded) == [(layers[0], 0), (layers[1], 0), (layers[0], 1)]
    with recording_together([early, late]):
        run(0, 2, 0)
    assert early.recorded == {}
    assert list(late.recorded) == [(layers[0], 0)]


BASE = torch.arange(24.0).reshape(2, 3, 4)
LAID_OUT = {
    "plain": BASE,
    "transposed": BASE.transpose(0, 2),
    "expanded": BASE[:, :1].expand(2, 5, 4),
    "one that is expanded": BASE[:1, 0, 0].expand(3),
    "with gaps": BASE[:, :, ::2],
    "a part": BASE[1:, 1:],
    "channels last": BASE[None].contiguous(memory_format=torch.channels_last),
    "none": BASE[:0],
    "a parameter": nn.Parameter(BASE),
    "sparse": BASE[0].to_sparse(),
    "no float": BASE.long(),
}


@for_each("name", LAID_OUT)
def test_what_is_handed_on_lies_as_its_original_does_and_is_written_into_for_itself(name):
    original = LAID_OUT[name]
    (found,) = copied([original])
    assert (found.layout, found.dtype) == (original.layout, original.dtype)
    assert torch.equal(found.to_dense(), original.to_dense())
    if original.layout == torch.strided:
        assert found.stride() == original.stride()
        assert not found.numel() or found.data_ptr() != original.data_ptr()
    if name == "expanded":
        assert found.untyped_storage().nbytes() < 4 * found.numel()


def test_what_stands_for_an_output_has_all_of_it_but_numbers():
    for tensor in (BASE.transpose(0, 2), BASE.double().requires_grad_(), BASE.long()):
        stands = Unkept.of(tensor)
        for what in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(stands, what) == getattr(tensor, what), what
        assert stands.stride() == tensor.stride()
        assert copied([stands])[0] is stands
        with pytest.raises(RuntimeError, match="reuse_prefix=False"):
            stands + 1


class Own(torch.Tensor):
    pass


ORDER = torch.tensor([0, 1])
USES = {
    "nothing": (None, lambda handed: None, False),
    "an operation": (None, lambda handed: handed + 1, True),
    "one that takes a view": (None, lambda handed: handed[:1].sum(), True),
    "one that takes it by keyword": (None, lambda handed: torch.searchsorted(ORDER, ORDER, sorter=handed), True),
    "a view in the result": (lambda handed: {"a": [handed.view(2, 1)]}, lambda handed: None, True),
    "a number by chance": (None, lambda handed: torch.rand([]), True),
    "numbers by chance": (None, lambda handed: torch.rand(2), False),
}


@for_each("name", USES)
@for_each("kind", [torch.Tensor, Own])
def test_what_is_consumed(name, kind):
    """What is of a class of its own counts as consumed: what becomes of it cannot be seen."""
    returned, use, consumed = USES[name]
    module, consumers, handed = nn.Identity(), Consumers(), ORDER.clone().as_subclass(kind)
    with consumers:
        consumers.hand_on(module, 3, ["a", handed])
        use(handed)
        result = None if returned is None else returned(handed)
    del handed
    assert consumers.unused(result) == (set() if consumed or kind is Own else {(module, 3, 1)})


@MAY_BE_IGNORED
def test_an_interrupt_leaves_no_mode_that_watches_operations():
    prefix = PrefixReuse([], [])

    @undoing_left()
    def watched():
        with prefix.seen_by(Consumers()):
            torch.ones(1)

    for at in interrupted_at_lines(watched, every=1):
        assert not _get_current_dispatch_mode_stack(), at
        assert prefix._consumers is None


def last_of(model):
    return {"weight": model.last.weight, "bias": model.last.bias}


def of_a_step(model, x, prefix):
    """Return the gradients of a step of three passes."""
    model.zero_grad()

    def run_pass(objective, index):
        loss = objective(model(x))
        loss.backward()
        return loss.detach()

    others = [*model.first.parameters(), *model.middle.parameters()]
    with DefendedStep(last_of(model), run_pass, 3, others, prefix=prefix) as step:
        MultiStepRisk(L2, steps=2).minimize(step)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_work_in_place_does_not_reach_later_passes():
    """Both the glue behind a module and the suffix may overwrite what they were handed."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = (nn.Linear(4, 4).double() for _ in range(3))

        def forward(self, x):
            hidden = self.first(x)
            hidden += 1
            hidden = self.middle(hidden)
            hidden *= 2
            return self.last(hidden).tanh().square().mean()

    model, x = InPlace(), torch.randn(3, 4).double()
    prefix = plan_prefix(model, last_of(model), lambda: {"loss": model(x)})
    assert prefix.prefix == [model.first, model.middle]
    assert_same(of_a_step(model, x, prefix), of_a_step(model, x, None), 1e-12)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh())).tanh().square().mean()


@for_each("later", [False, True])
@for_each("names", [["middle"], ["first", "middle"], None])
@for_each("of", ["full_backward_hook", "full_backward_pre_hook"])
def test_hooks_that_see_gradients_run_in_every_pass_and_may_change_them(of, names, later):
    model, x, calls, hooks = Layers(), torch.randn(3, 4).double().requires_grad_(), [], []

    def doubles(module, *gradients):
        calls.append(module)
        return tuple(2 * gradient for gradient in gradients[0])

    def hook():
        everywhere = getattr(nn.modules.module, f"register_module_{of}")
        some = [getattr(model, name) for name in names or ()]
        hooks.extend(getattr(module, f"register_{of}")(doubles) for module in some)
        hooks.extend([] if names else [everywhere(doubles)])

    try:
        if not later:
            hook()
        prefix = plan_prefix(model, last_of(model), lambda: {"loss": model(x)}, sparing=True)
        if later:
            hook()
        found = []
        for one in (prefix, None):
            calls.clear()
            found.append((of_a_step(model, x, one), calls.copy()))
        (gradients, called), (expected, called_as_ever) = found
        assert_same(gradients, expected, 1e-12)
        assert called == called_as_ever
    finally:
        for handle in hooks:
            handle.remove()


@for_each("share", [1.0, 0.5])
def test_exception_in_a_later_pass_leaves_no_trace(share, bits_of):
    family = FAMILIES["bert"]
    model, batch = family.build(), family.batch()
    selected = select_parameters(model, family.last)
    prefix = plan(model, selected, batch)
    find_rows_of(prefix, model, batch, 0.5)
    before, passes = bits_of(model), []

    def run_pass(objective, index):
        passes.append(index)
        part = share if index > 0 else 1
        with prefix.of_rows(round(part * ROWS), ROWS):
            loss = objective(model(**first_examples(batch, part)).loss)
            if index == 1:
                raise KeyboardInterrupt
            loss.backward()
        return loss.detach()

    with pytest.raises(KeyboardInterrupt), DefendedStep(selected, run_pass, 3, prefix=prefix) as step:
        MultiStepRisk(L2, steps=2).minimize(step)
    assert passes == [-1, 0, 1]
    assert bits_of(model) == before
    assert prefix.boundary == prefix.outputs == []
    assert not any("forward" in module.__dict__ for module in model.modules())
