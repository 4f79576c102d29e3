"""What a task is: how its rows become batches, which model it takes, and what is measured."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import transformers
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from hf_parcor.errors import InputError, nearest, one_line
from hf_parcor.evaluation import BatchMetric, LmEvalMetric
from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.evaluation.outputs import inside_adapters
from hf_parcor.sequence_length import fitting_length, positions
from hf_parcor.tasks.adapters import Adapter, LoaderOfAdapter
from hf_parcor.tasks.rows import Rows, find_column

logger = logging.getLogger(__name__)

_OF_ORIGIN = ("revision", "trust_remote_code")


def load_pretrained(what: str, loader: Any, name: str, **settings: Any) -> Any:
    """Return `loader.from_pretrained(name, **settings)`.

    Args:
        what: What messages call it.
        loader: A class of Transformers.
        name: A name on the Hub, or a local folder.
        **settings: For `from_pretrained`.

    Raises:
        InputError: Nothing of that name can be loaded, or not onto these devices, or it needs a library.
    """
    try:
        return loader.from_pretrained(name, **settings)
    except ImportError as error:
        raise InputError(
            f"{what}: expected the libraries that {name!r} needs, got an {one_line(error)}; install them"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise InputError(
            f"{what}: expected weights of the shapes that the configuration says, got others in {name!r}, which the "
            "report above names; save configuration and weights together"
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if settings.get("device_map") is not None and "device_map" in str(error):
            raise InputError(
                f"device_map: expected one that the model can be loaded onto, got {settings['device_map']} "
                f"({one_line(error)}); name a device for every module, and a folder for what is offloaded to disk"
            ) from error
        needs_code = "trust_remote_code" in str(error)
        advice = (
            "read its code, and allow it with trust_remote_code" if needs_code else "check name, files and network"
        )
        raise InputError(
            f"{what}: expected a name on the Hub or a local folder that {loader.__name__} can load, got {name!r} "
            f"({one_line(error)}); {advice}"
        ) from error


def load_processing(what: str, loader: Any, name: str, **settings: Any) -> Any:
    """Return what prepares inputs; of a PEFT adapter that was saved without, that of the model that it belongs to.

    Args:
        what: As in `load_pretrained`.
        loader: As in `load_pretrained`.
        name: As in `load_pretrained`.
        **settings: As in `load_pretrained`; the revision is the adapter's own.

    Raises:
        InputError: As in `load_pretrained`; or a tokenizer has no vocabulary.
    """
    adapter = Adapter.found(name, settings.get("revision"))
    if adapter is not None and not adapter.has_processor:
        base, revision = adapter.base
        if base:
            name, settings = base, {**settings, "revision": revision}
    found = load_pretrained(what, loader, name, **settings)
    tokenizer = getattr(found, "tokenizer", found)
    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        words = set(tokenizer.get_vocab()).difference(tokenizer.all_special_tokens)
        if len(words) < 2:  # Transformers makes one of special tokens where there is no file; that of T5 has a space
            raise InputError(
                f"{what}: expected one with a vocabulary, got that of {name!r} without, to which all words are one; "
                "save the tokenizer beside the model, with its save_pretrained"
            )
    return found


def load_configuration(name: str, revision: str | None = None, *, trust_remote_code: bool | None = None) -> Any:
    """Return the configuration of a model; of a PEFT adapter, that of the model that it belongs to.

    Args:
        name: As in `load_pretrained`.
        revision: Its branch, tag or commit on the Hub.
        trust_remote_code: Whether the model may bring code.

    Raises:
        InputError: As in `load_pretrained`.
    """
    adapter = Adapter.found(name, revision)
    if adapter is not None and adapter.base[0]:
        name, revision = adapter.base[0], adapter.base[1]
    return load_pretrained(
        "model", transformers.AutoConfig, name, revision=revision, trust_remote_code=trust_remote_code
    )


def origin_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of `from_pretrained` that say where a model is from: its revision, and its own code."""
    return {key: settings[key] for key in _OF_ORIGIN if key in settings}


