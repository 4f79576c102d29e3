"""Gradients over data, against the gradient of one loss over all of it, written longhand."""

import math
import warnings

import pytest
import tiny
import torch
import transformers
from for_each import for_each
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hf_parcor import CorruptionConstraint, CorruptionEvaluator, GradientCorruption, MultiStepCorruption, Quantization
from hf_parcor.evaluation import ClassificationMetric, DatasetGradients
from hf_parcor.evaluation.losses import count_items, model_loss
from hf_parcor.evaluation.passes.gradients import private

EXACT = {"rtol": 1e-12, "atol": 1e-14}
CLOSED_FORM = [
    GradientCorruption(CorruptionConstraint(p=p, epsilon=epsilon, top_n=top_n))
    for p in (1.0, 2.0, math.inf)
    for epsilon in (0.1, 0.2)
    for top_n in (None, 3)
]


def gradients_of(model, batches, **options):
    return DatasetGradients(model, dict(model.named_parameters()), batches, **options)


def longhand(model, loss):
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


class TestOverData:
    def test_an_unequal_last_batch_counts_by_its_items(self, classifier, batches):
        model = classifier.double().eval()
        inputs = torch.cat([batch["input_ids"] for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
        expected = longhand(model, cross_entropy(model(inputs).logits, labels))
        gradient = gradients_of(model, batches).over_data()
        assert all(part.dtype == torch.float64 for part in gradient.values())
        torch.testing.assert_close(gradient, expected, **EXACT)
        per_batch = [longhand(model, model(**batch).loss)["classifier.bias"] for batch in batches]
        assert not torch.allclose(gradient["classifier.bias"], torch.stack(per_batch).mean(0)), "the data is too easy"

    @pytest.mark.slow
    @for_each("off", [torch.no_grad, torch.inference_mode])
    def test_where_a_caller_has_turned_gradients_off(self, classifier, batches, off):
        corruptions = [GradientCorruption(CorruptionConstraint(epsilon=0.3)), Quantization(4)]
        corruptions += [MultiStepCorruption(CorruptionConstraint(epsilon=epsilon), steps=9) for epsilon in (0.3, 0.6)]
        settings = {"target_modules": ["classifier"], "progress": False}
        evaluator = CorruptionEvaluator(classifier, ClassificationMetric(batches), batches, **settings)
        expected = evaluator.evaluate(corruptions)
        with off():
            assert evaluator.evaluate(corruptions) == expected

    def test_of_a_users_loss_first_labels_count_too(self):
        config = transformers.GPT2Config(**tiny.gpt2(layers=1))
        model = transformers.GPT2LMHeadModel(config).double().eval()
        inputs = [torch.randint(1, 20, shape) for shape in ((2, 5), (3, 2))]

        def loss(model, batch):
            return model(batch["input_ids"]).logits.square().mean()

        batches = [{"input_ids": tokens, "labels": tokens} for tokens in inputs]
        expected = longhand(model, (10 * loss(model, batches[0]) + 6 * loss(model, batches[1])) / 16)
        torch.testing.assert_close(gradients_of(model, batches, loss=loss).over_data(), expected, **EXACT)

    def test_token_labels_count_unless_they_are_ignored(self, tiny_bert):
        model = tiny_bert(transformers.BertForTokenClassification, num_labels=3).double().eval()
        inputs, labels = torch.randint(1, 20, (7, 5)), torch.randint(0, 3, (7, 5))
        labels[0, 1:] = labels[3:6, 2:] = labels[6] = -100
        batches = [
            {"input_ids": inputs[rows], "labels": labels[rows]} for rows in (slice(0, 3), slice(3, 6), slice(6, 7))
        ]
        expected = longhand(model, cross_entropy(model(inputs).logits.reshape(-1, 3), labels.reshape(-1)))
        gradient = gradients_of(model, batches).over_data()
        torch.testing.assert_close(gradient, expected, **EXACT)

    @for_each("family", ["GPT2", "Llama"])
    def test_a_causal_language_model_does_not_predict_first_tokens(self, family):
        config = {
            "GPT2": transformers.GPT2Config(**tiny.gpt2(layers=1)),
            "Llama": transformers.LlamaConfig(**tiny.decoder(layers=1)),
        }[family]
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        texts = [torch.randint(3, 20, (3, 9)), torch.randint(3, 20, (2, 2))]
        predictions = torch.cat([model(text).logits[:, :-1].reshape(-1, 20) for text in texts])
        expected = longhand(model, cross_entropy(predictions, torch.cat([text[:, 1:].reshape(-1) for text in texts])))
        gradient = gradients_of(model, [{"input_ids": text, "labels": text} for text in texts]).over_data()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_sequence_to_sequence_labels_are_not_shifted(self):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**tiny.t5(layers=1))).eval()
        pairs = [
            (torch.randint(3, 20, (size, 3)), torch.randint(3, 20, (size, length)))
            for size, length in ((3, 5), (2, 1))
        ]
        predictions = torch.cat([model(source, labels=target).logits.reshape(-1, 20) for source, target in pairs])
        expected = longhand(model, cross_entropy(predictions, torch.cat([target.reshape(-1) for _, target in pairs])))
        gradient = gradients_of(
            model, [{"input_ids": source, "labels": target} for source, target in pairs]
        ).over_data()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_a_loss_of_ones_own_over_tuples_from_a_data_loader(self):
        model, inputs, targets = nn.Linear(3, 1).double(), torch.randn(5, 3).double(), torch.randn(5, 1).double()
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=2)
        gradient = gradients_of(
            model, loader, loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        ).over_data()
        torch.testing.assert_close(gradient, longhand(model, (model(inputs) - targets).square().mean()), **EXACT)

    def test_a_batch_without_items_whose_mean_is_nan(self):
        def loss(model, batch):
            counted = batch["labels"] != -100
            return (model(batch["x"])[:, 0] * counted).sum() / counted.sum()

        model, x = nn.Linear(2, 1), torch.ones(2, 2)
        batches = [{"x": x, "labels": torch.tensor([0, -100])}, {"x": x, "labels": torch.tensor([-100, -100])}]
        assert math.isnan(loss(model, batches[1]).item())
        assert gradients_of(model, batches, loss=loss).over_data()["weight"].tolist() == [[1.0, 1.0]]

    def test_parameters_that_the_loss_does_not_use(self):
        model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
        gradient = gradients_of(
            model, [torch.ones(2, 2)], loss=lambda model, batch: model["used"](batch).mean()
        ).over_data()
        assert gradient["used.weight"].abs().sum() > 0
        assert gradient["unused.weight"].tolist() == [[0.0, 0.0]]

    @for_each("dtype", [torch.float32, torch.bfloat16])
    def test_narrow_weights_have_float32_gradients(self, dtype):
        model = nn.Linear(2, 1).to(dtype)
        gradient = gradients_of(
            model, [torch.ones(1, 2, dtype=dtype)], loss=lambda model, batch: model(batch).sum()
        ).over_data()
        assert {part.dtype for part in gradient.values()} == {torch.float32}


