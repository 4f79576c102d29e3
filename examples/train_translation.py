"""Train a translation model from scratch, or fine-tune one, with its parameters defended.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument. The papers' De-En,
from the official archive of IWSLT'14 with their preparation (extra `moses`; about 160,239, 7,283 and 6,750 pairs):

    python examples/train_translation.py --output_dir out --do_train --do_eval --do_predict \
        --iwslt de-en.tgz --papers_preparation --source_lang de --target_lang en \
        --vocabulary_size 10149 --max_tokens 4096 --gradient_accumulation_steps 2 --num_train_epochs 70 \
        --learning_rate 0.0015 --lr_scheduler_type inverse_sqrt --warmup_steps 8000 --adam_beta2 0.98 \
        --label_smoothing_factor 0.1 --save_strategy epoch --save_total_limit 10 --average_checkpoints 10 \
        --defense_norm inf --defense_epsilon 0.0006 --defense_steps 2 --defense_start_epoch 30

Other text, in the place of the second line:

- En-Vi: `--iwslt en-vi.tgz --iwslt_validation_sets tst2012 --iwslt_test_sets tst2013`, with `--source_lang en
  --target_lang vi --vocabulary_size 7669 --target_vocabulary_size 6669`;
- the Hub: `--dataset_name IWSLT/iwslt2017 --dataset_config_name iwslt2017-de-en`, still a loading script there, which
  `datasets` no longer runs: the Hub's copy is read, as with `--dataset_revision refs/convert/parquet`;
- the archives beside that script: `--iwslt IWSLT/iwslt2017`;
- files: `--train_source_file` and `--train_target_file`, two of lines, or `--train_file`, a table or JSON lines;
  likewise `validation` and `test`. They come before what else is given.

Without the defense: `--defense none`. The last decoder layer alone: `--defense_target_modules last-decoder-layer`.
A pretrained model: `--model_name_or_path`, with its own vocabulary; T5 needs a `--source_prefix`, and mBART, NLLB and
M2M100 `--source_code` and `--target_code` where they call the languages otherwise (`deu_Latn`).

With `--corruptions quantization=4` the evaluation measures the model with such weights too, and writes
`robustness.json`; by default there are none, since each translates all of the validation data once more.
`--watched_corruptions` are measured at every evaluation in training.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_parcor import Seq2SeqParameterDefenseTrainer, Seq2SeqParameterDefenseTrainingArguments
from hf_parcor.arguments import check_count
from hf_parcor.evaluation import RobustnessArguments, measure_robustness
from hf_parcor.evaluation.metrics.generation import reference_text
from hf_parcor.hub_data import load_hub_data
from hf_parcor.languages import languages_of, set_languages
from hf_parcor.programs import (
    check_counts,
    check_something_is_done,
    push_if_asked,
    read_arguments,
    save_measurement,
    train_and_save,
)
from hf_parcor.sequence_length import asked_length, fitting_length, generated_length, unfinished
from hf_parcor.tasks.sequence_to_sequence import decoder_of, lacks_vocabulary
from hf_parcor.training import checkpoint_to_resume
from hf_parcor.training.checkpoints import last_checkpoint
from hf_parcor.translation import (
    BleuScores,
    ParallelText,
    TokenBatchesMixin,
    average_checkpoints,
    encode,
    freeze_positions,
    from_rows,
    iwslt_de_en,
    last_checkpoints,
    new_model,
    prepare_iwslt14_de_en,
    read_iwslt,
    read_parallel_files,
    read_rows,
    tokenize_13a,
    train_bpe,
    train_unigram,
    unlike_papers,
    wmt_en_de,
)

logger = logging.getLogger(__name__)

VOCABULARIES = {"bpe": train_bpe, "unigram": train_unigram}
VOCABULARY_SIZE = 10_149  # the papers'
TARGET_TOKENIZER = "target_tokenizer"
MAX_LENGTH = 256


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A pretrained model, on the Hub or a local folder. Not set: from scratch."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the shape of a new model: encoder_layers=3,decoder_layers=3,d_model=256."},
    )
    vocabulary: str | None = field(
        default=None, metadata={"help": "A folder with a vocabulary that was trained before. Not set: train one."}
    )
    vocabulary_kind: str | None = field(
        default=None, metadata={"help": "How it is trained: bpe or unigram. Not set: bpe."}
    )
    vocabulary_size: int | None = field(
        default=None,
        metadata={"help": "How many subwords there are, or of the source language alone. Not set: 10149."},
    )
    target_vocabulary_size: int | None = field(
        default=None,
        metadata={"help": "Give the target language a vocabulary of its own; the shape is then that of En-Vi."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})

    def check(self) -> None:
        """Refuse flags that others leave without effect.

        Raises:
            ValueError: There are some.
        """
        of_a_vocabulary = ("vocabulary_kind", "vocabulary_size", "target_vocabulary_size")
        settled = {
            "model_name_or_path": ("config_overrides", "vocabulary", *of_a_vocabulary),
            "vocabulary": of_a_vocabulary,
        }
        for name, without_effect in settled.items():
            given = [other for other in without_effect if getattr(self, other) is not None]
            if getattr(self, name) is not None and given:
                raise ValueError(
                    f"{', '.join(given)}: expected none beside {name}, which has its own, got "
                    f"{', '.join(repr(getattr(self, other)) for other in given)}; leave out one or the other"
                )


@dataclass
class DataArguments:
    """Which data it is trained on, and measured on."""

    source_lang: str = field(default="de", metadata={"help": "The language, or column, to translate from."})
    target_lang: str = field(default="en", metadata={"help": "The language, or column, to translate to."})
    source_code: str | None = field(
        default=None,
        metadata={"help": "What a model of many languages calls the source's: deu_Latn. Not set: as source_lang."},
    )
    target_code: str | None = field(default=None, metadata={"help": "And the target's. Not set: as target_lang."})
    source_prefix: str = field(
        default="", metadata={"help": 'Put before each sentence: "translate German to English: " for T5.'}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub with `translation`."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of it; refs/convert/parquet is the Hub's own copy."}
    )
    iwslt: str | None = field(
        default=None,
        metadata={
            "help": "The official distribution of IWSLT instead: a folder, a .tgz or .zip, or a data set on the Hub "
            "with such archives, IWSLT/iwslt2017."
        },
    )
    iwslt_validation_sets: list[str] | None = field(
        default=None, metadata={"help": "Its sets to measure on, dev2010 say. Not set: all development sets."}
    )
    iwslt_test_sets: list[str] | None = field(
        default=None, metadata={"help": "Its sets for the last measurement, tst2013 say. Not set: all test sets."}
    )
    papers_preparation: bool = field(
        default=False,
        metadata={
            "help": "Prepare IWSLT'14 De-En as the papers: Moses' tokens, lower case, 1 to 175 of them and at most "
            "1.5 times as many on one side, every 23rd pair for validation, five sets as test."
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "A .tsv, .json or .jsonl file, also .gz."})
    train_source_file: str | None = field(default=None, metadata={"help": "A file of lines, also .gz."})
    train_target_file: str | None = field(default=None, metadata={"help": "Their translations, line by line."})
    validation_file: str | None = field(default=None, metadata={"help": "As train_file, to measure on."})
    validation_source_file: str | None = field(default=None, metadata={"help": "As train_source_file."})
    validation_target_file: str | None = field(default=None, metadata={"help": "As train_target_file."})
    test_file: str | None = field(default=None, metadata={"help": "As train_file, for the last measurement."})
    test_source_file: str | None = field(default=None, metadata={"help": "As train_source_file."})
    test_target_file: str | None = field(default=None, metadata={"help": "As train_target_file."})
    text_is_tokenized: bool = field(
        default=False, metadata={"help": "The texts are tokenised already: their tokenised BLEU is the only one."}
    )
    lowercase_bleu: bool = field(default=False, metadata={"help": "Lower-case texts for the tokenised BLEU."})
    max_tokens: int | None = field(
        default=4096, metadata={"help": "The most tokens of a batch, padding included, instead of a batch size."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer pairs, in tokens, are left out of training, and cut in what is measured. Not set: 256, or "
            "what the model takes."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many pairs."})
    average_checkpoints: int | None = field(
        default=None, metadata={"help": "The model in the end is the mean of so many of the last checkpoints."}
    )


class TranslationTrainer(TokenBatchesMixin, Seq2SeqParameterDefenseTrainer):
    """The defended Trainer on batches of tokens, which saves the target's vocabulary too if that is another one."""

    target_tokenizer: PreTrainedTokenizerBase | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, as at each checkpoint, and both vocabularies."""
        if self.args.should_save and self.target_tokenizer not in (None, self.processing_class):
            folder = Path(output_dir or str(self.args.output_dir)) / TARGET_TOKENIZER
            self.target_tokenizer.save_pretrained(str(folder))
        super().save_model(output_dir, _internal_call)


def load_text(data: DataArguments, split: str, cache_dir: str | None) -> ParallelText:
    """Return the split `train`, `validation` or `test`: from files where there are any, else from the data set."""
    one, *two = files_of(data, split)
    if one is not None:
        return read_rows(one, data.source_lang, data.target_lang)
    if two[0] is not None and two[1] is not None:
        return read_parallel_files(two[0], two[1])
    if any(two) or data.dataset_name is None:
        raise ValueError(
            f"{split}: expected --{split}_file, or --{split}_source_file and --{split}_target_file, or --iwslt, or "
            "--dataset_name, got none; say where the sentences are"
        )
    rows = load_hub_data(
        data.dataset_name, data.dataset_config_name, split=split, revision=data.dataset_revision, cache_dir=cache_dir
    )
    return from_rows(rows, data.source_lang, data.target_lang, f"{data.dataset_name}, {split}")


def files_of(data: DataArguments, split: str) -> list[str | None]:
    """Return the file of rows and both files of lines that were given for a split, None for those that were not."""
    return [getattr(data, f"{split}_{which}") for which in ("file", "source_file", "target_file")]


def load_iwslt(data: DataArguments, splits: Collection[str], cache_dir: str | None) -> dict[str, ParallelText]:
    """Return these splits of IWSLT's distribution, prepared or as they are."""
    text = read_iwslt(cast(str, data.iwslt), data.source_lang, data.target_lang, cache_dir)
    if data.papers_preparation:
        prepared = prepare_iwslt14_de_en(text, splits)
        if differ := unlike_papers(prepared):
            logger.warning(f"--papers_preparation: {differ}; is the distribution whole?")
        return prepared
    sets = {
        "validation": data.iwslt_validation_sets or [name for name in text.sets if ".dev" in name],
        "test": data.iwslt_test_sets or [name for name in text.sets if ".tst" in name],
    }
    return {split: text.train() if split == "train" else text.evaluation(*sets[split]) for split in splits}


