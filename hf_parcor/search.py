"""Which radius, and how many steps: golden-section search over the settings of a defense, one training a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import default_compute_objective
from transformers.utils import logging

from hf_parcor.arguments import check_count
from hf_parcor.defenses import ConstrainedDefense
from hf_parcor.records.search import Direction, SearchRecord, SearchTrial
from hf_parcor.training import ParameterDefenseMixin, signs_of_collapse
from hf_parcor.training.checkpoints import last_checkpoint

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def golden_section_maximum(
    function: Callable[[float], float], low: float, high: float, evaluations: int
) -> list[tuple[float, float]]:
    r"""Return the points where a function was evaluated on its way to its maximum, with their values.

    .. math:: \arg\max_x \; f(x) \quad \text{such that} \quad l \le x \le h

    Of two inner points the worse one becomes the interval's new end, and one new point is evaluated: each evaluation
    after the second leaves 0.618 of the interval. For f that rises and then falls, the maximum stays inside. NaN
    counts as worse than any number. The same function takes the same path, however often it is called.

    Args:
        function: f; a noisy one can lead astray.
        low: l.
        high: h, above l.
        evaluations: How often f may be evaluated, at least 2.

    Raises:
        ValueError: The interval is empty or not finite, or there are less than two evaluations.

    Examples:
        >>> points = golden_section_maximum(lambda x: -((x - 2) ** 2), 0.0, 5.0, evaluations=12)
        >>> x, value = max(points, key=lambda point: point[1])
        >>> round(x, 1)
        2.0
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"interval: expected finite low < high, got {low} and {high}; give a range to search")
    if evaluations < 2:
        raise ValueError(f"evaluations: expected 2 or more, got {evaluations}; one point says nothing about a maximum")
    visited = []

    def evaluate(x: float) -> float:
        value = function(x)
        visited.append((x, value))
        return -math.inf if math.isnan(value) else value

    left, right = high - GOLDEN_RATIO * (high - low), low + GOLDEN_RATIO * (high - low)
    left_value, right_value = evaluate(left), evaluate(right)
    while len(visited) < evaluations:
        if left_value >= right_value:
            high, right, right_value = right, left, left_value
            left = high - GOLDEN_RATIO * (high - low)
            left_value = evaluate(left)
        else:
            low, left, left_value = left, right, right_value
            right = low + GOLDEN_RATIO * (high - low)
            right_value = evaluate(right)
    return visited


logger = logging.get_logger(__name__)

_FILE = "epsilon_search.json"


