"""Answers marked in texts: against a loop over all spans of all windows, and the evaluation of SQuAD written out."""

from __future__ import annotations

import math
import re
import string
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_parcor import CorruptionConstraint, CorruptionEvaluator, GaussianNoise, GradientCorruption
from hf_parcor.evaluation import Question, QuestionAnsweringMetric
from hf_parcor.evaluation.identity.row_fingerprint import data_fingerprint
from hf_parcor.evaluation.metrics.question_answering import answer_scores
from hf_parcor.records import OF_ROWS

WORDS = ["the", "a", "sea", "Black", "sea.", "coast", "an", "(Black)", "there"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


def of_squad(found, answers):
    """As the evaluation script of SQuAD 2.0 goes: texts are normalised, then compared."""

    def normalised(text):
        without = "".join(character for character in text.lower() if character not in string.punctuation)
        return " ".join(word for word in re.split(r"\s+", without) if word not in ("a", "an", "the", ""))

    def f1(one, other):
        one, other = normalised(one).split(), normalised(other).split()
        if not one or not other:
            return float(one == other)
        common = sum(min(one.count(word), other.count(word)) for word in set(one))
        precision, recall = common / len(one), common / len(other)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    answers = answers or [""]
    exact = max(float(normalised(found) == normalised(answer)) for answer in answers)
    return exact, max(f1(found, answer) for answer in answers)


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_scores_are_those_of_squad(found, answers):
    assert answer_scores(found, answers) == pytest.approx(of_squad(found, answers))


class Marks(nn.Module):
    """Returns the logits that stand in its batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, starts, ends):
        return SimpleNamespace(loss=starts.mean() * 0, start_logits=starts, end_logits=ends)


def window(number, width, asked, answers):
    """Return a window: the first token for none, some of the question, the rest one letter a token, then padding."""
    text = string.ascii_lowercase[number:] + string.ascii_lowercase[:number]
    spans = [(0, 0), *[(-1, -1)] * asked, *((place, place + 1) for place in range(width))]
    return Question(number, text, torch.tensor(spans), tuple(answers))


@st.composite
def batches_of_windows(draw):
    scores = st.integers(-6, 6).map(lambda number: number + 0.25)
    windows = draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 2)), min_size=1, max_size=6)
    )
    answers = {number: draw(st.sampled_from([(), ("a",), ("bc", "d"), ("cd",)])) for number in range(4)}
    longest = draw(st.integers(1, 6))
    rows = [
        (window(number, width, asked, answers[number]), [draw(scores) for _ in range(20)])
        for number, width, asked in windows
    ]
    return rows, longest, draw(st.integers(1, 3))


@settings(deadline=None)
@given(batches_of_windows())
def test_the_answer_is_the_likeliest_span_of_all_windows(drawn):
    """Found by trying all of them; a tie may go either way, so there is none in what is compared."""
    rows, longest, size = drawn
    noise = torch.rand(len(rows), 2, 10, generator=torch.Generator().manual_seed(0)) / 10  # no ties
    logits = torch.stack([torch.tensor(scores).view(2, 10) for _, scores in rows]) + noise
    batches = [
        {
            "starts": logits[first : first + size, 0],
            "ends": logits[first : first + size, 1],
            "questions": [question for question, _ in rows[first : first + size]],
        }
        for first in range(0, len(rows), size)
    ]
    found = QuestionAnsweringMetric(batches, longest_answer=longest)(Marks())
    best, none = {}, {}
    for (question, _), (starts, ends) in zip(rows, logits.tolist(), strict=True):
        of_text = [place for place, (begin, end) in enumerate(question.spans.tolist()) if end > begin]
        none[question.number] = min(none.get(question.number, math.inf), starts[0] + ends[0])
        for i in of_text:
            for j in of_text:
                if i <= j < i + longest:
                    text = question.context[question.spans[i, 0] : question.spans[j, 1]]
                    entry = (starts[i] + ends[j], text)
                    best[question.number] = max(best.get(question.number, (-math.inf, "")), entry)
    answers = {question.number: question.answers for question, _ in rows}
    some_without = not all(answers.values())
    scores = [
        of_squad("" if some_without and none[number] > score else text, answers[number])
        for number, (score, text) in best.items()
    ]
    exact, f1 = (sum(values) / len(scores) for values in zip(*scores, strict=True))
    assert found == pytest.approx({"exact_match": exact, "f1": f1, "loss": 0.0})


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**tiny.encoder(12), initializer_range=0.5)
    return transformers.BertForQuestionAnswering(config).eval()


def batch_of(rows=4, width=8, numbers=None, answers=("b c",)):
    torch.manual_seed(1)
    text = "a b c d e"
    spans = torch.tensor([(0, 0), (-1, -1), *((2 * place, 2 * place + 1) for place in range(5)), (-1, -1)])
    return {
        "input_ids": torch.randint(3, 12, (rows, width)),
        "start_positions": torch.full((rows,), 3),
        "end_positions": torch.full((rows,), 4),
        "questions": [
            Question(number, text, spans, answers) for number in (range(rows) if numbers is None else numbers)
        ],
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["start_logits", "end_logits"])
@pytest.mark.parametrize(
    ("place", "answers", "share"), [(3, ("b c",), 0.5), (0, ("b c",), 0.0), (0, (), 0.5), (1, (), 0.0), (7, (), 0.0)]
)
def test_logits_that_decide_have_to_be_finite(bad, which, place, answers, share):
    """Those of the text; that of the token for none where some question has no answer."""
    model, batch = bert(), batch_of(answers=answers, numbers=[0, 0, 1, 1])
    forward = model.forward

    def right(**inputs):
        output = forward(**inputs)
        for name, at in (("start_logits", 3), ("end_logits", 4)):
            output[name].zero_()[:, at if answers else 0] = 1
        return output

    def broken(**inputs):
        output = right(**inputs)
        output[which][1, place] = bad
        return output

    model.forward = right
    usual = QuestionAnsweringMetric([batch])(model)
    assert usual["f1"] == usual["exact_match"] == 1
    model.forward = broken
    found = QuestionAnsweringMetric([batch])(model)
    assert found.get("predictions_not_finite", 0.0) == share
    assert set(found) - {"predictions_not_finite"} == set(usual)
    assert share or found == usual
    assert found["exact_match"] == found["f1"] == 1 - share


def test_a_logit_of_minus_infinity_rules_a_token_out():
    model, batch = bert(), batch_of()
    forward = model.forward

    def ruled_out(**inputs):
        output = forward(**inputs)
        output.start_logits[:, [2, 4, 5, 6]] = -math.inf
        output.end_logits[:, [2, 3, 5, 6]] = -math.inf
        return output

    model.forward = ruled_out
    found = QuestionAnsweringMetric([batch])(model)
    assert (found["exact_match"], "predictions_not_finite" in found) == (1.0, False)


def test_no_model_is_given_the_questions(monkeypatch):
    """Neither where it is measured, nor where a gradient is taken, with and without the prefix of a layer."""
    seen = []
    forward = transformers.BertForQuestionAnswering.forward

    def watching(self, **inputs):
        seen.append(set(inputs))
        return forward(self, **inputs)

    model, batches = bert(), [batch_of(), batch_of(2)]
    monkeypatch.setattr(transformers.BertForQuestionAnswering, "forward", watching)
    corruptions = [GradientCorruption(CorruptionConstraint(epsilon=0.5)), GaussianNoise(0.5)]
    evaluator = CorruptionEvaluator(model, QuestionAnsweringMetric(batches), target_modules="last-encoder-layer")
    record = evaluator.evaluate(corruptions, trials=2)
    assert seen
    assert all(names == {"input_ids", "start_positions", "end_positions"} for names in seen)
    assert record.rows()[1].mean("loss") > record.clean.metrics["loss"][0]  # along the gradient of its own loss
    assert all("questions" in batch for batch in batches)


def test_a_record_tells_what_was_asked():
    """And what was right: the fingerprint of data counts it, row by row."""
    batch = batch_of()
    (first, *others), kept = batch["questions"], data_fingerprint([batch])
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(1), slice(1, 4))]
    assert data_fingerprint(halves) == kept
    assert kept.startswith(OF_ROWS)
    for change in ({"number": 7}, {"context": "a b c d f"}, {"answers": ("d",)}, {"spans": first.spans + 1}):
        assert data_fingerprint([{**batch, "questions": [replace(first, **change), *others]}]) != kept
    assert not data_fingerprint([{**batch, "questions": others}]).startswith(OF_ROWS)  # whose are they?


def test_bad_input():
    batch = batch_of()
    with pytest.raises(ValueError, match="longest_answer: expected"):
        QuestionAnsweringMetric([batch], longest_answer=0)
    for questions, got in ((None, "none"), ([1, 2], "list"), ("texts", "str")):
        other = {name: value for name, value in batch.items() if name != "questions"}
        other |= {} if questions is None else {"questions": questions}
        with pytest.raises((ValueError, TypeError), match=f"questions: expected .* got {got}|one example"):
            QuestionAnsweringMetric([other])(bert())
    with pytest.raises(ValueError, match=r"questions: expected spans of up to 8 tokens, .* got 10 with the padding"):
        QuestionAnsweringMetric([{**batch, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * 4)}])(bert())
    with pytest.raises(ValueError, match="loss: expected"):
        QuestionAnsweringMetric([{name: batch[name] for name in ("input_ids", "questions")}])(bert())
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.encoder(12)))
    of_classes = {"input_ids": batch["input_ids"], "questions": batch["questions"]}
    with pytest.raises(ValueError, match=r"logits: expected start_logits and end_logits .* SequenceClassifierOutput"):
        QuestionAnsweringMetric([of_classes])(classifier)


def test_what_its_numbers_mean():
    metric = QuestionAnsweringMetric([batch_of()])
    assert {name: metric.info_of(name).greater_is_better for name in ("f1", "exact_match", "loss")} == {
        "f1": True,
        "exact_match": True,
        "loss": False,
    }
    assert metric.info_of("f1").unit == "share"
    assert metric.identity() == {"longest": 30}
