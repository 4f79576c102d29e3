"""Labels have the shape of what a model predicts, and each kind of problem its own scores."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import scipy.stats
import sklearn.metrics
import tiny
import torch
import transformers
from for_each import for_each
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_parcor import CorruptionEvaluator, GaussianNoise
from hf_parcor.evaluation import (
    ClassificationMetric,
    GenerationMetric,
    LanguageModelMetric,
    PredictionMetric,
    model_loss,
)
from hf_parcor.evaluation.losses import _UNSHIFTED
from hf_parcor.evaluation.metrics.divergence import WithDivergence
from hf_parcor.evaluation.metrics.loss import LossMetric
from hf_parcor.evaluation.passes.gradients import DatasetGradients

SPLITS = [(10,), (4, 4, 2), (1,) * 10]


def split(data, sizes):
    """Return the same data in batches of these sizes."""
    parts = {name: value.split(list(sizes)) for name, value in data.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


@pytest.fixture
def inputs():
    return torch.randint(1, 20, (10, 6))


class TestKinds:
    @for_each("sizes", SPLITS)
    @for_each("named", ["multi_label_classification", None])
    def test_any_number_of_classes(self, tiny_bert, inputs, sizes, named):
        model = tiny_bert(num_labels=3, problem_type=named, initializer_range=0.5).eval()
        labels = torch.randint(0, 2, (10, 3)).float()
        with torch.no_grad():
            output = model(input_ids=inputs, labels=labels)
        labels[:4] = (output.logits[:4] > 0).float()
        with torch.no_grad():
            output = model(input_ids=inputs, labels=labels)
        said = (output.logits.sigmoid() > 0.5).int()
        found = ClassificationMetric(split({"input_ids": inputs, "labels": labels}, sizes))(model)
        assert found == {
            "accuracy": pytest.approx(sklearn.metrics.accuracy_score(labels.int(), said)),
            "f1": pytest.approx(sklearn.metrics.f1_score(labels.int(), said, average="micro")),
            "loss": pytest.approx(float(output.loss), rel=1e-5),
        }
        assert 0 < found["accuracy"] < found["f1"] < 1

    @for_each("sizes", SPLITS)
    @for_each(("outputs", "shape"), [(1, (10,)), (1, (10, 1)), (3, (10, 3))])
    def test_numbers(self, tiny_bert, inputs, sizes, outputs, shape):
        problem = "regression" if outputs > 1 else None
        model = tiny_bert(num_labels=outputs, problem_type=problem, initializer_range=0.5).eval()
        labels = torch.randn(shape) + torch.arange(10.0).reshape(10, *[1] * (len(shape) - 1))
        labels[3] = -100.0  # a number like any other
        with torch.no_grad():
            logits = model(input_ids=inputs).logits.double().numpy()
        wanted = labels.double().numpy().reshape(10, outputs)
        found = ClassificationMetric(split({"input_ids": inputs, "labels": labels}, sizes))(model)
        assert found == {
            "mse": pytest.approx(sklearn.metrics.mean_squared_error(wanted, logits), rel=1e-5),
            "pearson": pytest.approx(
                np.mean([scipy.stats.pearsonr(*pair).statistic for pair in zip(wanted.T, logits.T, strict=True)]),
                abs=1e-5,  # rows in batches of another size round otherwise in fp32
            ),
            "loss": pytest.approx(sklearn.metrics.mean_squared_error(wanted, logits), rel=1e-5),
        }

    def test_under_corruption(self, tiny_bert, inputs):
        model = tiny_bert(num_labels=1, initializer_range=0.5).eval()
        batches = split({"input_ids": inputs, "labels": torch.randn(10)}, (4, 4, 2))
        plain, shared = (
            CorruptionEvaluator(
                model, ClassificationMetric(batches), target_modules=["layer.1"], reuse_prefix=reuse, progress=False
            ).evaluate([GaussianNoise(0.1)], trials=2)
            for reuse in (False, True)
        )
        assert shared.to_json() == plain.to_json()
        assert list(plain.clean.metrics) == ["mse", "pearson", "loss"]

    def test_what_does_not_vary_has_no_correlation(self, tiny_bert, inputs):
        model = tiny_bert(num_labels=1).eval()
        model.classifier.weight.data.zero_()
        labels = torch.arange(7.0)
        for dtype in (torch.float32, torch.float64):  # the mean of seven times 0.1 in float64 is another number
            model.to(dtype).classifier.bias.data.fill_(0.1)
            found = ClassificationMetric([{"input_ids": inputs[:7], "labels": labels.to(dtype)}])(model)
            assert np.isnan(found["pearson"])

    def test_nothing_to_find_is_no_f1(self, tiny_bert, inputs):
        model = tiny_bert(num_labels=3, problem_type="multi_label_classification").eval()
        model.classifier.bias.data.fill_(-100.0)
        found = ClassificationMetric([{"input_ids": inputs, "labels": torch.zeros(10, 3)}])(model)
        assert (found["accuracy"], found["f1"]) == (1.0, 0.0)

    @for_each(
        ("settings", "labels", "said"),
        [
            ({"num_labels": 3}, torch.full((10, 3), 0.25), "a 0 or 1 for each label of a row, got 0.25"),
            (
                {"num_labels": 3},
                torch.full((10, 3), torch.nan),
                "a 0 or 1 for each label of a row, got nan; leave out",
            ),
            ({"num_labels": 1}, torch.full((10,), -100), "got -100, which stands for none"),
            ({"num_labels": 1}, torch.tensor([1.0] * 9 + [torch.nan]), "got nan, which stands for none"),
            (
                {"num_labels": 2, "problem_type": "regression"},
                torch.tensor([[1.0, torch.inf]] * 10),
                "got inf, which stands for none",
            ),
        ],
    )
    def test_labels_of_another_kind(self, tiny_bert, inputs, settings, labels, said):
        with pytest.raises(ValueError, match=said):
            ClassificationMetric([{"input_ids": inputs, "labels": labels}])(tiny_bert(**settings).eval())

    def test_kinds_that_change(self):
        batches = [
            {"logits": torch.randn(2, 3), "labels": torch.tensor([0, 1])},
            {"logits": torch.randn(2, 3), "labels": torch.zeros(2, 3)},
        ]
        with pytest.raises(ValueError, match=r"one kind of problem in all batches, got single.* and multi"):
            ClassificationMetric(batches)(Answering(lambda loss, logits: {"loss": loss, "logits": logits}))

    def test_an_unknown_problem(self, tiny_bert, inputs):
        model = Answering(lambda loss, logits: {"loss": loss, "logits": logits})
        model.config = SimpleNamespace(problem_type="clustering")
        with pytest.raises(ValueError, match=r"expected one of single_label_classification, .*, got 'clustering'"):
            ClassificationMetric([{"logits": torch.randn(2, 3), "labels": torch.tensor([0, 1])}])(model)

    @for_each(
        ("settings", "labels", "said"),
        [
            ({"num_labels": 3}, torch.zeros(10, 3), "multi_label_classification; use ClassificationMetric"),
            ({"num_labels": 1}, torch.zeros(10), "regression; use ClassificationMetric"),
        ],
    )
    def test_a_score_of_classes_for_what_has_none(self, tiny_bert, inputs, settings, labels, said):
        metric = PredictionMetric([{"input_ids": inputs, "labels": labels}], lambda predictions, references: 1.0)
        with pytest.raises(ValueError, match=said):
            metric(tiny_bert(**settings).eval())


class TestShapes:
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_a_column_of_labels_is_a_label_each(self, classifier, size):
        model = classifier.eval()
        inputs, labels = torch.randint(1, 20, (size, 6)), torch.arange(size) % 2
        plain, column = ([{"input_ids": inputs, "labels": given}] for given in (labels, labels[:, None]))
        assert ClassificationMetric(column)(model) == ClassificationMetric(plain)(model)
        assert PredictionMetric(column, _first)(model) == PredictionMetric(plain, _first)(model)

    @for_each(
        ("logits", "labels"),
        [
            ((4, 3), (4, 2)),
            ((4, 3), (3,)),
            ((2, 3, 5), (3, 2)),
            ((4, 6, 3), (4,)),
            ((4, 6, 3), (6,)),
            ((2, 3, 8, 8), (2, 8, 8)),
        ],
    )
    @for_each("metric", [ClassificationMetric, LanguageModelMetric, "predictions"])
    def test_other_shapes_are_refused(self, metric, logits, labels):
        build = (lambda batches: PredictionMetric(batches, _first)) if metric == "predictions" else metric
        batch = {"logits": torch.randn(logits), "labels": torch.zeros(labels, dtype=torch.long)}
        model = Answering(lambda loss, logits: {"loss": loss, "logits": logits})
        with pytest.raises(ValueError, match=r"labels: expected the shape of what the model predicts, \(.*got \("):
            build([batch])(model)

    def test_tokens(self, tiny_bert, inputs):
        model = tiny_bert(BertForTokenClassification, num_labels=3).eval()
        labels = torch.randint(0, 3, (10, 6))
        plain, column = ({"input_ids": inputs, "labels": given} for given in (labels, labels[..., None]))
        assert ClassificationMetric([column])(model) == ClassificationMetric([plain])(model)

    def test_labels_that_are_shifted_already(self):
        model = GPT2LMHeadModel(GPT2Config(**tiny.gpt2(12, layers=1))).eval()
        tokens = torch.randint(0, 12, (2, 6))
        shifted = nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]
        plain = {"input_ids": tokens, "labels": tokens}
        expected = LanguageModelMetric([plain])(model)
        assert LanguageModelMetric([{**plain, "shift_labels": shifted}])(model) == pytest.approx(expected)
        shifted = shifted.clone()
        shifted[:, 2:4] = -100  # ends of documents, that labels do not show
        found = LanguageModelMetric([{**plain, "shift_labels": shifted}])(model)
        with torch.no_grad():
            logits = model(tokens).logits
        counts = shifted != -100
        assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == shifted)[counts].double().mean()))
        assert found["loss"] == pytest.approx(
            float(nn.functional.cross_entropy(logits[counts], shifted[counts])), rel=1e-5
        )

    @for_each(
        ("family", "sizes"),
        [
            *((family, tiny.seq2seq(12)) for family in ("Bart", "Marian", "MBart", "Pegasus", "PLBart", "Blenderbot")),
            ("TrOCR", {**tiny.seq2seq(12), "is_decoder": True}),
            ("XLNet", {"vocab_size": 12, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 16}),
            ("XLM", {"vocab_size": 12, "emb_dim": 8, "n_layers": 1, "n_heads": 2}),
            ("Llama", tiny.decoder(12)),
        ],
    )
    def test_labels_of_the_places_that_the_own_loss_is_taken_of(self, family, sizes):
        """Some decoders of Transformers take labels that are shifted already, under the name of others."""
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        tokens = torch.randint(3, 12, (3, 6))
        labels = tokens.clone()
        labels[0, 1:3] = labels[1, 4:] = -100
        with torch.no_grad():
            output = model(input_ids=tokens, labels=labels)
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        (given,) = (
            one
            for one in (labels, shifted)
            if torch.allclose(output.loss, nn.functional.cross_entropy(output.logits.mT, one), atol=1e-6)
        )
        counts = given != -100
        right = (output.logits.argmax(-1) == given)[counts].double().mean()
        for rows in ([slice(3)], [slice(1), slice(1, 3)]):
            found = LanguageModelMetric([{"input_ids": tokens[some], "labels": labels[some]} for some in rows])(model)
            assert found["loss"] == pytest.approx(float(output.loss), rel=1e-5)
            assert found["accuracy"] == pytest.approx(float(right))

    @for_each("reduction", ["sum", "mean"])
    def test_speech_counts_by_the_row_however_it_is_batched(self, reduction):
        """CTC has one loss a row, of which Transformers takes the sum by default, or a mean."""
        sizes = {"conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_conv_pos_embeddings": 4}
        config = transformers.Wav2Vec2Config(
            **{**tiny.encoder(12), **sizes}, num_conv_pos_embedding_groups=2, ctc_loss_reduction=reduction
        )
        model = transformers.Wav2Vec2ForCTC(config).eval()
        data = {"input_values": torch.randn(10, 100), "labels": torch.randint(1, 12, (10, 6))}
        lengths = torch.tensor([6, 1, 2, 3, 6, 4, 1, 1, 5, 2])
        data["labels"][torch.arange(6) >= lengths[:, None]] = -100
        chances = model(data["input_values"]).logits.log_softmax(-1).transpose(0, 1)
        frames = torch.full((10,), len(chances))
        of_rows = nn.functional.ctc_loss(chances, data["labels"].clamp(0), frames, lengths, reduction="none")
        mean = (of_rows / lengths if reduction == "mean" else of_rows).mean()
        weights = dict(model.lm_head.named_parameters())
        expected = torch.autograd.grad(mean, list(weights.values()))
        for sizes in SPLITS:
            batches = split(data, sizes)
            assert LossMetric(batches)(model)["loss"] == pytest.approx(float(mean.detach()), rel=1e-5)
            found = DatasetGradients(model, weights, batches).over_data()
            torch.testing.assert_close(list(found.values()), list(expected), rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    def test_which_causal_models_do_not_shift(self):
        """Those that do call what Transformers shifts with; no other model has come that does not."""
        classes = [getattr(transformers, name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
        without = {kind.__name__ for kind in classes if "self.loss_function(" not in inspect.getsource(kind.forward)}
        assert {name for name in without if "Assistant" not in name} == _UNSHIFTED  # assistants have no loss

    def test_texts_are_as_many_as_references(self):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=32)).eval()
        batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)}
        tokenizer = SimpleNamespace(decode=lambda row, skip_special_tokens: "text")
        metric = GenerationMetric(
            tokenizer, [batch], _first, max_new_tokens=2, num_beams=2, num_return_sequences=2, pad_token_id=0
        )
        with pytest.raises(ValueError, match="one generated text for each of 2 references, got 4"):
            metric(model)


def _first(predictions, references):
    return float(predictions == references) + len(predictions)


class Answering(nn.Module):
    """Answers with the batch's own logits, in a form of its own."""

    def __init__(self, form):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.form = form

    def forward(self, logits, labels):
        return self.form(torch.tensor(0.5), logits + self.weight)