def search_epsilon(
    trainer: ParameterDefenseMixin,
    low: float,
    high: float,
    *,
    direction: Direction,
    steps: Sequence[int] | None = None,
    n_trials: int = 6,
    compute_objective: Callable[[dict[str, float]], float] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    path: str | Path | None = None,
) -> SearchRecord:
    """Search the ε (and K) with which training ends best, by golden section on log ε.

    Both papers report that the result first rises and then falls with ε and with K (paper 2, section 5.1). So for each
    K of `steps`, from the smallest on, ε is searched; when a K's best is worse than that of the one before, the search
    ends. Each point is one training from `model_init`, in a folder of its own under `args.output_dir`.

    A record is written after each training. Called again, the search goes on where it was interrupted, also in the
    middle of a training if that saved checkpoints; with a larger `n_trials` it goes further.

    Args:
        trainer: A defended Trainer with `model_init` and a defense that has a constraint. It ends with the model of
            the last training, and its own defense.
        low: Smallest ε, above 0.
        high: Largest ε.
        direction: "maximize" for an accuracy, "minimize" for a loss.
        steps: The numbers K to try; None, the default, for that of the defense.
        n_trials: Trainings for each K, at least 2. Default 6, which leaves 0.15 of the range on the log scale.
        compute_objective: From metrics to the objective, as in `Trainer.hyperparameter_search`. Default: the
            evaluation loss if it is the only metric, else the sum of all others.
        evaluate: What is measured after each training. Default `trainer.evaluate`; a function that calls a
            `CorruptionEvaluator` searches the ε that is best under corruption.
        path: Where the record is kept. Default `epsilon_search.json` in `args.output_dir`.

    Returns:
        The record; `record.best` is the best trial, `hf_parcor.reports.tables.search_table` and
        `hf_parcor.reports.plots.plot_search` draw it.

    Raises:
        ValueError: No `model_init`, a defense without constraint or with a fixed step size, an empty range, or a
            record of another search at `path`.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from hf_parcor import ParameterDefenseTrainer
        >>> config = BertConfig(
        ...     vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> rows = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4, 5, 6], "labels": 1}]
        >>> trainer = ParameterDefenseTrainer(
        ...     model_init=lambda: BertForSequenceClassification(config),
        ...     args=TrainingArguments(
        ...         tempfile.mkdtemp(), max_steps=1, use_cpu=True, disable_tqdm=True, report_to="none"
        ...     ),
        ...     train_dataset=rows,
        ...     eval_dataset=rows,
        ... )
        >>> record = search_epsilon(trainer, low=0.01, high=1.0, direction="minimize", n_trials=2)
        {...}
        >>> [round(trial.epsilon, 3) for trial in record.trials]
        [0.058, 0.172]
    """
    defense = _searchable(trainer, steps)
    if not 0 < low < high < math.inf:
        raise ValueError(f"range of epsilon: expected 0 < low < high, got {low} and {high}; give both in that order")
    if direction not in ("maximize", "minimize"):
        raise ValueError(f"direction: expected 'maximize' or 'minimize', got {direction!r}; an accuracy is maximized")
    check_count("n_trials", n_trials, minimum=2)
    folder = Path(str(trainer.args.output_dir))
    path = folder / _FILE if path is None else Path(path)
    record = _begin(path, SearchRecord(_described(defense, steps), low, high, direction))

    def objective(count: int | None, log_epsilon: float) -> float:
        nonlocal record
        epsilon = float(f"{math.exp(log_epsilon):.4g}")  # a number that people can type again
        for trial in record.trials:
            if (trial.epsilon, trial.steps) == (epsilon, count):
                return record.score(trial)
        name = f"epsilon-{epsilon:g}" if count is None else f"steps-{count}-epsilon-{epsilon:g}"
        logger.info(f"Search: training with {name.replace('-', ' ')}")
        with _settings(trainer, _with(defense, epsilon, count), folder / name):
            trainer.train(resume_from_checkpoint=last_checkpoint(folder / name))
            metrics = (evaluate or trainer.evaluate)()
            collapsed = bool(signs_of_collapse(trainer.state.log_history))
        value = float((compute_objective or default_compute_objective)(metrics))
        trial = SearchTrial(epsilon, count, value, _numbers(metrics), collapsed)
        record = replace(record, trials=(*record.trials, trial))
        if trainer.is_world_process_zero():
            record.save(path)
        return record.score(trial)

    bests: list[float] = []
    for count in [None] if steps is None else sorted(set(steps)):
        of_log_epsilon = partial(objective, count)
        visited = golden_section_maximum(of_log_epsilon, math.log(low), math.log(high), n_trials)
        bests.append(max(value for _, value in visited))
        if len(bests) > 1 and bests[-1] < bests[-2]:
            break
    return record


def _searchable(trainer: ParameterDefenseMixin, steps: Sequence[int] | None) -> ConstrainedDefense:
    defense = trainer.defense
    if trainer.model_init is None:
        raise ValueError("trainer: expected one made with model_init, got none; each training starts from a new model")
    if not isinstance(defense, ConstrainedDefense):
        raise ValueError(f"defense: expected one with a constraint, got {defense}; it has no epsilon to search")
    if steps is not None:
        if not steps:
            raise ValueError("steps: expected at least one K, got none; leave it out to keep that of the defense")
        if "steps" not in {setting.name for setting in fields(defense)}:
            raise ValueError(f"steps: expected None, got {steps} for {defense}, which takes no steps; leave it out")
        for count in steps:
            check_count("steps", count, minimum=1)
    if getattr(defense, "step_size", None) is not None:
        raise ValueError("step_size: expected None, which grows with epsilon, got a fixed one; leave it out")
    return defense


def _with(defense: ConstrainedDefense, epsilon: float, steps: int | None) -> ConstrainedDefense:
    changed: dict[str, Any] = {"constraint": replace(defense.constraint, epsilon=epsilon)}
    if steps is not None:
        changed["steps"] = steps
    return replace(defense, **changed)


def _described(defense: ConstrainedDefense, steps: Sequence[int] | None) -> str:
    """Return the settings that stay the same, by which a search is known again."""
    return str(_with(defense, 1.0, None if steps is None else 1))


def _begin(path: Path, new: SearchRecord) -> SearchRecord:
    if not path.exists():
        return new
    old = SearchRecord.load(path)
    if replace(old, trials=()) != new:
        raise ValueError(
            f"{path}: expected a record of this search, got one of {old.defense} for epsilon from {old.low:g} to "
            f"{old.high:g}, to {old.direction}; give another path, or remove it"
        )
    logger.info(f"Search: {len(old.trials)} trainings are in {path} already")
    return old


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


@contextmanager
def _settings(trainer: ParameterDefenseMixin, defense: ConstrainedDefense, folder: Path) -> Iterator[None]:
    before = trainer.defense, trainer.args.output_dir
    trainer.defense, trainer.args.output_dir = defense, str(folder)
    try:
        yield
    finally:
        trainer.defense, trainer.args.output_dir = before
