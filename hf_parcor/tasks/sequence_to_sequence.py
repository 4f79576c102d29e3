"""Texts from texts: translation and summarization."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from hf_parcor.errors import InputError
from hf_parcor.evaluation import BatchMetric, GenerationMetric, SacrebleuScore
from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.evaluation.outputs import inside_adapters
from hf_parcor.languages import set_languages
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.speech_recognition import speech_models
from hf_parcor.tasks.task import Collator, Example, Processed, Role, Task, check_tokens, library_score, say_what_is_cut
from hf_parcor.tasks.text_generation import decoders

_MAX_LENGTH = 512
_OF_SACREBLEU = ("bleu", "chrf", "ter")
_OF_TWO_MODELS = "EncoderDecoderModel"  # those with an encoder of images or sound end so too


class SequenceToSequence(Task):
    """A text is generated from a text, and compared with a reference."""

    heads: ClassVar[tuple[str, ...]] = ("ForConditionalGeneration", "ForSeq2SeqLM")
    auto_class = "AutoModelForSeq2SeqLM"
    metrics = _OF_SACREBLEU
    takes = frozenset({"max_length", "prefix", "source_language", "target_language"})

    def has_head(self, architectures: Sequence[str]) -> bool:
        """Return whether a model of these architectures encodes texts: decoders, and what hears, are named alike."""
        named_alike = decoders() | speech_models()
        own = [name for name in architectures if name not in named_alike]
        return _OF_TWO_MODELS in own or super().has_head(own)

    def prepare(self, processed: Processed) -> None:
        """Set the languages that are asked for.

        Raises:
            InputError: The model has another vocabulary for targets, and its tokenizer has none.
        """
        super().prepare(processed)
        encoding = processed.encoding
        if lacks_vocabulary(processed.processor, processed.model.config):
            raise InputError(
                "tokenizer: expected one with a vocabulary for sources and one for targets, as the model has, got "
                f"{type(processed.processor).__name__} with one; measure it with the program that trained it "
                "(train_translation.py --do_eval)"
            )
        set_languages(processed.model, processed.processor, encoding.source_language, encoding.target_language)

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return the tokens of each source, with those of its target as labels."""
        sources = [processed.encoding.prefix + text for text in rows.texts(columns["source"])]
        targets = rows.texts(columns["target"])
        tokenizer = processed.processor
        of_sources, of_targets = (processed.length(_MAX_LENGTH, decoder=decoder) for decoder in (False, True))
        inputs = tokenizer(sources, truncation=True, max_length=of_sources)
        labels = tokenizer(text_target=targets, truncation=True, max_length=of_targets)
        say_what_is_cut(rows, columns["source"], inputs, of_sources)
        say_what_is_cut(rows, columns["target"], labels, of_targets)
        check_tokens(rows, columns["source"], inputs["input_ids"])
        encoded = {**inputs, "labels": labels["input_ids"]}
        return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]

    def collator(self, processed: Processed) -> Collator:
        """Return what pads sources and targets to the longest of their batch."""
        return DataCollatorForSeq2Seq(processed.processor)

    def training_collator(self, processed: Processed) -> Collator:
        """Return the same, with what the decoder reads: a Trainer that smooths labels keeps them from the model."""
        return DataCollatorForSeq2Seq(processed.processor, model=decoder_of(processed.model))

    def smooths_labels(self, processed: Processed) -> bool:
        """Return whether it is known what the decoder reads."""
        return decoder_of(processed.model) is not None

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return what generates texts and scores them: by sacrebleu, or by a metric of `evaluate`."""
        score: Score = SacrebleuScore(name) if name in _OF_SACREBLEU else library_score(name, self.metrics)
        asked = processed.encoding.max_length
        settings: dict[str, Any] = {} if asked is None else {"max_new_tokens": asked}
        return GenerationMetric(processed.processor, batches, score, **settings)


def lacks_vocabulary(tokenizer: Any, config: Any) -> bool:
    """Return whether a model has one vocabulary for sources and another for targets, and its tokenizer only one."""
    sizes = [getattr(getattr(config, side, None), "vocab_size", None) for side in ("encoder", "decoder")]
    shared = getattr(config, "share_encoder_decoder_embeddings", None in sizes or sizes[0] == sizes[1])
    return not shared and not getattr(tokenizer, "separate_vocabs", False)


@dataclass(frozen=True)
class _Shifted:
    """What a decoder reads, for models that make it of labels and have no method for it, as M2M100 and NLLB."""

    config: Any
    shift: Callable[[Tensor, int, int], Tensor]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return self.shift(labels, self.config.pad_token_id, self.config.decoder_start_token_id)


def decoder_of(model: Any) -> Any:
    """Return what `DataCollatorForSeq2Seq` asks for the decoder's inputs; None where nobody says what they are."""
    inner = inside_adapters(model)
    if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        return inner
    shift = getattr(inspect.getmodule(type(inner)), "shift_tokens_right", None)
    return None if shift is None else _Shifted(inner.config, shift)


class Translation(SequenceToSequence):
    """From one language into another: `translation.de` and `translation.en`, or the only two columns, in order."""

    name = "translation"
    heads = (*SequenceToSequence.heads, "MTModel")
    roles: ClassVar[Mapping[str, Role]] = {
        "source": Role(("source", "src", "source_text", "input")),
        "target": Role(("target", "tgt", "target_text", "reference", "output")),
    }

    def find_columns(self, rows: Rows, given: Mapping[str, str]) -> dict[str, str]:
        """Return the columns with source and target."""
        pair = [name for name in rows.columns if name.startswith("translation.")] or list(rows.columns)
        named = {name.lower() for name in rows.columns}
        if len(pair) == 2 and not given and named.isdisjoint(self.roles["source"].names):
            return {"source": pair[0], "target": pair[1]}
        return super().find_columns(rows, given)


class Summarization(SequenceToSequence):
    """From a long text to a short one."""

    name = "summarization"
    roles: ClassVar[Mapping[str, Role]] = {
        "source": Role(("document", "article", "dialogue", "text")),
        "target": Role(("summary", "highlights", "abstract", "headline")),
    }
    metrics = ("chrf", "bleu", "ter")

    def shown(self, metric: str, found: Mapping[str, Any]) -> str:
        """Return the number to be reported, of ROUGE the one that is usual."""
        return "rougeL" if metric == "rouge" and "rougeL" in found else super().shown(metric, found)
