"""Which ε suits a small BERT on SST-2? The library's golden-section search, run for real, and its curve.

    python -m scripts.search_epsilon_sst2 --model MODEL --data FOLDER --output scripts/results/search_epsilon

MODEL is a folder or a name on the Hub, FOLDER holds `train_sentences.tsv.gz` and `dev.tsv.gz`. K = 1 in L2, from a new
head for each training. What is searched for is the largest mean accuracy on half of the dev sentences without
corruption and along the gradient at three radii: an ε that gains robustness and keeps the model. The output folder
gets the record, `table.md` and `epsilon.png`. A training that is done is kept, so an interrupted search goes on.
"""

from __future__ import annotations

import random
from statistics import fmean

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    set_seed,
)

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GradientCorruption,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    search_epsilon,
)
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.reports.plots import plot_search
from hf_parcor.reports.tables import search_table
from scripts.campaigns import write_table
from scripts.sst2_runs import parse_options, read_sentences, sentence_batches

LOW, HIGH, TRAININGS = 0.01, 1.0, 6
RADII = (0.05, 0.1, 0.2)


def main() -> None:
    """Search, and write down."""
    options = parse_options(__doc__, None, "runs/search_epsilon")
    (seed,) = options.seeds
    size = options.size
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = read_sentences(options.data / size.train_file)
    random.Random(seed).shuffle(rows)
    train_dataset = Dataset.from_list(
        [
            {**tokenizer(text, truncation=True, max_length=128), "labels": label}
            for text, label in rows[: size.train_samples]
        ]
    )

    def new_model() -> PreTrainedModel:
        set_seed(seed)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
        return model

    trainer = ParameterDefenseTrainer(
        model_init=new_model,
        args=ParameterDefenseTrainingArguments(
            output_dir=str(options.work),
            per_device_train_batch_size=32,
            learning_rate=size.learning_rate,
            num_train_epochs=size.epochs,
            seed=seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train_dataset,
        data_collator=DataCollatorWithPadding(tokenizer),
        defense=MultiStepRisk(CorruptionConstraint(p=2, epsilon=0.1), steps=1),
    )
    sorted_by_length = sentence_batches(tokenizer, options.data / "dev.tsv.gz")
    batches = sorted_by_length[::2]  # a half that is like the other
    corruptions = [GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in RADII]

    def evaluate() -> dict[str, float]:
        assert isinstance(trainer.model, PreTrainedModel), "it was trained"
        evaluator = CorruptionEvaluator(trainer.model, ClassificationMetric(batches), progress=False)
        return {row.label: row.mean("accuracy") for row in evaluator.evaluate(corruptions).rows()}

    record = search_epsilon(
        trainer,
        LOW,
        HIGH,
        direction="maximize",
        n_trials=TRAININGS,
        compute_objective=lambda metrics: fmean(metrics.values()),
        evaluate=evaluate,
        path=options.output / "record.json",
    )
    text = (
        f"SST-2, seed {seed}: {size}; K = 1, L2. Objective: mean accuracy on half of the dev sentences, without "
        f"corruption and along the gradient, L2, at ε = {', '.join(map(str, RADII))}.\n\n{search_table(record)}\n"
    )
    write_table(options.output, text)
    plot_search(record, "mean accuracy").savefig(options.output / "epsilon.png", dpi=100)


if __name__ == "__main__":
    main()