class Kept(torch.autograd.Function):
    """Its backward hands out what it has kept."""

    @staticmethod
    def forward(ctx, weight, inputs):
        ctx.save_for_backward(inputs)
        return (weight * inputs).sum()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0], None


class TestWhatIsHandedOut:
    """It may be written into, as corruptions do: each tensor has memory of its own, and is a plain one."""

    @for_each(
        "loss",
        [
            lambda model, batch: (model["a"] + model["b"]).square().sum(),
            lambda model, batch: model["a"].sum() + model["b"].sum(),
            lambda model, batch: torch.stack([model["a"], model["b"]], -1).square().sum(),
            lambda model, batch: (model["a"].t() @ model["b"]).sum(),
            lambda model, batch: Kept.apply(model["a"], batch["x"]) + Kept.apply(model["b"], batch["x"]),
            lambda model, batch: Kept.apply(model["a"], model["c"]) + Kept.apply(model["b"], model["c"]),
            lambda model, batch: (
                torch.nn.functional.embedding(torch.tensor([0, 1]), model["a"] + 0, sparse=True).sum()
                + torch.nn.functional.embedding(torch.tensor([0]), model["b"], sparse=True).sum()
            ),
        ],
    )
    @for_each("at", ["data", "batch"])
    def test_writing_into_one_leaves_all_else_as_it_was(self, loss, at):
        model = nn.ParameterDict({name: nn.Parameter(torch.arange(6.0).view(2, 3) + 1) for name in "abc"})
        parameters = {name: model[name] for name in "ab"}
        batch = {"x": torch.ones(2, 3)}
        gradients = DatasetGradients(model, parameters, [batch, batch], loss)
        zero = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        found = gradients.over_data() if at == "data" else gradients.on_batch(batch, zero)
        expected = {
            name: part.to_dense() if part.is_sparse else part.clone()
            for name, part in zip("ab", torch.autograd.grad(loss(model, batch), parameters.values()), strict=True)
        }
        for part in found.values():
            assert part.is_contiguous()
            assert part.layout is torch.strided
        torch.testing.assert_close(found, expected)
        for name, part in found.items():
            part.mul_(2)
            torch.testing.assert_close(part, 2 * expected[name])
        assert torch.equal(batch["x"], torch.ones(2, 3))
        assert torch.equal(model["c"], torch.arange(6.0).view(2, 3) + 1)

    def test_what_is_private_already_is_not_copied(self):
        parts = [torch.ones(2), torch.ones(3, 2)]
        assert all(one is other for one, other in zip(private(parts), parts, strict=True))


