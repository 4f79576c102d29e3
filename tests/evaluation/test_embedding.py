"""Embeddings, compared with sentence-transformers' own evaluators and losses, and with loops over all documents."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from for_each import for_each
from local_models import SENTENCES, save_sentence_encoder
from torch.utils.flop_counter import FlopCounterMode

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    Quantization,
    recipe,
    sensitivity,
)
from hf_parcor.evaluation import DatasetGradients, EmbeddingMetric, embedding_loss, measurement, model_loss
from hf_parcor.evaluation.metrics import WithDivergence
from hf_parcor.tasks import TASKS, Processed, Rows

REASON = "an optional dependency of the tests, in the extra dev"
st = pytest.importorskip("sentence_transformers", reason=REASON)

from sentence_transformers.sentence_transformer import evaluation, losses  # noqa: E402

TASK = TASKS["sentence-similarity"]
SCORES = [0.1, 0.9, 0.3, 0.5, 0.2, 0.7]
SCORED = [
    {"sentence1": one, "sentence2": other, "score": score}
    for one, other, score in zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], SCORES, strict=True)
]
# A query with two right documents, a document that is right for two queries, and one that is the query itself.
SEARCHED = [
    {"query": "good film", "document": "the good film", "negative": "bad film a plot"},
    {"query": "good film", "document": "good good", "negative": "bad plot"},
    {"query": "a film", "document": "good good", "negative": "the the the"},
    {"query": "bad plot", "document": "a plot bad", "negative": "good film"},
    {"query": "the plot", "document": "the plot", "negative": "plot plot"},
    {"query": "plot plot a", "document": "the plot", "negative": "film film"},
]
KINDS = ["cosine", "dot", "euclidean", "manhattan"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_sentence_encoder(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture
def encoder(saved):
    return lambda kind=None: TASK.load_model(saved).eval() if kind is None else with_similarity(saved, kind)


def with_similarity(saved, kind):
    model = st.SentenceTransformer(saved, device="cpu", similarity_fn_name=kind)
    return model.eval()


def batches_of(model, rows, size=4, **settings):
    rows = Rows("rows", rows, tuple(rows[0]))
    processed = Processed(model, None)
    TASK.prepare(processed)
    return TASK.batches(TASK.examples(rows, TASK.find_columns(rows, {}), processed), processed, size)


def inputs_by_column(batch):
    """Return what the model takes for the first texts, for the second ones, and so on."""
    (inputs,) = batch["inputs"].values()
    size, count = batch["ids"].shape
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return [
        {name: value[place * size : (place + 1) * size] for name, value in tensors.items()} for place in range(count)
    ]


def searched(alike, rows, embed):
    """Return what a search finds for each query that has a right document, one after the other."""
    embeddings = {text: embed(text) for row in rows for text in row.values()}
    documents = sorted({row[name] for row in rows for name in row if name != "query"})
    gains, first, reciprocals = [], [], []
    for query in dict.fromkeys(row["query"] for row in rows):
        right = {row["document"] for row in rows if row["query"] == query} - {query}
        if not right:
            continue
        scored = [(alike(embeddings[query], embeddings[one]), one) for one in documents if one != query]
        found = [one in right for _, one in sorted(scored, reverse=True)[:10]]
        best = sum(1 / math.log2(place + 2) for place in range(min(10, len(right))))
        gains.append(sum(1 / math.log2(place + 2) for place, hit in enumerate(found) if hit) / best)
        first.append(float(found[0]))
        reciprocals.append(1 / (found.index(True) + 1) if True in found else 0.0)
    return {"ndcg@10": np.mean(gains), "accuracy@1": np.mean(first), "mrr@10": np.mean(reciprocals)}


ALIKE = {
    "cosine": lambda one, other: float(one @ other / one.norm() / other.norm()),
    "dot": lambda one, other: float(one @ other),
    "euclidean": lambda one, other: -float((one - other).norm()),
    "manhattan": lambda one, other: -float((one - other).abs().sum()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negatives", [True, False])
def test_searches_are_those_of_a_loop(kind, negatives, encoder):
    model = encoder(kind)
    rows = SEARCHED if negatives else [{name: row[name] for name in ("query", "document")} for row in SEARCHED]
    found = EmbeddingMetric(batches_of(model, rows))(model)
    expected = searched(ALIKE[kind], rows, lambda text: model.encode(text, convert_to_tensor=True).double())
    assert found.keys() == {*expected, "loss"}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@for_each("at_once", [1, 7, 1 << 24])
def test_however_many_are_searched_for_at_once(at_once, saved, monkeypatch):
    monkeypatch.setattr("hf_parcor.evaluation.metrics.embedding._AT_ONCE", at_once)
    model = TASK.load_model(saved).eval()
    found = EmbeddingMetric(batches_of(model, SEARCHED))(model)
    expected = searched(ALIKE["cosine"], SEARCHED, lambda text: model.encode(text, convert_to_tensor=True).double())
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_searches_are_those_of_the_library(encoder):
    """Where no text is query and document: the library knows no text, but numbers."""
    model, rows = encoder(), [SEARCHED[place] for place in (0, 1, 2, 3)]
    queries = {row["query"]: row["query"] for row in rows}
    corpus = {row[name]: row[name] for row in rows for name in ("document", "negative") if row[name] not in queries}
    rows = [{**row, "negative": row["negative"] if row["negative"] in corpus else "film"} for row in rows]
    corpus["film"] = "film"
    right = {query: {row["document"] for row in rows if row["query"] == query} for query in queries}
    library = evaluation.InformationRetrievalEvaluator(queries, corpus, right, write_csv=False)(model)
    found = EmbeddingMetric(batches_of(model, rows))(model)
    for name in ("ndcg@10", "accuracy@1", "mrr@10"):
        assert found[name] == pytest.approx(library[f"cosine_{name}"]), name


@pytest.mark.parametrize("kind", KINDS)
def test_correlations_are_those_of_the_library(kind, encoder):
    model = encoder(kind)
    library = evaluation.EmbeddingSimilarityEvaluator(
        *([row[name] for row in SCORED] for name in ("sentence1", "sentence2", "score")),
        main_similarity=kind,
        similarity_fn_names=[kind],
        write_csv=False,
    )(model)
    found = EmbeddingMetric(batches_of(model, SCORED))(model)
    assert found.keys() == {"spearman", "pearson", "loss"}
    for name in ("spearman", "pearson"):
        assert found[name] == pytest.approx(library[f"{name}_{kind}"], rel=1e-5)


def test_losses_are_those_of_the_library(encoder):
    """Of rows that have no text in common; cosines count twenty times, other similarities once."""
    apart = [
        {"query": "good film", "document": "the good film", "negative": "bad film a plot"},
        {"query": "bad plot", "document": "a plot bad", "negative": "good"},
        {"query": "a", "document": "the film a", "negative": "the bad"},
    ]
    ranking, scoring = losses.MultipleNegativesRankingLoss, losses.CoSENTLoss
    for rows, kind, settings in (
        (SCORED, "cosine", {}),
        (apart, "cosine", {}),
        (SCORED, "dot", {"similarity_fct": st.util.pairwise_dot_score, "scale": 1}),
        (apart, "dot", {"similarity_fct": st.util.dot_score, "scale": 1}),
        (apart, "euclidean", {"similarity_fct": st.util.euclidean_sim, "scale": 1}),
    ):
        model = encoder(kind)
        (batch,) = batches_of(model, rows, 8)
        loss = (scoring if rows is SCORED else ranking)(model, **settings)
        expected = loss(inputs_by_column(batch), batch.get("labels"))
        actual = embedding_loss(model, batch)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
        wanted, got = (torch.autograd.grad(one, next(model.parameters()))[0] for one in (expected, actual))
        torch.testing.assert_close(got, wanted)
        assert EmbeddingMetric([batch])(model)["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_right_for_the_same_query_is_no_wrong_document(encoder):
    model = encoder()
    (batch,) = batches_of(model, SEARCHED, 8)
    embedded = [model(inputs)["sentence_embedding"] for inputs in inputs_by_column(batch)]
    queries, *others = (torch.nn.functional.normalize(one.detach().double(), dim=-1) for one in embedded)
    documents, names = torch.cat(others), batch["ids"][:, 1:].T.flatten().tolist()
    total = 0.0
    for row, (query, own, _) in enumerate(batch["ids"].tolist()):
        right = {pair[1] for pair in batch["ids"].tolist() if pair[0] == query}
        among = [place for place, name in enumerate(names) if place == row or name not in {*right, query}]
        scores = {place: 20 * float(queries[row] @ documents[place]) for place in among}
        assert names[row] == own
        total += math.log(sum(math.exp(score) for score in scores.values())) - scores[row]
    assert embedding_loss(model, batch).item() == pytest.approx(total / len(SEARCHED), rel=1e-5)


@for_each("scored", [False, True])
def test_any_batch_size_finds_the_same(scored, saved):
    model = TASK.load_model(saved).eval()
    rows = SCORED if scored else SEARCHED
    found = [EmbeddingMetric(batches_of(model, rows, size))(model) for size in (1, 2, 8)]
    for one in found:
        del one["loss"]  # which is of the texts that share a batch
        assert one == pytest.approx(found[0], rel=1e-4)


@for_each("scored, damaged", [(False, "all"), (True, "all"), (False, "one text"), (True, "one text")])
def test_embeddings_that_are_not_finite(scored, damaged, saved):
    model = TASK.load_model(saved).eval()
    rows = SCORED if scored else SEARCHED
    batches = list(batches_of(model, rows, 8))
    lost = None if damaged == "all" else batches[0]["ids"][0, 0].item()

    def embed(model, inputs):
        found = model(inputs)["sentence_embedding"]
        if damaged == "all":
            return found * math.nan
        gone = batches[0]["ids"].T.flatten() == lost
        return found.masked_fill(gone[:, None], math.nan)

    found = EmbeddingMetric(batches, embed=embed)(model)
    if scored:
        assert math.isnan(found["spearman"])
        assert math.isnan(found["pearson"])
        assert found["predictions_not_finite"] == (1.0 if damaged == "all" else 2 / 6)
        return
    clean = EmbeddingMetric(batches)(model)
    assert found["predictions_not_finite"] == (1.0 if damaged == "all" else 1 / 4)
    if damaged == "all":
        assert found["ndcg@10"] == found["accuracy@1"] == found["mrr@10"] == 0.0
    else:
        assert found["ndcg@10"] <= clean["ndcg@10"]


def test_ranks_are_those_of_scipy():
    rng = np.random.default_rng(0)
    from hf_parcor.evaluation.metrics.embedding import _ranks

    for _ in range(20):
        values = rng.integers(0, 6, 15).astype(float)
        assert _ranks(values).tolist() == scipy.stats.rankdata(values).tolist()


def test_an_encoder_of_transformers(encoder):
    """By a function of one's own, for the metric and the loss."""
    model = encoder()
    (batch,) = batches_of(model, SEARCHED, 8)
    inner = model[0].model

    def embed(model, inputs):
        mask = inputs["attention_mask"][..., None]
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return (hidden * mask).sum(1) / mask.sum(1)

    columns = inputs_by_column(batch)
    batch = {**batch, "inputs": {"queries": columns[0], "documents": columns[1], "others": columns[2]}}
    wanted = EmbeddingMetric([batch])(model)
    assert EmbeddingMetric([batch], embed=embed)(inner) == pytest.approx(wanted)
    loss = partial(embedding_loss, embed=embed)
    assert loss(inner, batch).item() == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("rows", [SCORED, SEARCHED], ids=["scores", "searches"])
