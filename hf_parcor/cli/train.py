"""`hf-parcor train`: a model whose weights are not fragile."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from hf_parcor.arguments import check_count, check_not_negative, check_positive
from hf_parcor.cli.flags import LARGEST_SEED, OF_SUBJECT, TRAIN_SPLIT, TRIALS, add_subject, at_least, corruption, share
from hf_parcor.cli.parsing import Command, Parser
from hf_parcor.cli.sources import check_sources, read_data, rows_of
from hf_parcor.cli.terminal import (
    PROBE,
    ROBUSTNESS,
    check_output_folder,
    going_on,
    refused,
    set_aside,
    show,
    table_of,
    tell,
)
from hf_parcor.errors import InputError, one_line
from hf_parcor.hub_data import failures_of_hub

if TYPE_CHECKING:
    from hf_parcor.cli.subject import Subject
    from hf_parcor.corruptions import Corruption
    from hf_parcor.evaluation import CorruptionEvaluator
    from hf_parcor.tasks import Processed, Rows, Task
    from hf_parcor.trainers import ParameterDefenseTrainer
    from hf_parcor.training import ParameterDefenseTrainingArguments


class Train(Command):
    """Fine-tunes a model with its parameters defended, and measures what that was worth."""

    summary = "fine-tune a model, defended, and measure its robustness"
    usage = "MODEL --dataset DATA --output-dir DIR [flags]"
    example = (
        "google-bert/bert-base-uncased --task text-classification \\\n"
        "      --dataset stanfordnlp/sst2 --output-dir defended \\\n"
        "      --num-train-epochs 1 --defense-epsilon 0.1"
    )

    spellings: ClassVar[Mapping[str, str]] = MappingProxyType({**OF_SUBJECT, "p": "--defense-norm"})
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **dict.fromkeys(
                ("rho", "epsilon", "defense-rho", "sam-rho"), "the radius is called epsilon here: --defense-epsilon"
            ),
            "lr": "it is --learning-rate",
            "epochs": "it is --num-train-epochs",
            "batch-size": "it is --per-device-train-batch-size, and --per-device-eval-batch-size where it is measured",
            "device": "it is on the accelerator where there is one; --use-cpu true for none",
            "json": f"the record is in {ROBUSTNESS} of --output-dir",
            "quiet": "it is --disable-tqdm true",
            "dtype": "precision is the Trainer's: --bf16, --fp16",
            **dict.fromkeys(("device-map", "offload-folder"), "what is offloaded cannot be defended: leave it out"),
            **dict.fromkeys(("gamma", "awp-gamma"), "it is --defense-epsilon with --defense-per-tensor true"),
        }
    )

    def add_arguments(self, parser: Parser) -> None:
        """Add what `--help` shows."""
        add_subject(parser)
        group = parser.add_argument_group("training")
        group.add_argument("--output-dir", metavar="DIR", help="where the model, its checkpoints and the record go")
        group.add_argument("--train-dataset", metavar="DATA", help="default: --dataset, which is measured on")
        group.add_argument(
            "--validation-split",
            type=share,
            default=0.1,
            metavar="P",
            help="where both would be the same rows, as of a file: hold this share of them out of training, drawn "
            "at random, and measure on it; default: %(default)s",
        )
        group.add_argument("--split-seed", type=at_least(0), default=0, metavar="N", help="of that draw; default: 0")
        group.add_argument("--train-split", default=TRAIN_SPLIT, metavar="NAME", help="default: %(default)s")
        group.add_argument("--train-limit", type=at_least(1), metavar="N", help="train on the first N rows only")
        group.add_argument(
            "--corruptions",
            nargs="*",
            type=corruption,
            metavar="NAME",
            help="what the model is measured under, with strengths, as in evaluate: gradient=0.1,0.2 quantization=4; "
            "default: the kinds of paper 2, Table 1, bit flips, and those of --defense corruption",
        )
        group.add_argument("--trials", type=at_least(1), default=TRIALS, metavar="N", help="of random corruptions")
        group.add_argument(
            "--corruption-seed", type=at_least(0, LARGEST_SEED), default=0, metavar="N", help="default: 0"
        )
        group.add_argument("--skip-corruptions", action="store_true", help="measure the clean model only")
        group.add_argument("--help-all", action="store_true", help="show all flags of the Trainer and the defense")
        parser.epilog = (
            "Every flag of transformers.TrainingArguments works too (--learning-rate,\n"
            "--num-train-epochs, ...; as --learning_rate, too), and those of the defense\n"
            f"(--defense-epsilon, --defense-target-modules, ...); --help-all shows them.\n\n{parser.epilog}"
        )

    @staticmethod
    def late_flags() -> argparse.ArgumentParser:
        """Return a parser with the flags of the Trainer and of the defense, from the fields of their arguments."""
        from transformers import HfArgumentParser

        from hf_parcor.training import ParameterDefenseTrainingArguments

        ours: Any = ParameterDefenseTrainingArguments
        parser = HfArgumentParser(ours, add_help=False)
        parser.add_argument("--help-all", action="help", help="show this")
        return parser

    def check(self, arguments: argparse.Namespace) -> None:
        """Look for model and data, unless a file may name them too."""
        if arguments.config is None and not arguments.help_all:
            check_sources(arguments)

    def run(self, arguments: argparse.Namespace) -> None:
        """Train, measure, and show the record."""
        if arguments.config is not None:
            check_sources(arguments)
        if not arguments.output_dir:
            raise InputError("--output-dir: expected a folder for what is trained, got none; name one")
        if arguments.skip_corruptions and arguments.corruptions is not None:
            raise InputError("--skip-corruptions: expected none beside --corruptions, got both; leave one of them out")
        with refused(ValueError):
            check_numbers(arguments)
        from dataclasses import fields

        from transformers import set_seed

        from hf_parcor.cli.subject import find_task, measured, origin_of, prepared
        from hf_parcor.programs import push_if_asked
        from hf_parcor.trainers import ParameterDefenseTrainer
        from hf_parcor.training import ParameterDefenseTrainingArguments

        names = [field.name for field in fields(ParameterDefenseTrainingArguments) if field.init]
        with redirect_stdout(sys.stderr):
            with refused(ValueError, TypeError, ImportError, OSError):
                training = ParameterDefenseTrainingArguments(**{name: getattr(arguments, name) for name in names})
            check_output_folder(str(training.output_dir))
            corruptions = _corruptions(arguments, training)
            set_seed(training.seed)
            train_rows, rows, given = _training_and_validation(arguments)
            task, columns = find_task(arguments, train_rows.first(arguments.train_limit), given)
            if task.trained_by:
                raise InputError(
                    f"--task: expected one that the Trainer of Transformers trains, got {task.name}; defend it by a "
                    f"class Defended(ParameterDefenseMixin, {task.trained_by}), see examples/train_embeddings.py"
                )
            training.remove_unused_columns = training.remove_unused_columns and task.examples_are_inputs
            measured_columns = task.find_columns(rows, given)
            model = _model(task, arguments, [(train_rows, columns), (rows, measured_columns)])
            train_rows, rows = train_rows.first(arguments.train_limit), rows.first(arguments.limit)
            processor = task.load_processor(arguments.model, **origin_of(arguments))
            processed = prepared(arguments, task, model, processor)
            _check_smoothing(training, task, processed)
            examples: Any = task.examples(train_rows, columns, processed)
            _check_full_batch(training, len(examples))
            with refused(ValueError, TypeError, *failures_of_hub()), _beginning():
                trainer = ParameterDefenseTrainer(
                    model=model,
                    args=training,
                    train_dataset=examples,
                    data_collator=task.training_collator(processed),
                    processing_class=processor,
                )
            subject = measured(task, processed, rows, measured_columns, training.eval_batch_size, arguments.metric)
            with refused(ValueError, NotImplementedError):  # before the training, not after it
                _evaluator(trainer, subject).check(corruptions)
            _announce(arguments, corruptions, len(rows.entries))
            with going_on(
                "with --resume-from-checkpoint true the same command goes on from the last checkpoint, if any"
            ):
                _train(trainer, training)
        _measure(arguments, trainer, subject, corruptions)
        with redirect_stdout(sys.stderr), refused(*failures_of_hub()):
            push_if_asked(trainer)


# Of the Trainer's numbers those that it takes as they come: some then fail in another library, some train nonsense.
_LEAST_WHOLE: Mapping[str, int] = MappingProxyType(
    {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_total_limit": 1,
        "dataloader_num_workers": 0,
        "seed": 0,
        "data_seed": 0,
    }
)
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm")
_POSITIVE = ("num_train_epochs", "save_steps")
_WHILE_TRAINING: Mapping[str, Any] = MappingProxyType(
    {"eval_on_start": False, "eval_strategy": "no", "load_best_model_at_end": False}
)
_BELOW_1 = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


def check_numbers(arguments: Any) -> None:
    """Refuse numbers that no training has.

    Args:
        arguments: The fields of `TrainingArguments` as attributes.

    Raises:
        ValueError: One of them is such a number.
    """
    for name, least in _LEAST_WHOLE.items():
        if getattr(arguments, name) is not None:
            check_count(name, getattr(arguments, name), least)
    for name in ("seed", "data_seed"):
        if (getattr(arguments, name) or 0) > LARGEST_SEED:
            got = f"got {getattr(arguments, name)}; pass a smaller one"
            raise ValueError(f"{name}: expected {LARGEST_SEED} at most, {got}")
    for name in _NOT_NEGATIVE:
        check_not_negative(name, getattr(arguments, name), "pass 0 or more")
    for name in _POSITIVE:
        check_positive(name, getattr(arguments, name))
    for name in _BELOW_1:
        if not 0 <= getattr(arguments, name) < 1:
            raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(arguments, name)}; pass less than 1")
    if arguments.max_steps != -1 and arguments.max_steps < 1:
        got = f"got {arguments.max_steps}; leave it out to train for num_train_epochs"
        raise ValueError(f"max_steps: expected 1 or more, or -1 for no limit, {got}")
    for name, unmeasured in _WHILE_TRAINING.items():
        if getattr(arguments, name) not in (unmeasured, None):
            raise ValueError(
                f"{name}: expected {unmeasured}, since the model is measured when trained, not before, got "
                f"{getattr(arguments, name)}; leave it out"
            )
    if arguments.save_strategy == "best":
        raise ValueError(
            "save_strategy: expected steps, epoch or no, since the model is measured when trained, not before, got "
            "best; name one of these, or leave it out"
        )


def _check_full_batch(training: ParameterDefenseTrainingArguments, rows: int) -> None:
    """Refuse a training without a step: no batch is full, and others are dropped.

    Raises:
        InputError: It is one.
    """
    needed = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and rows < needed:
        raise InputError(
            f"--dataloader-drop-last: expected a full batch to train on, of {needed:,} rows, got {rows:,}; lower "
            "--per-device-train-batch-size, or leave it out"
        )


def _check_smoothing(training: ParameterDefenseTrainingArguments, task: Task, processed: Processed) -> None:
    """Refuse to smooth labels where the Trainer would fail at it, or do nothing, or something else.

    Raises:
        InputError: It would.
    """
    factor = training.label_smoothing_factor
    if factor and not task.smooths_labels(processed):
        raise InputError(
            f"--label-smoothing-factor: expected none for {task.name} by {type(processed.model).__name__}, whose "
            f"labels the Trainer cannot smooth, got {factor}; leave it out"
        )


def _corruptions(arguments: argparse.Namespace, training: ParameterDefenseTrainingArguments) -> list[Corruption]:
    """Return what the trained model is measured under.

    Raises:
        InputError: A word names no corruption, or has no strength, or the flags describe no defense.
    """
    from hf_parcor.corruptions import corruptions_of_table_1
    from hf_parcor.corruptions.catalogue import read_corruptions
    from hf_parcor.training import build_defense

    if arguments.skip_corruptions:
        return []
    if arguments.corruptions is not None:
        return read_corruptions(arguments.corruptions)
    found = corruptions_of_table_1()
    with refused(ValueError, TypeError, NotImplementedError):
        trained_against = getattr(build_defense(training), "corruptions", ())
    return [*found, *(one for one in trained_against if one not in found)]


def _announce(arguments: argparse.Namespace, corruptions: Sequence[Corruption], rows: int) -> None:
    """Say before the training how much is measured after it, which may take as long, and how to have less."""
    if not corruptions:
        return
    trials = sum(arguments.trials if one.stochastic else 1 for one in corruptions)
    count = len(corruptions)
    in_all = f", {trials} trials in all" if trials > count else ""
    shorter = "--trials 1 and --limit make" if trials > count else "--limit makes"
    tell(
        f"after the training the model is measured {1 + trials} times on {rows:,} rows: as it is, and under "
        f"{count} corruption{'s' * (count > 1)}{in_all}; --skip-corruptions leaves these out, --corruptions names "
        f"fewer, {shorter} it shorter"
    )


def _training_and_validation(arguments: argparse.Namespace) -> tuple[Rows, Rows, dict[str, str]]:
    """Return the rows to train on, others to measure on, and the columns that the flags name.

    Raises:
        InputError: There is no such data, or only one row for both, or one split is a slice of the other.
    """
    rows, given = read_data(arguments)
    source = arguments.train_dataset or arguments.dataset
    one, other = Path(arguments.dataset), Path(source)
    same_source = one.samefile(other) if one.exists() and other.exists() else arguments.dataset == source
    splits = (arguments.split, arguments.train_split)
    if not same_source or (splits[0] != splits[1] and not one.is_file()):
        training = rows_of(arguments, source, arguments.train_split)  # first: it says which splits there are
        if same_source and _share_rows(splits, rows.entries):
            raise InputError(
                f"--split: expected rows that are not trained on, got {splits[0]} beside --train-split {splits[1]}; "
                "name slices that do not overlap, such as train[:90%] and train[90%:]"
            )
        return training, rows, given
    training, held_out = rows.split_off(arguments.validation_split, arguments.split_seed)
    count, limit = len(held_out.entries), arguments.limit
    which = "" if limit is None or limit >= count else f"the first {limit:,} of them "
    tell(
        f"{count:,} of the {len(rows.entries):,} rows of {source} are held out of training, drawn with seed "
        f"{arguments.split_seed}, and {which}measured on; to measure on others, name them with --dataset, and these "
        "with --train-dataset"
    )
    return training, held_out, given


def _share_rows(splits: tuple[str, str], entries: Any) -> bool:
    """Return whether two splits, or slices of splits, of a data set have rows in common.

    Slices of a split whose length the data set does not say are taken to have none.
    """
    known = getattr(getattr(entries, "info", None), "splits", None)
    if known:
        from datasets import ReadInstruction

        lengths = {name: split.num_examples for name, split in known.items()}
        first, second = (ReadInstruction.from_spec(split).to_absolute(lengths) for split in splits)
        pairs = [(one, other) for one in first for other in second if one.splitname == other.splitname]
        return any(max(one.from_, other.from_) < min(one.to, other.to) for one, other in pairs)
    sliced, others = ({part.partition("[")[0].strip(): "[" in part for part in split.split("+")} for split in splits)
    return any(not (sliced[name] and others[name]) for name in sliced.keys() & others.keys())


def _model(task: Task, arguments: argparse.Namespace, parts: Sequence[tuple[Rows, dict[str, str]]]) -> Any:
    """Return the model; one without the task's head gets one, which is to be trained.

    Args:
        task: The task.
        arguments: The flags.
        parts: The rows to train and to measure on, each with its columns: the head knows the classes of both.
    """
    from hf_parcor.cli.subject import origin_of
    from hf_parcor.evaluation.outputs import Problem
    from hf_parcor.tasks import architectures_of

    origin = origin_of(arguments)
    has_head = task.has_head(architectures_of(arguments.model, **origin))
    settings = {} if has_head else task.head_settings(parts)
    if names := list(settings.get("id2label", {}).values()):  # a mistyped label is a class, too
        several = (
            ", of which a row may have any number" if settings.get("problem_type") == Problem.LABELS.value else ""
        )
        tell(f"the new head has {len(names):,} classes{several}: {', '.join(names[:20])}{', …' * (len(names) > 20)}")
    elif "problem_type" in settings:
        tell("the labels are numbers, some with fractions: the new head predicts one (regression)")
    return task.load_model(arguments.model, to_train=True, **origin, **settings)


def _train(trainer: ParameterDefenseTrainer, training: ParameterDefenseTrainingArguments) -> None:
    """Train, and save model, metrics and state.

    Raises:
        InputError: Another library refuses a flag of its own before the first step, as it builds loader, optimizer or
            schedule, or looks for the checkpoint.
    """
    from transformers import TrainerCallback

    from hf_parcor.programs import save_training
    from hf_parcor.training import checkpoint_to_resume

    config = trainer.defense_config
    if config is None:
        tell("not defended, since --defense none")
    else:
        tell(f"defended by {config.defense!r}; --defense none trains without")

    class Begun(TrainerCallback):
        yet = False

        def on_train_begin(self, *arguments: Any, **others: Any) -> None:
            self.yet = True

    begun = Begun()
    trainer.add_callback(begun)
    with _beginning(lambda: begun.yet):
        metrics = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training)).metrics
    if trainer.is_world_process_zero():
        for name in (ROBUSTNESS, PROBE):  # of the weights that are replaced now
            set_aside(Path(str(training.output_dir)) / name)
    examples: Any = trainer.train_dataset
    save_training(trainer, metrics, train_samples=len(examples))


@contextmanager
def _beginning(begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Let what other libraries refuse before the first step be a user's mistake, of a flag of theirs."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if begun() or isinstance(error, InputError) or _raised_by(error) not in _ELSEWHERE:
            raise
        raise InputError(f"training cannot begin ({one_line(error)}); check the flags of the Trainer") from error


_ELSEWHERE = ("accelerate", "torch", "transformers")


def _raised_by(error: BaseException) -> str:
    """Return the package that raised an exception."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _evaluator(trainer: ParameterDefenseTrainer, subject: Subject) -> CorruptionEvaluator:
    from hf_parcor.evaluation import CorruptionEvaluator

    return CorruptionEvaluator(
        subject.model, subject.metric, **subject.settings(progress=not trainer.args.disable_tqdm)
    )