def load_texts(data: DataArguments, splits: Sequence[str], cache_dir: str | None) -> dict[str, ParallelText]:
    """Return these splits, each from files where there are any, else from IWSLT's distribution or the data set."""
    if data.iwslt is not None and data.dataset_name is not None:
        raise ValueError("--iwslt, --dataset_name: expected one of them, got both; leave one out")
    if data.papers_preparation and data.iwslt is None:
        raise ValueError("--papers_preparation: expected --iwslt, the distribution of 2014, got none; say where it is")
    named = [name for name in ("iwslt_validation_sets", "iwslt_test_sets") if getattr(data, name) is not None]
    if named and (data.papers_preparation or data.iwslt is None):
        raise ValueError(
            f"{', '.join(named)}: expected --iwslt beside it, and no --papers_preparation, which has its own, got "
            f"{'that' if data.papers_preparation else 'no --iwslt'}; leave one or the other out"
        )
    official: dict[str, ParallelText] = {}
    if data.iwslt is not None:
        official = load_iwslt(data, [split for split in splits if not any(files_of(data, split))], cache_dir)
    return {split: official[split] if split in official else load_text(data, split, cache_dir) for split in splits}


def load_vocabularies(
    model: ModelArguments, train: ParallelText | None, tokenized: bool
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Return the tokenizers of both languages: those of the pretrained model or of a folder, or trained ones."""
    origin = model.model_name_or_path or model.vocabulary
    if origin is not None:
        source = AutoTokenizer.from_pretrained(origin, revision=model.model_revision, cache_dir=model.cache_dir)
        beside = Path(origin) / TARGET_TOKENIZER
        return source, AutoTokenizer.from_pretrained(beside) if beside.is_dir() else source
    if train is None:
        raise ValueError("vocabulary: expected text to train one on, got none; give --do_train or --vocabulary")
    kind = "bpe" if model.vocabulary_kind is None else model.vocabulary_kind
    if kind not in VOCABULARIES:
        known = " or ".join(VOCABULARIES)
        raise ValueError(f"vocabulary_kind: expected {known}, got {kind!r}; choose one of these")
    learn = partial(VOCABULARIES[kind], split_punctuation=not tokenized)
    size = VOCABULARY_SIZE if model.vocabulary_size is None else model.vocabulary_size
    if model.target_vocabulary_size is None:
        joint = learn(chain(train.sources, train.targets), size)
        return joint, joint
    return learn(train.sources, size), learn(train.targets, model.target_vocabulary_size)


def load_model(
    model: ModelArguments, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return the pretrained model, or a new one of the papers' shape."""
    if model.model_name_or_path is not None:
        origin = {"revision": model.model_revision, "cache_dir": model.cache_dir}
        pretrained = AutoModelForSeq2SeqLM.from_pretrained(model.model_name_or_path, **origin)
        if target is source and lacks_vocabulary(source, pretrained.config):
            raise ValueError(
                f"model_name_or_path: expected {TARGET_TOKENIZER} beside a model with two vocabularies, found none in "
                f"{model.model_name_or_path}; copy it from the folder that its training wrote"
            )
        return cast(PreTrainedModel, freeze_positions(pretrained))
    shape = iwslt_de_en(len(source)) if target is source else wmt_en_de(len(source), len(target))
    if model.config_overrides is not None:
        shape.update_from_string(model.config_overrides)
    return new_model(shape)


def name_languages(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> None:
    """Tell a model of many languages which ones the data has."""
    if languages_of(tokenizer):
        set_languages(model, tokenizer, data.source_code or data.source_lang, data.target_code or data.target_lang)
    else:
        set_languages(model, tokenizer, data.source_code, data.target_code)


def check_average(count: int | None, training: Seq2SeqParameterDefenseTrainingArguments) -> None:
    """Refuse an average of checkpoints that there will not be, before the hours of training.

    Raises:
        ValueError: There will not be as many, or others would be taken for them.
    """
    if count is None:
        return
    check_count("average_checkpoints", count)
    if not training.do_train:
        raise ValueError(
            "average_checkpoints: expected --do_train, after which checkpoints are averaged, got none; pass it, with "
            "--resume_from_checkpoint true for the checkpoints of a training that has ended"
        )
    if training.save_strategy == "no":
        raise ValueError(
            "average_checkpoints: expected checkpoints, got --save_strategy no; pass --save_strategy epoch, or steps"
        )
    if training.metric_for_best_model is not None:
        raise ValueError(
            "average_checkpoints: expected no best checkpoint beside it, which would be the model instead, and stay "
            f"among the last, got --metric_for_best_model {training.metric_for_best_model}; leave that and "
            "--load_best_model_at_end out"
        )
    kept = training.save_total_limit
    if kept is not None and kept < count:
        raise ValueError(
            f"average_checkpoints: expected at most {kept}, since --save_total_limit keeps no more, got {count}; "
            f"pass --save_total_limit {count}"
        )
    epochs = math.ceil(training.num_train_epochs)
    if training.save_strategy == "epoch" and training.max_steps <= 0 and epochs < count:
        raise ValueError(
            f"average_checkpoints: expected at most {epochs}, one for each of --num_train_epochs, got {count}; train "
            "for longer, or pass --save_strategy steps"
        )
    left = last_checkpoint(str(training.output_dir))
    if left is not None and checkpoint_to_resume(training) is None:
        raise ValueError(
            f"output_dir: expected none with checkpoints of another run, which would be averaged too, got {left}; "
            "name another folder, or go on with --resume_from_checkpoint true"
        )


def set_generated_length(model: PreTrainedModel, asked: int | None, longest: int) -> int:
    """Let a model generate as long texts as are asked for, or as the data has; it is saved so.

    Args:
        model: What generates; its own length counts before that of the data.
        asked: `generation_max_length`, which counts the token that a text begins with.
        longest: The tokens of the longest reference.

    Returns:
        How many tokens are generated at most.

    Raises:
        InputError: More are asked for than the model has positions for.
    """
    own = asked_length(model, {})
    if asked is not None:
        length = fitting_length(model, None, asked - 1, asked - 1, decoder=True)
    else:
        length = generated_length(model, longest) if own is None else own
    model.generation_config.max_new_tokens = None  # it would count before what is asked for
    model.generation_config.max_length = length + 1
    return length


def main() -> None:
    """Train, average, evaluate, translate."""
    model_arguments, data, robustness, training = read_arguments(
        ModelArguments, DataArguments, RobustnessArguments, Seq2SeqParameterDefenseTrainingArguments
    )
    model_arguments.check()
    check_something_is_done(training, predicts=True)
    check_counts(data, "max_train_samples", "max_eval_samples")
    check_average(data.average_checkpoints, training)
    corruptions = robustness.read(())  # before hours of training
    training.predict_with_generate = True
    if training.generation_num_beams is None and training.generation_config is None:
        training.generation_num_beams = 5  # as the papers
    logger.info("processes: %d", training.world_size)
    set_seed(training.seed)

    wanted = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    texts = load_texts(data, [split for split, asked in wanted.items() if asked], model_arguments.cache_dir)
    tokenized = data.text_is_tokenized or data.papers_preparation
    source, target = load_vocabularies(model_arguments, texts.get("train"), tokenized)
    set_seed(training.seed)  # the weights do not depend on whether a vocabulary was trained
    model = load_model(model_arguments, source, target)
    if training.generation_config is not None:  # the Trainer would put it in place of one that knows the language
        model.generation_config = TranslationTrainer.load_generation_config(training.generation_config)
        training.generation_config = None
    name_languages(model, source, data)
    max_length = min(
        fitting_length(model, tokenizer, MAX_LENGTH, data.max_length, decoder=decoder)
        for tokenizer, decoder in ((source, False), (target, True))
    )

    def prepare(split: str) -> Sequence[Any] | None:
        if split not in texts:
            return None
        most = data.max_train_samples if split == "train" else data.max_eval_samples
        text = texts[split].first(most)
        encoded = encode(text, source, target, max_length, cut=split != "train", prefix=data.source_prefix)
        logger.info(encoded.report)
        return encoded.rows

    scores = BleuScores(tokenize=None if tokenized else tokenize_13a, lowercase=data.lowercase_bleu)

    def decode(rows: Any) -> list[str]:
        known = np.where(rows >= 0, rows, target.pad_token_id)
        return [text.strip() for text in target.batch_decode(known, skip_special_tokens=True)]

    def bleu(prediction: EvalPrediction) -> dict[str, float]:
        generated = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        references = [reference_text(target, row[row >= 0].tolist()) for row in np.asarray(prediction.label_ids)]
        found = scores(predictions=decode(generated), references=references)
        tokens = torch.from_numpy(np.where(generated >= 0, generated, target.pad_token_id))[:, 1:]
        cut = float(np.mean(unfinished(tokens, length, model, {})))
        if cut:
            logger.warning(
                f"{cut:.1%} of the translations did not end within {length} tokens, and are scored as they were cut; "
                "raise generation_max_length, unless they run on for ever"
            )
        return {**found, "predictions_cut": cut}

    rows = {split: prepare(split) for split in wanted}
    trainer = TranslationTrainer(
        model=model,
        args=training,
        train_dataset=cast("Dataset[Any]", rows["train"]),
        eval_dataset=cast("Dataset[Any]", rows["validation"]),
        compute_metrics=bleu,
        processing_class=source,
        data_collator=DataCollatorForSeq2Seq(source, model=decoder_of(model)),
        max_tokens=data.max_tokens,
    )
    trainer.target_tokenizer = target
    measured = [row for split in ("validation", "test") for row in rows[split] or ()] or rows["train"] or ()
    longest = max((len(row["labels"]) for row in measured), default=1)
    length = set_generated_length(model, training.generation_max_length, longest)
    logger.info(f"Translations may have {length} tokens.")

    if rows["train"] is not None:
        train_and_save(trainer, checkpoint_to_resume(training), robustness, train_samples=len(rows["train"]))
        if data.average_checkpoints is not None and trainer.is_world_process_zero():
            last = last_checkpoints(training.output_dir, data.average_checkpoints)
            average_checkpoints(last, training.output_dir)
        trainer.accelerator.wait_for_everyone()
        if data.average_checkpoints is not None:
            averaged = AutoModelForSeq2SeqLM.from_pretrained(training.output_dir)
            model.load_state_dict(averaged.state_dict())

    if rows["validation"] is not None:
        metrics = {**trainer.evaluate(), "eval_samples": len(rows["validation"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if corruptions and not robustness.skip_corruptions:  # all processes measure together
            record = measure_robustness(
                trainer, corruptions, trials=robustness.corruption_trials, seed=robustness.corruption_seed
            )
            save_measurement(trainer, record, "BLEU", "tokenized_bleu" if tokenized else "bleu")

    if rows["test"] is not None:
        found = trainer.predict(cast("Dataset[Any]", rows["test"]), metric_key_prefix="test")
        metrics = {**(found.metrics or {}), "test_samples": len(rows["test"])}
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)
        if trainer.is_world_process_zero():
            path = Path(training.output_dir) / "generated_predictions.txt"
            path.write_text("\n".join(decode(found.predictions)) + "\n", encoding="utf-8")

    if scores.notes and trainer.is_world_process_zero():
        path = Path(training.output_dir) / "bleu_signatures.json"
        path.write_text(json.dumps(scores.notes, indent=2) + "\n", encoding="utf-8")
        print(*scores.notes, sep="\n")
    push_if_asked(trainer)


if __name__ == "__main__":
    main()
