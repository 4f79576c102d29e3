"""Train a dependency parser on trees in CoNLL-U, with its parameters defended; paper 1's system.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument.

    python examples/train_parser.py --train_file train.conllu.gz --validation_file dev.conllu.gz --output_dir out \
        --do_train --do_eval

The model is that of Chen and Manning (2014), see `modeling_transition_parser.py`; word vectors start at random. A row
of training data is one configuration on the way to a tree. With `--do_eval` whole sentences are parsed, UAS and LAS
(punctuation excluded: words whose part of speech, UPOS, is PUNCT) are measured on gold parts of speech, also under
corruptions, and `robustness.json` is written beside the other results.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from modeling_transition_parser import UNKNOWN, TransitionParser, TransitionParserConfig, oracle_rows
from torch import Tensor
from torch.utils.data import Dataset
from transformers import set_seed
from transformers.trainer_utils import EvalLoopOutput

from hf_parcor import CorruptionEvaluator, ParameterDefenseTrainer, ParameterDefenseTrainingArguments
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.errors import InputError
from hf_parcor.evaluation import RobustnessArguments
from hf_parcor.evaluation.metrics import OverBatches, own_batch, share_not_finite
from hf_parcor.hub_data import load_hub_data
from hf_parcor.programs import (
    check_counts,
    check_something_is_done,
    measure_and_save,
    push_if_asked,
    read_arguments,
    train_and_save,
)
from hf_parcor.records.data import EvaluationData
from hf_parcor.records.metric_info import SHARE, MetricInfo
from hf_parcor.training import checkpoint_to_resume

logger = logging.getLogger(__name__)

CORRUPTIONS = (
    *("random=0.01,0.1:norm=inf", "gradient=0.0001,0.001,0.01:norm=inf", "gradient=0.05,0.1,0.2,0.5"),
    *("gaussian=0.01,0.1", "quantization=8,6,4"),
)


@dataclass
class ModelArguments:
    """Which parser: a new one, or one that was trained before."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A parser that this program has saved; not set: a new one."}
    )
    embedding_size: int = field(default=50, metadata={"help": "Of a new one: width of each embedding."})
    hidden_size: int = field(default=200, metadata={"help": "Of a new one: width of the hidden layer."})
    dropout: float = field(default=0.5, metadata={"help": "Of a new one: dropout of the hidden layer."})
    min_word_count: int = field(
        default=2, metadata={"help": "Of a new one: rarer words of the training data are unknown ones."}
    )


