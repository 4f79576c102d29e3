"""`evaluate_robustness` against a loop in ten lines, and what it leaves as it was."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import statistics

import numpy as np
import pytest
import tiny
import torch
from for_each import for_each
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainings import QUIET
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from hf_parcor import (
    CorruptionConstraint,
    GaussianNoise,
    GradientCorruption,
    MetricInfo,
    MultiStepCorruption,
    ParameterDefenseTrainer,
    Quantization,
    Seq2SeqParameterDefenseTrainer,
    corrupted,
    select_parameters,
)
from hf_parcor.errors import InputError
from hf_parcor.evaluation import (
    DEFAULT_CORRUPTIONS,
    DatasetGradients,
    RobustnessArguments,
    RobustnessMixin,
    TrainerMetric,
    measure_robustness,
)
from hf_parcor.evaluation.losses import TrainerLoss

NOISE, BITS = GaussianNoise(0.2), Quantization(2)
NAMES = ("gaussian_sigma_0.2", "2_bit_quantization")


class RobustTrainer(RobustnessMixin, Trainer):
    pass


KINDS = {"stock": RobustTrainer, "defended": ParameterDefenseTrainer}


@pytest.fixture(params=KINDS)
def trainer(request, make):
    return make(KINDS[request.param])


def by_hand(model, rows, change):
    """Return accuracy and loss of a copy whose weights were changed."""
    changed = copy.deepcopy(model).eval()
    with torch.no_grad():
        change(changed)
        logits = changed(torch.stack([row["input_ids"] for row in rows])).logits.double()
    labels = torch.tensor([row["labels"] for row in rows])
    return float((logits.argmax(-1) == labels).float().mean()), float(
        torch.nn.functional.cross_entropy(logits, labels)
    )


def add_noise(seed):
    def change(model):
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)

    return change


def round_to_two_bits(model):
    for weight in model.parameters():
        width = weight.abs().max()
        if width > 0:
            weight.copy_((weight / width).round() * width)


class TestNumbers:
    def test_against_ten_lines(self, trainer, rows):
        metrics = trainer.evaluate_robustness([NOISE, BITS], trials=2, seed=5)
        noisy = np.mean([by_hand(trainer.model, rows, add_noise(seed)) for seed in (5, 6)], axis=0)
        rounded = by_hand(trainer.model, rows, round_to_two_bits)
        clean = by_hand(trainer.model, rows, lambda model: None)
        expected = {}
        for index, metric in enumerate(("accuracy", "loss")):
            expected[f"eval_{metric}"] = clean[index]
            expected[f"eval_robustness_{NAMES[0]}_{metric}"] = noisy[index]
            expected[f"eval_robustness_{NAMES[1]}_{metric}"] = rounded[index]
            expected[f"eval_robustness_{metric}"] = (noisy[index] + rounded[index]) / 2
        assert metrics == pytest.approx(expected, rel=1e-4)
        assert len(set(metrics.values())) > 5, "the corruptions do something"

    def test_the_record_is_kept_and_the_log_written(self, trainer):
        metrics = trainer.evaluate_robustness({"noise": NOISE}, trials=3)
        record = trainer.robustness_records["eval"]
        assert len(record.corruptions[0].metrics["accuracy"]) == 3
        assert metrics["eval_robustness_noise_loss"] == record.corruptions[0].mean("loss")
        assert record.clean.notes == ()
        (logged,) = trainer.state.log_history
        assert metrics.items() <= logged.items()

    def test_defaults(self, trainer):
        metrics = trainer.evaluate_robustness()
        assert len(metrics) == 2 * (1 + len(DEFAULT_CORRUPTIONS) + 1)
        assert all(math.isfinite(value) for value in metrics.values())

    def test_data_sets_by_name_as_evaluate_does(self, make, rows):
        parts = {"first": rows[:6], "last": rows[6:]}
        trainer = make(RobustTrainer, eval_dataset=parts)
        metrics = trainer.evaluate_robustness([BITS])
        assert {name for name in metrics if "robustness" not in name} <= set(trainer.evaluate())
        for name, part in parts.items():
            expected = by_hand(trainer.model, part, round_to_two_bits)
            assert metrics[f"eval_{name}_robustness_{NAMES[1]}_accuracy"] == pytest.approx(expected[0])
        alone = trainer.evaluate_robustness([BITS], eval_dataset="last", metric_key_prefix="test")
        assert alone["test_loss"] == metrics["eval_last_loss"]

    def test_modules_can_be_chosen(self, trainer):
        trainer.evaluate_robustness([NOISE], target_modules=["classifier"])
        chosen = sum(parameter.numel() for parameter in trainer.model.classifier.parameters())
        assert trainer.robustness_records["eval"].parameters == chosen

    @pytest.mark.parametrize("corruption", [GradientCorruption, MultiStepCorruption])
    def test_the_worst_direction_is_that_of_the_trainers_own_loss(self, make, corruption):
        """With its own loss turned round the Trainer's worst direction is the model's best."""
        constraint = CorruptionConstraint(epsilon=0.05)
        found = []
        for loss in (None, lambda output, labels, num_items_in_batch=None: -_cross_entropy(output, labels)):
            trainer = make(RobustTrainer, compute_loss_func=loss)
            record = measure_robustness(trainer, [corruption(constraint)])
            found.append(record.corruptions[0].mean("loss") - record.clean.mean("loss"))
        assert found[0] > 0
        assert found[1] > 0, "the loss that the Trainer reports is turned round, too"

    @for_each("kind", ["smoothed", "overridden", "divided"])
    def test_the_gradient_is_that_of_what_the_trainer_computes(self, make, rows, kind):
        """To first order the loss rises by ε times the norm of its own gradient."""

        class Overridden(RobustTrainer):
            inside = False

            @contextlib.contextmanager
            def compute_loss_context_manager(self):
                self.inside = True
                yield
                self.inside = False

            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                assert self.inside, "as `prediction_step` does"
                outputs = model(input_ids=inputs["input_ids"])
                loss = spread(outputs.logits)
                return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

        def spread(logits):
            return -logits.log_softmax(-1).mean()

        def divided(output, labels, num_items_in_batch):
            return spread(output.logits) * len(labels) / num_items_in_batch

        settings = {"smoothed": {"label_smoothing_factor": 1.0}, "divided": {"compute_loss_func": divided}}
        trainer = make(Overridden if kind == "overridden" else RobustTrainer, **settings.get(kind, {}))
        epsilon, model = 1e-3, trainer.model.eval()
        loss = spread(model(torch.stack([row["input_ids"] for row in rows])).logits)
        norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
        record = measure_robustness(trainer, [GradientCorruption(CorruptionConstraint(epsilon=epsilon))])
        assert record.corruptions[0].mean("loss") - record.clean.mean("loss") == pytest.approx(
            epsilon * norm, rel=0.02
        )

    def test_each_batch_counts_by_what_its_loss_is_divided_by(self, make):
        """Smoothed labels of the next token, of which batches have more or fewer, are as one loss of all of them."""
        model = GPT2LMHeadModel(GPT2Config(**tiny.gpt2(), **tiny.STILL_GPT2)).double().eval()
        tokens = torch.randint(1, 20, (6, 8), generator=torch.Generator().manual_seed(0))
        labels = tokens.masked_fill(torch.arange(8) > torch.tensor([[1], [2], [1], [7], [6], [7]]), -100)
        trainer = make(RobustTrainer, trained=model, label_smoothing_factor=0.2)
        batches = [
            {"input_ids": one, "labels": those} for one, those in zip(tokens.split(3), labels.split(3), strict=True)
        ]
        parameters = dict(model.named_parameters())
        found = DatasetGradients(model, parameters, batches, TrainerLoss(trainer)).over_data()
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)
        expected = torch.autograd.grad(loss, list(parameters.values()))
        directions = [torch.cat([part.flatten() for part in one]) for one in (found.values(), expected)]
        assert nn.functional.cosine_similarity(*directions, dim=0).item() == pytest.approx(1.0, abs=1e-12)

    def test_gradients_of_other_data_than_what_is_evaluated(self, make, rows):
        """Two data sets whose worst directions differ, against ten lines; the record says so, where it matters."""
        trainer = make(RobustTrainer, eval_dataset=rows[:6])
        worst = GradientCorruption(CorruptionConstraint(epsilon=0.3))

        def along(data):
            def change(model):
                with torch.enable_grad():
                    logits = model(torch.stack([row["input_ids"] for row in data])).logits
                    labels = torch.tensor([row["labels"] for row in data])
                    gradients = torch.autograd.grad(
                        torch.nn.functional.cross_entropy(logits, labels), list(model.parameters())
                    )
                norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
                for weight, gradient in zip(model.parameters(), gradients, strict=True):
                    weight += 0.3 * gradient / norm

            return change

        found = []
        for other in (rows[6:], None, trainer.eval_dataset):
            trainer.evaluate_robustness([worst, BITS], gradient_dataset=other)
            record = trainer.robustness_records["eval"]
            found.append([record.corruptions[0].mean(name) for name in ("accuracy", "loss")])
            assert found[-1] == pytest.approx(by_hand(trainer.model, rows[:6], along(other or rows[:6])), rel=1e-3)
            assert record.evaluated_on.rows == 6
            assert any("other data" in note for note in record.notes) == (other is not None and other[0] is rows[6])
        assert found[0][1] < found[1][1] == found[2][1]
        trainer.evaluate_robustness([BITS], gradient_dataset=rows[6:])
        assert not any("other data" in note for note in trainer.robustness_records["eval"].notes)

    def test_what_is_evaluated_has_no_labels(self, make, rows):
        """As in question answering, where a Trainer's own `evaluate` compares texts."""

        class Comparing(RobustTrainer):
            def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
                found = self.predict(eval_dataset or self.eval_dataset).predictions
                return {f"{metric_key_prefix}_score": float(found.max()), f"{metric_key_prefix}_runtime": 1.0}

        trainer = make(Comparing, eval_dataset=[{"input_ids": row["input_ids"]} for row in rows])
        with pytest.raises(ValueError, match="with labels, as gradient_dataset="):
            trainer.evaluate_robustness()
        metrics = trainer.evaluate_robustness(gradient_dataset=rows)
        assert len({metrics["eval_score"], metrics["eval_robustness_gradient_based_l2_epsilon_0.1_score"]}) == 2

    def test_the_record_says_on_how_many_rows_and_what_gradients_were_taken_on(self, make, rows):
        trainer = make(eval_dataset={"first": rows[:6], "last": rows[6:11]})
        for asked, count in (("first", 6), ("last", 5), (rows[:3], 3)):
            record = measure_robustness(trainer, [BITS], eval_dataset=asked)
            assert record.evaluated_on.rows == count
            assert not record.data, "nothing needed them"
        assert measure_robustness(
            trainer, [GradientCorruption(CorruptionConstraint(epsilon=1.0))], eval_dataset="last"
        ).data

    def test_the_mean_over_corruptions_is_no_median(self, trainer):
        several = {"a": NOISE, "b": BITS, "c": GaussianNoise(3.0)}
        metrics = trainer.evaluate_robustness(several, trials=1)
        expected = statistics.fmean(metrics[f"eval_robustness_{name}_loss"] for name in several)
        assert metrics["eval_robustness_loss"] == pytest.approx(expected)

    def test_a_metric_that_a_corrupted_model_does_not_have_is_unknown(self, trainer):
        calls = []

        def found(_):
            calls.append(None)
            return {"f1": 0.5, "f1_of_rare": 0.25} if len(calls) == 1 else {"f1": 0.5}  # as seqeval's of each type

        trainer.compute_metrics = found
        metrics = trainer.evaluate_robustness({"a": BITS})
        assert (metrics["eval_f1_of_rare"], metrics["eval_robustness_a_f1"]) == (0.25, 0.5)
        assert math.isnan(metrics["eval_robustness_a_f1_of_rare"])
        assert math.isnan(metrics["eval_robustness_f1_of_rare"])

    def test_what_a_metric_refuses_of_a_corrupted_model_is_unknown(self, trainer, caplog):
        compute = trainer.compute_metrics

        def refuse_nan(predictions):
            if np.isnan(predictions.predictions).any():
                raise ValueError("Input contains NaN.")
            return compute(predictions)

        trainer.compute_metrics = refuse_nan
        metrics = trainer.evaluate_robustness({"broken": GaussianNoise(1e30), "same": GaussianNoise(0.0)}, trials=1)
        assert math.isnan(metrics["eval_robustness_broken_accuracy"])
        assert metrics["eval_robustness_same_accuracy"] == metrics["eval_accuracy"]
        assert "did not without corruption, so all it finds is NaN: Input contains NaN." in caplog.text

    def test_the_records_are_those_of_the_last_call(self, trainer):
        for prefix in ("eval", "test"):
            trainer.evaluate_robustness([BITS], metric_key_prefix=prefix)
            assert list(trainer.robustness_records) == [prefix]

    def test_no_bar_where_the_trainer_shows_none(self, make, capsys):
        for disabled in (True, False):
            measure_robustness(make(disable_tqdm=disabled), [BITS])
            assert ("corruptions" in capsys.readouterr().err) != disabled


