"""Which radius or strength, and how many steps: golden-section search over settings, one training a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import default_compute_objective
from transformers.utils import logging

from hf_parcor.arguments import check_count
from hf_parcor.defenses import ConstrainedDefense, CorruptionRisk, Defense
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

_FILE, _FILE_OF_STRENGTHS = "epsilon_search.json", "strength_search.json"


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
    """Search the ε (and K) that give the best result of training, by golden section on log ε.

    Each point is one training from `model_init`, in its own folder under `args.output_dir`. A record is written after
    each training. To continue an interrupted search, call it again: it goes on where it stopped, even in the middle of
    a training that saved checkpoints. With a larger `n_trials` it goes further.

    Both papers report that the result first rises and then falls with ε and with K (paper 2, section 5.1). So ε is
    searched for each K in `steps`, starting with the smallest. The search ends when the best result for a K is worse
    than that for the K before.

    Args:
        trainer: A defended Trainer with `model_init` and a defense that has a constraint. Afterwards it holds the
            model of the last training, and its own defense again.
        low: Smallest ε, above 0.
        high: Largest ε.
        direction: "maximize" for an accuracy, "minimize" for a loss.
        steps: The numbers K to try. None, the default, takes that of the defense.
        n_trials: Trainings for each K, at least 2. Default 6, which leaves 0.15 of the range on the log scale.
        compute_objective: Function from metrics to the objective, as in `Trainer.hyperparameter_search`. Default: the
            evaluation loss if it is the only metric, else the sum of all others.
        evaluate: Measures the metrics after each training. Default `trainer.evaluate`. To search the ε that is best
            under corruption, pass a function that calls a `CorruptionEvaluator`.
        path: File of the record. Default `epsilon_search.json` in `args.output_dir`.

    Returns:
        The record. `record.best` is the best trial; `hf_parcor.reports.tables.search_table` and
        `hf_parcor.reports.plots.plot_search` show the record.

    Raises:
        ValueError: There is no `model_init`, or neither `evaluate` nor an `eval_dataset`; the defense has no
            constraint, or a fixed step size; the range is empty; the file at `path` is the record of another search;
            or there is no file, but `args.output_dir` holds checkpoints of another search.

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
        >>> [round(trial.strength, 3) for trial in record.trials]
        [0.058, 0.172]
    """
    defense = _searchable(trainer, steps)
    record = SearchRecord(_described(defense, steps), low, high, direction)
    counts = [None] if steps is None else sorted(set(steps))
    return _search(trainer, record, partial(_with, defense), counts, n_trials, compute_objective, evaluate, path)


def search_strength(
    trainer: ParameterDefenseMixin,
    low: float,
    high: float,
    *,
    direction: Direction,
    n_trials: int = 6,
    compute_objective: Callable[[dict[str, float]], float] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    path: str | Path | None = None,
) -> SearchRecord:
    """Search the strength of a `CorruptionRisk`'s corruption that gives the best result, as `search_epsilon` does.

    The strength is σ of `GaussianNoise`, the number of bits of `Quantization`, and so on. If a whole number comes
    again, its training is not repeated.

    Args:
        trainer: A defended Trainer with `model_init` and a `CorruptionRisk` of one corruption.
        low: Smallest strength, above 0.
        high: Largest strength.
        direction: As in `search_epsilon`.
        n_trials: As in `search_epsilon`.
        compute_objective: As in `search_epsilon`.
        evaluate: As in `search_epsilon`.
        path: As in `search_epsilon`. Default `strength_search.json` in `args.output_dir`.

    Raises:
        ValueError: There is no `model_init`; the defense is not a `CorruptionRisk` of one corruption with a strength;
            the range is empty, or leaves what the corruption allows; or as in `search_epsilon`.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from hf_parcor import CorruptionRisk, GaussianNoise, ParameterDefenseTrainer
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
        ...     defense=CorruptionRisk(GaussianNoise(0.1)),
        ... )
        >>> record = search_strength(trainer, low=0.01, high=1.0, direction="minimize", n_trials=2)
        {...}
        >>> record.setting, [round(trial.strength, 3) for trial in record.trials]
        ('std', [0.058, 0.172])
    """
    defense = trainer.defense
    if not isinstance(defense, CorruptionRisk) or len(defense.corruptions) != 1:
        raise ValueError(f"defense: expected a CorruptionRisk of one corruption, got {defense}; there is no strength")
    (corruption,) = defense.corruptions
    if corruption.strength is None:
        raise ValueError(
            f"defense: expected a corruption whose strength is a number, got {corruption}; compare trainings by hand"
        )
    (kind, strength), risk = corruption.strength, defense

    def with_settings(value: float, steps: int | None) -> CorruptionRisk:
        return replace(risk, corruption=corruption.with_strength(value))

    whole = isinstance(strength, int)
    described = str(with_settings(2 if whole else 0.5, None))  # the same for all strengths
    record = SearchRecord(described, low, high, direction, setting=kind.setting)
    return _search(trainer, record, with_settings, [None], n_trials, compute_objective, evaluate, path, whole=whole)


def _search(
    trainer: ParameterDefenseMixin,
    new: SearchRecord,
    with_settings: Callable[[float, int | None], Defense],
    counts: Sequence[int | None],
    n_trials: int,
    compute_objective: Callable[[dict[str, float]], float] | None,
    evaluate: Callable[[], dict[str, float]] | None,
    path: str | Path | None,
    *,
    whole: bool = False,
) -> SearchRecord:
    """Search for each K in turn, until the best of one is worse than that of the one before."""
    if trainer.model_init is None:
        raise ValueError("trainer: expected one made with model_init, got none; each training starts from a new model")
    if evaluate is None and trainer.eval_dataset is None:
        raise ValueError(
            "evaluate: expected a function, or a Trainer with an eval_dataset, got neither; no training could be "
            "judged: pass evaluate=, which may be trainer.evaluate where that needs no eval_dataset"
        )
    low, high, name_of = new.low, new.high, new.setting
    if not 0 < low < high < math.inf:
        raise ValueError(f"range of {name_of}: expected 0 < low < high, got {low} and {high}; give both in that order")
    if new.direction not in ("maximize", "minimize"):
        raise ValueError(f"direction: expected 'maximize' or 'minimize', got {new.direction!r}; see search_epsilon")
    check_count("n_trials", n_trials, minimum=2)
    folder = Path(str(trainer.args.output_dir))
    path = folder / (_FILE if name_of == "epsilon" else _FILE_OF_STRENGTHS) if path is None else Path(path)

    def readable(strength: float) -> float:
        return round(strength) if whole else float(f"{strength:.4g}")  # a number that people can type again

    for end in (low, high):
        with_settings(readable(end), counts[0])  # refuses what some training would be refused for

    def name(count: object, strength: str) -> str:
        return f"{name_of}-{strength}" if count is None else f"steps-{count}-{name_of}-{strength}"

    record = _begin(path, new, folder, name(counts[0] and "*", "*"))
    if trainer.is_world_process_zero():
        record.save(path)  # before any checkpoint, which is thereby known as its own

    def objective(count: int | None, log_strength: float) -> float:
        nonlocal record
        strength = readable(math.exp(log_strength))
        for trial in record.trials:
            if (trial.strength, trial.steps) == (strength, count):
                return record.score(trial)
        own = folder / name(count, f"{strength:g}")
        logger.info(f"Search: training with {own.name.replace('-', ' ')}")
        with _settings(trainer, with_settings(strength, count), own):
            trainer.train(resume_from_checkpoint=last_checkpoint(own))
            metrics = _measured(evaluate or trainer.evaluate)
            collapsed = bool(signs_of_collapse(trainer.state.log_history, trainer.model))
        value = float((compute_objective or default_compute_objective)(metrics))
        trial = SearchTrial(strength, count, value, _numbers(metrics), collapsed)
        record = replace(record, trials=(*record.trials, trial))
        if trainer.is_world_process_zero():
            record.save(path)
        return record.score(trial)

    bests: list[float] = []
    for count in counts:
        of_log_strength = partial(objective, count)
        visited = golden_section_maximum(of_log_strength, math.log(low), math.log(high), n_trials)
        bests.append(max(value for _, value in visited))
        if len(bests) > 1 and bests[-1] < bests[-2]:
            break
    return record


def _searchable(trainer: ParameterDefenseMixin, steps: Sequence[int] | None) -> ConstrainedDefense:
    defense = trainer.defense
    if not isinstance(defense, ConstrainedDefense):
        raise ValueError(
            f"defense: expected one with a constraint, got {defense}, which has no epsilon to search; "
            "search_strength searches that of a corruption"
        )
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


def _begin(path: Path, new: SearchRecord, folder: Path, trainings: str) -> SearchRecord:
    if not path.exists():
        others = [one for one in sorted(folder.glob(trainings)) if last_checkpoint(one)]
        if others:
            raise ValueError(
                f"{folder}: expected no trainings of another search, got checkpoints in {others[0].name}, which this "
                f"one would go on from, as there is no {path}; remove such folders, or give another output_dir"
            )
        return new
    old = SearchRecord.load(path)
    if replace(old, trials=()) != new:
        raise ValueError(
            f"{path}: expected a record of this search, got one of {old.defense} for {old.setting} from {old.low:g} "
            f"to {old.high:g}, to {old.direction}; give another path, or remove it"
        )
    logger.warning(
        f"Search: it goes on after the {len(old.trials)} trainings in {path}; remove that and the folders of the "
        "trainings to begin anew, where the Trainer's arguments or data have changed since."
    )
    return old


def _measured(evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    metrics = evaluate()
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"evaluate: expected numbers by name, got {metrics!r}; return what compute_objective reads. The training "
            "is kept in its checkpoints, where it has any"
        )
    return dict(metrics)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


@contextmanager
def _settings(trainer: ParameterDefenseMixin, defense: Defense, folder: Path) -> Iterator[None]:
    before = trainer.defense, trainer.args.output_dir
    trainer.defense, trainer.args.output_dir = defense, str(folder)
    try:
        yield
    finally:
        trainer.defense, trainer.args.output_dir = before