def test_gradient_is_that_of_all_batches(rows, encoder):
    model = encoder().double()
    batches = list(batches_of(model, rows, 4))
    parameters = dict(model.named_parameters())
    found = DatasetGradients(model, parameters, batches, embedding_loss).over_data()
    total = sum(embedding_loss(model, batch) * len(batch["ids"]) for batch in batches) / len(rows)
    wanted = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for (name, one), other in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, msg=name)


@pytest.mark.parametrize("rows", [SCORED, SEARCHED], ids=["scores", "searches"])
def test_probe_is_a_plain_loop(rows, encoder):
    """With the prefix of each layer run once, and bits put back."""
    model = encoder()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    metric = EmbeddingMetric(batches_of(model, rows, 2))
    corruptions = [Quantization(bits) for bits in (2, 3, 4)] + [
        GradientCorruption(CorruptionConstraint(epsilon=epsilon)) for epsilon in (0.1, 1.0)
    ]
    found = [
        LayerProbe(model, metric, targets="layers", reuse_prefix=reuse).evaluate(corruptions)
        for reuse in (True, False)
    ]
    assert found[0].records.keys() == {"0.model.encoder.layer.0", "0.model.encoder.layer.1"}
    for name, record in found[0].records.items():
        for one, other in zip(record.rows(), found[1].records[name].rows(), strict=True):
            assert one.metrics == other.metrics
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_what_does_not_depend_on_a_layer_runs_once(encoder, caplog):
    """Of measurements and of ascents: both columns are embedded by one call."""
    model = encoder()
    metric = EmbeddingMetric(batches_of(model, SEARCHED, 2))
    noise = [GaussianNoise(0.1 * number) for number in range(1, 9)]
    ascents = [
        MultiStepCorruption(CorruptionConstraint(epsilon=epsilon), steps=10) for epsilon in (0.1, 0.2, 0.5, 1.0, 2.0)
    ]
    flops, found = [], []
    for corruptions in (noise, ascents):
        for reuse in (True, False):
            with FlopCounterMode(display=False) as counter:
                probe = LayerProbe(
                    model, metric, targets={"last": ["0.model.encoder.layer.1"]}, reuse_prefix=reuse, progress=False
                )
                found.append([row.metrics for row in probe.evaluate(corruptions).records["last"].rows()])
            flops.append(counter.get_total_flops())
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert flops[0] < 0.85 * flops[1]
    assert flops[2] < 0.95 * flops[3]
    assert not [record for record in caplog.records if "runs all of the model" in record.getMessage()]