def _cross_entropy(output, labels):
    return torch.nn.functional.cross_entropy(output.logits, labels)


class TestWhatStays:
    def test_weights_mode_random_numbers_and_the_trainers_state(self, trainer, bits_of):
        seen = []

        class Watcher(TrainerCallback):
            def on_evaluate(self, args, state, control, **kwargs):
                seen.append("evaluate")

            def on_log(self, args, state, control, logs=None, **kwargs):
                seen.append(sorted(name for name in logs if "robustness" in name)[:1])

        trainer.add_callback(Watcher())
        trainer.model.train()
        before = (bits_of(trainer.model), torch.get_rng_state().tolist(), random.getstate())
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        kept = [trainer.state, trainer.control, trainer.callback_handler]
        trainer.evaluate_robustness([NOISE, BITS, GradientCorruption(CorruptionConstraint(epsilon=1.0))])
        assert before == (bits_of(trainer.model), torch.get_rng_state().tolist(), random.getstate())
        assert numpy == np.random.get_state()[1].tolist()  # noqa: NPY002
        assert trainer.model.training
        assert all(weight.grad is None for weight in trainer.model.parameters())
        assert [trainer.state, trainer.control, trainer.callback_handler] == kept
        assert seen == [["eval_robustness_2_bit_quantization_accuracy"]], "one log, no other event"

    def test_a_failing_metric_leaves_the_trainer_as_it_was(self, trainer, bits_of):
        calls = []

        def failing(prediction):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("no more")
            return {"one": 1.0}

        trainer.compute_metrics = failing
        before, handler = bits_of(trainer.model), trainer.callback_handler
        with pytest.raises(RuntimeError, match="no more"):
            trainer.evaluate_robustness([NOISE])
        assert bits_of(trainer.model) == before
        assert trainer.callback_handler is handler
        assert trainer.state.log_history == []

    def test_random_numbers_of_the_evaluation_are_the_same_each_time(self, trainer):
        trainer.compute_metrics = lambda _: {
            "drawn": float(torch.rand(())),
            "python": random.random(),
            "numpy": float(np.random.rand()),  # noqa: NPY002
        }
        record = measure_robustness(trainer, [NOISE], trials=2)
        for name in ("drawn", "python", "numpy"):
            assert set(record.corruptions[0].metrics[name]) == set(record.clean.metrics[name])