Example = dict[str, Any]
Collator = Callable[[list[Example]], Mapping[str, Any]]


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens, and what the numbers of boxes are.

    Attributes:
        max_length: Longer texts are cut to this many tokens; None for what suits the task.
        prefix: Put before each text, such as "translate English to German: " for T5.
        source_language: What a model of many languages calls that of the sources, or what is spoken; None for what it
            was saved with.
        target_language: And that of the targets.
        box_format: Of a detector's data: "coco" for (x, y, width, height), "voc" for (xmin, ymin, xmax, ymax); None
            for what the column's name says.
        stride: Of text generation, how many tokens lie between the beginnings of two windows, see `sliding_windows`;
            None for windows that do not overlap.
        between_rows: Of text generation, what stands between the texts of two rows, such as a line feed, where all of
            them are one running text; None for an end-of-text token after each.
    """

    max_length: int | None = None
    prefix: str = ""
    source_language: str | None = None
    target_language: str | None = None
    box_format: str | None = None
    stride: int | None = None
    between_rows: str | None = None


@dataclass(frozen=True)
class Role:
    """What a column is for.

    Attributes:
        names: Well-known names of such a column, in lower case, the likeliest first.
        required: Whether a task does not go without it.
    """

    names: Sequence[str]
    required: bool = True


@dataclass(frozen=True)
class Processed:
    """A model with what prepares its inputs.

    Attributes:
        model: The model with the task's head.
        processor: Its tokenizer or image processor.
        encoding: How text becomes tokens.
    """

    model: Any
    processor: Any
    encoding: Encoding = field(default_factory=Encoding)

    def length(self, default: int, *, decoder: bool = False) -> int:
        """Return how many tokens a text may have: what was asked for, or the default, or what the model can take.

        Raises:
            InputError: More is asked for than the model has positions for.
        """
        return fitting_length(self.model, self.processor, default, self.encoding.max_length, decoder=decoder)


class Task(ABC):
    """One task: from rows to batches, and from batches to a metric.

    Attributes:
        name: As the Hub calls it.
        heads: How the names of architectures end that have the task's head.
        auto_class: The name of Transformers' class that loads such models.
        roles: What columns are for, by role.
        metrics: The names of the metrics that it knows itself, the usual one first.
        pads: Whether its batches are padded with a token of the tokenizer.
        takes: The fields of `Encoding` that it reads; others are refused.
        examples_are_inputs: Whether examples have what the model takes, by name: a Trainer drops all else.
        trained_by: The Trainer that trains such models, where that of Transformers cannot; else "".
    """

    name: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    auto_class: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]]
    metrics: ClassVar[tuple[str, ...]]
    pads: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset()
    examples_are_inputs: ClassVar[bool] = True
    trained_by: ClassVar[str] = ""

    def has_head(self, architectures: Sequence[str]) -> bool:
        """Return whether a model of these architectures has the task's head."""
        return any(name.endswith(self.heads) for name in architectures)

    def find_columns(self, rows: Rows, given: Mapping[str, str]) -> dict[str, str]:
        """Return the column of each role that there is one for.

        Args:
            rows: The data.
            given: Columns by role, where their names are not well known.

        Raises:
            InputError: There is no such role, no such column, or none for a role that is required.
        """
        for role in given:
            if role not in self.roles:
                raise InputError(
                    f"column: expected one of the roles {', '.join(self.roles)}, got {role!r}"
                    f"{nearest(role, self.roles)}; give ROLE=NAME"
                )
        found = {role: find_column(rows, role, entry.names, given) for role, entry in self.roles.items()}
        missing = [role for role, column in found.items() if column is None and self.roles[role].required]
        if missing:
            expected = "a column" if len(missing) == 1 else "columns"
            flags = " ".join(f"--column {role}=NAME" for role in missing)
            raise InputError(
                f"{rows.source}: expected {expected} with the {' and the '.join(missing)} for {self.name}, got the "
                f"columns {', '.join(rows.columns)}; say which with {flags}"
            )
        given_columns = set(given.values())  # no second text that is the text, where somebody says which that is
        return {
            role: column
            for role, column in found.items()
            if column is not None and (role in given or self.roles[role].required or column not in given_columns)
        }

    def load_model(self, name: str, *, to_train: bool = False, **settings: Any) -> Any:
        """Return a model for this task; of an adapter, what was trained can be trained on.

        Args:
            name: A name on the Hub, or a local folder.
            to_train: Whether it is to be trained and saved: an adapter is then around it, as PEFT has it.
            **settings: For `from_pretrained`, such as `revision` and `trust_remote_code`.

        Raises:
            InputError: There is no such model, or it cannot have such a head.
        """
        loader = self.loader(name, **origin_in(settings))
        adapter = Adapter.found(name, settings.get("revision"))
        if adapter is not None:
            loader = LoaderOfAdapter(loader, adapter, around=to_train)
        return load_pretrained("model", loader, name, **settings)

    def loader(self, name: str, **origin: Any) -> Any:
        """Return the class of Transformers that loads a model with the task's head.

        Args:
            name: As for `load_model`.
            **origin: As for `load_configuration`.
        """
        return getattr(transformers, self.auto_class)

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return the model's tokenizer, or what its inputs need otherwise.

        Args:
            name: As for `load_model`.
            **settings: As for `load_model`.

        Raises:
            InputError: There is none, or it cannot pad.
        """
        tokenizer = load_processing("tokenizer", transformers.AutoTokenizer, name, **settings)
        if self.pads and tokenizer.pad_token is None:
            raise InputError(
                f"tokenizer: expected one with a padding token, got that of {name!r} without; set its pad_token and "
                "the model's pad_token_id, and save both"
            )
        return tokenizer

    def prepare(self, processed: Processed) -> None:
        """Set model and tokenizer to what is asked for, before texts are encoded.

        A tokenizer returns what the model takes, as a Trainer would leave it: that of a BERT with a BART, which many
        Chinese models have, returns `token_type_ids`, and `generate` refuses them.

        Raises:
            InputError: Something is asked for that the task has no use for, or languages are missing where the model
                has many.
        """
        for entry in fields(Encoding):
            asked = getattr(processed.encoding, entry.name)
            if asked != entry.default and entry.name not in self.takes:
                raise InputError(
                    f"{entry.name}: expected none for {self.name}, which has no use for it, got {asked!r}; leave "
                    "it out"
                )
        model, tokenizer = processed.model, processed.processor
        taken = inspect.signature(inside_adapters(model).forward).parameters
        if isinstance(tokenizer, transformers.PreTrainedTokenizerBase) and "input_ids" in taken:
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
        if self.pads and getattr(tokenizer, "padding_side", "right") != "right" and positions(model):
            tokenizer.padding_side = "right"  # positions that are looked up begin with padding otherwise

    def head_settings(self, parts: Sequence[tuple[Rows, Mapping[str, str]]]) -> dict[str, Any]:
        """Return what a model that is to be trained has to know of its head; by default nothing.

        Args:
            parts: All rows that it will meet, in training and after, each with their columns.

        Raises:
            InputError: The data has no labels.
        """
        return {}

    @abstractmethod
    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return the inputs of the model for each row, or block of text, with `labels`.

        Raises:
            InputError: The data has no labels that the model knows.
        """

    @abstractmethod
    def collator(self, processed: Processed) -> Collator:
        """Return what makes a batch of tensors from examples."""

    def training_collator(self, processed: Processed) -> Collator:
        """Return what makes a batch to train on; by default the same."""
        return self.collator(processed)

    def smooths_labels(self, processed: Processed) -> bool:
        """Return whether the Trainer can smooth the labels: each is one of the classes that logits are scores of."""
        return True

    def usual_metric(self, processed: Processed, batches: DataLoader[Any]) -> tuple[str, str]:
        """Return what is measured where no metric is asked for, and a remark on that for the user, or ""."""
        return self.metrics[0], ""

    @abstractmethod
    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric | LmEvalMetric:
        """Return what measures a metric over batches.

        Raises:
            InputError: There is no such metric.
        """

    def check_metric(self, name: str, *others: str) -> None:
        """Refuse a metric that is none of the task's own.

        Args:
            name: The metric.
            *others: What the message names beside them.

        Raises:
            InputError: It is none.
        """
        if name not in self.metrics:
            raise InputError(
                f"metric: expected one of {', '.join([*self.metrics, *others])} for {self.name}, got {name!r}"
                f"{nearest(name, self.metrics)}; name one of them"
            )

    def shown(self, metric: str, found: Mapping[str, Any]) -> str:
        """Return which of the numbers that a metric found is to be reported."""
        return metric if metric in found else next(iter(found))

    def batches(
        self, examples: Sequence[Example], processed: Processed, size: int, workers: int = 0
    ) -> DataLoader[Any]:
        """Return batches; texts, and recordings, of like length share one, for less padding.

        Args:
            examples: What `examples` returned.
            processed: The model.
            size: The most examples of a batch.
            workers: How many processes make batches; 0 for this one.
        """
        ordered: Any = examples
        lengths = getattr(examples, "lengths", None)  # of recordings: an example would be decoded for it
        if lengths is None and "input_ids" in examples[0]:
            lengths = [len(example["input_ids"]) for example in examples]
        if lengths is not None:
            ordered = _InOrder(examples, sorted(range(len(examples)), key=lengths.__getitem__))
        return DataLoader(ordered, batch_size=size, collate_fn=self.collator(processed), num_workers=workers)