def _measure(
    arguments: argparse.Namespace,
    trainer: ParameterDefenseTrainer,
    subject: Subject,
    corruptions: Sequence[Corruption],
) -> None:
    """Measure the trained model, all processes together, and show the record, which has the name of its folder."""
    from hf_parcor.evaluation import NotEnoughMemoryError
    from hf_parcor.programs import of_trained, show_on_card

    with redirect_stdout(sys.stderr):
        with refused(NotEnoughMemoryError):
            record = _evaluator(trainer, subject).evaluate(corruptions, arguments.trials, arguments.corruption_seed)
        trainer.save_metrics("eval", {f"eval_{name}": values[0] for name, values in record.clean.metrics.items()})
    if not trainer.is_world_process_zero():
        return
    metric = subject.shown(record.clean.metrics)
    of_best = trainer.args.metric_for_best_model in (None, metric, f"eval_{metric}")  # the Trainer's flag of that name
    greater = arguments.greater_is_better if of_best else None
    record = record.stating(metric, greater_is_better=greater, unit=arguments.unit)
    of_source = ("revision", "trust_remote_code")  # the model that was trained has none
    told = {flag: value for flag, value in arguments.told.items() if flag not in of_source}
    record = of_trained(trainer, record).told({**told, **subject.told})
    if corruptions:
        show(record, metric, Path(str(trainer.args.output_dir)) / ROBUSTNESS)
        show_on_card(trainer, record)
    else:
        print(table_of(record, metric))
