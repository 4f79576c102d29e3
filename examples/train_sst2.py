"""Fine-tune a classifier on SST-2, or any data of sentences and labels, with its parameters defended.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument.

    python examples/train_sst2.py --output_dir out --do_train --do_eval

Without the defense: `--defense none`. The last layer alone: `--defense_target_modules last-encoder-layer`. With
`--do_eval` the robustness is measured too, under the corruptions of paper 2, Table 1, unless `--corruptions` names
others, and `robustness.json` is written beside the other results.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    set_seed,
)

from hf_parcor import CorruptionEvaluator, ParameterDefenseTrainer, ParameterDefenseTrainingArguments
from hf_parcor.corruptions import corruptions_of_table_1
from hf_parcor.evaluation import ClassificationMetric, RobustnessArguments
from hf_parcor.evaluation.outputs import Problem
from hf_parcor.hub_data import load_hub_data
from hf_parcor.programs import (
    check_counts,
    check_something_is_done,
    measure_and_save,
    push_if_asked,
    read_arguments,
    train_and_save,
)
from hf_parcor.sequence_length import fitting_length
from hf_parcor.tasks import TASKS, Processed, Rows, read_file
from hf_parcor.tasks.classification import class_numbers, label_numbers_of, problem_of_model
from hf_parcor.training import checkpoint_to_resume

logger = logging.getLogger(__name__)
TASK = TASKS["text-classification"]


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(
        default="google-bert/bert-base-uncased", metadata={"help": "A model on the Hub, or a local folder."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters of this rank on all linear layers, and the head. Not set: all weights."
        },
    )


@dataclass
class DataArguments:
    """Which data it is fine-tuned on, and measured on."""

    dataset_name: str | None = field(default="stanfordnlp/sst2", metadata={"help": "A data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of it; refs/convert/parquet is the Hub's own copy."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "A local .csv, .tsv or .json(l) file, also .gz, instead of the data set."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "A local file to measure on."})
    text_column_name: str = field(default="sentence", metadata={"help": "The column with the text."})
    label_column_name: str = field(
        default="label", metadata={"help": "The column with the label: a number or a name."}
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Longer texts are cut to this many tokens. Not set: 128, or what the model takes."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many, drawn with the seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again."})


def load_data(data: DataArguments, cache_dir: str | None) -> Mapping[str, datasets.Dataset]:
    """Return the splits `train` and `validation` that were asked for."""
    given = {"train": data.train_file, "validation": data.validation_file}
    files = {split: path for split, path in given.items() if path is not None}
    if files:
        rows = {split: read_file(path) for split, path in files.items()}
        for split, found in rows.items():
            if not found:
                raise ValueError(f"{files[split]}: expected at least one row, got none; name another file")
        return {split: datasets.Dataset.from_list(found) for split, found in rows.items()}
    if data.dataset_name is None:
        raise ValueError("expected --dataset_name, or --train_file or --validation_file, got none; name the data")
    splits: Mapping[str, datasets.Dataset] = load_hub_data(
        data.dataset_name, data.dataset_config_name, revision=data.dataset_revision, cache_dir=cache_dir
    )
    return splits


def labelled_rows(split: str, rows: datasets.Dataset, data: DataArguments) -> Rows:
    """Return rows as tasks take them, with the names of their classes, if they have some."""
    for name in ("text_column_name", "label_column_name"):
        if getattr(data, name) not in rows.column_names:
            raise ValueError(
                f"{name}: expected one of {', '.join(rows.column_names)}, got {getattr(data, name)!r}; name the column"
            )
    names = getattr(rows.features[data.label_column_name], "names", None)
    return Rows(split, rows, tuple(rows.column_names), {data.label_column_name: names} if names else {})


def new_head(rows: Rows, label_column: str) -> dict[str, Any]:
    """Return what a model that is to learn these classes gets."""
    head = TASK.head_settings([(rows, {"label": label_column})])
    if head["problem_type"] != Problem.CLASSES.value:
        raise ValueError(
            f"label_column_name: expected one class a row, got a {head['problem_type']} in {label_column!r}; name "
            "another column"
        )
    return head


def with_adapters(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Return a classifier of which LoRA adapters on all linear layers and the head are trained, and nothing else."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            f"lora_rank: expected PEFT, got {error}; install it: pip install 'hf-parcor[peft]'"
        ) from error
    adapters: Any = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted: PreTrainedModel = get_peft_model(model, adapters)
    return adapted


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right answers."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, evaluate, corrupt."""
    model_arguments, data, robustness, training = read_arguments(
        ModelArguments, DataArguments, RobustnessArguments, ParameterDefenseTrainingArguments
    )
    logger.info("processes: %d", training.world_size)
    check_something_is_done(training)
    check_counts(data, "max_train_samples", "max_eval_samples")
    set_seed(training.seed)
    corruptions = robustness.read(corruptions_of_table_1())  # before minutes of training

    splits = load_data(data, model_arguments.cache_dir)
    origin = {"cache_dir": model_arguments.cache_dir, "revision": model_arguments.model_revision}
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.model_name_or_path, **origin)
    asked = {"train": training.do_train, "validation": training.do_eval}
    labelled = {
        split: labelled_rows(split, splits[split], data)
        for split, needed in asked.items()
        if needed and split in splits
    }
    # A model that is measured only keeps the classes that it knows.
    learns = training.do_train and "train" in labelled
    head = new_head(labelled["train"], data.label_column_name) if learns else {}
    model = AutoModelForSequenceClassification.from_pretrained(model_arguments.model_name_or_path, **head, **origin)
    problem = problem_of_model(model.config)
    if problem is not Problem.CLASSES:
        raise ValueError(
            f"model_name_or_path: expected a classifier of one class a row, got one for {problem.value}; measure it "
            "with hf-parcor evaluate"
        )
    TASK.prepare(Processed(model, tokenizer))
    if model_arguments.lora_rank is not None:
        model = with_adapters(model, model_arguments.lora_rank)

    max_length = fitting_length(model, tokenizer, 128, data.max_seq_length)

    def tokenize(rows: dict[str, list[Any]], numbers: Mapping[Any, int]) -> dict[str, Any]:
        encoded = tokenizer(rows[data.text_column_name], truncation=True, max_length=max_length)
        return {**encoded, "labels": [numbers[label] for label in rows[data.label_column_name]]}

    def prepare(split: str, most: int | None, shuffle: bool) -> datasets.Dataset:
        if split not in splits:
            raise ValueError(f"expected a split {split!r}, found {', '.join(splits)}; give --{split}_file")
        rows = splits[split].shuffle(seed=training.seed) if shuffle else splits[split]
        if most is not None:
            rows = rows.select(range(min(most, len(rows))))
        found = class_numbers(labelled_rows(split, rows, data), data.label_column_name, label_numbers_of(model.config))
        return rows.map(
            tokenize,
            batched=True,
            fn_kwargs={"numbers": dict(zip(rows[data.label_column_name], found, strict=True))},
            remove_columns=rows.column_names,
            load_from_cache_file=not data.overwrite_cache,
            desc=f"tokenising {split}",
        )

    train_rows = prepare("train", data.max_train_samples, True) if training.do_train else None
    eval_rows = prepare("validation", data.max_eval_samples, False) if training.do_eval else None
    collator = DataCollatorWithPadding(tokenizer)
    trainer = ParameterDefenseTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        compute_metrics=accuracy,
        processing_class=tokenizer,
        data_collator=collator,
    )

    if train_rows is not None:
        train_and_save(trainer, checkpoint_to_resume(training), robustness, train_samples=len(train_rows))

    if eval_rows is not None:
        metrics = {**trainer.evaluate(), "eval_samples": len(eval_rows)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if not robustness.skip_corruptions:  # all processes measure together
            # Sentences of like length share a batch: less padding, the same numbers.
            lengths = [len(tokens) for tokens in eval_rows["input_ids"]]
            by_length = eval_rows.select(sorted(range(len(lengths)), key=lengths.__getitem__))
            batches = DataLoader(by_length, batch_size=training.eval_batch_size, collate_fn=collator)
            if model_arguments.lora_rank is not None:
                # What is deployed, and all of it; the Trainer's model keeps its adapters, which are saved.
                model = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
            evaluator = CorruptionEvaluator(model, ClassificationMetric(batches), progress=not training.disable_tqdm)
            measure_and_save(trainer, evaluator, corruptions, robustness, "accuracy")
    push_if_asked(trainer)


if __name__ == "__main__":
    main()