@dataclass(frozen=True)
class _InOrder:
    examples: Sequence[Example]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.order[index]]


def say_what_is_cut(rows: Rows, column: str, encoded: Any, length: int) -> None:
    """Say how many texts of a column had more tokens than this length, if a tokenizer cut any."""
    cut = sum(bool(text.overflowing) for text in encoded.encodings or ())
    if cut:
        logger.warning(
            f"{rows.source}: {cut:,} of {len(encoded.encodings):,} texts of column {column!r} have more than "
            f"{length:,} tokens and are cut; another max_length cuts others."
        )


def check_tokens(rows: Rows, column: str, encoded: Sequence[Sequence[int]]) -> None:
    """Refuse texts without a token: there is nothing to compute on but the padding of their batch.

    Raises:
        InputError: There is one.
    """
    for row, tokens in rows.numbered(encoded):
        if not tokens:
            raise InputError(
                f"{rows.source}: expected a token or more in each text of column {column!r}, got none in row {row}; "
                "leave such rows out"
            )


def library_score(name: str, known: Sequence[str]) -> Score:
    """Return the `compute` of a metric of `evaluate`.

    Args:
        name: Its name on the Hub, or a local folder.
        known: The names that need no library, for the message.

    Raises:
        InputError: It cannot be reached.
    """
    try:
        import evaluate
    except ImportError as error:
        raise InputError(
            f"metric: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}; name one of them, or "
            "install evaluate, which may know it: pip install 'hf-parcor[cli]'"
        ) from error
    try:
        module: Any = evaluate.load(name)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"metric: expected one of {', '.join(known)}, or a metric of evaluate that can be reached, got {name!r}"
            f"{nearest(name, known)} ({one_line(error)}); name one of them, or a local folder"
        ) from error
    score: Score = module.compute
    return score
