"""What programs that train have in common: their arguments, a training, and a measurement, that are saved."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as logging_of_transformers

from hf_parcor.arguments import check_count
from hf_parcor.cards.mixin import PublishingMixin
from hf_parcor.corruptions import Corruption
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.evaluation import CorruptionEvaluator, RobustnessArguments, RobustnessCallback
from hf_parcor.evaluation.identity.provenance import folder_name
from hf_parcor.records import EvaluationRecord
from hf_parcor.reports.tables import comparison_table
from hf_parcor.training import signs_of_collapse


def read_arguments(*kinds: type) -> tuple[Any, ...]:
    """Return a program's arguments, from its flags or from one JSON file, and let the program log as they say.

    Args:
        *kinds: Dataclasses; one of them is `TrainingArguments`, or a subclass.

    Examples:
        >>> import sys
        >>> from dataclasses import dataclass
        >>> from unittest.mock import patch
        >>> @dataclass
        ... class Size:
        ...     width: int = 8
        >>> with patch.object(
        ...     sys, "argv", ["program.py", "--width", "16", "--output_dir", "out", "--use_cpu", "true"]
        ... ):
        ...     size, training = read_arguments(Size, TrainingArguments)
        >>> size.width, training.output_dir
        (16, 'out')
    """
    parser = HfArgumentParser(kinds)  # type: ignore[arg-type]
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        parsed = parser.parse_json_file(json_file=str(Path(sys.argv[1]).resolve()))
    else:
        parsed = parser.parse_args_into_dataclasses()
    training = next(one for one in parsed if isinstance(one, TrainingArguments))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging_of_transformers.set_verbosity(training.get_process_log_level())
    return tuple(parsed)


def check_something_is_done(training: TrainingArguments, *, predicts: bool = False) -> None:
    """Refuse a run that would do nothing, and end as if all were well.

    Args:
        training: What was asked for.
        predicts: Whether the program knows `do_predict`.

    Raises:
        ValueError: Nothing was asked for that the program does.

    Examples:
        >>> check_something_is_done(TrainingArguments(output_dir="out", use_cpu=True))
        Traceback (most recent call last):
        ...
        ValueError: expected --do_train, --do_eval or both, got none; say what is to be done
    """
    if training.do_train or training.do_eval or (predicts and training.do_predict):
        return
    expected = "--do_train, --do_eval, --do_predict or several" if predicts else "--do_train, --do_eval or both"
    got = "--do_predict alone, which does nothing here" if training.do_predict else "none"
    raise ValueError(f"expected {expected}, got {got}; say what is to be done")


def check_counts(settings: object, *names: str) -> None:
    """Refuse numbers of rows that leave none, before anything is loaded.

    Args:
        settings: What has them.
        *names: What they are called there; None stands for all rows.

    Raises:
        ValueError: One is less than 1.

    Examples:
        >>> from argparse import Namespace
        >>> check_counts(Namespace(max_eval_samples=0), "max_eval_samples")
        Traceback (most recent call last):
        ...
        ValueError: max_eval_samples: expected a whole number >= 1, got 0; pass 1 or more
    """
    for name in names:
        if getattr(settings, name) is not None:
            check_count(name, getattr(settings, name))


class VariedByEpoch(Protocol):
    """Data that is varied anew in each epoch, as the number of the epoch says."""

    def set_epoch(self, epoch: int) -> None:
        """Vary it as in an epoch."""


class NewEpoch(TrainerCallback):
    """Tells data which epoch begins: the data loader of a resumed epoch does not.

    Args:
        data: What is trained on.
    """

    def __init__(self, data: VariedByEpoch) -> None:
        self._data = data

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse workers that would not hear of a new epoch.

        Raises:
            ValueError: They live on from one to the next.
        """
        if args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers: expected workers that begin anew in each epoch, got some that live "
                "on, and vary the data as in the first one; leave the flag out"
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Vary the data anew, or as it was when the epoch began that is resumed."""
        self._data.set_epoch(int((state.epoch or 0) + 1e-6))


def train_and_save(trainer: Trainer, checkpoint: str | None, robustness: RobustnessArguments, **counts: int) -> None:
    """Train, and save model, state and `train_results.json`, which says whether the run shows signs of collapse.

    Args:
        trainer: The Trainer.
        checkpoint: Where to go on from; None for from the start (see `checkpoint_to_resume`).
        robustness: What its evaluations measure as well, by a `RobustnessCallback`.
        **counts: What else the metrics shall say, such as `train_samples`.

    Raises:
        ValueError: Corruptions are to be watched, and the Trainer does not evaluate while it trains.
    """
    if robustness.watched_corruptions is not None:
        if trainer.args.eval_strategy == "no":
            raise ValueError(
                "watched_corruptions: expected evaluations in training, got --eval_strategy no; pass --do_eval and "
                "--eval_strategy epoch, or steps"
            )
        watched = read_corruptions(robustness.watched_corruptions)
        trials, seed = robustness.corruption_trials, robustness.corruption_seed
        trainer.add_callback(RobustnessCallback(trainer, watched, trials=trials, seed=seed))
    save_training(trainer, trainer.train(resume_from_checkpoint=checkpoint).metrics, **counts)


def save_training(trainer: Trainer, metrics: Mapping[str, float], **counts: int) -> None:
    """Save a trained model, its state, and `train_results.json`, which is logged too.

    Nothing is pushed to the Hub: that is the end of the program, when the model is measured (see `push_if_asked`).

    Args:
        trainer: The Trainer.
        metrics: Those of its training; whether it shows signs of collapse is added.
        **counts: What else they shall say.
    """
    collapsed = float(bool(signs_of_collapse(trainer.state.log_history, trainer.model)))
    found = {**metrics, **counts, "train_collapsed": collapsed}
    trainer.save_model(_internal_call=True)  # any other call would push it
    trainer.log_metrics("train", dict(found))
    trainer.save_metrics("train", found)
    trainer.save_state()


def measure_and_save(
    trainer: Trainer,
    evaluator: CorruptionEvaluator,
    corruptions: Sequence[Corruption],
    robustness: RobustnessArguments,
    name: str,
    metric: str = "accuracy",
) -> None:
    """Measure a trained model under corruptions, all processes together; save `robustness.json`, and print its table.

    Args:
        trainer: Whose output folder the record goes to.
        evaluator: Of its model.
        corruptions: What the weights are corrupted by.
        robustness: Trials and their seed.
        name: What the table calls the column.
        metric: What the table shows.
    """
    record = evaluator.evaluate(corruptions, robustness.corruption_trials, robustness.corruption_seed)
    save_measurement(trainer, record, name, metric)


def of_trained(trainer: Trainer, record: EvaluationRecord) -> EvaluationRecord:
    """Return what was measured of a Trainer's model, named by the output folder where it was trained.

    A model is named by what it was loaded from, and after a training that is what it began as.
    """
    if not trainer.state.global_step:
        return record
    return replace(record, model=folder_name(str(trainer.args.output_dir)))


def save_measurement(trainer: Trainer, record: EvaluationRecord, name: str, metric: str) -> None:
    """Save what was measured of a Trainer's model as `robustness.json`, and print its table and where the record is.

    The first process alone does. The record is named as by `of_trained`, and the Trainer's card will say it.

    Args:
        trainer: Whose output folder the record goes to.
        record: What was measured.
        name: What the table calls the column.
        metric: What the table shows.
    """
    if trainer.is_world_process_zero():
        record = of_trained(trainer, record)
        path = record.save(Path(str(trainer.args.output_dir)) / "robustness.json")
        print(f"{comparison_table({name: record}, metric)}\nThe record is in {path}.")
        show_on_card(trainer, record)


def show_on_card(trainer: Trainer, record: EvaluationRecord) -> None:
    """Let the card of a Trainer that writes cards say what was measured of its model by another evaluator."""
    if isinstance(trainer, PublishingMixin):
        trainer.show_on_card({"eval": record})


def push_if_asked(trainer: Trainer) -> None:
    """Push a model to the Hub, with its card and the records beside it, if `push_to_hub` is set; in all processes."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
