"""Fine-tune an embedding model with the Trainer of sentence-transformers, with its parameters defended.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument. All flags of
`SentenceTransformerTrainingArguments` are there, beside those of the defense:

    python examples/train_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --train_file pairs.tsv --validation_file dev.tsv --output_dir out --do_train --do_eval

Each row has two texts, in columns such as `anchor` and `positive`, `query` and `document`, or `sentence1` and
`sentence2`. With a `score`, the loss is CoSENT, and rank correlation is measured; without, it is
MultipleNegativesRankingLoss, a column `negative` is taken too, and the first texts are searched for among the others.
Data sets of the Hub as well.

    --defense corruption --defense_corruption quantization=2:per=channel    for 2 bits
    --defense sam --defense_epsilon 0.05                                    another defense; none: the stock step

With `--do_eval` the robustness is measured too, by the evaluator of sentence-transformers under each corruption; then
the model card says it, and `robustness.json` is written beside the other results.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import set_seed

from hf_parcor import ParameterDefenseMixin, PublishingMixin
from hf_parcor.evaluation import RobustnessArguments
from hf_parcor.programs import check_something_is_done, push_if_asked, read_arguments, save_measurement, train_and_save
from hf_parcor.tasks import TASKS, Encoding, Processed, load_rows
from hf_parcor.training import DefenseArguments, checkpoint_to_resume

try:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import evaluation, losses
except ImportError as error:
    raise ImportError(
        f"train_embeddings.py: expected sentence-transformers, got {error}; install it: pip install "
        "'hf-parcor[embeddings]'"
    ) from error

logger = logging.getLogger(__name__)
TASK = TASKS["sentence-similarity"]


class DefendedTrainer(ParameterDefenseMixin, PublishingMixin, SentenceTransformerTrainer):
    """The Trainer of sentence-transformers; it defends parameters, measures robustness, and writes it on the card."""


@dataclass
class EmbeddingArguments(DefenseArguments, SentenceTransformerTrainingArguments):
    """The arguments of sentence-transformers, and the defense as flags."""


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "A model on the Hub, or a local folder."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Cut texts to so many tokens. Not set: as the model was saved."}
    )


@dataclass
class DataArguments:
    """Which texts it is trained on, and measured on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_split: str = field(default="train", metadata={"help": "The data set's split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "The data set's split to measure on."})
    train_file: str | None = field(
        default=None, metadata={"help": "A local .csv, .tsv or .json(l) file, also .gz, instead."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "A local file to measure on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many."})


def load_split(data: DataArguments, split: str, processed: Processed) -> datasets.Dataset:
    """Return the texts of a split in columns that are named by their roles, and the `score`, if there is one.

    Raises:
        ValueError: Nothing was named for the split, or its rows are no such texts.
    """
    names, most, path = {
        "train": (data.train_split, data.max_train_samples, data.train_file),
        "validation": (data.validation_split, data.max_eval_samples, data.validation_file),
    }[split]
    if path is None and data.dataset_name is None:
        raise ValueError(f"{split}: expected --{split}_file or --dataset_name, got none; say where the texts are")
    rows = load_rows(path or str(data.dataset_name), names, data.dataset_config_name).first(most)
    columns = TASK.find_columns(rows, {})
    examples = TASK.examples(rows, columns, processed)
    roles = [role for role in columns if role != "score"]
    texts = zip(*(example["texts"] for example in examples), strict=True)
    scores = {"score": [example["label"] for example in examples]} if "score" in columns else {}
    return datasets.Dataset.from_dict({**dict(zip(roles, map(list, texts), strict=True)), **scores})


def evaluator_of(texts: Mapping[str, list[Any]]) -> evaluation.SentenceEvaluator:
    """Return what compares similarities with scores, or searches for each first text among all others."""
    if "score" in texts:
        return evaluation.EmbeddingSimilarityEvaluator(texts["text"], texts["second_text"], texts["score"])
    right: dict[str, set[str]] = {}
    for query, document in zip(texts["text"], texts["second_text"], strict=True):
        right.setdefault(query, set()).add(document)
    documents = [*texts["second_text"], *texts.get("negative", ())]
    return evaluation.InformationRetrievalEvaluator(
        dict(zip(right, right, strict=True)), dict(zip(documents, documents, strict=True)), right
    )


def main() -> None:
    """Train, evaluate, corrupt."""
    settings, data, robustness, training = read_arguments(
        ModelArguments, DataArguments, RobustnessArguments, EmbeddingArguments
    )
    logger.info("processes: %d", training.world_size)
    check_something_is_done(training)
    set_seed(training.seed)
    corruptions = robustness.read()  # before minutes of training
    model = TASK.load_model(settings.model_name_or_path, revision=settings.model_revision)
    processed = Processed(model, None, Encoding(max_length=settings.max_seq_length))
    TASK.prepare(processed)
    wanted = {"train": training.do_train, "validation": training.do_eval}
    texts = {split: load_split(data, split, processed) for split, asked in wanted.items() if asked}
    scored = "score" in next(iter(texts.values())).column_names
    loss = losses.CoSENTLoss(model) if scored else losses.MultipleNegativesRankingLoss(model)
    trainer: Any = DefendedTrainer(
        model=model,
        args=training,
        train_dataset=texts.get("train"),
        eval_dataset=texts.get("validation"),
        loss=loss,
        evaluator=evaluator_of(texts["validation"].to_dict()) if "validation" in texts else None,
    )

    if "train" in texts:
        train_and_save(trainer, checkpoint_to_resume(training), robustness, train_samples=len(texts["train"]))

    if "validation" in texts:
        metrics = {**trainer.evaluate(), "eval_samples": len(texts["validation"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if not robustness.skip_corruptions:  # all processes measure together
            trainer.evaluate_robustness(
                corruptions, trials=robustness.corruption_trials, seed=robustness.corruption_seed
            )
            save_measurement(trainer, trainer.robustness_records["eval"], "model", trainer.evaluator.primary_metric)
    push_if_asked(trainer)
    if not training.push_to_hub:
        trainer.create_model_card(model_name=Path(str(training.output_dir)).name)


if __name__ == "__main__":
    main()
