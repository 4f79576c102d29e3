"""BLEU of texts as people write them, and BLEU of their tokens, which is what the papers report.

`hf_parcor.evaluation.SacrebleuScore` is any one score of sacrebleu, with its own settings.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from hf_parcor.records.metric_info import POINTS, MetricInfo


class BleuScores:
    r"""Two corpus BLEUs by sacrebleu, clearly told apart, each with its signature as a note for the record.

    - `bleu`: of detokenised text, tokenised by sacrebleu itself (13a). Compare this with other people's work.
    - `tokenized_bleu`: of text that was tokenised before, split at spaces and nothing else, as `multi-bleu.perl` and
      fairseq's `generate.py` score it. The papers' numbers are of this kind: their De-En is lower-cased and tokenised
      by Moses. It depends on the tokenizer, so compare only texts tokenised alike.

    Args:
        tokenize: Makes tokens with spaces between them of a text. None if the texts are tokenised already.
        detokenize: Makes text as people write it of tokenised text, such as sacremoses' detokeniser. None if the texts
            are so already, that is with `tokenize`. With neither, only `tokenized_bleu` is known.
        lowercase: Whether `tokenized_bleu` is of lower-cased text.

    Raises:
        ValueError: Both functions are given.
        ImportError: sacrebleu is not installed.

    Examples:
        >>> scores = BleuScores(tokenize=str)
        >>> texts = ["ein Hund läuft durch den Schnee"]
        >>> scores(predictions=texts, references=texts)
        {'bleu': 100.0..., 'tokenized_bleu': 100.0...}
        >>> print(*scores.notes, sep="\n")
        bleu, detokenised: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:...
        tokenized_bleu, of tokens: nrefs:1|case:mixed|eff:no|tok:none|smooth:exp|version:...
    """

    def __init__(
        self,
        *,
        tokenize: Callable[[str], str] | None = None,
        detokenize: Callable[[str], str] | None = None,
        lowercase: bool = False,
    ) -> None:
        if tokenize is not None and detokenize is not None:
            raise ValueError(
                "tokenize, detokenize: expected one of them, got both; texts are tokenised already, or they are not"
            )
        try:
            from sacrebleu.metrics.bleu import BLEU
        except ImportError as error:
            raise ImportError(
                "BleuScores needs sacrebleu; install it with: pip install 'hf-parcor[translation]'"
            ) from error
        self._scores: dict[str, tuple[str, Any, Callable[[str], str]]] = {}
        if tokenize is not None or detokenize is not None:
            self._scores["bleu"] = ("detokenised", BLEU(), detokenize or _unchanged)
        of_tokens = BLEU(tokenize="none", lowercase=lowercase, force=True)
        self._scores["tokenized_bleu"] = ("of tokens", of_tokens, tokenize or _unchanged)
        functions = {"tokenize": tokenize, "detokenize": detokenize}
        version = importlib.metadata.version("sacrebleu")
        self._settings = {**functions, "lowercase": lowercase, "version": version}
        self._scored = False

    def __call__(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Return the scores of a corpus, in points of 100."""
        found = {}
        for name, (_, metric, prepare) in self._scores.items():
            hypotheses, expected = ([prepare(text) for text in texts] for texts in (predictions, references))
            found[name] = float(metric.corpus_score(hypotheses, [expected]).score)
        self._scored = True
        return found

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers of this name mean: points of 100."""
        return MetricInfo(True, POINTS) if name in self._scores else None

    def identity(self) -> dict[str, Any]:
        """Return both functions, the case and sacrebleu's version, which determine the scores."""
        return self._settings

    @property
    def notes(self) -> tuple[str, ...]:
        """The signatures, known when a corpus was scored: how many references there are is part of them."""
        if not self._scored:
            return ()
        return tuple(f"{name}, {kind}: {metric.get_signature()}" for name, (kind, metric, _) in self._scores.items())


def tokenize_13a(text: str) -> str:
    """Return the tokens of a text with spaces between them, as mteval-v13a and sacrebleu split it.

    Examples:
        >>> tokenize_13a("Ein Hund, der läuft.")
        'Ein Hund , der läuft .'
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer: Any = Tokenizer13a()  # type: ignore[no-untyped-call]
    return str(tokenizer(text))


def _unchanged(text: str) -> str:
    return text