class TestTrainerMetric:
    def test_it_keeps_numbers_alone_and_draws_for_itself(self, trainer):
        trainer.compute_metrics = lambda _: {
            "drawn": float(torch.rand(())),
            "name": "x",
            "matrix": [[1, 2]],
            "count": 3,
            "mean_num_tokens": 5,
            "num_tokens": 100,  # as TRL's Trainers count what they were trained on
        }
        metric, before = TrainerMetric(trainer), torch.get_rng_state()
        found = metric(trainer.model)
        assert torch.equal(torch.get_rng_state(), before)
        assert found == metric(trainer.model)
        assert found.keys() == {"loss", "drawn", "count", "mean_num_tokens"}

    def test_memory_is_no_metric_and_is_tracked_on(self, make):
        pytest.importorskip("psutil")
        trainer = make(skip_memory_metrics=False)
        tracker = trainer._memory_tracker
        assert TrainerMetric(trainer)(trainer.model).keys() == {"accuracy", "loss"}
        assert trainer._memory_tracker is tracker
        assert any("_mem_" in name for name in trainer.evaluate())

    def test_a_number_in_an_array_is_one(self, make):
        found = {"numpy": np.float32(0.5), "array": np.array(0.5), "tensor": torch.tensor([0.5])}
        trainer = make(compute_metrics=lambda prediction: {**found, "matrix": np.eye(2), "names": ["a"], "none": None})
        metrics = TrainerMetric(trainer)(trainer.model)
        assert {name: value for name, value in metrics.items() if name != "loss"} == dict.fromkeys(found, 0.5)

    def test_a_wrapper_of_the_model_is_the_model(self, trainer):
        wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
        nn.Module.__init__(wrapper)
        wrapper.module = trainer.model
        assert TrainerMetric(trainer)(wrapper) == TrainerMetric(trainer)(trainer.model)


