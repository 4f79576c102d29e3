"""What the numbers of a metric mean: whether a large one is good, and their unit. Stated, or a guess that says so."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

SHARE = "share"
"""A share of 1, which is shown in percent, such as an accuracy."""
POINTS = "points"
"""Points of 100, such as BLEU and chrF by sacrebleu."""
NATS = "nats"
"""Natural logarithms, such as a cross-entropy."""
LABEL_UNITS = "label units"
"""The unit of what is predicted, such as a mean absolute error."""
SQUARED_LABEL_UNITS = "squared label units"
"""The squared unit of what is predicted, such as a mean squared error."""
LM_EVAL = "lm-eval="
"""The prefix of a metric that stands for tasks of lm-eval."""

_DIRECTION, _UNIT = "greater_is_better", "unit"


@dataclass(frozen=True)
class MetricInfo:
    """What the numbers of one metric mean.

    Args:
        greater_is_better: Whether a large number is good.
        unit: "share" (of 1, shown in percent), "points" (of 100), or any other word, which is shown after a number,
            such as "nats" or "label units". Default "", if there is no unit or it is not stated.
        guessed: The names of those of the two arguments above that are guesses.

    Raises:
        TypeError: An argument has the wrong type.

    Examples:
        >>> MetricInfo(greater_is_better=False, unit="label units")
        MetricInfo(greater_is_better=False, unit='label units', guessed=())
    """

    greater_is_better: bool
    unit: str = ""
    guessed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in ((_DIRECTION, bool), (_UNIT, str)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {value!r}; see MetricInfo")

    def stating(self, *, greater_is_better: bool | None = None, unit: str | None = None) -> MetricInfo:
        """Return a copy with stated values in place of known or guessed ones; None leaves a value unchanged.

        Examples:
            >>> info_by_name("score", [0.5]).stating(unit="points")
            MetricInfo(greater_is_better=True, unit='points', guessed=('greater_is_better',))
        """
        given = {_DIRECTION: greater_is_better, _UNIT: unit}
        stated: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, **stated, guessed=tuple(name for name in self.guessed if name not in stated))

    @property
    def stated(self) -> dict[str, Any]:
        """The values that were stated, by name, as `stating` takes them.

        Examples:
            >>> info_by_name("accuracy", [0.5]).stated
            {'greater_is_better': True}
        """
        values = {_DIRECTION: self.greater_is_better, _UNIT: self.unit}
        return {name: value for name, value in values.items() if name not in self.guessed and value != ""}

    @property
    def direction_guessed(self) -> bool:
        """Whether the direction is a guess: it was not stated, and the name does not say it either."""
        return _DIRECTION in self.guessed

    def guesses(self, metric: str) -> tuple[str, ...]:
        """Return a sentence on each guess.

        Examples:
            >>> MetricInfo(True).guesses("bleu"), len(info_by_name("score", [0.5]).guesses("score"))
            ((), 1)
        """
        better = "large" if self.greater_is_better else "small"
        said = []
        if self.direction_guessed:
            said.append(
                f"Nothing states whether a large {metric} is good: that a {better} one is, is a guess. Where it is "
                "wrong, better and worse are exchanged."
            )
        if _UNIT in self.guessed:
            said.append(
                f"Nothing states the unit of {metric}: that it is a share of 1, shown in percent, is a guess from its "
                "name and values."
            )
        return tuple(said)


def shown_unit(unit: str) -> tuple[int, str]:
    """Return what values are multiplied by to be shown, and the word for their unit; "" for none.

    Examples:
        >>> shown_unit("share"), shown_unit("points"), shown_unit("nats"), shown_unit("")
        ((100, '%'), (1, 'of 100'), (1, 'nats'), (1, ''))
    """
    return {SHARE: (100, "%"), POINTS: (1, "of 100")}.get(unit, (1, unit))


# The last word of a name, after prefixes such as eval_ or macro_, says what a metric is.
_GREATER = {
    *("accuracy", "acc", "f1", "precision", "recall", "auc", "auroc", "bleu", "chrf", "meteor", "pearson", "pearsonr"),
    *("spearman", "spearmanr", "mcc", "r2", "iou", "ndcg", "mrr", "map", "rouge1", "rouge2", "rougel", "rougelsum"),
    *("exact_match", "matthews_correlation", "r_squared", "win_rate"),
}
_SMALLER = {
    *("loss", "perplexity", "ppl", "ter", "wer", "cer", "mse", "rmse", "mae", "mape", "smape", "mase", "nll", "ece"),
    *("error", "errors", "fid", "not_finite", "brier_score", "error_rate", "cross_entropy", "edit_distance"),
}
_NEGATED = {"neg", "negative"}
_SHARES = {"accuracy", "acc", "f1", "precision", "recall"}
_AVERAGES = {"macro", "micro", "weighted"}


def direction_by_name(name: str) -> bool | None:
    """Return whether a large value of a metric is good, where its name is one that everybody uses alike; else None.

    Examples:
        >>> [direction_by_name(name) for name in ("eval_macro_f1", "val/loss", "wer", "score")]
        [True, False, False, None]
        >>> direction_by_name("neg_mean_squared_error"), direction_by_name("negative_log_likelihood")
        (True, False)
    """
    words = _words(name)
    if _ends_with(words, {"log_likelihood"}):
        return _NEGATED.isdisjoint(words)
    if _ends_with(words, _SMALLER):
        return "neg" in words  # scikit-learn's name for an error with its sign changed
    return True if _ends_with(words, _GREATER) else None


def info_by_name(name: str, values: Iterable[float]) -> MetricInfo:
    """Return what a metric's numbers mean as far as its name says; the rest is a guess, and marked as one.

    A direction that no name says is guessed to be that of a score. Names do not say units: an accuracy is guessed to
    be a share if all of its finite values lie between 0 and 1, and all else has none.

    Args:
        name: The metric.
        values: What was measured.

    Examples:
        >>> info_by_name("accuracy", [0.5, 1.0]), info_by_name("accuracy", [50.0, 1.0])
        (MetricInfo(greater_is_better=True, unit='share', guessed=('unit',)),
         MetricInfo(greater_is_better=True, unit='', guessed=()))
        >>> info_by_name("mse", [0.1])
        MetricInfo(greater_is_better=False, unit='', guessed=())
    """
    direction = direction_by_name(name)
    guessed = (_DIRECTION,) if direction is None else ()
    is_share = direction is True and _ends_with(_words(name), _SHARES)
    if is_share and not any(math.isfinite(value) and not 0 <= value <= 1 for value in values):
        return MetricInfo(True, SHARE, (*guessed, _UNIT))
    return MetricInfo(direction is not False, "", guessed)


def info_of(metric: Any, name: str, values: Iterable[float]) -> MetricInfo:
    """Return what a metric's numbers of a name mean: what the metric states, else what the name says.

    A metric states it with a method `info_of(name)`, which returns a `MetricInfo` or None; or, for the number that its
    attribute `primary_metric` names, with attributes `greater_is_better` and, if there is one, `unit`. The `compute`
    of a metric of `evaluate` is known.

    Args:
        metric: The metric.
        name: The name of one of its numbers.
        values: The measured values.
    """
    stated = stated_by(metric, name)
    by_name = info_by_name(name, values)
    if stated is None:
        return by_name
    return by_name.stating(greater_is_better=stated.greater_is_better, unit=stated.unit or None)


def stated_by(metric: Any, name: str) -> MetricInfo | None:
    """Return what a metric or a score states of one of its numbers; None if that is nothing.

    Examples:
        >>> class Score:
        ...     primary_metric, greater_is_better = "distance", False
        >>> stated_by(Score(), "distance"), stated_by(Score(), "other")
        (MetricInfo(greater_is_better=False, unit='', guessed=()), None)
    """
    method = getattr(metric, "info_of", None)
    if callable(method):
        found: MetricInfo | None = method(name)
        return found
    greater = getattr(metric, _DIRECTION, None)
    if isinstance(greater, bool) and getattr(metric, "primary_metric", None) == name:
        return MetricInfo(greater, str(getattr(metric, _UNIT, "") or ""))
    return _of_evaluate(metric, name)


def agreed(infos: Iterable[MetricInfo], metric: str) -> MetricInfo:
    """Return what several records of one metric say together: what one states, the others need not.

    Raises:
        ValueError: They state different things.

    Examples:
        >>> agreed([info_by_name("accuracy", [0.5]), MetricInfo(True, "share")], "accuracy")
        MetricInfo(greater_is_better=True, unit='share', guessed=())
    """
    found = list(infos)
    values: dict[str, Any] = {}
    guessed = []
    for name in (_DIRECTION, _UNIT):
        stated = {getattr(info, name) for info in found if name not in info.guessed} - {""}
        if len(stated) > 1:
            raise ValueError(
                f"{metric}: expected records of one {name}, got {' and '.join(map(repr, sorted(stated)))}; compare "
                f"what was measured alike, or state {name}"
            )
        guesses = {getattr(info, name) for info in found}
        values[name] = stated.pop() if stated else guesses.pop() if len(guesses) == 1 else ""
        if values[name] != "" and all(name in info.guessed for info in found):
            guessed.append(name)
    return MetricInfo(**values, guessed=tuple(guessed))


def checked_infos(infos: Mapping[str, MetricInfo] | None) -> dict[str, MetricInfo]:
    """Return what a user states of metrics, by their names.

    Raises:
        TypeError: It is no mapping to `MetricInfo`.
    """
    found = {} if infos is None else infos
    if not isinstance(found, Mapping) or not all(isinstance(info, MetricInfo) for info in found.values()):
        raise TypeError(
            f"metric_info: expected MetricInfo by the name of the metric, got {infos!r}; pass "
            "{'score': MetricInfo(greater_is_better=False)}, say"
        )
    return dict(found)


class _Module(NamedTuple):
    """What a metric of `evaluate` returns: the unit of all its numbers, and which are better large, which small."""

    unit: str
    greater: frozenset[str] = frozenset()
    smaller: frozenset[str] = frozenset()


def _module(unit: str, greater: str = "", smaller: str = "") -> _Module:
    return _Module(unit, frozenset(greater.split()), frozenset(smaller.split()))


# By the name of their class without underscores, as version 0.4.6 returns them. A number without a name has that of
# the module. Left out is what has no direction, such as lengths.
_MODULES = {
    **{name: _module(SHARE, name) for name in ("accuracy", "f1", "precision", "recall", "bleu", "meteor")},
    "exactmatch": _module(SHARE, "exact_match"),
    "rocauc": _module(SHARE, "roc_auc"),
    "googlebleu": _module(SHARE, "google_bleu"),
    "rouge": _module(SHARE, "rouge1 rouge2 rougeL rougeLsum"),
    "seqeval": _module(SHARE, "overall_accuracy overall_f1 overall_precision overall_recall"),
    "meaniou": _module(SHARE, "mean_iou mean_accuracy overall_accuracy"),
    **{name: _module(SHARE, "accuracy f1") for name in ("glue", "superglue", "indicglue", "xnli")},
    **{name: _module(SHARE, "", name) for name in ("wer", "cer", "mape")},
    "character": _module(SHARE, "", "cer_score"),
    **{name: _module(POINTS, "score") for name in ("sacrebleu", "chrf")},
    "ter": _module(POINTS, "", "score"),
    "sari": _module(POINTS, "sari"),
    **{name: _module(POINTS, "exact_match f1") for name in ("squad", "cuad")},
    "squadv2": _module(POINTS, "exact f1 HasAns_exact HasAns_f1 NoAns_exact NoAns_f1 best_exact best_f1"),
    "wikisplit": _module(POINTS, "sari sacrebleu exact"),
    "mse": _module(SQUARED_LABEL_UNITS, "", "mse"),
    "mae": _module(LABEL_UNITS, "", "mae"),
    **{name: _module("", "", name) for name in ("mase", "smape")},
    "brierscore": _module("", "", "brier_score"),
    "charcut": _module("", "", "charcut_mt"),
    "perplexity": _module("", "", "mean_perplexity"),
    **{name: _module("", name) for name in ("pearsonr", "spearmanr")},
    "matthewscorrelation": _module("", "matthews_correlation"),
    "rsquared": _module("", "r_squared"),
    "nistmt": _module("", "nist_mt"),
    "comet": _module("", "mean_score"),
}


def evaluate_module(metric: Any) -> str:
    """Return the name of the metric of `evaluate` that this is, or whose `compute` it is; "" for anything else."""
    owner = getattr(metric, "__self__", metric)
    return str(getattr(owner, "name", "") or "") if is_of_evaluate(owner) else ""


def is_of_evaluate(value: Any) -> bool:
    """Return whether the class of an object is one of the library `evaluate`, or derived from one."""
    return any(kind.__module__.partition(".")[0] == "evaluate" for kind in type(value).__mro__)


def _of_evaluate(metric: Any, name: str) -> MetricInfo | None:
    module = _MODULES.get(evaluate_module(metric).replace("_", ""))
    if module is None or name not in module.greater | module.smaller:
        return None
    return MetricInfo(name in module.greater, module.unit)


def _words(name: str) -> list[str]:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    while len(words) > 1 and words[-1] in _AVERAGES:
        words.pop()
    return words or [""]


def _ends_with(words: list[str], known: set[str]) -> bool:
    """Return whether the last one to three words are among the known."""
    return any("_".join(words[-count:]) in known for count in (1, 2, 3))
