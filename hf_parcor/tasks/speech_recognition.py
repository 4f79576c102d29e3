"""Texts from speech: models that align frames with letters (CTC), and those that generate a text (Whisper)."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import transformers
from torch.utils.data import DataLoader
from transformers.models.auto import modeling_auto

from hf_parcor.errors import InputError, nearest
from hf_parcor.evaluation import BatchMetric, CTCMetric, GenerationMetric, TranscriptScore
from hf_parcor.evaluation.losses import is_ctc
from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.sequence_length import asked_length, fitting_length, generated_length, positions
from hf_parcor.tasks.recordings import (
    RECORDING,
    AudioCollator,
    Recordings,
    check_features,
    extractor_of,
    frames_heard,
    say_what_is_heard,
)
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import (
    Collator,
    Example,
    Processed,
    Role,
    Task,
    check_tokens,
    library_score,
    load_configuration,
    load_processing,
    origin_in,
    say_what_is_cut,
)

logger = logging.getLogger(__name__)

_CTC = "ForCTC"
# They take recordings and nothing beside them; others of the kind read a prompt, which each writes in its own way.
_GENERATING = frozenset(
    {
        "MoonshineForConditionalGeneration",
        "Speech2TextForConditionalGeneration",
        "SpeechEncoderDecoderModel",
        "WhisperForConditionalGeneration",
    }
)
_MAX_LENGTH = 448


@cache
def speech_models() -> frozenset[str]:
    """Return the classes of Transformers that generate texts from sound: they are named as those for texts are."""
    return frozenset(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values())


class SpeechRecognition(Task):
    """What is said in a recording, compared with a transcript: word and character error rate."""

    name = "automatic-speech-recognition"
    heads = (_CTC,)
    auto_class = "AutoModelForSpeechSeq2Seq"
    pads = False
    examples_are_inputs = False
    takes = frozenset({"max_length", "source_language"})
    metrics = TranscriptScore.names
    roles: ClassVar[Mapping[str, Role]] = {
        "audio": Role(RECORDING),
        "text": Role(
            ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription", "raw_text")
        ),
    }

    def has_head(self, architectures: Sequence[str]) -> bool:
        """Return whether a model of these architectures hears."""
        return super().has_head(architectures) or not _GENERATING.isdisjoint(architectures)

    def loader(self, name: str, **origin: Any) -> Any:
        """Return the class of Transformers for CTC, or that for models that generate."""
        config = load_configuration(name, **origin)
        aligns = super().has_head(config.architectures or []) or _gets_head(config)
        return transformers.AutoModelForCTC if aligns else super().loader(name, **origin)

    def load_model(self, name: str, *, to_train: bool = False, **settings: Any) -> Any:
        """Return a model; one without a head that is to be trained gets one for the letters of its tokenizer."""
        if to_train:
            origin = origin_in(settings)
            config = load_configuration(name, **origin)
            if _gets_head(config) and not self.has_head(config.architectures or []):
                tokenizer = self.load_processor(name, **origin).tokenizer
                blank = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
                settings = {**blank, "ctc_loss_reduction": "mean", **settings}
        return super().load_model(name, to_train=to_train, **settings)

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return the model's processor, which has a feature extractor and a tokenizer."""
        processor = load_processing("processor", transformers.AutoProcessor, name, **settings)
        extractor_of(processor, name)
        if getattr(processor, "tokenizer", None) is None:
            raise InputError(
                f"processor: expected one with a tokenizer, got {type(processor).__name__} of {name!r}; save the "
                "model's whole processor beside it"
            )
        return processor

    def prepare(self, processed: Processed) -> None:
        """Set the language that is spoken: what is named, or else what the model is told to generate.

        Where neither is, a model of many languages finds one in each recording.

        The loss of a model for CTC ignores recordings that are too short for their texts.

        Raises:
            InputError: One is named, and the model has none, or not that one; or a length, and the model writes frame
                by frame.
        """
        super().prepare(processed)
        asked = processed.encoding.max_length
        if is_ctc(processed.model):
            if asked is not None:
                raise InputError(
                    f"max_length: expected none for {self.name}, where a model for CTC writes as much as is said, got "
                    f"{asked}; leave it out"
                )
            processed.model.config.ctc_zero_infinity = True  # a text of more letters than frames has no finite loss
        language, model, tokenizer = processed.encoding.source_language, processed.model, processed.processor.tokenizer
        told: Any = getattr(model, "generation_config", None)
        task = "transcribe"
        known = getattr(told, "lang_to_id", None)
        if language is None and known and getattr(told, "language", None):  # as fine-tuned models are saved
            language, task = told.language.strip("<|>"), getattr(told, "task", None) or task
        if language is None:
            if known and tokenizer.language is None:
                logger.warning(
                    f"source_language: none of {len(known)} languages is named, so that the model finds one in each "
                    "recording, and labels begin without: name it if all recordings have one (--source-lang)."
                )
            return
        if not known:
            raise InputError(
                f"source_language: expected none for {type(model).__name__}, which is told of no language, got "
                f"{language!r}; leave it out"
            )
        before = tokenizer.language, tokenizer.task
        try:
            tokenizer.set_prefix_tokens(language=language, task=task)
            if known.keys().isdisjoint(tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)):
                raise ValueError(f"none of its {len(known)}")
        except ValueError as error:
            tokenizer.language, tokenizer.task = before
            tokenizer.set_prefix_tokens()
            codes = [token.strip("<|>") for token in known]
            raise InputError(
                f"source_language: expected a language of the model, such as {', '.join(codes[:6])}, got {language!r}"
                f"{nearest(language, codes)}; name one"
            ) from error
        told.language, told.task = language, task

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return samples of each row, with the tokens of its text as labels."""
        extractor, tokenizer = processed.processor.feature_extractor, processed.processor.tokenizer
        texts, column = rows.texts(columns["text"]), columns["text"]
        if is_ctc(processed.model):
            labels = tokenizer(_as_spelled(texts, tokenizer, f"{rows.source}: column {column!r}"))["input_ids"]
        else:
            asked = processed.encoding.max_length
            length = fitting_length(processed.model, tokenizer, _MAX_LENGTH, asked, decoder=True)
            encoded = tokenizer(texts, truncation=True, max_length=length)
            say_what_is_cut(rows, column, encoded, length)
            labels = list(_without_start(encoded["input_ids"], processed.model))
        check_tokens(rows, column, labels)
        recordings = Recordings(rows, columns["audio"], extractor.sampling_rate, labels)
        check_features(recordings, extractor)
        say_what_is_heard(recordings, extractor)
        if is_ctc(processed.model):
            _say_what_is_too_short(recordings, processed.model)
        found: Any = recordings
        examples: Sequence[Example] = found
        return examples

    def collator(self, processed: Processed) -> Collator:
        """Return what makes the model's inputs of samples."""
        return AudioCollator(processed.processor.feature_extractor, processed.model)

    def smooths_labels(self, processed: Processed) -> bool:
        """Return that it cannot: letters of CTC have no places, and other models make what they decode of labels."""
        return False

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return the word and the character error rate, or a metric of `evaluate`, of what is heard."""
        score: Score = TranscriptScore() if name in self.metrics else library_score(name, self.metrics)
        model, tokenizer = processed.model, processed.processor.tokenizer
        if is_ctc(model):
            return CTCMetric(tokenizer, batches, score)
        length = processed.encoding.max_length
        if length is None and asked_length(model, {}) is None:
            # Of the labels that are known: those of batches would be had from recordings, all decoded once more.
            length = generated_length(model, max(map(len, _labels_of(batches))))
        most = positions(model, decoder=True)
        if length is not None and most is not None:
            length = min(length, most - _tokens_before(model))
        settings: dict[str, Any] = {} if length is None else {"max_new_tokens": length}
        return GenerationMetric(tokenizer, batches, score, **settings)


def _gets_head(config: Any) -> bool:
    """Return whether a model of this configuration can have a head for CTC, and none that generates."""
    kind = config.model_type
    generates = kind in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    return kind in modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES and not generates


def _tokens_before(model: Any) -> int:
    """Return for how many tokens before a text Whisper wants positions: its start, language, task, and no times."""
    generation = model.generation_config
    if getattr(generation, "no_timestamps_token_id", None) is None:
        return 0
    return 4 if getattr(generation, "lang_to_id", None) else 2


def _labels_of(batches: DataLoader[Any]) -> Sequence[Sequence[int]]:
    dataset: Any = batches.dataset
    recordings: Recordings = getattr(dataset, "examples", dataset)
    return recordings.labels


def _without_start(rows: Sequence[Sequence[int]], model: Any) -> Iterator[Sequence[int]]:
    """Yield labels without the token that the model puts before them by itself."""
    start = [model.config.decoder_start_token_id]
    for tokens in rows:
        yield tokens[1:] if tokens[:1] == start else tokens


def _as_spelled(texts: Sequence[str], tokenizer: Any, source: str) -> Sequence[str]:
    """Return texts in the letters that a tokenizer knows: as they are, or in upper or lower case if it knows more so.

    Of what is in no vocabulary a model can hear nothing; many know capital letters alone, and no punctuation, which
    does not count in what is heard either.
    """
    marks = {
        letter
        for letter in {*"".join(texts)}
        if unicodedata.category(letter).startswith("P") and tokenizer.unk_token_id in tokenizer(letter)["input_ids"]
    }
    if marks:
        logger.warning(
            f"{source}: texts are taken without {' '.join(sorted(marks))}, which the model's vocabulary does not know."
        )
        without = dict.fromkeys(map(ord, marks))
        texts = [" ".join(text.translate(without).split()) for text in texts]

    def unknown(ways: Sequence[str]) -> int:
        return sum(tokens.count(tokenizer.unk_token_id) for tokens in tokenizer(ways)["input_ids"])

    ways = {
        "as they are": texts,
        "in upper case": [text.upper() for text in texts],
        "in lower case": [text.lower() for text in texts],
    }
    counts = {way: unknown(spelled) for way, spelled in ways.items()}
    best = min(counts, key=counts.__getitem__)
    if best != "as they are":
        logger.warning(f"{source}: texts are taken {best}, of which the model's vocabulary knows more.")
    if counts[best]:
        logger.warning(
            f"{source}: {counts[best]:,} characters are none of the model's vocabulary, and count as errors: spell "
            "numbers and signs out."
        )
    return ways[best]


def _say_what_is_too_short(recordings: Recordings, model: Any) -> None:
    """Say how many recordings have fewer frames than their texts need, in which two equal letters have one between."""
    frames = frames_heard(recordings, model)
    if frames is None:
        return
    needed = [len(tokens) + sum(one == other for one, other in pairwise(tokens)) for tokens in recordings.labels]
    short = sum(count < least for count, least in zip(frames, needed, strict=True))
    if short:
        logger.warning(
            f"{recordings.rows.source}: {short:,} of {len(recordings):,} recordings have fewer frames than their "
            "texts need, so that the model cannot write them, and learns nothing from them: leave them out, or look "
            "for recordings that were cut."
        )
