"""Answers that a model marks in a text, compared with those of people: exact match and F1, as SQuAD counts them."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_parcor.arguments import check_count
from hf_parcor.evaluation.metrics.over_batches import OverBatches, sum_of
from hf_parcor.evaluation.outputs import ForMetrics, Output, called, own_batch, share_not_finite
from hf_parcor.records.metric_info import SHARE, MetricInfo

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_scores(found: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return whether an answer is right, 1 or 0, and the F1 of its words: of the right answer that it is nearest to.

    As in the evaluation of SQuAD (Rajpurkar et al., 2016; 2018), case, punctuation and the articles a, an, the do not
    count. With c words in common, F1 is 2c / (words found + words of the right answer). Where there is no answer, ""
    alone is right.

    Args:
        found: The answer; "" for none.
        answers: Right answers; none where there is no answer.

    Examples:
        >>> answer_scores("The Black Sea.", ["black sea", "sea"])
        (1.0, 1.0)
        >>> answer_scores("the Black Sea coast", ["black sea", "sea"])
        (0.0, 0.8)
        >>> answer_scores("", []), answer_scores("sea", [])
        ((1.0, 1.0), (0.0, 0.0))
    """
    words = _words(found)
    pairs = [(words, _words(answer)) for answer in answers or [""]]
    return float(any(one == other for one, other in pairs)), max(_f1(one, other) for one, other in pairs)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _f1(found: list[str], right: list[str]) -> float:
    if not found and not right:
        return 1.0
    return 2 * (Counter(found) & Counter(right)).total() / (len(found) + len(right))


@dataclass(frozen=True, eq=False)
class Question(ForMetrics):
    """What is asked of a window over a text, and how what a model marks there is read.

    Attributes:
        number: Of the question; all windows over its text have the same.
        context: The text.
        spans: (T, 2): the characters of the text that each token of the window stands for, its begin and its end;
            (0, 0) for the token that is marked where there is no answer, and (−1, −1) for all others: those of the
            question, say. Padding, before or behind these tokens, has none.
        answers: The right answers; none if the text has none.
    """

    number: int
    context: str
    spans: Tensor
    answers: tuple[str, ...]


class _Marked(NamedTuple):
    """The likeliest answer in one window.

    Attributes:
        number: Of the question.
        answers: Its right answers.
        text: The likeliest answer; None if the logits do not tell.
        score: Of it: the sum of two logits.
        score_of_none: That there is no answer here.
    """

    number: int
    answers: tuple[str, ...]
    text: str | None
    score: float
    score_of_none: float


