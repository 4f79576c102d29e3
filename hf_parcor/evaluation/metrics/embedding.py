"""How well embeddings tell which texts belong together: rank correlation with scores, or what a search finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_parcor.evaluation.embeddings import Embed, Embeddings, is_of_texts, sentence_embedding, similarities
from hf_parcor.evaluation.metrics.classification import correlations
from hf_parcor.evaluation.metrics.over_batches import ANSWERS, OverBatches, sum_of
from hf_parcor.evaluation.outputs import own_batch, share_not_finite
from hf_parcor.records.metric_info import SHARE, MetricInfo

_FOUND = 10  # documents that a search returns
_AT_ONCE = 1 << 24  # similarities


class EmbeddingMetric(OverBatches):
    r"""Whether texts that belong together have embeddings that are alike.

    Each row has two texts or more. If batches have `labels`, these say how alike the two are:

    - `spearman` and `pearson`: the correlation, of ranks and of numbers, of the similarities with the labels, over all
      rows; NaN if one of them does not vary.

    Otherwise, the first text of a row is a query, the second is a document that is right for it, and all others are
    documents too. Every query is searched for among the documents of all rows, each text once; a document that is the
    query itself is left out. Means over all queries:

    - `ndcg@10`: the sum of `1 / log2(1 + rank)` over the right documents among the first ten, divided by what it would
      be at best;
    - `accuracy@1`: whether the first document is right;
    - `mrr@10`: 1 / rank of the first right document; 0 if it is not among the first ten.

    The `loss` is `embedding_loss`. It is over the texts that share a batch, so it depends on the batch size.

    The similarity is the model's `similarity_fn_name`, or else the cosine. An embedding that is not finite is never
    found; the share of queries, or of labelled rows, with such an embedding is `predictions_not_finite`, if there are
    any. The embeddings of all texts are kept in main memory until all batches are done.

    Args:
        batches: Mappings with `inputs`: what the model takes for the texts, all first ones of the rows, then all
            second ones, and so on, in one mapping of tensors or several, by any names; and `ids`, (B, C): a number for
            each text, the same for the same text in all batches. What does not depend on corrupted weights is shared
            if the inputs are one mapping, so that a batch takes one call of the model. The task "sentence-similarity"
            of `hf_parcor.tasks.TASKS` makes such batches of rows.
        embed: `embed(model, inputs)` returns the embeddings, (B, width). The default is for sentence-transformers; for
            an encoder of Transformers it may be `lambda model, inputs: model(**inputs).last_hidden_state[:, 0]`. Then
            corruptions along a gradient need `loss=functools.partial(embedding_loss, embed=embed)`.

    Raises:
        ValueError: There are no batches, or they can be walked through only once.

    Examples:
        >>> texts = {"queries": torch.eye(2), "documents": torch.tensor([[1.0, 0.1], [0.9, 1.0]])}
        >>> batches = [{"inputs": texts, "ids": torch.tensor([[0, 2], [1, 3]])}]
        >>> metric = EmbeddingMetric(batches, embed=lambda model, inputs: model(inputs))
        >>> found = metric(nn.Identity())
        >>> found["accuracy@1"], found["mrr@10"]
        (1.0, 1.0)
    """

    _named: ClassVar[bool] = True
    _infos: ClassVar[Mapping[str, MetricInfo]] = {
        **dict.fromkeys((f"ndcg@{_FOUND}", "accuracy@1", f"mrr@{_FOUND}"), MetricInfo(True, SHARE)),
        **dict.fromkeys(("spearman", "pearson"), MetricInfo(True)),
        "loss": MetricInfo(False),
    }

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, embed: Embed = sentence_embedding) -> None:
        super().__init__(batches)
        self._embed = embed

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return the embeddings of one batch, or the similarities of its labelled rows, and the sum of its loss.

        Raises:
            ValueError: The batch has no inputs of texts, or not a number for each of them.
        """
        if not is_of_texts(batch):
            raise ValueError(
                f"batches: expected 'inputs', a mapping of what the model takes, and 'ids', got {', '.join(batch)}; "
                "let the task 'sentence-similarity' collate rows, or do as it does"
            )
        labels = batch.get("labels")
        embeddings = Embeddings.of(model, own_batch(batch, model), self._embed)
        rows = len(embeddings.ids)
        found: dict[str, Any] = {
            "loss": float(embeddings.loss(labels)) * rows,
            "rows": rows,
            "labelled": labels is not None,
            ANSWERS: embeddings.scores().float().cpu(),
        }
        if labels is not None:
            return {**found, "similarities": embeddings.alike().tolist(), "labels": torch.as_tensor(labels).tolist()}
        return {
            **found,
            "kind": embeddings.kind,
            "ids": embeddings.ids.cpu(),
            "embeddings": embeddings.vectors.cpu(),
        }

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return the metrics over all rows.

        Raises:
            ValueError: Some batches have labels and others have none, or no query has a right document but itself.
        """
        labelled = {part["labelled"] for part in parts}
        if len(labelled) > 1:
            raise ValueError("labels: expected them in all batches or in none, got both; collate all batches alike")
        self.kept_bytes = sum(part["embeddings"].nbytes for part in parts if "embeddings" in part)
        loss = sum_of(parts, "loss") / sum_of(parts, "rows")
        found = _of_scores(parts) if labelled.pop() else _of_searches(parts)
        odd = found.pop("odd")
        return {**found, "loss": loss, **share_not_finite(*odd)}


def _of_scores(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    similarities, labels = (
        np.array([value for part in parts for value in part[name]]) for name in ("similarities", "labels")
    )
    odd = int((~np.isfinite(similarities)).sum())
    pairs = {"spearman": (_ranks(similarities), _ranks(labels)), "pearson": (similarities, labels)}
    found = {
        name: float("nan") if odd else float(correlations(one[:, None], other[:, None])[0])
        for name, (one, other) in pairs.items()
    }
    return {**found, "odd": (odd, len(labels))}


def _ranks(values: Any) -> Any:
    """Return the rank of each value, from 1 on; equal ones share the mean of theirs.

    Examples:
        >>> _ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist()
        [2.5, 1.0, 2.5, 4.0]
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