class Masks:
    """A collator that masks at random; with a seed, by a generator of its own, as those of Transformers."""

    def __init__(self, seed=None):
        self.seed, self.generator = seed, None

    def __call__(self, rows):
        if self.seed is not None and self.generator is None:
            self.generator = torch.Generator().manual_seed(self.seed)
        batch = default_data_collator(rows)
        batch["input_ids"] *= torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.5
        return batch


@pytest.mark.parametrize("seed", [None, 7])
def test_a_collator_that_masks_at_random(make, seed):
    """All is measured on the same masks, the gradient is taken on one draw, and the run draws what it would have."""
    trainer = make(eval_dataset=None)
    trainer.eval_dataset = trainer.train_dataset
    trainer.data_collator = Masks(seed)
    corruptions = [GradientCorruption(CorruptionConstraint(epsilon=0.5)), GaussianNoise(0.0)]
    before = torch.get_rng_state()
    record = measure_robustness(trainer, corruptions, trials=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.data_collator.generator is None
    assert measure_robustness(trainer, corruptions, trials=2) == record
    assert set(record.corruptions[1].metrics["loss"]) == set(record.clean.metrics["loss"])
    assert record.corruptions[0].metrics["loss"] > record.clean.metrics["loss"]


def test_flags_without_a_word_are_not_the_default():
    with pytest.raises(InputError, match="expected at least one"):
        RobustnessArguments(corruptions=[]).read()
    assert RobustnessArguments().read([BITS]) == [BITS]
    in_a_file = "quantization=4"  # one stands alone there
    assert RobustnessArguments(corruptions=in_a_file).read() == RobustnessArguments(corruptions=[in_a_file]).read()
    with pytest.raises(ValueError, match=r"corruption_trials: .* got 0"):
        RobustnessArguments(corruption_trials=0).read()


def test_a_corruption_alone_is_a_list_of_one(trainer):
    """As for an evaluator; the callback reads them alike."""
    assert trainer.evaluate_robustness(BITS) == trainer.evaluate_robustness([BITS])


class TestErrors:
    @pytest.mark.parametrize(
        ("corruptions", "error", "says"),
        [
            ([], ValueError, "corruptions: expected at least one"),
            ([NOISE, NOISE], ValueError, "two with the name 'gaussian_sigma_0.2'; pass a dict"),
            ([0.1], TypeError, "expected Corruption objects, got 0.1"),
        ],
    )
    def test_corruptions(self, trainer, corruptions, error, says):
        with pytest.raises(error, match=says):
            trainer.evaluate_robustness(corruptions)

    def test_another_model(self, trainer):
        with pytest.raises(ValueError, match=r"pass trainer\.model to the evaluator"):
            TrainerMetric(trainer)(copy.deepcopy(trainer.model))

    def test_no_model(self, trainer):
        trainer.model = None
        with pytest.raises(ValueError, match="model: expected a Trainer with a model"):
            trainer.evaluate_robustness([NOISE])

    def test_several_data_sets_are_not_one(self, make, rows):
        trainer = make(eval_dataset={"first": rows[:6], "last": rows[6:]})
        with pytest.raises(ValueError, match="expected one data set, got first, last; name one of them"):
            measure_robustness(trainer, [NOISE])
        record = measure_robustness(trainer, [NOISE], eval_dataset="last")
        assert record.evaluated_on.rows == len(rows) - 6
        with pytest.raises(ValueError, match="gradient_dataset: expected one data set, got first, last"):
            measure_robustness(trainer, [NOISE], eval_dataset="last", gradient_dataset=trainer.eval_dataset)

    def test_nothing_to_measure(self, make, rows):
        unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
        trainer = make(RobustTrainer, eval_dataset=unlabelled)
        with pytest.raises(ValueError, match="put labels into the data set"):
            trainer.evaluate_robustness([NOISE])


def test_texts_generated_by_a_seq2seq_trainer(tmp_path):
    """The numbers are those that `evaluate` finds in what is generated at these weights."""
    config = T5Config(**tiny.t5(layers=1))
    inputs = torch.randint(2, 20, (4, 5))
    rows = [{"input_ids": row, "labels": row} for row in inputs]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), **QUIET, predict_with_generate=True, generation_max_length=4
    )
    trainer = Seq2SeqParameterDefenseTrainer(
        T5ForConditionalGeneration(config),
        arguments,
        eval_dataset=rows,
        compute_metrics=lambda p: {"sum": float(p.predictions.sum())},
    )
    metrics = trainer.evaluate_robustness([GaussianNoise(3.0)], trials=1)
    assert metrics["eval_sum"] == trainer.evaluate()["eval_sum"]
    parameters = select_parameters(trainer.model, "all")
    noise = GaussianNoise(3.0)(parameters, None, torch.Generator().manual_seed(0))
    with corrupted(parameters, noise):
        expected = trainer.evaluate()
    assert metrics["eval_robustness_gaussian_sigma_3_sum"] == expected["eval_sum"] != metrics["eval_sum"]