@dataclass
class DataArguments:
    """Which trees it is trained on, and measured on."""

    train_file: str | None = field(default=None, metadata={"help": "A local CoNLL-U file, also .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "A local file to measure on."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Without files: a data set on the Hub with the columns of Universal Dependencies."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as en_ewt."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of it; refs/convert/parquet is the Hub's own copy."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many sentences, drawn with the seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many sentences."})
    parse_batch_size: int = field(default=256, metadata={"help": "Sentences that are parsed together."})


@dataclass
class TrainingArguments(ParameterDefenseTrainingArguments):
    """Those of the library, with batches and a learning rate for single configurations, as paper 1 has them."""

    per_device_train_batch_size: int = field(default=1024, metadata={"help": "Configurations a step, on each device."})
    per_device_eval_batch_size: int = field(default=1024, metadata={"help": "Configurations a batch."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate of AdamW."})


class Tree(NamedTuple):
    """A sentence: for each word its form, tag, head (0 is the root), relation, and whether it is punctuation."""

    words: list[str]
    tags: list[str]
    heads: list[int]
    relations: list[str]
    punctuation: list[bool]


def tree_of(words: Iterable[Sequence[str]], where: str) -> Tree:
    """Return the tree of words that are given as form, UPOS, XPOS, head, relation.

    A word's tag is its XPOS, that of the language, or UPOS where the XPOS is `_`.

    Raises:
        InputError: The heads are no tree with one root.
    """
    forms, universal, own, heads, relations = map(list, zip(*words, strict=True))
    if not all(head.isdecimal() and int(head) <= len(heads) for head in heads):
        raise InputError(f"{where}: expected heads from 0 to {len(heads)}, got {' '.join(heads)}; correct them")
    numbers = [int(head) for head in heads]
    if numbers.count(0) != 1:
        raise InputError(f"{where}: expected one word with head 0, got {numbers.count(0)}; correct the heads")
    reached = {0}
    for _ in numbers:
        reached |= {word for word, head in enumerate(numbers, 1) if head in reached}
        if len(reached) > len(numbers):
            break
    else:
        raise InputError(f"{where}: expected a tree, got words that are their own ancestors; correct the heads")
    tags = [tag if tag != "_" else other for tag, other in zip(own, universal, strict=True)]
    return Tree(forms, tags, numbers, relations, [tag == "PUNCT" for tag in universal])


def read_conllu(path: str | Path) -> list[Tree]:
    """Return the trees of a file in CoNLL-U, also compressed with gzip.

    Multiword tokens (1-2) and empty nodes (1.1) are no words of the tree, and left out.

    Raises:
        InputError: There is no such file, it is no CoNLL-U, or heads are no tree with one root.
    """
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if str(path).endswith(".gz") else content).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a file, found none; check its name") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected text in UTF-8, got {error}; restore or convert it") from error
    trees: list[Tree] = []
    words: list[list[str]] = []
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        cells = line.split("\t")
        if not line.strip():
            if words:
                trees.append(tree_of(words, f"{path}, before line {number}"))
            words = []
        elif not line.startswith("#"):
            if len(cells) != 10:
                raise InputError(
                    f"{path}, line {number}: expected 10 columns with tabs, got {len(cells)}; see CoNLL-U"
                )
            if "-" in cells[0] or "." in cells[0]:
                continue
            if cells[0] != str(len(words) + 1):
                raise InputError(
                    f"{path}, line {number}: expected the word {len(words) + 1}, got {cells[0]!r}; put an empty line "
                    "after each sentence"
                )
            words.append([cells[1], cells[3], cells[4], cells[6], cells[7]])
    if not trees:
        raise InputError(f"{path}: expected sentences in CoNLL-U, got none; check the file")
    return trees


def trees_of_rows(rows: Any, split: str) -> list[Tree]:
    """Return the trees of a split on the Hub: lists of tokens, upos, xpos, head and deprel."""
    upos = getattr(rows.features["upos"], "feature", None)  # whole numbers that stand for names, or the names
    names = getattr(upos, "names", None)
    trees = []
    for number, row in enumerate(rows):
        tags = row["upos"] if names is None else [names[tag] for tag in row["upos"]]
        xpos = [tag or "_" for tag in row["xpos"]]
        columns = (row["tokens"], tags, xpos, map(str, row["head"]), row["deprel"])
        # Multiword tokens and empty nodes have no head.
        words = [word for word in zip(*columns, strict=True) if word[3].isdecimal()]
        if words:
            trees.append(tree_of(words, f"{split}, row {number}"))
    return trees


def load_trees(data: DataArguments) -> dict[str, tuple[str, list[Tree]]]:
    """Return what the splits `train` and `validation` that were asked for are called, and their trees."""
    given = {"train": data.train_file, "validation": data.validation_file}
    files = {split: path for split, path in given.items() if path is not None}
    if files:
        return {split: (Path(path).name, read_conllu(path)) for split, path in files.items()}
    if data.dataset_name is None:
        raise InputError("expected --train_file or --validation_file, or --dataset_name, got none; name the data")
    splits: Mapping[str, Any] = load_hub_data(
        data.dataset_name, data.dataset_config_name, revision=data.dataset_revision, cache_dir=data.cache_dir
    )
    return {
        split: (f"{data.dataset_name}, {split}", trees_of_rows(splits[split], split))
        for split in given
        if split in splits
    }


def config_of(trees: Sequence[Tree], model: ModelArguments) -> TransitionParserConfig:
    """Return the configuration of a new parser, whose vocabulary is that of these trees."""
    counts = Counter(word.lower() for tree in trees for word in tree.words)
    return TransitionParserConfig(
        words=[word for word, count in counts.items() if count >= model.min_word_count],
        tags=sorted({tag for tree in trees for tag in tree.tags}),
        relations=sorted({relation for tree in trees for relation in tree.relations}),
        embedding_size=model.embedding_size,
        hidden_size=model.hidden_size,
        dropout=model.dropout,
    )


def sentence_batches(model: TransitionParser, trees: Iterable[Tree], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of sentences with their trees, those of like length together, and which words are scored."""
    ordered = sorted(trees, key=lambda tree: len(tree.words))
    for start in range(0, len(ordered), size):
        some = ordered[start : start + size]
        words, tags = model.encode([tree.words for tree in some], [tree.tags for tree in some])
        heads, relations = model.encode_trees([tree.heads for tree in some], [tree.relations for tree in some])
        scored = heads >= 0
        for row, tree in zip(scored, some, strict=True):
            row[: len(tree.words)] &= ~torch.tensor(tree.punctuation)
        yield {"words": words, "tags": tags, "heads": heads, "relations": relations, "scored": scored}


class OracleRows(Dataset[dict[str, Tensor]]):
    """Configurations on the way to trees, each with the next transition; non-projective trees are left out.

    A batch is taken from two tensors at once: 400,000 rows one by one would take longer than to learn from them.
    """

    def __init__(self, batches: Iterable[Mapping[str, Tensor]], relation_count: int) -> None:
        parts = [
            oracle_rows(batch["words"], batch["tags"], batch["heads"], batch["relations"], relation_count)
            for batch in batches
        ]
        features, labels, projective = map(torch.cat, zip(*parts, strict=True))
        self.features, self.labels = features, labels
        self.trees, self.non_projective = len(projective), int((~projective).sum())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.features[index : index + 1], "labels": self.labels[index : index + 1]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Return the rows as one batch."""
        return [{"features": self.features[indices], "labels": self.labels[indices]}]


def collate(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return batches, of `OracleRows` the only one there is, as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class AttachmentScore(OverBatches):
    """Which share of the words gets its head (`uas`), and its relation, too (`las`): sentences parsed greedily.

    Args:
        batches: Those of `sentence_batches`; words that are not `scored`, punctuation say, do not count. A relation
            that the model does not know is never right.
        progress: Whether to show a progress bar.
    """

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers of this name mean."""
        return MetricInfo(True, SHARE) if name in ("uas", "las") else None

    @torch.no_grad()
    def of_batch(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """Return how many words have the right head, that and the right relation, no answer, and are scored."""
        own = own_batch(batch, model)
        heads, relations = model.parse(own["words"], own["tags"])
        attached = own["scored"] & (heads == own["heads"])
        labelled = attached & (relations == own["relations"]) & (relations > UNKNOWN)
        found = (attached, labelled, own["scored"] & (heads < 0), own["scored"])
        return [int(which.sum()) for which in found]

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return both scores over all words, and the share of words without an answer, if there are any.

        Raises:
            ValueError: No word is scored.
        """
        attached, labelled, unanswered, words = map(sum, zip(*parts, strict=True))
        if not words:
            raise ValueError("batches: expected words that are no punctuation, got none; give sentences with some")
        return {"uas": attached / words, "las": labelled / words, **share_not_finite(unanswered, words)}


class ParserTrainer(ParameterDefenseTrainer):
    """Parses sentences in each evaluation, so that UAS and LAS are logged, and can choose the best checkpoint."""

    attachment: AttachmentScore | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate transitions, then whole sentences."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        scores = self.attachment(self.model) if self.attachment is not None and self.model is not None else {}
        found = {f"{prefix}_{name}": value for name, value in scores.items()}
        return output._replace(metrics={**(output.metrics or {}), **found})


def main() -> None:
    """Train, evaluate, corrupt."""
    model_arguments, data, robustness, training = read_arguments(
        ModelArguments, DataArguments, RobustnessArguments, TrainingArguments
    )
    logger.info("processes: %d", training.world_size)
    check_something_is_done(training)
    check_counts(data, "max_train_samples", "max_eval_samples")
    set_seed(training.seed)
    corruptions = robustness.read(read_corruptions(CORRUPTIONS))  # before minutes of training

    splits = load_trees(data)
    for split, needed in {"train": training.do_train, "validation": training.do_eval}.items():
        if needed and split not in splits:
            raise InputError(f"expected a split {split!r}, found {', '.join(splits)}; give --{split}_file")
    train_trees = splits["train"][1] if training.do_train else []
    if data.max_train_samples is not None:
        drawn = torch.randperm(len(train_trees), generator=torch.Generator().manual_seed(training.seed))
        train_trees = [train_trees[index] for index in drawn[: data.max_train_samples]]
    if model_arguments.model_name_or_path is not None:
        model = TransitionParser.from_pretrained(model_arguments.model_name_or_path)
    elif train_trees:
        model = TransitionParser(config_of(train_trees, model_arguments))
    else:
        raise InputError("expected --do_train or --model_name_or_path, got neither; train a parser, or name one")

    def rows_of(trees: Sequence[Tree], split: str) -> OracleRows:
        batches = sentence_batches(model, trees, data.parse_batch_size)
        rows = OracleRows(batches, model.config.relation_count)
        logger.info(
            "%s: %d of %d trees are non-projective, which arc-standard transitions cannot make; they are left out of "
            "the %d configurations, and parsed as all others",
            split,
            rows.non_projective,
            rows.trees,
            len(rows),
        )
        return rows

    train_rows = rows_of(train_trees, "train") if training.do_train else None
    eval_trees = splits["validation"][1][: data.max_eval_samples] if training.do_eval else []
    eval_rows = rows_of(eval_trees, "validation") if training.do_eval else None
    trainer = ParserTrainer(
        model=model, args=training, train_dataset=train_rows, eval_dataset=eval_rows, data_collator=collate
    )
    if eval_trees:
        trainer.attachment = AttachmentScore(list(sentence_batches(model, eval_trees, data.parse_batch_size)))

    if train_rows is not None:
        counts = {"train_trees": train_rows.trees, "train_non_projective_trees": train_rows.non_projective}
        train_and_save(trainer, checkpoint_to_resume(training), robustness, train_samples=len(train_rows), **counts)

    if eval_rows is not None and trainer.attachment is not None:
        metrics = {
            **trainer.evaluate(),
            "eval_samples": len(eval_trees),
            "eval_non_projective_trees": eval_rows.non_projective,
        }
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if not robustness.skip_corruptions:  # all processes measure together
            evaluator = CorruptionEvaluator(
                model,
                trainer.attachment,
                # Whole sentences are measured, single configurations have a loss to climb along.
                trainer.get_eval_dataloader(),
                progress=not training.disable_tqdm,
                evaluated_on=EvaluationData(splits["validation"][0], rows=len(eval_trees)),
                task="token-classification",
            )
            measure_and_save(trainer, evaluator, corruptions, robustness, "UAS", "uas")
    push_if_asked(trainer)


if __name__ == "__main__":
    main()
