"""Where models are cut: small ones with every reason to cut elsewhere than before the module that holds the weight."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from for_each import for_each
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_parcor.prefix import NothingToReuse, PrefixError, PrefixReuse, find_prefix, plan_prefixes_of_values
from hf_parcor.prefix.cut import before_calls, watch_calls

X = torch.ones(1, 2)


def linear():
    return nn.Linear(2, 2)


class Layer(GradientCheckpointingLayer):
    def __init__(self, flag):
        super().__init__()
        self.inner, self.last, self.gradient_checkpointing = linear(), linear(), flag

    def forward(self, x):
        return self.last(self.inner(x))


class Holds(nn.Module):
    """Runs its parts one after the other, those in lists too, and may have the flag that Transformers sets."""

    def __init__(self, *parts, flag=None):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        if flag is not None:
            self.gradient_checkpointing = flag

    def forward(self, x):
        for part in self.parts:
            for one in part if isinstance(part, nn.ModuleList) else [part]:
                x = one(x)
        return x


def flagged(parts, flag):
    parts = nn.ModuleList(parts)
    parts.gradient_checkpointing = flag
    return parts


def pair():
    return nn.Sequential(linear(), linear())


def compiled(module):
    module.compile(backend="eager")
    return module


# A model whose first part is done before the second, `where` the selected weight lies, and where the cut is.
CUTS = {
    "plain": (Holds(linear(), pair()), "parts.1.1", "parts.1.1"),
    "a checkpoint of FSDP": (Holds(linear(), checkpoint_wrapper(pair())), "parts.1._checkpoint_wrapped_module.1",
                             "parts.1"),
    "a checkpointed layer": (Holds(linear(), Layer(True)), "parts.1.last", "parts.1"),
    "a layer that is not": (Holds(linear(), Layer(False)), "parts.1.last", "parts.1.last"),
    "its parent checkpoints it": (Holds(linear(), pair(), flag=True), "parts.1.1", "parts.1"),
    "its parent does, in lists": (Holds(linear(), nn.ModuleList([pair()]), flag=True), "parts.1.0.1", "parts.1.0"),
    "a parent further up": (Holds(linear(), Holds(pair(), flag=False), flag=True), "parts.1.parts.0.1", "parts.1"),
    "its parent does not": (Holds(linear(), Holds(pair(), flag=True), flag=False), "parts.1.parts.0.1",
                            "parts.1.parts.0"),
    "layers that read the flag": (Holds(linear(), Holds(Layer(True), Layer(True)), flag=True), "parts.1.parts.1.last",
                                  "parts.1.parts.1"),
    "a flag that is a setting": (Holds(linear(), pair(), flag="reentrant"), "parts.1.1", "parts.1.1"),
}  # fmt: skip


def cut_of(model, where, run=None):
    return find_prefix(model, {"w": model.get_submodule(where).weight}, run or (lambda: model(X)), PrefixReuse)


@for_each("name", CUTS)
def test_where(name):
    model, where, start = CUTS[name]
    cut = cut_of(model, where)
    assert cut.starts == [model.get_submodule(start)]
    assert cut.prefix[0] is model.parts[0]
    inside = set(cut.starts[0].modules())
    assert not inside.intersection(cut.prefix)


@pytest.mark.slow
class TestWhatIsCompiled:
    @for_each("wrap", [compiled, lambda module: torch.compile(module, backend="eager")])
    def test_it_is_not_cut_inside(self, wrap):
        model = Holds(linear(), wrap(pair()))
        where = next(name for name, module in model.named_modules() if name.endswith("1.1") or name.endswith("mod.1"))
        cut = cut_of(model, where)
        assert (cut.prefix, cut.starts) == ([model.parts[0]], [model.parts[1]])
        with pytest.raises(PrefixError, match="compiled as one"):
            cut_of(compiled(Holds(linear(), linear())), "parts.1")
        with pytest.raises(NothingToReuse):
            cut_of(Holds(compiled(linear()), linear()), "parts.0")

    def test_nor_behind_it_where_a_part_of_it_runs_again(self):
        model = Holds(linear(), compiled(pair()))
        cut = cut_of(model, "parts.1.1", lambda: model.parts[1][1](model(X)))
        assert cut.starts == [model.parts[1]]

    def test_what_is_to_run_before_its_calls_does_and_is_gone_after(self):
        part = compiled(pair())
        implementation, begun = part._compiled_call_impl, []
        with torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
            before_calls(hooks, part, lambda module, arguments: begun.append(module))
            part(X)
        assert begun == [part]
        assert part._compiled_call_impl is implementation


def test_what_is_to_run_before_calls_does_so_before_hooks():
    part, ran = linear(), []
    part.register_forward_pre_hook(lambda module, arguments: ran.append("hook"))
    with ExitStack() as hooks:
        before_calls(hooks, part, lambda module, arguments: ran.append("first"))
        part(X)
    part(X)
    assert ran == ["first", "hook", "hook"]


def test_a_weight_in_two_places_is_cut_before_the_first_that_runs():
    """The one named first runs last; neither calls the module that holds the weight."""

    class Uses(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, x):
            return x @ self.table.weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            table = linear()
            self.decoder, self.first, self.encoder, self.middle = Uses(table), linear(), Uses(table), linear()

        def forward(self, x):
            return self.decoder(self.middle(self.encoder(self.first(x))))

    model = Model()
    cut = cut_of(model, "decoder.table")
    assert cut.prefix == [model.first]
    assert set(cut.starts) == {model.decoder, model.encoder}


def test_what_is_called_again_is_no_prefix_of_a_generation():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.head = linear(), linear(), linear()

        def forward(self, x):
            x = self.encoder(x)
            for _ in range(2):
                x = self.head(self.decoder(x))
            return x

    model = Model()
    assert cut_of(model, "head").prefix == [model.encoder, model.decoder]
    prefixes, reasons, result = plan_prefixes_of_values(model, {0: {"w": model.head.weight}}, lambda: model(X))
    assert (prefixes[0].prefix, reasons) == ([model.encoder], [])
    assert torch.equal(result, model(X))


@for_each(
    ("model", "where"),
    [(Holds(nn.Dropout(), linear(), linear()), "parts.1"), (Holds(linear(), linear()), "parts.0")],
)
def test_nothing_to_reuse(model, where):
    with pytest.raises(NothingToReuse, match="no module with parameters"):
        cut_of(model, where)


def test_all_of_a_model_is_not_even_run():
    model = linear()
    with pytest.raises(NothingToReuse, match="all of the model"):
        find_prefix(model, dict(model.named_parameters()), lambda: pytest.fail("it was run"), PrefixReuse)


def test_where_no_module_is_called_around_a_selected_parameter():
    model = nn.ModuleDict({"used": pair(), "unused": linear()})
    with pytest.raises(PrefixError, match=r"^unused holds .* no module around it is called"):
        cut_of(model, "unused", lambda: model["used"](X))
    with pytest.raises(PrefixError, match="the run on the first batch calls no module"):
        cut_of(model, "unused", lambda: X)


def test_what_hooks_call_belongs_to_the_call_that_they_hang_on():
    model, probe = Holds(linear(), linear()), linear()
    model.probes = nn.ModuleList([probe])  # known, and called by hooks alone

    def calls_it(module, *given):
        probe(X)

    model.parts[0].register_forward_pre_hook(calls_it)
    model.parts[1].register_forward_hook(calls_it)
    (whole,) = watch_calls(model, lambda: model(X))[0].inner
    assert [[one.module for one in call.inner] for call in whole.inner] == [[probe], [probe]]