class TestWhatItsNumbersMean:
    """The record has what the Trainer's arguments say of a metric, and no more."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "name", "info"),
        [
            ({}, "accuracy", MetricInfo(True, "share", ("unit",))),
            ({}, "distance", MetricInfo(True, "", ("greater_is_better",))),
            ({}, "loss", MetricInfo(False)),
            ({"metric_for_best_model": "distance", "greater_is_better": False}, "distance", MetricInfo(False)),
            ({"metric_for_best_model": "eval_distance", "greater_is_better": True}, "distance", MetricInfo(True)),
            ({"metric_for_best_model": "distance"}, "distance", MetricInfo(True)),  # so the Trainer goes by it
            ({"metric_for_best_model": "mse"}, "mse", MetricInfo(False)),  # what Transformers writes down is not said
            ({"metric_for_best_model": "mse"}, "distance", MetricInfo(True, "", ("greater_is_better",))),
            (
                {"metric_for_best_model": "edit_distance", "greater_is_better": False},
                "distance",
                MetricInfo(True, "", ("greater_is_better",)),
            ),
            (
                {"metric_for_best_model": "eval_robustness_noise_distance", "greater_is_better": False},
                "distance",
                MetricInfo(False),
            ),
            ({"metric_for_best_model": "eval_loss", "greater_is_better": True}, "loss", MetricInfo(False)),
        ],
    )
    def test_of_its_arguments(self, make, options, name, info):
        trainer = make(**options)
        trainer.compute_metrics = lambda prediction: {"accuracy": 0.5, "distance": 0.5, "mse": 0.5}
        assert measure_robustness(trainer, [BITS]).metric_info[name] == info

    def test_a_direction_that_was_taken_away_is_not_said(self, make):
        trainer = make(metric_for_best_model="eval_distance")
        metric = TrainerMetric(trainer, metric_key_prefix="test")
        assert metric.info_of("distance") == MetricInfo(True), "whatever other data it is measured on"
        trainer.args.greater_is_better = None
        assert metric.info_of("distance") is None

    @for_each(
        ("options", "greater"),
        [
            ({}, True),
            ({"metric_for_best_model": "mse", "greater_is_better": False}, False),
            ({"metric_for_best_model": "accuracy"}, True),
        ],
    )
    def test_of_compute_metrics_itself(self, make, options, greater):
        """Of which the arguments may say the direction, and leave the unit."""

        class Odd:
            primary_metric, greater_is_better, unit = "mse", True, "steps"

            def __call__(self, prediction):
                return {"mse": 0.5}

        trainer = make(**options)
        trainer.compute_metrics = Odd()
        assert measure_robustness(trainer, [BITS]).metric_info["mse"] == MetricInfo(greater, "steps")

    def test_a_user_says_it(self, make):
        trainer, info = make(RobustTrainer), {"accuracy": MetricInfo(True, "share")}
        trainer.evaluate_robustness([BITS], metric_info=info)
        assert trainer.robustness_records["eval"].info("accuracy") == info["accuracy"]
