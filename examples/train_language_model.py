"""Train a language model, or fine-tune one, with its parameters defended.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument. Without a model's name
it is the LSTM of `modeling_awd_lstm.py`, on the words of the train file. Paper 1's setting, on the Penn Treebank:

    python examples/train_language_model.py --output_dir out --do_train --do_eval \
        --train_file ptb.train.txt.gz --validation_file ptb.test.txt.gz --num_train_epochs 70 \
        --learning_rate 1e-3 --weight_decay 1.2e-6 --max_grad_norm 0.25 --lr_scheduler_type constant \
        --per_device_train_batch_size 20 --per_device_eval_batch_size 10

Any causal language model: `--model_name_or_path` for a pretrained one, `--config_name` or `--model_type gpt2` for a
new one, whose sizes `--config_overrides n_layer=2,n_embd=128,n_head=2` sets. Those of the LSTM are set alike.

The text is one stream of tokens, with the token for the end after every line. A model that carries state (it takes
`continues`) reads as many pieces of it side by side as there are texts in a batch, `--block_size` tokens at a time,
each batch going on where the one before ended; so does a run that goes on from a checkpoint. Any other model reads
blocks of it, shuffled. Without the defense: `--defense none`. With `--do_eval` the log perplexity, the mean loss of a
token in nats, is measured (`eval_loss`), and also under the corruptions of paper 1, Table 1, and the same in L2,
unless `--corruptions` names others; `robustness.json` is written beside the other results.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modeling_awd_lstm  # noqa: F401 - registers the LSTM
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GradientCorruption,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    RandomCorruption,
)
from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import LanguageModelMetric, RobustnessArguments
from hf_parcor.hub_data import load_hub_data
from hf_parcor.programs import (
    check_counts,
    check_something_is_done,
    measure_and_save,
    push_if_asked,
    read_arguments,
    train_and_save,
)
from hf_parcor.records.metric_info import MetricInfo
from hf_parcor.sequence_length import fitting_length
from hf_parcor.tasks import Rows, read_file
from hf_parcor.training import checkpoint_to_resume

logger = logging.getLogger(__name__)

END, UNKNOWN = "<eos>", "<unk>"
Batch = dict[str, Tensor]


@dataclass
class ModelArguments:
    """Which model is trained: a pretrained one, or a new one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A causal language model on the Hub, or a local folder. Not set: a new one."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "The configuration of a new model, on the Hub or in a local folder."}
    )
    model_type: str = field(
        default="awd-lstm", metadata={"help": "The kind of a new model without config_name, such as gpt2 or llama."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Settings of a new model: hidden_size=200,num_hidden_layers=1."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer on the Hub or in a local folder. Not set: the pretrained model's, and for a new "
            "model the words of the train file."
        },
    )
    vocabulary_size: int | None = field(
        default=None, metadata={"help": "The most frequent so many words of the train file. Not set: all."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})

    @property
    def origin(self) -> dict[str, Any]:
        """How all of it is loaded."""
        given = {"revision": self.model_revision, "cache_dir": self.cache_dir}
        return {**given, "trust_remote_code": self.trust_remote_code}