def test_what_is_kept_takes_of_the_memory(encoder, monkeypatch):
    """The embeddings of all texts, for each corruption that is measured on the same batches."""
    model = encoder()
    metric = EmbeddingMetric(batches_of(model, SEARCHED * 20, 8))
    noise = [GaussianNoise(0.1 * number) for number in range(1, 7)]
    kept, weights = 20 * 6 * 3 * 8 * 4, 4 * sum(one.numel() for one in model[0].model.encoder.layer[1].parameters())
    together = []
    own = measurement.measure_together
    monkeypatch.setattr(measurement, "measure_together", lambda *a: together.append(len(a[2])) or own(*a))
    for metric_of_these in (metric, WithDivergence(metric, model)):
        together.clear()
        probe = LayerProbe(
            model, metric_of_these, targets={"last": ["0.model.encoder.layer.1"]}, memory=3 * (kept + weights)
        )
        probe.evaluate(noise, trials=1)
        assert metric.kept_bytes == kept
        assert together == [3, 3]


def test_what_a_corruption_along_the_gradient_does(encoder):
    """It makes the loss larger, which is that of embeddings without a word."""
    model = encoder()
    metric = EmbeddingMetric(batches_of(model, SEARCHED, 8))
    worst = GradientCorruption(CorruptionConstraint(epsilon=0.05))
    record = CorruptionEvaluator(model, metric).evaluate([worst])
    assert record.task == "sentence-similarity"
    clean, corrupted = (row.mean("loss") for row in record.rows())
    assert corrupted > clean
    batch = next(iter(metric.batches))
    assert model_loss(model, batch).item() == embedding_loss(model, batch).item()


