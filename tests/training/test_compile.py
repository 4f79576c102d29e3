"""torch_compile=True, and running statistics where the forward is compiled or computed again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from for_each import for_each
from torch import nn
from trainings import losses_of, weights_of
from transformers import Trainer, TrainerCallback
from transformers.utils import logging as tf_logging

from hf_parcor import CorruptionConstraint, GradientPenalty, MultiStepRisk, ParameterDefenseTrainer

DEFENDED = {
    "multi_step_risk": MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=2),
    "gradient_penalty": GradientPenalty(weight=0.1),
}
ONE_STEP = {"max_steps": 1, "train_sampling_strategy": "sequential", "optim": "sgd"}

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Normalized(nn.Module):
    """A classifier with batch normalization."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.checkpointed = checkpointed

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.first(input_ids.float() / 30)
        if self.checkpointed:
            hidden = torch.utils.checkpoint.checkpoint(self.norm, hidden, use_reentrant=False)
        else:
            hidden = self.norm(hidden)
        logits = self.last(torch.relu(hidden))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Counting:
    """A compiler that changes nothing, and counts what it compiles and how often that runs."""

    def __init__(self):
        self.compiled = self.ran = 0
        self.graphs, self.runs = [], []

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*arguments):
            self.ran += 1
            return graph.forward(*arguments)

        return run

    def at_the_end_of_steps(self):
        counts = self

        class Counts(TrainerCallback):
            def on_step_end(self, *_, **__):
                counts.graphs.append(counts.compiled)
                counts.runs.append(counts.ran)

        return Counts()


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self, monkeypatch):
        """Transformers leaves the backend in the environment, and every training after it would be compiled."""
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_running_statistics_and_weights_equal_the_plain_run(self, train, backend):
        """Passes switch `track_running_stats`, which the compiler must notice."""
        models = []
        for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
            torch.manual_seed(0)
            models.append(Normalized())
            options = {**ONE_STEP, **options, "max_steps": 2}
            train(ParameterDefenseTrainer, models[-1], options, defense=DEFENDED["multi_step_risk"])
        assert models[1].norm.num_batches_tracked == 2
        for name, value in weights_of(models[0]).items():
            torch.testing.assert_close(weights_of(models[1])[name], value, rtol=1e-5, atol=1e-6, msg=name)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["multi_step_risk", "gradient_penalty"])
    def test_transformer_equals_the_plain_run(self, tiny_bert, train, name):
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
        plain = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), ONE_STEP, defense=DEFENDED[name])
        ours = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), ONE_STEP | compiled, defense=DEFENDED[name])
        assert losses_of(ours) == pytest.approx(losses_of(plain), rel=1e-6)
        for first, second in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)

    @pytest.mark.slow
    def test_inductor(self, train, monkeypatch):
        """The default backend, which needs a C++ compiler; kernels kept by a run on other vector units do not fit."""
        monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
        torch.manual_seed(0)
        plain, compiled = Normalized(), Normalized()
        compiled.load_state_dict(plain.state_dict())
        train(ParameterDefenseTrainer, plain, ONE_STEP, defense=DEFENDED["multi_step_risk"])
        train(
            ParameterDefenseTrainer, compiled, ONE_STEP | {"torch_compile": True}, defense=DEFENDED["multi_step_risk"]
        )
        for name, value in weights_of(plain).items():
            torch.testing.assert_close(weights_of(compiled)[name], value, rtol=1e-5, atol=1e-6, msg=name)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_layers_that_are_compiled_each_by_itself_are_skipped(self, tiny_bert, train, share):
        """K + 1 = 3 passes run the last layer; the first runs once a step; the trial of the first step compiles."""
        backend, weights = Counting(), []
        for compiled in (False, True):
            model = tiny_bert(dropout=0.0)
            for layer in model.bert.encoder.layer if compiled else ():
                layer.compile(backend=backend)
            trainer = train(
                ParameterDefenseTrainer,
                model,
                {**ONE_STEP, "max_steps": 2},
                defense=replace(DEFENDED["multi_step_risk"], batch_share=share),
                target_modules="last-encoder-layer",
                callbacks=[backend.at_the_end_of_steps()],
            )
            assert trainer.shared_prefix is not None
            weights.append(weights_of(model))
        assert backend.runs[-1] - backend.runs[-2] == 1 + 3
        assert backend.graphs[-1] == backend.graphs[-2] > 0
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-6, atol=1e-8, msg=name)

    @pytest.mark.slow
    @for_each("model", ["transformer", "batch normalization"])
    def test_a_model_that_is_compiled_as_one_is_compiled_no_oftener_than_in_stock_training(
        self, tiny_bert, train, caplog, model
    ):
        """Not for another pass, another step or other weights; and a prefix is refused with the way out."""
        tf_logging.enable_propagation()
        compiled = []
        for kind in (Trainer, ParameterDefenseTrainer):
            torch.compiler.reset()
            net, target = (tiny_bert(), "last-encoder-layer") if model == "transformer" else (Normalized(), ["last"])
            settings = {"defense": DEFENDED["multi_step_risk"], "target_modules": target}
            backend = Counting()
            net.compile(backend=backend)
            train(kind, net, {**ONE_STEP, "max_steps": 2}, **(settings if kind is ParameterDefenseTrainer else {}))
            compiled.append(backend.compiled)
        assert compiled[0] == compiled[1] > 0
        assert any("layer.compile()" in record.message for record in caplog.records)

    @pytest.mark.slow
    @pytest.mark.parametrize("target", ["all", ["embeddings"]])
    def test_where_nothing_comes_before_a_model_compiled_as_one_is_trained_without_a_warning(
        self, tiny_bert, train, caplog, target
    ):
        """Nothing could be shared if its layers were compiled each by itself, either."""
        tf_logging.enable_propagation()
        model = tiny_bert()
        model.compile(backend=Counting())
        trainer = train(
            ParameterDefenseTrainer, model, ONE_STEP, defense=DEFENDED["multi_step_risk"], target_modules=target
        )
        assert trainer.shared_prefix is None
        assert not any("layer.compile()" in record.message for record in caplog.records)

    @for_each("backend", [None, "aot_eager"])
    def test_second_derivative_of_a_compiled_backward_is_refused(self, tiny_bert, arguments, backend):
        options = {"torch_compile": True, "torch_compile_backend": backend}
        with pytest.raises(ValueError, match="choose 'eager', torch_compile=False, or another defense"):
            ParameterDefenseTrainer(model=tiny_bert(), args=arguments(**options), defense=GradientPenalty())


def test_running_statistics_under_checkpointing_move_as_in_stock_training(train):
    """Recomputing moves them a second time, in stock training too; corrupted passes must not move them at all."""

    def run(kind, **extra):
        torch.manual_seed(0)
        model = Normalized(checkpointed=True)
        train(kind, model, ONE_STEP, **extra)
        return model

    stock, ours = run(Trainer), run(ParameterDefenseTrainer, defense=DEFENDED["multi_step_risk"])
    assert stock.norm.num_batches_tracked == ours.norm.num_batches_tracked == 2
    assert torch.equal(stock.norm.running_mean, ours.norm.running_mean)
    assert torch.equal(stock.norm.running_var, ours.norm.running_var)
