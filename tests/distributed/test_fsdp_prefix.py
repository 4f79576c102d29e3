"""A shared prefix under FSDP2: the gradients of full passes, and weights that are not gathered in every pass."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import tiny
import torch
from another_device.device import cases_here, cases_on, rank_device
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from hf_parcor import ACRT, CorruptionConstraint, MultiStepRisk, select_parameters
from hf_parcor.defenses import DefendedStep
from hf_parcor.distributed.dtensors import local_part
from hf_parcor.distributed.fsdp import on_shards
from hf_parcor.prefix import PrefixError
from hf_parcor.training.shared_prefix import plan_prefix_on_shards

pytestmark = pytest.mark.slow  # ranks are processes of their own

L2 = CorruptionConstraint(epsilon=0.3)
LAYERS = 4
RUNS = [
    # targets, defense, accumulation, the way to shard
    ("last-encoder-layer", MultiStepRisk(L2, steps=1), 1, True),
    ("last-encoder-layer", MultiStepRisk(L2, steps=2), 3, True),
    ("last-encoder-layer", MultiStepRisk(L2, steps=3), 1, True),
    ("last-encoder-layer", MultiStepRisk(L2, steps=3), 1, False),
    (["classifier"], MultiStepRisk(L2, steps=1), 3, False),
    (["classifier"], MultiStepRisk(L2, steps=2), 1, True),
    (["layer.3.output"], ACRT(L2, alpha=0.3), 1, True),  # cut inside a unit
    ("last-encoder-layer", MultiStepRisk(L2, steps=2), 3, "replicas"),
    ("last-encoder-layer", MultiStepRisk(L2, steps=2), 1, "bfloat16"),
]
SOME_RUNS = [*RUNS[:3], RUNS[-1]]  # where it may matter that tensors are elsewhere
CAN_RESET = hasattr(FSDPModule, "reset_iter_state")  # since PyTorch 2.13
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded_bert(way):
    """Shard a model: whether weights are freed after forward, or over one rank of two replicas, or for bfloat16."""
    torch.manual_seed(0)
    config = BertConfig(**tiny.encoder(layers=LAYERS, inner=13), **tiny.STILL)
    dtype = torch.float32 if way == "bfloat16" else torch.float64
    model = BertForSequenceClassification(config).to(rank_device(), dtype)
    settings = {"reshard_after_forward": way is not False}
    if way == "replicas":
        settings["mesh"] = init_device_mesh(rank_device().type, (2, 1), mesh_dim_names=("replicas", "shards"))
    if way == "bfloat16":
        settings["mp_policy"] = HALF
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


class Collectives(TorchDispatchMode):
    """Counts what goes over the network, by operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.namespace == "c10d":
            self.counts[operation._schema.name.removeprefix("c10d::")] += 1
        return operation(*arguments, **(options or {}))


def gradients_of(model, selected, batches, defense, prefix):
    """Run micro-batches whose gradients accumulate; return the shards of the gradients, and the collectives."""
    model.zero_grad()
    others = [p for p in model.parameters() if not any(p is chosen for chosen in selected.values())]
    with Collectives() as collectives:
        for batch in batches:

            def run_pass(objective, index, batch=batch):
                loss = objective(model(**batch).loss)
                loss.backward()
                return loss.detach()

            step = DefendedStep(selected, on_shards(run_pass, model), defense.passes, others, prefix=prefix)
            with step:
                defense.minimize(step)
    gradients = {name: local_part(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return gradients, dict(collectives.counts)


def on_ranks():
    torch.manual_seed(torch.distributed.get_rank())
    here = rank_device()
    batches = [
        {"input_ids": torch.randint(20, (3, 6)).to(here), "labels": torch.randint(2, (3,)).to(here)} for _ in range(3)
    ]
    answers = []
    for targets, defense, accumulation, way in cases_here(RUNS, SOME_RUNS):
        model = sharded_bert(way).eval()
        selected = select_parameters(model, targets)

        def one_pass(objective, model=model):
            result = model(**batches[0])
            objective(result).backward()
            return result

        prefix = plan_prefix_on_shards(
            model, selected, partial(model, **batches[0]), one_pass, lambda make: make(), defense.passes
        )
        runs = [gradients_of(model, selected, batches[:accumulation], defense, kept) for kept in (prefix, None)]
        reused = {inner for module in prefix.prefix for inner in module.modules()}
        answers.append((len(reused.intersection(model.bert.encoder.layer)), *runs))
    return answers, after_a_trial_that_breaks_off(batches[:1])


def after_a_trial_that_breaks_off(batches):
    """Let a model find in its last layer that the first one did not run.

    Returns what was said, and gradients of later passes if FSDP2 can run any.
    """
    model, ran = sharded_bert(True).eval(), []

    def check(module, arguments):
        assert ran.pop()

    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: ran.append(True))
    model.classifier.register_forward_pre_hook(check)
    selected, defense = select_parameters(model, "last-encoder-layer"), MultiStepRisk(L2, steps=2)

    def one_pass(objective):
        result = model(**batches[0])
        objective(result).backward()
        return result

    run = partial(model, **batches[0])
    with pytest.raises(PrefixError if CAN_RESET else RuntimeError) as said:
        plan_prefix_on_shards(model, selected, run, one_pass, lambda make: make(), defense.passes)
    if not CAN_RESET:
        return str(said.value), None, None
    fresh = sharded_bert(True).eval()
    full = gradients_of(fresh, select_parameters(fresh, "last-encoder-layer"), batches, defense, None)
    return str(said.value), gradients_of(model, selected, batches, defense, None)[0], full[0]


@pytest.mark.slow
def test_gradients_are_those_of_full_passes_and_the_prefix_is_not_gathered_in_each(run_on_ranks, device_of_ranks):
    runs = cases_on(device_of_ranks, RUNS, SOME_RUNS)
    for rank, (said, after, fresh) in run_on_ranks(on_ranks, 2, device=device_of_ranks):
        assert "IndexError" in said
        assert CAN_RESET or "reuse_prefix=False" in said, "the way out"
        torch.testing.assert_close(after, fresh, rtol=0, atol=0)
        assert [layers for layers, _, _ in rank] == [
            LAYERS if targets == ["classifier"] else 3 for targets, *_ in runs
        ]
        for (targets, defense, accumulation, way), (_, reused, full) in zip(runs, rank, strict=True):
            case = f"{targets} {defense} {accumulation} {way}"
            close = 2e-2 if way == "bfloat16" else 1e-12
            size = max(float(gradient.abs().max()) for gradient in full[0].values() if gradient.numel())
            assert reused[0].keys() == full[0].keys()
            for name, gradient in full[0].items():
                torch.testing.assert_close(reused[0][name], gradient, rtol=0, atol=close * size, msg=f"{case}, {name}")
            assert all(reused[1][operation] <= count for operation, count in full[1].items()), case
        # A full pass gathers each layer twice and reduces it once. Two more passes save all of that for those reused.
        (layers, *few), _, (_, *many) = rank[:3]
        for operation, times in {"_allgather_base_": 2, "_reduce_scatter_base_": 1}.items():
            reused, full = (more[1][operation] - less[1][operation] for more, less in zip(many, few, strict=True))
            assert full - reused == 2 * times * layers