@pytest.mark.parametrize("rows", [SCORED, SEARCHED], ids=["scores", "searches"])
def test_divergence_is_that_of_searches_in_a_batch(rows, encoder):
    """Of the documents that a query is to be told from, by their similarities times 20."""
    model = encoder()
    (batch,) = batches_of(model, rows, 8)
    metric = WithDivergence(EmbeddingMetric([batch]), model)
    assert metric(model)["divergence"] == 0
    chances = []
    for noise in (0.0, 0.3):
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(noise * torch.randn_like(weight))
            found = [model(inputs)["sentence_embedding"].double() for inputs in inputs_by_column(batch)]
        queries, *others = (torch.nn.functional.normalize(one, dim=-1) for one in found)
        chances.append((20 * queries @ torch.cat(others).T).tolist())
    numbers = batch["ids"].tolist()
    names = [row[place] for place in range(1, len(numbers[0])) for row in numbers]
    divergences = []
    for row, (before, after) in enumerate(zip(*chances, strict=True)):
        right = {one[1] for one in numbers if one[0] == numbers[row][0]}
        kept = [d for d, name in enumerate(names) if d == row or name not in {*right, numbers[row][0]}]
        p, q = (scipy.special.softmax([scores[d] for d in kept]) for scores in (before, after))
        divergences.append(scipy.special.rel_entr(p, q).sum())
    assert metric(model)["divergence"] == pytest.approx(np.mean(divergences), rel=1e-4)