@dataclass
class DataArguments:
    """Which text it is trained on, and measured on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of it; refs/convert/parquet is the Hub's own copy."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "A local .txt file of lines, or .csv, .tsv or .json(l), also .gz."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "A local file to measure on."})
    text_column_name: str = field(default="text", metadata={"help": "The column with the text; lines have none."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a text in a batch, which gradients go back through. Not set: 70, or what the model "
            "takes."
        },
    )
    max_train_tokens: int | None = field(default=None, metadata={"help": "Train on the first so many tokens."})
    max_eval_tokens: int | None = field(default=None, metadata={"help": "Measure on the first so many tokens."})


def load_lines(data: DataArguments, splits: Iterable[str], cache_dir: str | None) -> dict[str, list[str]]:
    """Return the lines of these splits, from files where there are any, else from the data set."""
    files = {"train": data.train_file, "validation": data.validation_file}
    lines = {}
    for split in splits:
        path = files[split]
        if path is not None:
            rows: Any = read_file(path)
        elif data.dataset_name is not None:
            rows = load_hub_data(
                data.dataset_name,
                data.dataset_config_name,
                split=split,
                revision=data.dataset_revision,
                cache_dir=cache_dir,
            )
        else:
            raise ValueError(f"{split}: expected --{split}_file or --dataset_name, got none; say where the text is")
        column = data.text_column_name
        if len(rows) and column not in rows[0]:
            raise ValueError(
                f"{split}: expected a column {column!r}, got {', '.join(rows[0])}; name it with --text_column_name"
            )
        lines[split] = Rows(split, rows, (column,)).texts(column)
    return lines


def word_tokenizer(lines: Iterable[str], size: int | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words between spaces, the most frequent first, as the model's folder will keep it.

    Args:
        lines: What has the words; `<unk>` may be one of them.
        size: How many of them at most, those for an unknown word and for the end of a line included; None for all.

    Examples:
        >>> tokenizer = word_tokenizer(["the film", "the plot"])
        >>> tokenizer.convert_ids_to_tokens(tokenizer("the end")["input_ids"])
        ['the', '<unk>', '<eos>']
    """
    counts = Counter(word for line in lines for word in line.split())
    words = [word for word, _ in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))]
    known = [END, UNKNOWN, *(word for word in words if word not in (END, UNKNOWN))][:size]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    special = {"unk_token": UNKNOWN, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]


def load_tokenizer(model: ModelArguments, train: Sequence[str] | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was named, or the pretrained model's, or that of the words of the train file."""
    name = model.tokenizer_name or model.model_name_or_path
    if name is not None:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **model.origin)
        return found
    if train is None:
        raise ValueError(
            "tokenizer: expected --model_name_or_path or --tokenizer_name, or --do_train for the words of its text, "
            "got none; name the model that is to be measured"
        )
    return word_tokenizer(train, model.vocabulary_size)


