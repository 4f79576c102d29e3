"""Metrics: ours longhand, and those that other libraries bring."""

import numpy as np
import pytest
import tiny
import torch
import transformers
from for_each import for_each
from local_models import word_tokenizer
from torch import nn
from trainings import QUIET, accuracy

from hf_parcor import CorruptionEvaluator, GaussianNoise, Quantization
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.evaluation.metrics.loss import LossMetric


class TestLossMetric:
    """Losses weigh as many labels as they are the mean of; what has none, weighs nothing."""

    @for_each("own", [False, True])
    def test_against_all_labels_at_once(self, own):
        """The model's own loss is of the next token, so that the first label counts for nothing; ours is of each."""
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.gpt2(layers=1))).eval()
        ids = torch.randint(0, 20, (5, 6))
        labels = ids.clone()
        labels[0, 2:] = labels[1, 5:] = labels[4] = -100
        parts = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(1), slice(1, 4), slice(4, 5))]

        def loss(model, batch):
            return nn.functional.cross_entropy(
                model(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten()
            )

        with torch.no_grad():
            logits = model(ids).logits
            shifted = (logits, labels) if own else (logits[:, :-1], labels[:, 1:])
            expected = nn.functional.cross_entropy(*(part.flatten(0, 1) for part in shifted))
        found = LossMetric(parts, loss)(model) if own else LossMetric(parts)(model)
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)


class TestClassificationMetric:
    def test_against_a_loop_over_single_sequences(self, classifier, batches):
        model = classifier.eval()
        right, losses = [], []
        for batch in batches:
            for row, label in zip(batch["input_ids"], batch["labels"].tolist(), strict=True):
                probabilities = model(row[None]).logits[0].double().softmax(-1).tolist()
                right.append(float(probabilities[label] == max(probabilities)))
                losses.append(-np.log(probabilities[label]))
        result = ClassificationMetric(batches)(model)
        assert result == {"accuracy": pytest.approx(np.mean(right)), "loss": pytest.approx(np.mean(losses), rel=1e-5)}
        assert 0 < result["accuracy"] < 1, "the data is too easy"

    def test_tokens_with_the_label_that_does_not_count(self, tiny_bert):
        model = tiny_bert(transformers.BertForTokenClassification, num_labels=3).eval()
        inputs, labels = torch.randint(1, 20, (4, 5)), torch.randint(0, 3, (4, 5))
        labels[0, 2:] = labels[3] = -100
        right, losses = [], []
        for row, row_labels in zip(inputs, labels.tolist(), strict=True):
            for logits, label in zip(model(row[None]).logits[0].detach().double(), row_labels, strict=True):
                if label != -100:
                    right.append(float(logits.argmax() == label))
                    losses.append(-logits.log_softmax(-1)[label].item())
        batches = [{"input_ids": inputs[rows], "labels": labels[rows]} for rows in (slice(0, 3), slice(3, 4))]
        expected = {"accuracy": pytest.approx(np.mean(right)), "loss": pytest.approx(np.mean(losses), rel=1e-5)}
        assert ClassificationMetric(batches)(model) == expected

    def test_batches_are_walked_through_once(self, classifier, batches):
        """Each walk of a loader has workers of its own, and draws a number."""
        walks = []

        class Walked(list):
            def __iter__(self):
                walks.append(1)
                return super().__iter__()

        metric = ClassificationMetric(Walked(batches))
        walks.clear()
        metric(classifier)
        assert len(walks) == 1

    def test_no_graph_is_built(self, classifier, batches):
        enabled = []
        classifier.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
        ClassificationMetric(batches)(classifier)
        assert enabled == [False] * 3

    def test_errors(self, classifier, batches):
        with pytest.raises(ValueError, match="expected at least one batch"):
            ClassificationMetric([])
        with pytest.raises(ValueError, match="walked through again"):
            ClassificationMetric(iter(batches))
        ignored = ClassificationMetric([{**batches[0], "labels": torch.full((4,), -100)}])
        with pytest.raises(ValueError, match="expected labels other than -100"):
            ignored(classifier)


class TestOtherLibraries:
    def test_a_lambda_around_trainer_evaluate(self, classifier, batches, tmp_path, bits_of):
        rows = [
            {"input_ids": row, "labels": label}
            for batch in batches
            for row, label in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        trainer = transformers.Trainer(
            model=classifier,
            args=transformers.TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=4, **QUIET),
            eval_dataset=rows,
            compute_metrics=accuracy,
        )
        before = bits_of(classifier)
        corruptions = [GaussianNoise(0.3), Quantization(2)]
        ours = CorruptionEvaluator(classifier, ClassificationMetric(batches), progress=False).evaluate(corruptions)
        record = CorruptionEvaluator(classifier, lambda _: trainer.evaluate(), progress=False).evaluate(corruptions)
        assert bits_of(classifier) == before
        assert classifier.training
        for row, expected in zip(record.rows(), ours.rows(), strict=True):
            assert row.metrics["eval_accuracy"] == pytest.approx(expected.metrics["accuracy"])
            assert row.metrics["eval_loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
            assert row.notes == ()
            assert sorted(row.metrics) == ["eval_accuracy", "eval_loss"], "neither times nor where the training is"
        assert len({values for row in record.rows() for values in row.metrics["eval_loss"]}) == 5

    def test_a_pipeline(self, classifier):
        classify = transformers.TextClassificationPipeline(
            model=classifier,
            tokenizer=word_tokenizer(["[UNK]", "good", "bad", "film"]),
            device="cpu",
        )
        texts = ["good film", "bad film"]
        record = CorruptionEvaluator(
            classifier, lambda _: {"confidence": sum(answer["score"] for answer in classify(texts))}, progress=False
        ).evaluate([GaussianNoise(0.3)], trials=2)
        with torch.no_grad():
            logits = classifier.eval()(torch.tensor([[1, 3], [2, 3]])).logits
        assert record.clean.mean("confidence") == pytest.approx(float(logits.softmax(-1).amax(-1).sum()), rel=1e-5)
        assert len(set(record.corruptions[0].metrics["confidence"]) | {record.clean.mean("confidence")}) == 3
