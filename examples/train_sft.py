"""Fine-tune a language model with TRL's SFTTrainer, whole or by LoRA adapters, with its parameters defended.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument. All flags of TRL's
`SFTConfig` and `ModelConfig` are there, beside those of the defense:

    python examples/train_sft.py --model_name_or_path MODEL --train_file chats.jsonl --validation_file dev.jsonl \
        --output_dir out --do_train --do_eval

Each line of a file is a text (.txt), or has a column `text`, the columns `prompt` and `completion`, or `messages`, a
chat: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]. Data sets of the Hub as well.

    --defense sam --defense_epsilon 0.05                          another defense; none: the stock step
    --defense corruption --defense_corruption quantization=4      for 4 bits
    --use_peft                                                    LoRA adapters, which are defended alone
    --use_peft --defense corruption --defense_corruption quantization=4 --defense_target_modules base_layer
                                                                  adapters that learn beside a base rounded to 4 bits
    ... --defense_merge_adapters true                             and that are merged into it before it is rounded

With `--do_eval` the robustness is measured too, by the Trainer's own evaluation under each corruption; then the model
card says it, and `robustness.json` is written beside the other results.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.peft_utils import find_adapter_config_file

from hf_parcor import ParameterDefenseMixin, PublishingMixin
from hf_parcor.evaluation import RobustnessArguments
from hf_parcor.hub_data import load_hub_data
from hf_parcor.programs import (
    check_counts,
    check_something_is_done,
    push_if_asked,
    read_arguments,
    save_measurement,
    train_and_save,
)
from hf_parcor.sequence_length import fitting_length
from hf_parcor.tasks import read_file
from hf_parcor.training import DefenseArguments, checkpoint_to_resume

try:
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config
except ImportError as error:
    raise ImportError(
        f"train_sft.py: expected TRL with its SFTTrainer, got {error}; install it: pip install 'hf-parcor[trl]'"
    ) from error

logger = logging.getLogger(__name__)


class DefendedSFTTrainer(ParameterDefenseMixin, PublishingMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's Trainer; it defends parameters, measures robustness, and writes it on the model card."""


@dataclass
class SFTArguments(DefenseArguments, SFTConfig):  # type: ignore[misc]
    """TRL's arguments, and the defense as flags."""


@dataclass
class DataArguments:
    """Which texts it is trained on, and measured on, and what of the model is corrupted there."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of it; refs/convert/parquet is the Hub's own copy."}
    )
    train_split: str = field(default="train", metadata={"help": "The data set's split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "The data set's split to measure on."})
    train_file: str | None = field(
        default=None, metadata={"help": "A local .txt file of lines, or .csv, .tsv or .json(l), also .gz, instead."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "A local file to measure on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many."})
    corruption_target_modules: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "Which weights are corrupted where robustness is measured, named as for the defense. Not set: "
            "all, adapters and what is under them; base_layer: what is under adapters alone."
        },
    )


def load_texts(data: DataArguments, text_column: str, splits: Iterable[str]) -> dict[str, datasets.Dataset]:
    """Return the rows of these splits, from files where there are any, else from the data set.

    Args:
        data: Where they are.
        text_column: The column of plain texts, which may be empty lines: these are left out.
        splits: `train`, `validation`.

    Raises:
        ValueError: Nothing was named for a split, or its rows are nothing that TRL reads.
    """
    files = {"train": data.train_file, "validation": data.validation_file}
    names = {"train": data.train_split, "validation": data.validation_split}
    most = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    known = [{"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"}, {text_column}]
    found = {}
    for split in splits:
        path = files[split]
        if path is not None:
            rows = [row for row in read_file(path) if row.get(text_column) != ""]
            texts = datasets.Dataset.from_list(rows)
        elif data.dataset_name is not None:
            texts = load_hub_data(
                data.dataset_name, data.dataset_config_name, split=names[split], revision=data.dataset_revision
            )
        else:
            raise ValueError(f"{split}: expected --{split}_file or --dataset_name, got none; say where the texts are")
        if not any(columns <= set(texts.column_names) for columns in known):
            raise ValueError(
                f"{split}: expected a column {text_column!r}, or prompt and completion, or messages, got "
                f"{', '.join(texts.column_names) or 'no row'}; name the column with --dataset_text_field"
            )
        limit = most[split]
        found[split] = texts if limit is None else texts.select(range(min(limit, len(texts))))
    return found


def load_model(settings: ModelConfig, training: SFTArguments) -> Any:
    """Return the pretrained model, or adapters on theirs, in the type and the quantization that were asked for.

    Raises:
        ValueError: No model was named.
    """
    if settings.model_name_or_path is None:
        raise ValueError("model_name_or_path: expected a model on the Hub or a local folder, got none; name one")
    given = {"revision": settings.model_revision, "dtype": settings.dtype, **(training.model_init_kwargs or {})}
    given |= {"trust_remote_code": training.trust_remote_code, "attn_implementation": settings.attn_implementation}
    quantization = get_quantization_config(settings)
    if quantization is not None:
        given["quantization_config"] = quantization
    training.model_init_kwargs = None  # they were for the Trainer, which would have loaded the model
    if find_adapter_config_file(settings.model_name_or_path, revision=settings.model_revision) is None:
        return AutoModelForCausalLM.from_pretrained(settings.model_name_or_path, **given)
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(settings.model_name_or_path, is_trainable=True, **given)


def main() -> None:
    """Train, evaluate, corrupt."""
    settings, data, robustness, training = read_arguments(
        ModelConfig, DataArguments, RobustnessArguments, SFTArguments
    )
    logger.info("processes: %d", training.world_size)
    check_something_is_done(training)
    check_counts(data, "max_train_samples", "max_eval_samples")
    set_seed(training.seed)
    corruptions = robustness.read()  # before minutes of training
    wanted = {"train": training.do_train, "validation": training.do_eval}
    texts = load_texts(data, training.dataset_text_field, [split for split, asked in wanted.items() if asked])
    model = load_model(settings, training)
    tokenizer = AutoTokenizer.from_pretrained(
        settings.model_name_or_path, revision=settings.model_revision, trust_remote_code=training.trust_remote_code
    )
    default = SFTConfig.max_length
    asked = None if training.max_length == default else training.max_length
    if training.max_length is not None:
        training.max_length = fitting_length(model, tokenizer, default, asked)
    trainer: Any = DefendedSFTTrainer(
        model=model,
        args=training,
        train_dataset=next(iter(texts.values())),  # the Trainer takes no less, also where it does not train
        eval_dataset=texts.get("validation"),
        processing_class=tokenizer,
        peft_config=get_peft_config(settings),
    )

    if "train" in texts:
        train_and_save(trainer, checkpoint_to_resume(training), robustness, train_samples=len(trainer.train_dataset))

    if "validation" in texts:
        metrics = {**trainer.evaluate(), "eval_samples": len(trainer.eval_dataset)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if not robustness.skip_corruptions:  # all processes measure together
            trainer.evaluate_robustness(
                corruptions,
                trials=robustness.corruption_trials,
                seed=robustness.corruption_seed,
                target_modules=data.corruption_target_modules,
            )
            save_measurement(trainer, trainer.robustness_records["eval"], "model", "loss")
    push_if_asked(trainer)
    if not training.push_to_hub:
        trainer.create_model_card(model_name=Path(str(training.output_dir)).name)


if __name__ == "__main__":
    main()
