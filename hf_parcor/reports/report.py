"""Reports from records: a verdict, a recipe or a first look in plain words, then everything it was made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from textwrap import TextWrapper
from typing import Generic, TypeVar

from hf_parcor.records.evaluation import EvaluationRecord
from hf_parcor.records.recipe import RecipeRecord
from hf_parcor.records.sensitivity import SensitivityRecord
from hf_parcor.reports.content import Content, content_of, markdown_page
from hf_parcor.reports.first_look import FirstLookContent, content_of_first_look, first_look_markdown
from hf_parcor.reports.html import first_look_page, framed, html_page, recipe_page
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.recipe import RecipeContent, content_of_recipe, recipe_markdown
from hf_parcor.reports.study import Records, Study
from hf_parcor.strict_json import replace_text, to_strict_json

_Found = TypeVar("_Found", bound=Content | FirstLookContent | RecipeContent)


class _Report(Generic[_Found]):
    """A verdict in plain words, and the pages that it leads.

    Args:
        content: What is to be said.
    """

    _html: Callable[[_Found], str]
    _markdown: Callable[[_Found], str]

    def __init__(self, content: _Found) -> None:
        self._content = content

    def __str__(self) -> str:
        fill = TextWrapper(80, break_long_words=False, break_on_hyphens=False).fill  # names and paths are not cut
        return "\n\n".join(map(fill, self.verdict))

    def _repr_html_(self) -> str:
        return framed(self._html(self._content))

    @property
    def verdict(self) -> list[str]:
        """The findings in plain words, each with its remedy; the last says if the metric's direction is a guess."""
        return [finding.text for finding in self._content.findings]

    @property
    def notes(self) -> list[str]:
        """What to know before relying on the numbers, as the pages say it."""
        return list(self._content.notes)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page and return its path; the folder is created if needed.

        The page needs no network and no script, supports phones and dark mode, and colour-blind readers can tell its
        colours and markers apart. Without Matplotlib it has no curves, and says so; all numbers are in its tables.
        """
        return replace_text(path, self._html(self._content))

    def to_markdown(self, path: str | Path) -> Path:
        """Write the report in Markdown, with tables instead of pictures, and return its path."""
        return replace_text(path, self._markdown(self._content))


class RobustnessReport(_Report[Content]):
    """Reports in plain words, from records alone, how fragile a model is and which of its parts is weakest.

    `print(report)` shows the verdict, and a notebook shows the page where a cell ends with the report. The model is
    not run. If measurements were repeated, SciPy is needed for confidence intervals and tests. Matplotlib is needed
    for the curves of the HTML page.

    Args:
        records: The record of an evaluator or of a probe; a list of either, one for each seed; or a mapping from the
            names of groups to records or lists of them.
        metric: The metric to report. By default, the `usual_metric` of the first record.
        greater_is_better: Whether a large metric is good. By default, what the records say, or else a guess that is
            marked as one.
        unit: As in `MetricInfo`: "share" (of 1, shown in percent), "points" (of 100), any other word, or "" for none.
            By default, what the records say, or else a guess.
        title: The heading. By default, it names the metric and the models.

    Raises:
        ValueError: There are no records or no corruptions, repetitions have no corruption in common, the metric is
            missing, or the records state different directions or units of it.
        ImportError: Measurements were repeated and SciPy is not installed.

    Examples:
        >>> from hf_parcor import CorruptionRecord, EvaluationRecord
        >>> clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
        >>> def record(layer, accuracy):
        ...     row = CorruptionRecord("gradient", "", {"p": 2.0, "epsilon": 0.1}, (0,), {"accuracy": (accuracy,)})
        ...     return EvaluationRecord("bert", {"target_modules": [layer]}, 10, clean, (row,))
        >>> probe = {layer: record(layer, accuracy) for layer, accuracy in [("a", 0.85), ("b", 0.8), ("c", 0.5)]}
        >>> print(RobustnessReport(probe).verdict[0])
        gradient-based, L2: c is 5.3 times as fragile as the median of the others. With c corrupted, accuracy falls by
        40.0 points at ε=0.1; with the others, at the median, it falls by 7.5 points. There is no spread to judge that
        by, since it was measured once or came out the same each time: repeat it with models of other seeds before you
        rely on it. If that holds, defend it with ParameterDefenseTrainer(..., target_modules=['c'])
    """

    _html, _markdown = staticmethod(html_page), staticmethod(markdown_page)

    def __init__(
        self,
        records: Records,
        metric: str | None = None,
        *,
        greater_is_better: bool | None = None,
        unit: str | None = None,
        title: str | None = None,
    ) -> None:
        super().__init__(_content({"": records}, metric, greater_is_better, unit, title))

    @classmethod
    def compare(
        cls,
        models: Mapping[str, Records],
        metric: str | None = None,
        *,
        greater_is_better: bool | None = None,
        unit: str | None = None,
        title: str | None = None,
    ) -> RobustnessReport:
        """Return a report that compares models with the first one, for example defended models with a plain one.

        Args:
            models: Records as in the constructor, by the name of the model; two or more, the baseline first.
            metric: As in the constructor.
            greater_is_better: As in the constructor.
            unit: As in the constructor.
            title: As in the constructor.

        Raises:
            ValueError: As in the constructor, or there are fewer than two models, or no two have corrupted
                weights, or a corruption, in common.
            ImportError: As in the constructor.
        """
        if len(models) < 2:
            raise ValueError(f"models: expected two or more to compare, got {len(models)}; use RobustnessReport(...)")
        report = cls.__new__(cls)
        _Report.__init__(report, _content(models, metric, greater_is_better, unit, title))
        return report

    @property
    def guesses(self) -> tuple[str, ...]:
        """A sentence on each guess about the metric, its direction or its unit; the notes contain them too."""
        return self._content.guesses

    def to_json(self) -> str:
        """Return metric, verdict, notes and every mean as standard JSON, for programs.

        `in_one_alone` has, for each model, the labels of corruptions that no other model was measured under, and that
        are therefore not compared. Each entry of `means` has `model`, `group`, `corruption` ("none" for the clean
        model), `strength`, `mean`, `interval` (95 % confidence; null if nothing was repeated) and `values`, one for
        each repetition. Numbers are the metric's own: shares of 1, not percent. NaN and infinities are strings, as in
        records.
        """
        plain = dict(self._content.plain)
        found = plain.pop("means")
        return to_strict_json({**plain, "verdict": self.verdict, "notes": self.notes, "means": found})


class _Answer(_Report[_Found]):
    """A report that leads with one answer."""

    @property
    def answer(self) -> str:
        """The finding, its cost, and what to do, in plain words."""
        return self._content.findings[0].text


class RecipeReport(_Answer[RecipeContent]):
    """Reports in one sentence which formats to use, and plots the metric against bits, from records alone.

    SciPy is needed for rank correlations, and Matplotlib for the plot of the HTML page.

    Args:
        scores: What `sensitivity` returned; choose the metric to look at with its `stating`.
        recipe: The recipe that was chosen from `scores`.
        measured: The record of `measure_recipes`, in which the recipe is named "recipe", and a recipe of one format
            for all by the format's label. If None, only expectations are shown.
        title: The heading. By default, it names the metric and the model.
        metric: The metric to look at: one of `measured` if given, else of `scores`. By default, that of `scores`.
        files: Names of the files that `export_recipe` wrote; the page says how to read them. By default, none.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: There is no such metric.

    Examples:
        >>> from hf_parcor.records import FormatScore, WeightGroup
        >>> from hf_parcor.recipes import recipe
        >>> four = {"4-bit quantization": {"corruption": "quantization", "settings": {"bits": 4}}}
        >>> groups = {name: WeightGroup({f"{name}.weight": 100}, 16.0) for name in ("a", "b", "c")}
        >>> cells = [
        ...     FormatScore(name, "4-bit quantization", 4.0, {"fisher": 1 - accuracy}, {"accuracy": accuracy})
        ...     for name, accuracy in {"a": 0.9, "b": 0.6, "c": 0.89}.items()
        ... ]
        >>> scores = SensitivityRecord("m", groups, four, tuple(cells), {"accuracy": 0.9}, "accuracy")
        >>> print(RecipeReport(scores, recipe(scores, bits=8.0)).answer)
        Quantize everything but b (as it is) to 4 bits: accuracy −1.0 points are expected; with it −31.0 points.
    """

    _html, _markdown = staticmethod(recipe_page), staticmethod(recipe_markdown)

    def __init__(
        self,
        scores: SensitivityRecord,
        recipe: RecipeRecord,
        measured: EvaluationRecord | None = None,
        *,
        title: str | None = None,
        metric: str | None = None,
        files: Collection[str] | None = None,
    ) -> None:
        content = content_of_recipe(scores, recipe, measured, title, metric, files)
        super().__init__(content)


class FirstLookReport(_Answer[FirstLookContent]):
    """Reports which part of a model is weakest in one format, from one backward pass and a few measurements.

    SciPy is needed for rank correlations.

    Args:
        scores: What `sensitivity` returned with one format and a `budget` of 1 or more; choose the metric to look at
            with its `stating`.
        title: The heading. By default, it names the model and the format.

    Raises:
        ValueError: There is more than one format, or nothing was measured.
        ImportError: SciPy is not installed.

    Examples:
        >>> from hf_parcor.records import FormatScore, WeightGroup
        >>> four = {"4-bit quantization": {"corruption": "quantization", "settings": {"bits": 4}}}
        >>> groups = {name: WeightGroup({f"{name}.weight": 100}, 16.0) for name in ("a", "b", "c")}
        >>> cells = [
        ...     FormatScore(name, "4-bit quantization", 4.0, {"fisher": score}, measured)
        ...     for name, score, measured in [("a", 0.1, {}), ("b", 0.9, {"loss": 2.5}), ("c", 0.2, {"loss": 2.1})]
        ... ]
        >>> print(FirstLookReport(SensitivityRecord("m", groups, four, tuple(cells), {"loss": 2.0}, "loss")).answer)
        b is the weakest of 3 parts in 4 bits: by itself it changes loss from 2 by +0.5; the next, c, by +0.1.
        Keep it in more bits than the others.
        If that holds, defend it with
        ParameterDefenseTrainer(..., defense=CorruptionRisk(Quantization(bits=4)), target_modules=['b'])
    """

    _html, _markdown = staticmethod(first_look_page), staticmethod(first_look_markdown)

    def __init__(self, scores: SensitivityRecord, *, title: str | None = None) -> None:
        super().__init__(content_of_first_look(scores, title))


def _content(
    models: Mapping[str, Records],
    metric: str | None,
    greater_is_better: bool | None,
    unit: str | None,
    title: str | None,
) -> Content:
    study = Study.of(models, metric, greater_is_better=greater_is_better, unit=unit)
    if title is None:
        named = " and ".join(models) if len(models) > 1 else ", ".join(dict.fromkeys(r.model for r in study.records))
        title = f"How robust are the weights of {named}? {study.metric} under corruption"
    return content_of(study, Numbers(study.info.unit), title)