def load_model(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the pretrained model, or a new one."""
    if model.model_name_or_path is not None:
        if model.config_overrides is not None:
            raise ValueError("config_overrides: expected a new model, got a pretrained one; leave one of both out")
        pretrained: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **model.origin)
        return pretrained
    if model.config_name is not None:
        config = AutoConfig.from_pretrained(model.config_name, **model.origin)
    else:
        config = AutoConfig.for_model(model.model_type)
    if model.config_overrides is not None:
        config.update_from_string(model.config_overrides)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = type(config).from_dict({**config.to_dict(), "vocab_size": len(tokenizer), **ends})  # which checks it
    auto: Any = AutoModelForCausalLM
    new: PreTrainedModel = auto.from_config(config, trust_remote_code=model.trust_remote_code)
    return new


def encode(lines: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int | None) -> Tensor:
    """Return the tokens of all lines, each with the end after it, as one vector; an empty line is an end alone.

    Raises:
        ValueError: There is nothing but ends.
    """
    if not any(line.strip() for line in lines):
        raise ValueError(f"text: expected lines with words, got {len(lines)} without; is the file empty?")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(lines), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor([token for tokens in encoded["input_ids"] for token in (*tokens, *end)][:most])


class Streams(Dataset[Batch]):
    """A text as pieces that are read side by side, a batch of blocks after the other; for a model that carries state.

    Row `i` is of piece `i mod n`, block `i div n`: read in order, n rows at a time, each batch goes on where the one
    before ended. Each token is predicted once, the first ones of pieces from the token before them and no state, and
    the very first from an end. The last piece is shorter, and filled up with what does not count.

    Args:
        tokens: The text, `[tokens]`.
        streams: How many pieces, n.
        block_size: Tokens of a row; the last row of a piece has what is left.
        end: The token for the end of a line.

    Raises:
        ValueError: The text has fewer tokens than pieces.
    """

    def __init__(self, tokens: Tensor, streams: int, block_size: int, end: int) -> None:
        if len(tokens) < streams:
            raise ValueError(
                f"text: expected at least {streams} tokens, one for each text of a batch, got {len(tokens)}; give "
                "more text, or smaller batches"
            )
        self.streams, self.block_size = streams, block_size
        length = math.ceil(len(tokens) / streams)
        missing = length * streams - len(tokens)
        before = torch.cat([tokens.new_tensor([end]), tokens[:-1], tokens.new_full((missing,), end)])
        self._before = before.view(streams, length)
        self._targets = torch.cat([tokens, tokens.new_full((missing,), -100)]).view(streams, length)

    def __len__(self) -> int:
        """Return how many rows there are: a multiple of the number of pieces."""
        return math.ceil(self._before.shape[1] / self.block_size) * self.streams

    def __getitem__(self, index: int) -> Batch:
        """Return a row; its labels are the tokens themselves, as ever, and `shift_labels` what counts."""
        block, stream = divmod(index, self.streams)
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = slice(block * self.block_size, (block + 1) * self.block_size)
        tokens = self._before[stream, place]
        targets = self._targets[stream, place]
        return {"input_ids": tokens, "labels": tokens, "shift_labels": targets, "continues": torch.tensor(block > 0)}


class Blocks(Dataset[Batch]):
    """A text as blocks, each read by itself; the last one is filled up with what does not count.

    Args:
        tokens: The text, `[tokens]`.
        block_size: Tokens of a row, of which the first is not predicted.
        end: The token to fill up with.
    """

    def __init__(self, tokens: Tensor, block_size: int, end: int) -> None:
        missing = -len(tokens) % block_size
        self._tokens = torch.cat([tokens, tokens.new_full((missing,), end)]).view(-1, block_size)
        self._labels = torch.cat([tokens, tokens.new_full((missing,), -100)]).view(-1, block_size)
        self._labels[:, 0] = -100  # for Trainers that count the labels of a model without its shift

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return len(self._tokens)

    def __getitem__(self, index: int) -> Batch:
        """Return a block."""
        return {"input_ids": self._tokens[index], "labels": self._labels[index]}


def carries_state(model: nn.Module) -> bool:
    """Return whether a model goes on where a batch before ended, if the batch says so."""
    return "continues" in inspect.signature(model.forward).parameters


class StateInCheckpoints(TrainerCallback):
    """Keeps, beside a checkpoint, where the texts of each process's last batch ended, and goes on from there.

    Args:
        checkpoint: The folder that the run goes on from; None for a new run.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self._checkpoint = checkpoint

    @staticmethod
    def _file(folder: Path, arguments: TrainingArguments) -> Path:
        return folder / f"training_state_{arguments.process_index}.pt"

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        torch.save(kwargs["model"].training_state, self._file(folder, args))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read it.

        Raises:
            ValueError: The checkpoint has none.
        """
        if self._checkpoint is None:
            return
        path = self._file(Path(self._checkpoint), args)
        if not path.exists():
            raise ValueError(
                f"{path}: expected the state of the text that the run goes on with, found none; go on from another "
                "checkpoint, with as many processes as wrote it"
            )
        model = kwargs["model"]
        model.training_state = torch.load(path, map_location=model.device, weights_only=True)


class InOrder:
    """A metric whose batches a model has to see in their order, one corruption after the other: it carries state.

    The library would show each batch to the model under all corruptions, and on several processes every n-th batch to
    each, to save time; it does neither where a metric is nothing but called.

    Args:
        metric: The metric.
    """

    def __init__(self, metric: LanguageModelMetric) -> None:
        self.metric = metric

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics over all batches."""
        return self.metric(model)

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers of this name mean."""
        return self.metric.info_of(name)


@torch.no_grad()
def with_states(model: Any, batches: Iterable[Batch]) -> list[Batch]:
    """Return batches with the state that the model begins each of them with: gradients need no order then."""
    model.eval()
    found = []
    state: Tensor | None = None
    for batch in batches:
        alone = {name: tensor for name, tensor in batch.items() if name != "continues"}
        moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
        after = model(**moved).state
        found.append({**alone, "state": torch.zeros_like(after).cpu() if state is None else state})
        state = after.cpu()
    model.forget_state()
    return found


def corruptions_of_paper_1() -> list[Corruption]:
    """Return the rows of paper 1, Table 1 (L∞, all weights and 100 of them), and the same in L2, over decades."""
    bounds: list[tuple[float, int | None, Sequence[float]]] = [
        (math.inf, None, (1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
        (math.inf, 100, (1e-2, 1e-1, 1.0, 1e1, 1e2)),
        (2.0, None, (1e-2, 1e-1, 1.0, 1e1, 1e2)),
        (2.0, 100, (1e-1, 1.0, 1e1, 1e2)),
    ]
    return [
        kind(CorruptionConstraint(p=p, epsilon=epsilon, top_n=most))
        for p, most, strengths in bounds
        for epsilon in strengths
        for kind in (RandomCorruption, GradientCorruption)
    ]


def main() -> None:
    """Train, evaluate, corrupt."""
    model_arguments, data, robustness, training = read_arguments(
        ModelArguments, DataArguments, RobustnessArguments, ParameterDefenseTrainingArguments
    )
    logger.info("processes: %d", training.world_size)
    check_something_is_done(training)
    check_counts(data, "max_train_tokens", "max_eval_tokens")
    set_seed(training.seed)
    corruptions = robustness.read(corruptions_of_paper_1())  # before minutes of training

    wanted = {"train": training.do_train, "validation": training.do_eval}
    lines = load_lines(data, [split for split, asked in wanted.items() if asked], model_arguments.cache_dir)
    tokenizer = load_tokenizer(model_arguments, lines.get("train"))
    set_seed(training.seed)  # the weights do not depend on whether a vocabulary was made
    model: Any = load_model(model_arguments, tokenizer)
    carries = carries_state(model)
    if carries and training.n_gpu > 1:
        raise ValueError(
            f"expected one GPU for each process, since state is carried, got {training.n_gpu}; start with torchrun, "
            "or show it one GPU"
        )
    block_size = fitting_length(model, tokenizer, 70, data.block_size)

    def prepare(split: str, most: int | None, batch_size: int) -> Streams | Blocks | None:
        if split not in lines:
            return None
        tokens = encode(lines[split], tokenizer, most)
        logger.info(f"{split}: {len(tokens)} tokens")
        end = 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return Streams(tokens, batch_size, block_size, end) if carries else Blocks(tokens, block_size, end)

    in_a_batch = training.eval_batch_size * training.world_size
    train_rows = prepare("train", data.max_train_tokens, training.train_batch_size * training.world_size)
    eval_rows = prepare("validation", data.max_eval_tokens, in_a_batch)
    checkpoint = checkpoint_to_resume(training)
    if carries:
        training.train_sampling_strategy = "sequential"
    trainer = ParameterDefenseTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[StateInCheckpoints(checkpoint)] if carries else None,
    )

    if train_rows is not None:
        train_and_save(trainer, checkpoint, robustness, train_samples=len(train_rows))

    if carries:
        model.forget_state()
    if eval_rows is not None:
        batches = list(DataLoader(eval_rows, batch_size=in_a_batch, collate_fn=default_data_collator))
        measured = LanguageModelMetric(batches)
        model.eval()
        metrics = {f"eval_{name}": value for name, value in measured(model).items()}
        metrics["eval_samples"] = len(eval_rows)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if not robustness.skip_corruptions:  # all processes measure together
            evaluator = CorruptionEvaluator(
                model,
                InOrder(measured) if carries else measured,
                with_states(model, batches) if carries else None,
                progress=not training.disable_tqdm,
            )
            measure_and_save(trainer, evaluator, corruptions, robustness, "model", "loss")
    push_if_asked(trainer)


if __name__ == "__main__":
    main()