class _Texts(NamedTuple):
    """Different texts.

    Attributes:
        ids: Their numbers, (N,).
        vectors: The embedding of each, (N, width).
    """

    ids: Tensor
    vectors: Tensor

    def finite(self) -> Tensor:
        """Return of which texts the embedding is."""
        return self.vectors.isfinite().all(-1)


def _different(ids: Any, vectors: Tensor) -> tuple[_Texts, Any]:
    """Return each text once, as it is met first, and which of these each text is."""
    numbers, first, places = np.unique(ids, return_index=True, return_inverse=True)
    return _Texts(torch.from_numpy(numbers), vectors[first]), places.reshape(-1)


def _of_searches(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ids = torch.cat([part["ids"] for part in parts]).numpy()
    vectors = torch.cat([part["embeddings"] for part in parts], 1)
    queries, of_rows = _different(ids[:, 0], vectors[0])
    documents, of_texts = _different(ids[:, 1:].T.reshape(-1), vectors[1:].flatten(0, 1))
    pairs = torch.from_numpy(np.unique([of_rows, of_texts[: len(ids)]], axis=1))
    query, document = pairs[:, queries.ids[pairs[0]] != documents.ids[pairs[1]]]
    if not len(query):
        raise ValueError(
            "batches: expected a query with a right document, got none but the queries themselves; name other columns"
        )
    searched, count = query.unique(return_counts=True)
    hits = _hits(parts[0]["kind"], queries, documents, query, document)[searched]
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64)
    worth = 1 / (1 + ranks).log2()
    best = worth.cumsum(0)[count.clamp(max=len(worth)) - 1]
    lost = ~(queries.finite()[query] & documents.finite()[document])
    return {
        f"ndcg@{_FOUND}": float(((hits * worth).sum(-1) / best).mean()),
        "accuracy@1": float(hits[:, 0].mean()),
        f"mrr@{_FOUND}": float((hits / ranks).max(-1).values.mean()),
        "odd": (len(query[lost].unique()), len(searched)),
    }


def _hits(kind: str, queries: _Texts, documents: _Texts, query: Tensor, document: Tensor) -> Tensor:
    """Return whether each of the first documents for each query is right, 1 or 0: (queries, found).

    Args:
        kind: What a similarity is.
        queries: What is searched for.
        documents: What may be found.
        query: Of each right pair, which of the queries it has.
        document: And which of the documents.
    """
    found = []
    for rows in torch.split(torch.arange(len(queries.ids)), max(1, _AT_ONCE // len(documents.ids))):
        scores = similarities(kind, queries.vectors[rows], documents.vectors)
        may_be = scores.isfinite() & (queries.ids[rows, None] != documents.ids)
        best = scores.where(may_be, -torch.inf).topk(min(_FOUND, len(documents.ids)))
        right = torch.zeros_like(may_be)
        here = (query >= rows[0]) & (query <= rows[-1])
        right[query[here] - rows[0], document[here]] = True
        found.append((right & may_be).gather(1, best.indices).double())
    return torch.cat(found)