def test_a_model_that_writes_into_its_batch(classifier, batches):
    """Every pass sees the batches as they are: the gradient, the ascent, and what others do with them."""

    def polite(model, batch):
        return model(batch["input_ids"] // 2, labels=batch["labels"]).loss

    def rude(model, batch):
        return model(batch.pop("input_ids").div_(2, rounding_mode="floor"), labels=batch.pop("labels")).loss

    before = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    corruptions = [CLOSED_FORM[0], MultiStepCorruption(CorruptionConstraint(epsilon=0.5), steps=4)]

    def record(loss):
        evaluator = CorruptionEvaluator(classifier, ClassificationMetric(batches), batches, loss=loss, progress=False)
        return evaluator.evaluate(corruptions)

    assert record(rude) == record(polite)
    assert all(torch.equal(one[k], other[k]) for one, other in zip(batches, before, strict=True) for k in other)


def test_a_batch_that_moves_in_place_stays_where_it_is(classifier, batches):
    encodings = [transformers.BatchEncoding(batch) for batch in batches]
    before = [encoding.data for encoding in encodings]
    gradients = gradients_of(classifier, encodings)
    gradients.over_data()
    gradients.next_batch()
    assert all(encoding.data is data for encoding, data in zip(encodings, before, strict=True))


class TestHowOftenTheModelRuns:
    @pytest.fixture
    def run(self, classifier, batches):
        def count(corruptions):
            passes = []
            handle = classifier.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
            CorruptionEvaluator(classifier, lambda _: {"x": 0.0}, batches, progress=False).evaluate(corruptions)
            handle.remove()
            return passes

        return count

    def test_one_gradient_serves_all_closed_forms(self, run, batches):
        assert run(CLOSED_FORM) == [True] * len(batches)

    def test_no_gradient_without_need(self, run):
        assert run([Quantization(4)]) == []

    def test_multi_step_is_one_pass_over_the_data(self, run, batches):
        constraint = CorruptionConstraint(epsilon=0.1)
        assert len(run([MultiStepCorruption(constraint)])) == len(batches)
        assert len(run([MultiStepCorruption(constraint, steps=2), *CLOSED_FORM])) == 2 + len(batches)


class TestTheWalk:
    @pytest.mark.parametrize(("steps", "expected"), [(None, [0, 1, 2]), (2, [0, 1]), (5, [0, 1, 2, 0, 1])])
    @pytest.mark.parametrize("kind", [MultiStepCorruption, type("OfAUser", (MultiStepCorruption,), {})])
    def test_every_walk_begins_with_the_first_batch(self, classifier, batches, kind, steps, expected):
        walk = []

        def loss(model, batch):
            walk.append(
                next(
                    index for index, other in enumerate(batches) if torch.equal(batch["input_ids"], other["input_ids"])
                )
            )
            return model(**batch).loss

        corruption = kind(CorruptionConstraint(epsilon=0.1), steps=steps)
        evaluator = CorruptionEvaluator(classifier, lambda _: {"x": 0.0}, batches, loss=loss, progress=False)
        record = evaluator.evaluate([corruption, corruption])
        assert walk == expected * 2
        without = {"input_ids": batches[0]["input_ids"] + 1, "labels": torch.full_like(batches[0]["labels"], -100)}
        batches[1:1] = batches[:0] = batches[len(batches) :] = [without]
        walk.clear()
        evaluator.evaluate([corruption])
        told_apart = [index for index, batch in enumerate(batches) if batch is not without]
        assert [told_apart.index(index) for index in walk] == expected, "what has no labels takes no step"
        assert record.corruptions[0] == record.corruptions[1]

    def test_projected_gradient_ascent_longhand(self, classifier, batches):
        model = classifier.double()
        clean = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        seen = []

        def metric(model):
            seen.append({name: parameter.detach() - clean[name] for name, parameter in model.named_parameters()})
            return {"x": 0.0}

        epsilon, steps = 0.3, 4
        corruption = MultiStepCorruption(CorruptionConstraint(epsilon=epsilon), steps=steps)
        CorruptionEvaluator(model, metric, batches, progress=False).evaluate([corruption])

        model.eval()
        a = {name: torch.zeros_like(weight) for name, weight in clean.items()}
        for step in range(steps):
            for name, parameter in model.named_parameters():
                parameter.data = clean[name] + a[name]
            gradient = longhand(model, model(**batches[step % 3]).loss)
            length = math.sqrt(sum(float(part.square().sum()) for part in gradient.values()))
            a = {name: a[name] + 1.5 * epsilon / steps * gradient[name] / length for name in a}
            norm = math.sqrt(sum(float(part.square().sum()) for part in a.values()))
            a = {name: part * min(1, epsilon / norm) for name, part in a.items()}
        torch.testing.assert_close(seen[1], a, rtol=1e-5, atol=1e-9)

    def test_gradients_are_taken_at_the_corrupted_point_which_is_left_at_once(self, bits_of):
        model = nn.Linear(2, 1, bias=False).double()
        before = bits_of(model)
        gradients = gradients_of(
            model, [torch.eye(2).double()], loss=lambda model, batch: model(batch).square().sum() / 2
        )
        gradient = gradients.on_next_batch({"weight": torch.tensor([[1.0, -2.0]]).double()})
        expected = model.weight.detach() + torch.tensor([[1.0, -2.0]])
        torch.testing.assert_close(gradient["weight"], expected, **EXACT)
        assert bits_of(model) == before
        torch.testing.assert_close(gradients.over_data()["weight"], model.weight.detach(), **EXACT)


class TestErrors:
    @for_each(
        ("wrong", "error", "says"),
        [
            (lambda logits: logits.sum(1), TypeError, r"one number, got shape \(\d+,\); return the mean"),
            (lambda logits: logits.mean().item(), TypeError, "one number, got float; return the mean"),
            (lambda logits: None, TypeError, "one number, got NoneType; return the mean"),
            (lambda logits: logits.mean().detach(), ValueError, "got one without a gradient; .* do not detach it"),
        ],
    )
    def test_a_loss_that_is_none(self, classifier, batches, wrong, error, says):
        gradients = gradients_of(classifier, batches, loss=lambda model, batch: wrong(model(**batch).logits))
        with pytest.raises(error, match=says):
            gradients.over_data()

    def test_no_item_at_all(self, classifier):
        ignored = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.full((2,), -100)}
        for batches in ([], [ignored]):
            with pytest.raises(ValueError, match=f"got {len(batches)} batches without any; is the data set empty"):
                gradients_of(classifier, batches)

    def test_a_generator(self, classifier, batches):
        with pytest.raises(ValueError, match="expected a collection that can be walked through again"):
            gradients_of(classifier, (batch for batch in batches))

    def test_a_list_that_is_changed_meanwhile(self, classifier, batches):
        gradients = gradients_of(classifier, batches)
        batches.pop()
        with pytest.raises(ValueError, match="expected the 10 items that there were before, got 8"):
            gradients.over_data()

    def test_a_warning_of_the_loss_is_no_lost_gradient(self, classifier, batches):
        def loss(model, batch):
            warnings.warn("of the user", stacklevel=1)
            return model(**batch).loss

        with pytest.raises(UserWarning, match="of the user"):
            gradients_of(classifier, batches, loss=loss).over_data()

    def test_a_model_without_a_loss(self, classifier, batches):
        with pytest.raises(ValueError, match="put labels into the batches, or pass loss="):
            model_loss(classifier, {"input_ids": batches[0]["input_ids"]})

    @for_each("batch", [{}, [], {"text": ["a", "b"]}, (torch.tensor(1.0),)])
    def test_a_batch_without_tensors(self, batch):
        with pytest.raises(ValueError, match="expected tensors in every batch, got"):
            count_items(batch)


@for_each(
    ("batch", "shifted", "items"),
    [
        ({"labels": torch.tensor([1, -100, 0])}, False, 2),
        ({"labels": torch.tensor([[1, 2, -100], [3, -100, -100]])}, False, 3),
        ({"labels": torch.tensor([[1, 2, -100], [3, -100, -100]])}, True, 1),
        ({"labels": torch.ones(2, 3), "shift_labels": torch.tensor([[1, 2, -100]])}, True, 2),
        ({"labels": torch.zeros(4, 3)}, False, 12),
        ({"scale": torch.tensor(2.0), "start_positions": torch.zeros(5)}, False, 5),
        (transformers.BatchEncoding({"input_ids": torch.ones(3, 7)}), False, 3),
        ((torch.ones(6, 2), torch.ones(6)), False, 6),
        (torch.ones(4, 2), False, 4),
        ({"pixel_values": [torch.ones(3, 8, 8)] * 2, "labels": [{"boxes": torch.ones(9, 4)}] * 2}, False, 2),
    ],
)
def test_count_items(batch, shifted, items):
    assert count_items(batch, shifted=shifted) == items
