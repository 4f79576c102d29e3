"""Causal language models: how likely is a text?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from jinja2 import TemplateError
from torch.utils.data import DataLoader
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto

from hf_parcor.errors import InputError, nearest, one_line
from hf_parcor.evaluation import BatchMetric, LanguageModelMetric, LmEvalMetric
from hf_parcor.evaluation.metrics.language_model import padded_windows, sliding_windows
from hf_parcor.evaluation.outputs import inside_adapters
from hf_parcor.records.metric_info import LM_EVAL
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, Task, load_configuration

_MAX_LENGTH = 512
_SETTINGS: Mapping[str, Callable[[str], Any]] = {"limit": float, "num-fewshot": int, "include-path": str}


@cache
def decoders() -> frozenset[str]:
    """Return the classes of Transformers that go on with a text: causal ones, and those that take images beside it.

    The latter are named as encoder-decoders are, and those that read a text with an encoder are not among them.
    """
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    multimodal = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()
    with_encoder = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    named_alike = {name for name in multimodal if name.endswith("ForConditionalGeneration")}
    return frozenset({*causal, *named_alike} - set(with_encoder))


class TextGeneration(Task):
    """The next token of a text: loss, perplexity, accuracy; also of decoders that take images beside it.

    The texts of all rows are joined, with the end-of-text token of the tokenizer after each, if it has one, and cut
    into windows of the longest length, which overlap where a stride says so: see `sliding_windows`. Where the encoding
    says what stands between rows, they are one running text, encoded as a whole, as it is done to WikiText. Chats are
    written by the tokenizer's template, and end as it ends them; all that is said in them counts.
    """

    name = "text-generation"
    heads = ("ForCausalLM", "LMHeadModel")
    auto_class = "AutoModelForCausalLM"
    roles: ClassVar[Mapping[str, Role]] = {"text": Role(("text", "sentence", "content", "document", "messages"))}
    pads = False
    takes = frozenset({"max_length", "prefix", "stride", "between_rows"})
    metrics = ("perplexity", "loss", "accuracy")

    def has_head(self, architectures: Sequence[str]) -> bool:
        """Return whether a model of these architectures is a decoder."""
        return super().has_head(architectures) or not decoders().isdisjoint(architectures)

    def loader(self, name: str, **origin: Any) -> Any:
        """Return the class of Transformers for causal models, or that for what takes images too.

        Raises:
            InputError: There is no such model, or it reads images with an encoder, such as Pix2Struct, and no text.
        """
        config = load_configuration(name, **origin)
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
            return super().loader(name, **origin)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(
                f"model: expected a decoder, which goes on with a text, got {name!r} with a {type(config).__name__}, "
                "an encoder; measure it from Python: CorruptionEvaluator takes any model and any metric"
            )
        return AutoModelForMultimodalLM

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return windows over the joined text."""
        tokens = self._tokens(rows, columns["text"], processed)
        length, stride = processed.length(_MAX_LENGTH), processed.encoding.stride
        if stride is not None and stride > length:
            raise InputError(
                f"stride: expected at most {length:,}, the tokens of a window, got {stride:,}; lower it, or raise "
                "--max-length"
            )
        windows: list[Example] = [dict(window) for window in sliding_windows(tokens, length, stride)]
        if not windows:
            raise InputError(f"{rows.source}: expected two tokens of text or more, got {len(tokens)}; name other data")
        return windows

    def smooths_labels(self, processed: Processed) -> bool:
        """Return whether the Trainer knows the model as one whose labels are of the next token."""
        name = type(inside_adapters(processed.model)).__name__
        return name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @staticmethod
    def _tokens(rows: Rows, column: str, processed: Processed) -> list[int]:
        """Return the tokens of all rows as one text."""
        tokenizer, between = processed.processor, processed.encoding.between_rows
        chats = isinstance(next(rows.with_columns(column)).get(column), list)
        written = _chats(rows, column, tokenizer) if chats else rows.texts(column)
        texts = [processed.encoding.prefix + text for text in written]
        if between is not None:
            return list(tokenizer(between.join(texts), verbose=False)["input_ids"])
        end = [] if chats or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [token for of_text in encoded for token in [*of_text, *end]]

    def collator(self, processed: Processed) -> Collator:
        """Return what pads windows, whether the tokenizer has a token for it or not."""
        return padded_windows

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric | LmEvalMetric:
        """Return perplexity, loss and accuracy; or tasks of lm-eval, which are not measured on the batches."""
        if name.startswith(LM_EVAL):
            return _lm_eval(name, processed.processor, batches.batch_size or 1)
        self.check_metric(name, f"{LM_EVAL}TASK")
        return LanguageModelMetric(batches)


def _chats(rows: Rows, column: str, tokenizer: Any) -> list[str]:
    """Return chats, lists of messages with `role` and `content`, as the tokenizer writes them.

    Raises:
        InputError: The tokenizer has no template for chats, or none for one of these.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"tokenizer: expected one with a template for the chats in column {column!r}, got none; set its "
            "chat_template, or name a column with texts"
        )
    written = []
    for row, chat in rows.numbered(rows.column(column)):
        try:
            written.append(tokenizer.apply_chat_template(chat, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise InputError(
                f"{rows.source}: expected a chat that the tokenizer's template can write, messages with role and "
                f"content, got one in row {row} that it cannot ({one_line(error)}); mend the data"
            ) from error
    return written


def _lm_eval(name: str, tokenizer: Any, batch_size: int) -> LmEvalMetric:
    """Return the tasks that a word names, as corruptions are named: tasks, then settings behind a colon.

    Raises:
        InputError: There is no such task or setting.
    """
    tasks, _, words = name.removeprefix(LM_EVAL).partition(":")
    settings: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        key, _, value = word.partition("=")
        try:
            settings[key.replace("-", "_")] = _SETTINGS[key](value)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"metric: expected settings such as limit=100,num-fewshot=5,include-path=FOLDER, got {word!r}"
                f"{nearest(key, _SETTINGS)}; write {LM_EVAL}arc_easy:limit=100"
            ) from error
    try:
        return LmEvalMetric(list(filter(None, tasks.split(","))), tokenizer, batch_size=batch_size, **settings)
    except ValueError as error:
        raise InputError(f"metric: {error}") from error
