"""F1 of entities: against spans found by hand, of whatever sentences and tags, and of a model token by token."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_models import save_bert
from transformers import BertForTokenClassification

from hf_parcor.cli.subject import measured
from hf_parcor.errors import InputError
from hf_parcor.evaluation import EntityScore, PredictionMetric
from hf_parcor.evaluation.outputs import NOT_FINITE
from hf_parcor.tasks import TASKS, Processed, load_rows

TAGS = ("O", "B-X", "I-X", "B-Y", "I-Y")


def spans(sentences):
    """Return sentence, type, first and last word of each entity: a B begins one, and an I that continues none."""
    found = set()
    for number, tags in enumerate(sentences):
        open_at = None
        for place, tag in enumerate([*tags, "O"]):
            before = tags[place - 1][2:] if place else ""
            continues = open_at is not None and tag.startswith("I-") and tag[2:] == before
            if open_at is not None and not continues:
                found.add((number, before, open_at, place - 1))
                open_at = None
            if tag != "O" and not continues:
                open_at = place
    return found


def by_hand(predictions, references):
    said, true = spans(predictions), spans(references)
    right = len(said & true)
    precision, recall = right / (len(said) or 1), right / (len(true) or 1)
    pairs = [pair for one, other in zip(predictions, references, strict=True) for pair in zip(one, other, strict=True)]
    return {
        "f1": 2 * precision * recall / (precision + recall or 1),
        "precision": precision,
        "recall": recall,
        "accuracy": sum(one == other for one, other in pairs) / len(pairs),
    }


@given(st.lists(st.lists(st.tuples(*[st.sampled_from(TAGS)] * 2), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_against_spans_found_by_hand(pairs):
    predictions, references = ([[pair[side] for pair in sentence] for sentence in pairs] for side in (0, 1))
    score = EntityScore()
    assert score(predictions=predictions, references=references) == pytest.approx(by_hand(predictions, references))


@pytest.fixture
def model(tiny_bert):
    torch.manual_seed(0)
    model = tiny_bert(BertForTokenClassification, vocab_size=24, num_labels=len(TAGS), initializer_range=0.5).eval()
    model.config.id2label = dict(enumerate(TAGS))
    return model


@pytest.fixture
def batches():
    """Sentences of three lengths; one has no label that counts."""
    torch.manual_seed(1)
    found = [{"input_ids": torch.randint(24, (3, n)), "labels": torch.randint(len(TAGS), (3, n))} for n in (7, 4)]
    found[0]["labels"][:, 0] = found[0]["labels"][1, 4:] = found[1]["labels"][2] = -100
    return found


def test_of_a_model_token_by_token(model, batches):
    predictions, references = [], []
    for batch in batches:
        for row, labels in zip(batch["input_ids"], batch["labels"].tolist(), strict=True):
            chosen = model(row[None]).logits[0].argmax(-1).tolist()
            kept = [place for place, label in enumerate(labels) if label != -100]
            if kept:
                predictions.append([TAGS[chosen[place]] for place in kept])
                references.append([TAGS[labels[place]] for place in kept])
    found = PredictionMetric(batches, EntityScore(), class_names=TAGS)(model)
    assert len(references) == 5
    assert found == pytest.approx(by_hand(predictions, references))


def test_what_is_not_finite_is_a_share_of_tags(model, batches):
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    found = PredictionMetric(batches, EntityScore(), class_names=TAGS)(model)
    assert (found["f1"], found["accuracy"], found[NOT_FINITE]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("names", "labels"), [(TAGS[:3], [[1, 2]]), (TAGS, [1])], ids=["a name too few", "no sentences"]
)
def test_names_that_fit_no_tags(names, labels):
    def answers(**batch):
        return torch.zeros(*batch["labels"].shape, len(TAGS))

    head = torch.nn.Module()
    head.forward = answers
    with pytest.raises(ValueError, match="class_names"):
        PredictionMetric([{"labels": torch.tensor(labels)}], EntityScore(), class_names=names)(head)


class TestOnTheCommandLine:
    def of(self, model, name, batches):
        processed = type("Processed", (), {"model": model})()
        return TASKS["token-classification"].metric(name, processed, batches)

    def test_f1_is_that_of_entities(self, model, batches):
        by_name = self.of(model, "f1", batches)(model)
        assert by_name == PredictionMetric(batches, EntityScore(), class_names=TAGS)(model)

    def test_other_classes_have_none(self, model, batches):
        model.config.id2label = dict(enumerate(["NOUN", "VERB", "ADJ", "ADV", "X"]))
        with pytest.raises(InputError, match="tags: expected those of entities"):
            self.of(model, "f1", batches)
        assert "accuracy" in self.of(model, "accuracy", batches)(model)

    @pytest.mark.parametrize(
        ("names", "with_seqeval", "metric", "remark"),
        [
            (TAGS, True, "f1", "--metric accuracy"),
            (TAGS, False, "accuracy", "hf-parcor[entities]"),
            (["NOUN", "VERB", "ADJ"], True, "accuracy", ""),
            (["NOUN", "VERB", "ADJ"], False, "accuracy", ""),
            (["O", "B-PER", "X"], True, "accuracy", ""),  # some other scheme
        ],
    )
    @pytest.mark.parametrize("asked", [None, "accuracy"])
    def test_what_is_shown_of_tags_unless_asked(
        self, names, with_seqeval, metric, remark, asked, tmp_path, monkeypatch, capsys
    ):
        numbers = {name: number for number, name in enumerate(names)}
        save_bert(
            tmp_path,
            BertForTokenClassification,
            id2label=dict(enumerate(names)),
            label2id=numbers,
            num_labels=len(names),
        )
        data = tmp_path / "words.jsonl"
        rows = [{"tokens": ["good", "film"], "ner_tags": [names[0], names[-1]]}] * 3
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if not with_seqeval:
            monkeypatch.setitem(sys.modules, "seqeval", None)
            monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
        task, loaded = TASKS["token-classification"], load_rows(str(data))
        processed = Processed(task.load_model(str(tmp_path)), task.load_processor(str(tmp_path)))
        subject = measured(task, processed, loaded, task.find_columns(loaded, {}), 2, asked)
        assert subject.shown(subject.metric(subject.model.eval())) == (asked or metric)
        said = " ".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-parcor:"))
        assert (remark in said) if remark and not asked else not said