FORMS = {
    "attributes": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "loss as a float": lambda loss, logits: {"loss": float(loss), "logits": logits},
    "tuple": lambda loss, logits: (loss, logits),
    "tuple with more": lambda loss, logits: (loss, logits, (torch.zeros(3),)),
}
BATCH = {"logits": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "labels": torch.tensor([0, 1])}


class TestOutputs:
    @for_each("form", FORMS)
    def test_served(self, form):
        model = Answering(FORMS[form])
        assert ClassificationMetric([BATCH])(model) == {"accuracy": 0.5, "loss": 0.5}
        assert PredictionMetric([BATCH], _first)(model) == {"score": 2.0}

    @for_each(
        "form", [lambda loss, logits: (logits,), lambda loss, logits: {"logits": logits}, lambda loss, logits: logits]
    )
    def test_without_a_loss(self, form):
        """What a model would have returned that computes it: checked against Transformers' own heads."""
        found = ClassificationMetric([BATCH])(Answering(form))
        expected = -BATCH["logits"].log_softmax(-1)[[0, 1], BATCH["labels"]].mean()
        assert found == {"accuracy": 0.5, "loss": pytest.approx(float(expected))}
        assert PredictionMetric([BATCH], _first)(Answering(form)) == {"score": 2.0}

    def test_a_number_for_each_row_without_a_dimension_of_its_own(self):
        batch = {"logits": torch.tensor([1.0, 2.0, 4.0]), "labels": torch.tensor([1, 2, 3])}
        assert ClassificationMetric([batch])(Answering(FORMS["dict"]))["mse"] == pytest.approx(1 / 3)

    def test_labels_of_any_number_for_each_token(self):
        logits, labels = torch.randn(2, 3, 2), torch.randint(0, 2, (2, 3, 2)).float()
        labels[0] = (logits[0] > 0).float()
        found = ClassificationMetric([{"logits": logits, "labels": labels}])(Answering(FORMS["dict"]))
        rows = [part.reshape(6, 2).int() for part in (labels, logits > 0)]
        assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(*rows))

    @for_each(
        ("outputs", "labels", "as_numbers"),
        [
            ((10, 3), (10, 3), torch.float),
            ((10, 1, 3), (10, 3), torch.float),
            ((4, 5, 3), (4, 5, 3), torch.float),
            ((10, 2), (10,), torch.long),
            ((10, 2), (10, 1), torch.long),
            ((2, 2), (2, 1), torch.long),
            ((4, 5, 2), (4, 5), torch.long),
            ((10, 1), (10,), torch.float),
        ],
    )
    @for_each("form", [lambda loss, logits: logits, FORMS["dict"]])
    def test_truth_values_are_as_good_as_their_numbers(self, form, outputs, labels, as_numbers):
        """One for each output is any number of classes, which as an integer would be a class."""
        batch = {"logits": torch.randn(outputs), "labels": torch.randn(labels) > 0}
        model, named = Answering(form), {**batch, "labels": batch["labels"].to(as_numbers)}
        assert ClassificationMetric([batch])(model) == ClassificationMetric([named])(model)
        assert LossMetric([batch])(model) == LossMetric([named])(model)
        assert torch.equal(model_loss(model, batch), model_loss(model, named))

    @for_each(
        ("outputs", "labels"),
        [
            (3, torch.tensor([0, 2, -100, 1, 1, 0, 0, 2, 2, 1])),
            (3, (torch.arange(30).reshape(10, 3) % 2).float()),
            (1, torch.linspace(-1, 1, 10)),
        ],
    )
    def test_the_loss_of_bare_logits_is_that_of_transformers(self, tiny_bert, inputs, outputs, labels):
        model = tiny_bert(BertForSequenceClassification, num_labels=outputs).eval()

        class Bare(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, input_ids):  # takes no labels
                return self.inner(input_ids).logits

        batches = [{"input_ids": inputs, "labels": labels}]
        expected = ClassificationMetric(batches)(model)
        assert ClassificationMetric(batches)(Bare()) == pytest.approx(expected)
        own, bare = (model_loss(one, batches[0]) for one in (model, Bare()))
        assert torch.allclose(own, bare)

    def test_so_is_that_of_a_language_model_which_predicts_the_next_token(self):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
        tokens = torch.randint(0, 12, (2, 6))
        batch = {"input_ids": tokens, "labels": tokens.masked_fill(tokens == 3, -100)}
        expected, metric = model_loss(model, batch), LanguageModelMetric([batch])
        of_model, inner = metric(model), model.forward
        model.forward = lambda input_ids: inner(input_ids).logits
        assert torch.allclose(model_loss(model, batch), expected)
        assert metric(model) == pytest.approx(of_model)

    @pytest.mark.slow
    @for_each("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
    def test_of_a_model_inside_of_another_module(self, tiny_bert, wrap):
        """Its class is another one, and its `forward` takes anything."""
        tokens = torch.randint(0, 12, (2, 6))
        gpt2 = GPT2LMHeadModel(GPT2Config(**tiny.gpt2(12, layers=1))).eval()
        lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
        adapted = peft.get_peft_model(copy.deepcopy(gpt2), lora).eval()
        numbers = tiny_bert(num_labels=2, problem_type="regression").eval()
        rows = {"input": torch.randn(4, 3), "labels": torch.tensor([0, 1, 1, 0])}
        for model, metric in (
            (gpt2, LanguageModelMetric([{"input_ids": tokens, "labels": tokens}])),
            (adapted, LanguageModelMetric([{"input_ids": tokens, "labels": tokens}])),
            (numbers, ClassificationMetric([{"input_ids": tokens, "labels": torch.eye(2)}])),
            (nn.Linear(3, 2), ClassificationMetric([rows])),
        ):
            wrapped = wrap(model)
            assert metric(wrapped) == pytest.approx(metric(model))
            records = [
                CorruptionEvaluator(one, metric, progress=False).evaluate([GaussianNoise(0.1)], trials=1)
                for one in (model, wrapped)
            ]
            assert records[0].to_json() == records[1].to_json()

    @for_each(
        "form",
        [
            lambda loss, logits: (loss,),
            lambda loss, logits: (loss, loss),
            lambda loss, logits: {"loss": loss},
            lambda loss, logits: None,
        ],
    )
    def test_without_logits(self, form):
        for metric in (ClassificationMetric([BATCH]), PredictionMetric([BATCH], _first)):
            with pytest.raises(ValueError, match="logits: expected the model to return a tensor of scores"):
                metric(Answering(form))

    def test_a_loss_for_each_gpu(self):
        model = Answering(lambda loss, logits: {"loss": torch.stack([loss, loss]), "logits": logits})
        with pytest.raises(ValueError, match=r"loss: expected one number.*got shape \(2,\)"):
            ClassificationMetric([BATCH])(model)

    def test_return_dict_false(self, classifier, batches):
        model = classifier.eval()
        expected = ClassificationMetric(batches)(model)
        asked = [{**batch, "return_dict": False} for batch in batches]
        assert ClassificationMetric(asked)(model) == expected
        model.config.return_dict = False
        assert ClassificationMetric(batches)(model) == expected

    def test_a_model_without_a_head(self, tiny_bert, inputs):
        class Loose(BertModel):
            def forward(self, labels=None, **inputs):
                return super().forward(**inputs)

        batch = {"input_ids": inputs, "labels": torch.zeros(10, dtype=torch.long)}
        with pytest.raises(ValueError, match="use a model with a head for the task"):
            ClassificationMetric([batch])(tiny_bert(Loose).eval())


# PEFT's kind, its task, and where a row's first prediction stands that counts, with its label, after three vectors.
PROMPTS = {
    "prompt tuning": (peft.PromptTuningConfig, "CAUSAL_LM", 2, 0),
    "p-tuning": (peft.PromptEncoderConfig, "CAUSAL_LM", 2, 0),
    "prefix tuning": (peft.PrefixTuningConfig, "CAUSAL_LM", 0, 1),
    "in an encoder": (peft.PromptTuningConfig, "SEQ_2_SEQ_LM", 0, 0),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT passes them
@for_each("name", PROMPTS)
def test_learned_prompts_count_for_nothing_and_the_last_of_them_predicts(name, inputs):
    """Vectors before a row make predictions of their own, and give the first label of a causal row one."""
    kind, task, place, first = PROMPTS[name]
    if task == "CAUSAL_LM":
        model = GPT2LMHeadModel(GPT2Config(**tiny.gpt2(20, 8), initializer_range=0.5))
    else:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**tiny.t5(20, 8)))
    model = peft.get_peft_model(model, kind(task_type=task, num_virtual_tokens=3)).eval()
    labels = torch.where(torch.rand(inputs.shape) < 0.3, -100, inputs)
    losses, right = [], []
    for ids, wanted in zip(inputs, labels, strict=True):
        logits = model(input_ids=ids[None], labels=wanted[None]).logits[0]
        for at, label in enumerate(wanted[first:].tolist(), start=place):
            if label != -100:
                losses.append(-logits[at].log_softmax(-1)[label])
                right.append(int(logits[at].argmax()) == label)
    loss = torch.stack(losses).mean()
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    expected = torch.autograd.grad(loss, list(trained.values()))
    for sizes in SPLITS:
        batches = split({"input_ids": inputs, "labels": labels}, sizes)
        found = LanguageModelMetric(batches)(model)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert found["accuracy"] == pytest.approx(float(np.mean(right)))
        assert LossMetric(batches)(model)["loss"] == pytest.approx(loss.item(), rel=1e-5)
        gradient = DatasetGradients(model, trained, batches).over_data()
        for key, value in zip(trained, expected, strict=True):
            torch.testing.assert_close(gradient[key], value, rtol=1e-4, atol=1e-7)
    part = WithDivergence(LanguageModelMetric(batches), model).of_batch(model, batches[0])
    assert part.predictions == int((batches[0]["labels"][:, first:] != -100).sum())
