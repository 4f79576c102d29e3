"""Embeddings of texts: how alike two are, and the loss of a batch of texts that belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.distributed.fsdp import as_written

Embed = Callable[[nn.Module, Mapping[str, Any]], Tensor]

_COSINE = "cosine"
_DISTANCES = {"euclidean": 2.0, "manhattan": 1.0}  # the negative of which is the similarity
_SCALE = 20.0  # of cosines in both losses, as sentence-transformers has it


def sentence_embedding(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return what a model of sentence-transformers finds for a batch of texts: (B, width)."""
    embedding: Tensor = model(inputs)["sentence_embedding"]
    return embedding


def embedding_loss(model: nn.Module, batch: Mapping[str, Any], embed: Embed = sentence_embedding) -> Tensor:
    r"""Return how badly embeddings tell which texts of a batch belong together.

    With the similarity s of two texts, times 20 if it is a cosine:

    - if there are `labels` y, CoSENT (Huang et al., 2024): `log(1 + Σ exp(s_k − s_i))` over all rows i, k with
      `y_i > y_k`;
    - otherwise the mean over rows of `−log softmax` of the row's document among all documents of the batch (InfoNCE;
      van den Oord et al., 2018). Left out are other documents that are right for the same query, and the query itself.

    These are `CoSENTLoss` and `MultipleNegativesRankingLoss` of sentence-transformers, which leaves nothing out.

    Args:
        model: What embeds.
        batch: As `EmbeddingMetric` has them, on the model's device.
        embed: As for `EmbeddingMetric`.
    """
    return Embeddings.of(model, batch, embed).loss(batch.get("labels"))


def is_of_texts(batch: Any) -> bool:
    """Return whether a batch is one of an `EmbeddingMetric`, and its loss `embedding_loss`."""
    return isinstance(batch, Mapping) and isinstance(batch.get("inputs"), Mapping) and "ids" in batch


def similarities(kind: str, some: Tensor, others: Tensor) -> Tensor:
    """Return the similarity of each of some embeddings, (M, width), to each of others, (N, width), as (M, N).

    Args:
        kind: What a similarity is: "euclidean" or "manhattan", the distance with a minus, or else the dot product.
        some: Embeddings.
        others: Embeddings.
    """
    if kind in _DISTANCES:
        return -torch.cdist(some, others, p=_DISTANCES[kind])
    return some @ others.T


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of all texts of a batch.

    Attributes:
        kind: What a similarity is: the model's `similarity_fn_name`, or else "cosine".
        ids: (B, C), the numbers of the texts.
        vectors: (C, B, width), in float32 at least; of length 1 where cosines are taken of them.
    """

    kind: str
    ids: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Any], embed: Embed) -> Embeddings:
        """Return what a model finds for a batch.

        Raises:
            ValueError: The rows have not two texts each, or more where they have no label, or there are more numbers
                or fewer than texts.
        """
        kind = str(getattr(as_written(model), "similarity_fn_name", None) or _COSINE)
        found = torch.cat([embed(model, inputs) for inputs in batch["inputs"].values()])
        ids = torch.as_tensor(batch["ids"]).to(found.device)
        count = ids.shape[-1] if ids.ndim > 1 else 1
        if count < 2 or ids.numel() != len(found) or (batch.get("labels") is not None and count > 2):
            raise ValueError(
                "ids: expected a number for each text, (rows, 2), or more texts a row where there are no labels, got "
                f"shape {tuple(ids.shape)} for {len(found)} texts; let the task 'sentence-similarity' collate rows, "
                "or do as it does"
            )
        vectors = found.to(torch.promote_types(found.dtype, torch.float32)).reshape(count, -1, found.shape[-1])
        return cls(kind, ids, nn.functional.normalize(vectors, dim=-1) if kind == _COSINE else vectors)

    def alike(self) -> Tensor:
        """Return the similarity of the two texts of each row."""
        return similarities(self.kind, self.vectors[0], self.vectors[1]).diagonal()

    def loss(self, labels: Any) -> Tensor:
        """Return what `embedding_loss` does, with labels, (B,), or without."""
        if labels is None:
            scores = self.scores()
            return nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        alike = self.alike() * self._scale
        labels = torch.as_tensor(labels, device=alike.device)
        ahead = alike[None, :] - alike[:, None]
        return torch.cat([alike.new_zeros(1), ahead[labels[:, None] > labels[None, :]]]).logsumexp(0)

    def scores(self) -> Tensor:
        """Return a logit of each document of the batch, for the query of each row: (B, B (C − 1)).

        The first B are the rows' own documents. It is −∞ for others that are right for the query, and for itself.
        """
        scores = similarities(self.kind, self.vectors[0], self.vectors[1:].flatten(0, 1)) * self._scale
        queries, right, documents = self.ids[:, 0], self.ids[:, 1], self.ids[:, 1:].T.flatten()
        # How many rows have the query of row i, and d as their right document?
        found = (queries[:, None] == queries).float() @ (right[:, None] == documents).float()
        apart = (found == 0) & (queries[:, None] != documents)
        apart[:, : len(queries)].fill_diagonal_(True)
        return scores.masked_fill(~apart, -torch.inf)

    @property
    def _scale(self) -> float:
        return _SCALE if self.kind == _COSINE else 1.0