def test_a_recipe_names_what_transformers_loads(encoder):
    model = encoder()
    metric = EmbeddingMetric(batches_of(model, SEARCHED, 8))
    scores = sensitivity(model, metric, [Quantization(3, "channel")], budget=2)
    assert scores.loaded_part == "0.model"
    assert scores.metric == "ndcg@10"
    chosen = recipe(scores, bits=20)
    assert (chosen.loaded_part, chosen.by) == ("0.model", "divergence")
    inner = {name for name, _ in model[0].model.named_modules()}
    assert {name.removeprefix("0.model.") for name in chosen.groups} <= inner


@for_each(
    "batch, says",
    [
        ({"ids": torch.zeros(2, 2), "first": 0}, "batches: expected 'inputs', .* got ids, first"),
        ({"inputs": {"a": torch.zeros(2, 3)}}, "batches: expected 'inputs', .* got inputs"),
        ({"inputs": {"a": torch.zeros(2, 3)}, "ids": torch.zeros(2, 1)}, r"got shape \(2, 1\) for 2 texts"),
        ({"inputs": {"a": torch.zeros(2, 3)}, "ids": torch.zeros(2)}, r"got shape \(2,\) for 2 texts"),
        ({"inputs": {"a": torch.zeros(2, 3)}, "ids": torch.zeros(2, 2)}, r"got shape \(2, 2\) for 2 texts"),
        (
            {"inputs": {"a": torch.zeros(6, 3)}, "ids": torch.zeros(2, 3), "labels": torch.zeros(2)},
            r"or more texts a row where there are no labels, got shape \(2, 3\) for 6",
        ),
    ],
)
def test_other_batches(batch, says):
    with pytest.raises(ValueError, match=says):
        EmbeddingMetric([batch], embed=lambda model, inputs: model(inputs))(torch.nn.Identity())


def test_some_batches_with_labels(encoder):
    model = encoder()
    mixed = [*batches_of(model, SCORED, 3), *batches_of(model, [dict(list(row.items())[:2]) for row in SCORED], 3)]
    with pytest.raises(ValueError, match="labels: expected them in all batches or in none"):
        EmbeddingMetric(mixed)(model)


def test_queries_that_are_their_documents(encoder):
    model = encoder()
    rows = [{"query": text, "document": f"{text} good"} for text in SENTENCES]
    same = [{**batch, "ids": batch["ids"][:, :1].expand(-1, 2)} for batch in batches_of(model, rows)]
    with pytest.raises(ValueError, match="got none but the queries themselves"):
        EmbeddingMetric(same)(model)
