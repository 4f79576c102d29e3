"""Models of sentence-transformers, from a folder and from the Hub, and the rows that they are measured on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from for_each import for_each
from local_hub import local_hub
from local_models import SENTENCES, save_bert, save_llama, save_sentence_encoder

from hf_parcor.errors import InputError
from hf_parcor.tasks import TASKS, Encoding, Processed, Rows, architectures_of, task_of

REASON = "an optional dependency of the tests, in the extra dev"
st = pytest.importorskip("sentence_transformers", reason=REASON)

TASK = TASKS["sentence-similarity"]
PAIRS = [{"anchor": one, "positive": other} for one, other in pairwise(SENTENCES)]
SCORED = [{**row, "score": place / 10} for place, row in enumerate(PAIRS)]


def rows_of(entries, **settings):
    return Rows("rows", entries, tuple(entries[0]), **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_sentence_encoder(tmp_path_factory.mktemp("model"))


def batches_of(model, entries, encoding=None, size=2, given=None, **settings):
    rows = rows_of(entries, **settings)
    processed = Processed(model, None, encoding or Encoding())
    TASK.prepare(processed)
    return TASK.batches(TASK.examples(rows, TASK.find_columns(rows, given or {}), processed), processed, size)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestWhichTask:
    @for_each("kind, is_one", [(None, True), ("SentenceTransformer", True), ("CrossEncoder", False)])
    def test_what_a_model_was_saved_as(self, kind, is_one, tmp_path):
        """Older versions of sentence-transformers did not say it."""
        folder = Path(save_sentence_encoder(tmp_path))
        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        assert settings.pop("model_type") == "SentenceTransformer"
        more = {} if kind is None else {"model_type": kind}
        (folder / "config_sentence_transformers.json").write_text(json.dumps({**settings, **more}))
        assert architectures_of(str(folder)) == ["BertModel", *["SentenceTransformer"] * is_one]
        if is_one:
            assert task_of(str(folder), rows_of(PAIRS), {}) is TASK

    def test_other_models(self, saved, tmp_path):
        assert architectures_of(save_bert(tmp_path / "plain", transformers.BertModel)) == ["BertModel"]
        with pytest.raises(InputError, match="model: expected"):
            architectures_of(str(tmp_path / "nothing"))

    def test_a_decoder_that_embeds(self, tmp_path):
        """It has the head of a language model: the data say what for."""
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        parts = [Transformer(save_llama(tmp_path / "inner")), Pooling(8, "lasttoken")]
        folder = str(tmp_path / "encoder")
        st.SentenceTransformer(modules=parts, device="cpu").save_pretrained(folder)
        config = json.loads((tmp_path / "encoder/config.json").read_text())
        (tmp_path / "encoder/config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
        assert task_of(folder, rows_of(PAIRS), {}) is TASK
        assert task_of(folder, rows_of([{"text": "a"}]), {}).name == "text-generation"
        model = TASK.load_model(folder).eval()
        assert TASK.metric("mrr@10", Processed(model, None), batches_of(model, PAIRS))(model)["mrr@10"] > 0

    def test_on_the_hub(self, saved, tmp_path, monkeypatch):
        """At a branch of its own; what is loaded there, sentence-transformers loads."""
        plain = save_bert(tmp_path / "plain", transformers.BertModel)
        branches = {"main": files_of(Path(saved)), "other": files_of(Path(plain))}
        with local_hub({"models/me/encoder": branches}, monkeypatch, tmp_path / "cache"):
            assert task_of("me/encoder", rows_of(PAIRS), {}) is TASK
            assert architectures_of("me/encoder") == ["BertModel", "SentenceTransformer"]
            assert architectures_of("me/encoder", revision="other") == ["BertModel"]
            with pytest.raises(InputError, match=r"model: expected .* got 'me/nothing'"):
                task_of("me/nothing", rows_of(PAIRS), {})

    def test_what_is_asked_of_the_library(self, monkeypatch):
        asked = []
        monkeypatch.setattr(st, "SentenceTransformer", lambda *names, **settings: asked.append((names, settings)))
        TASK.load_model("me/encoder", revision="other", trust_remote_code=None, dtype="bfloat16")
        settings = {"device": "cpu", "revision": "other", "trust_remote_code": False}
        assert asked == [(("me/encoder",), {**settings, "model_kwargs": {"dtype": "bfloat16"}})]


@for_each("scored", [False, True])
@for_each("prefix", ["", "good "])
@for_each("prompts, usual", [({}, None), ({"query": "a ", "passage": "the "}, None), ({"any": "bad "}, "any")])
def test_texts_are_embedded_as_the_model_does(scored, prefix, prompts, usual, saved):
    """With its prompts for queries and documents, where there are no scores; or with a prefix instead."""
    model = st.SentenceTransformer(saved, device="cpu", prompts=prompts, default_prompt_name=usual).eval()
    rows = [{"anchor": SENTENCES[place], "positive": SENTENCES[place + 3]} for place in range(3)]
    batches = batches_of(model, [{**row, "score": 0.5} for row in rows] if scored else rows, Encoding(prefix=prefix))
    ways = [model.encode] * 2 if scored else [model.encode_query, model.encode_document]
    more = {"prompt": prefix} if prefix else {}
    expected = [
        way(row[column], convert_to_tensor=True, **more)
        for column, way in zip(("anchor", "positive"), ways, strict=True)
        for row in rows
    ]
    seen = 0
    with torch.no_grad():
        for batch in batches:
            found = torch.cat([model(dict(inputs))["sentence_embedding"] for inputs in batch["inputs"].values()])
            numbers = batch["ids"].T.flatten().tolist()
            torch.testing.assert_close(found, torch.stack([expected[number] for number in numbers]))
            assert len(batch["inputs"]) == (2 if "query" in prompts and not (scored or prefix) else 1)
            seen += len(numbers)
    assert seen == len(expected)


def test_length(saved, caplog):
    """What is asked for is what the model cuts at, here too; and no more than it has positions for."""
    model = TASK.load_model(saved).eval()
    long = [{"anchor": "good " * 12, "positive": "bad"}]
    (batch,) = batches_of(model, long, Encoding(max_length=5))
    assert batch["inputs"]["texts 1"]["input_ids"].shape == (1, 5)  # the other text is much shorter, and apart
    assert batch["inputs"]["texts 2"]["input_ids"].shape == (1, 1)
    assert "1 of 1 texts of column 'anchor' have more than 5 tokens and are cut" in caplog.text
    assert model.max_seq_length == 5
    with pytest.raises(InputError, match="max_length: expected at most 16 tokens"):
        batches_of(model, long, Encoding(max_length=17))


@for_each(
    "column, labels",
    [("score", [0.5, 1, 0]), ("label", ["0.5", "1", "0"]), ("label", [1, 1, 0]), ("similarity", [[0.5], [1], [0]])],
)
def test_scores(column, labels, saved):
    """Two classes are scores as well."""
    model = TASK.load_model(saved).eval()
    entries = [{**row, column: label} for row, label in zip(PAIRS, labels, strict=False)]
    batches = batches_of(model, entries, size=8, class_names={"label": ["different", "alike"]})
    (batch,) = batches
    expected = {row["anchor"]: float(str(label).strip("[]")) for row, label in zip(entries, labels, strict=True)}
    anchors = list(expected)  # which are numbered first
    assert batch["labels"].tolist() == [expected[anchors[number]] for number in batch["ids"][:, 0].tolist()]
    assert TASK.usual_metric(Processed(model, None), batches) == ("spearman", "")
    with pytest.raises(InputError, match=r"expected one of spearman, pearson, loss where there is a score .*'mrr@10'"):
        TASK.metric("mrr@10", Processed(model, None), batches)


@for_each(
    "entries, settings, said",
    [
        ([{**SCORED[0], "negative": "bad"}], {}, "expected a score of two texts, or a wrong document"),
        (
            [SCORED[0], {**SCORED[1], "score": "much"}],
            {},
            "a number in each row, of how alike its texts are, got 'much'",
        ),
        (
            [{**PAIRS[0], "label": 1}],
            {"class_names": {"label": ["entailment", "neutral", "contradiction"]}},
            "expected scores of how alike texts are, got the classes entailment, neutral, contradiction",
        ),
        ([{**PAIRS[0], "anchor": ""}], {}, "a token or more in each text of column 'anchor', got none in row 1"),
        ([{"anchor": "bad", "positive": "bad"}] * 2, {}, "a document that is not its query in one row at least"),
    ],
)
def test_rows_that_are_none(entries, settings, said, saved):
    with pytest.raises(InputError, match=said):
        batches_of(TASK.load_model(saved), entries, **settings)


def test_other_metrics(saved):
    model = TASK.load_model(saved)
    for name, said in (("spearman", "where there is no score in the rows"), ("ndcg", "did you mean ndcg@10")):
        with pytest.raises(InputError, match=said):
            TASK.metric(name, Processed(model, None), batches_of(model, PAIRS))


def test_with_an_adapter(saved, tmp_path):
    """One of PEFT that sentence-transformers saved: it stands beside the model's parts, and names its base."""
    peft = pytest.importorskip("peft", reason="an optional dependency, the extra peft")
    model = st.SentenceTransformer(saved, device="cpu")
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"], r=2)
    model[0].model = peft.get_peft_model(model[0].model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight))
    model.save_pretrained(str(tmp_path / "adapted"))
    folder = str(tmp_path / "adapted")
    assert task_of(folder, rows_of(PAIRS), {}) is TASK
    loaded = TASK.load_model(folder).eval()
    found, expected = (one.encode(SENTENCES, convert_to_tensor=True) for one in (loaded, model.eval()))
    torch.testing.assert_close(found, expected)


def test_without_the_library(saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"install it with: pip install 'hf-parcor\[embeddings\]'"):
        TASK.load_model(saved)