class QuestionAnsweringMetric(OverBatches):
    r"""Exact match and F1 of the answers that a model marks in texts, and its mean loss over windows.

    Of all spans of up to `longest_answer` tokens of the text, the answer is the one with the largest
    `start\_logit_i + end\_logit_j`; of several windows over a text, that in the window where this is largest. If some
    of the questions have no answer, a question is said to have none if `start\_logit_c + end\_logit_c`, of the token
    c that is marked then, is larger in all windows.

    `exact_match` and `f1` are means over questions (see `answer_scores`), and `loss` is the model's own, which for
    windows without the answer is that of marking c. Padding counts as tokens in it, as in training, so that it depends
    on which windows share a batch. If a logit that decides is not finite, the answer is wrong; the share of these
    questions is `predictions_not_finite`, if there are any.

    Args:
        batches: Mappings of what the model takes, with `start_positions` and `end_positions`, and as `questions` a
            list with a `Question` for each row, which no model is given.
        longest_answer: In tokens.

    Raises:
        ValueError: There are no batches, or they can be walked through only once.
    """

    _named: ClassVar[bool] = True
    _infos: ClassVar[Mapping[str, MetricInfo]] = {
        "f1": MetricInfo(True, SHARE),
        "exact_match": MetricInfo(True, SHARE),
        "loss": MetricInfo(False),
    }

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, longest_answer: int = 30) -> None:
        check_count("longest_answer", longest_answer)
        super().__init__(batches)
        self._longest = longest_answer

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return the likeliest answer in each window of one batch, and the sum of the loss over them.

        Raises:
            ValueError: There are no questions, or the model returns no loss or other logits.
        """
        questions = batch.get("questions")
        if not isinstance(questions, (list, tuple)) or not all(isinstance(one, Question) for one in questions):
            raise ValueError(
                "questions: expected a list with a Question for each row of a batch, got "
                f"{'none' if questions is None else type(questions).__name__}; let the collator add it"
            )
        returned = called(model, own_batch(batch, model))
        starts, ends = _logits(returned, len(questions))
        spans = _padded(questions, batch.get("attention_mask"), starts.shape[1])
        marked = self._marked(starts, ends, spans, questions)
        return {"marked": marked, "loss": Output.read(returned).own_loss() * len(questions), "windows": len(questions)}

    def _marked(self, starts: Tensor, ends: Tensor, spans: Tensor, questions: Sequence[Question]) -> list[_Marked]:
        """Return the likeliest answer in each window, from logits (B, T) and the characters of tokens (B, T, 2)."""
        here = spans.to(starts.device)
        of_text, is_none = here[..., 1] > here[..., 0], (here == 0).all(-1)
        none = torch.where(is_none, starts + ends, -math.inf).amax(-1)
        starts, ends = (torch.where(of_text, logits, -math.inf) for logits in (starts, ends))
        later = nn.functional.pad(ends, (0, self._longest - 1), value=-math.inf).unfold(1, self._longest, 1)
        scores, places = (starts[..., None] + later).flatten(1).max(-1)  # NaN if there is one
        found = zip(questions, spans, scores.tolist(), places.tolist(), none.tolist(), strict=True)
        return [
            _Marked(
                one.number,
                one.answers,
                _text(one.context, of_row, *divmod(place, self._longest)) if math.isfinite(score) else None,
                score,
                of_none,
            )
            for one, of_row, score, place, of_none in found
        ]

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return the metrics over all questions."""
        of_questions: dict[int, list[_Marked]] = {}
        for marked in (one for part in parts for one in part["marked"]):
            of_questions.setdefault(marked.number, []).append(marked)
        some_without = any(not windows[0].answers for windows in of_questions.values())
        answers = [(_answer(windows, some_without), windows[0].answers) for windows in of_questions.values()]
        scores = [(0.0, 0.0) if found is None else answer_scores(found, right) for found, right in answers]
        exact_match, f1 = (sum(of_all) / len(scores) for of_all in zip(*scores, strict=True))
        return {
            "f1": f1,
            "exact_match": exact_match,
            "loss": sum_of(parts, "loss") / sum_of(parts, "windows"),
            **share_not_finite(sum(found is None for found, _ in answers), len(answers)),
        }


def _logits(returned: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Return the scores of each token to be the first of the answer, and the last."""
    found = [
        returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)
        for name in ("start_logits", "end_logits")
    ]
    starts, ends = (logits.float() if isinstance(logits, Tensor) else None for logits in found)
    if starts is None or ends is None or starts.dim() != 2 or len(starts) != rows or ends.shape != starts.shape:
        shapes = [tuple(logits.shape) if isinstance(logits, Tensor) else logits for logits in found]
        raise ValueError(
            f"logits: expected start_logits and end_logits with a score for each token of {rows} rows, got {shapes} "
            f"from a {type(returned).__name__}; use a model that AutoModelForQuestionAnswering loads"
        )
    return starts, ends


def _padded(questions: Sequence[Question], mask: Tensor | None, width: int) -> Tensor:
    """Return the characters of each token of a batch, (B, T, 2); (−1, −1) where it is padding, at either side.

    Raises:
        ValueError: A window has more tokens than the batch.
    """
    begins = [0] * len(questions)
    if mask is not None and mask.dim() == 2:
        begins = (mask != 0).int().argmax(1).tolist()
    behind = [width - begin - len(one.spans) for one, begin in zip(questions, begins, strict=True)]
    if min(behind) < 0:
        raise ValueError(
            f"questions: expected spans of up to {width} tokens, as the batch has, got {width - min(behind)} with the "
            "padding before them; make them of the window's own tokens"
        )
    padding = zip(questions, begins, behind, strict=True)
    return torch.stack([nn.functional.pad(one.spans, (0, 0, *around), value=-1) for one, *around in padding])


def _text(context: str, spans: Tensor, first: int, more: int) -> str:
    """Return the characters from a token until so many tokens later."""
    return context[int(spans[first, 0]) : int(spans[first + more, 1])]


def _answer(windows: Sequence[_Marked], may_be_none: bool) -> str | None:
    """Return the likeliest answer of all windows, "" for none; None where logits that decide are not finite."""
    if any(window.text is None for window in windows):
        return None
    best = max(windows, key=lambda window: window.score)
    if not may_be_none:
        return best.text
    of_none = [window.score_of_none for window in windows]
    if any(math.isnan(score) or score == math.inf for score in of_none):
        return None
    return "" if min(of_none) > best.score else best.text
