"""Causal language models: how likely is a text?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from hf_parcor.errors import InputError, nearest
from hf_parcor.evaluation import BatchMetric, LanguageModelMetric, LmEvalMetric
from hf_parcor.evaluation.metrics.language_model import padded_windows, sliding_windows
from hf_parcor.records.metric_info import LM_EVAL
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, Task

_MAX_LENGTH = 512
_SETTINGS: Mapping[str, Callable[[str], Any]] = {"limit": float, "num-fewshot": int, "include-path": str}


class TextGeneration(Task):
    """The next token of a text: loss, perplexity, accuracy.

    The texts of all rows are joined, with the end-of-text token of the tokenizer after each, if it has one, and cut
    into windows of the longest length, which overlap where a stride says so: see `sliding_windows`. Where the encoding
    says what stands between rows, they are one running text, encoded as a whole, as it is done to WikiText.
    """

    name = "text-generation"
    heads = ("ForCausalLM", "LMHeadModel")
    auto_class = "AutoModelForCausalLM"
    roles: ClassVar[Mapping[str, Role]] = {"text": Role(("text", "sentence", "content", "document"))}
    pads = False
    takes = frozenset({"max_length", "prefix", "stride", "between_rows"})
    metrics = ("perplexity", "loss", "accuracy")

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return windows over the joined text."""
        texts = [processed.encoding.prefix + text for text in rows.texts(columns["text"])]
        tokens = self._tokens(texts, processed)
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

    @staticmethod
    def _tokens(texts: Sequence[str], processed: Processed) -> list[int]:
        """Return the tokens of all rows as one text."""
        tokenizer, between = processed.processor, processed.encoding.between_rows
        if between is not None:
            return list(tokenizer(between.join(texts), verbose=False)["input_ids"])
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
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
