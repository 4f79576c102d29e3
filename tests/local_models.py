"""Tiny models with tokenizers, and data for them, in a folder: one of each task."""

from __future__ import annotations

import csv
import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

WORDS = ["[PAD]", "[UNK]", "</s>", "good", "bad", "film", "plot", "the", "a", "gut", "Film", "Ende"]
BERT = {**tiny.encoder(len(WORDS)), "initializer_range": 0.5}
SENTENCES = ["the good film", 'a "bad" plot', "good good", "bad bad film a plot", "the film", "a good plot the"]
LABELS = {"NEGATIVE": 0, "POSITIVE": 1}
NAMED = {"label2id": LABELS, "id2label": {number: name for name, number in LABELS.items()}}


def word_tokenizer(
    words: Sequence[str], unk_token: str = "[UNK]", punctuation: bool = True, **settings: Any
) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, which sets punctuation apart from them or leaves it with them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unk_token))
    raw.pre_tokenizer = pre_tokenizers.Whitespace() if punctuation else pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=unk_token, **settings)


def save_tokenizer(folder: Path) -> None:
    ends = {"pad_token": "[PAD]", "eos_token": "</s>"}
    word_tokenizer(WORDS, punctuation=False, **ends, model_max_length=16).save_pretrained(folder)


def save_bert(
    folder: Path, kind: type[Any] = transformers.BertForSequenceClassification, seed: int = 0, **settings: Any
) -> str:
    torch.manual_seed(seed)
    kind(transformers.BertConfig(**{**BERT, **NAMED, **settings})).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_sentence_encoder(folder: Path, **settings: Any) -> str:
    """Save a BERT whose mean is the embedding of a text, as sentence-transformers does."""
    pytest.importorskip("sentence_transformers", reason="models of texts need the extra 'embeddings'")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with TemporaryDirectory() as inner:
        parts = [Transformer(save_bert(Path(inner), transformers.BertModel, **settings)), Pooling(BERT["hidden_size"])]
        SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder))
    return str(folder)


def save_masked_bert(folder: Path) -> str:
    save_bert(folder, transformers.BertForMaskedLM, vocab_size=len(WORDS) + 1)
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "model_max_length": 16}
    word_tokenizer([*WORDS, "[MASK]"], punctuation=False, **names).save_pretrained(folder)
    return str(folder)


def save_gpt2(folder: Path) -> str:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**tiny.gpt2(len(WORDS)), "bos_token_id": 2})
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_llama(folder: Path, **settings: Any) -> str:
    torch.manual_seed(0)
    sizes = {**tiny.encoder(len(WORDS), layers=3), "eos_token_id": 2, "initializer_range": 0.5}
    config = transformers.LlamaConfig(**{**sizes, **settings})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_t5(folder: Path) -> str:
    torch.manual_seed(0)
    config = transformers.T5Config(**tiny.t5(len(WORDS)), eos_token_id=2, initializer_factor=5.0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def _save_many_languages(folder: Path, tokenizer: Any, kind: type[Any], config: type[Any], **settings: Any) -> str:
    torch.manual_seed(0)
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 8, "max_position_embeddings": 32}
    kind(config(vocab_size=len(tokenizer), init_std=0.5, **sides, **widths, **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_mbart(folder: Path) -> str:
    pieces = [(token, 0.0) for token in ("<unk>", "<s>", "</s>")] + [(f"▁{word}", -1.0) for word in WORDS[3:]]
    tokenizer: Any = transformers.MBartTokenizer(vocab=pieces)
    return _save_many_languages(
        folder, tokenizer, transformers.MBartForConditionalGeneration, transformers.MBartConfig
    )


def save_mbart50(folder: Path) -> str:
    pieces = [(token, 0.0) for token in ("<unk>", "<s>", "</s>")] + [(f"▁{word}", -1.0) for word in WORDS[3:]]
    tokenizer: Any = transformers.MBart50Tokenizer(vocab=pieces)
    settings = {"decoder_start_token_id": 2}
    kind = transformers.MBartForConditionalGeneration
    return _save_many_languages(folder, tokenizer, kind, transformers.MBartConfig, **settings)


def save_nllb(folder: Path) -> str:
    letters = sorted(set("".join(WORDS[3:])))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *letters]
    tokenizer: Any = transformers.NllbTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        extra_special_tokens=["deu_Latn", "eng_Latn", "zho_Hans", "zho_Hant"],  # of 202
    )
    settings = {"decoder_start_token_id": 2}
    kind = transformers.M2M100ForConditionalGeneration
    return _save_many_languages(folder, tokenizer, kind, transformers.M2M100Config, **settings)


# Models that generate the language of their first token, with tokenizers that know it.
MANY_LANGUAGES: dict[str, Callable[[Path], str]] = {"mbart": save_mbart, "mbart50": save_mbart50, "nllb": save_nllb}


def save_vit(folder: Path) -> str:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**tiny.images(), **NAMED)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}})
    )
    return str(folder)


def save_yolos(folder: Path) -> str:
    torch.manual_seed(0)
    config = transformers.YolosConfig(**{**tiny.images(), "image_size": [8, 8]}, **NAMED, num_detection_tokens=6)
    transformers.YolosForObjectDetection(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "YolosImageProcessor", "size": {"height": 8, "width": 8}})
    )
    return str(folder)


LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abdefghilmopt"]


def save_wav2vec2(folder: Path, kind: type[Any] = transformers.Wav2Vec2ForCTC, seed: int = 0, **settings: Any) -> str:
    """Save a model that hears 50 frames a second, with letters for CTC, or with classes."""
    torch.manual_seed(seed)
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (40, 16), "conv_stride": (20, 16)}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    ctc = {"pad_token_id": 0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "feat_extract_norm": "layer"}
    sizes = {**tiny.encoder(len(LETTERS)), "initializer_range": 0.5, "classifier_proj_size": 8, "mask_time_length": 2}
    config = transformers.Wav2Vec2Config(**{**sizes, **convolutions, **places, **ctc, **NAMED, **settings})
    kind(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    if kind is not transformers.Wav2Vec2ForCTC:
        extractor.save_pretrained(folder)
        return str(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(LETTERS)}))
    tokenizer: Any = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


def save_whisper(folder: Path, **settings: Any) -> str:
    """Save a model of three languages that hears one second, and writes bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(0)
    # Languages in the order of Whisper, whose tokenizer counts them.
    controls = [
        "startoftranscript",
        "en",
        "zh",
        "de",
        "translate",
        "transcribe",
        "startoflm",
        "startofprev",
        "nospeech",
    ]
    named = [f"<|{name}|>" for name in ("endoftext", *controls, "nospeech", "notimestamps")]
    tokens = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    tokenizer: Any = transformers.WhisperTokenizer(vocab=tokens, merges=[], extra_special_tokens=named)
    number = {name: tokenizer.convert_tokens_to_ids(name) for name in named}
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "init_std": 0.5}
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), number["<|endoftext|>"])
    starts = {"decoder_start_token_id": number["<|startoftranscript|>"], "suppress_tokens": None}
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        max_source_positions=50,
        max_target_positions=64,
        begin_suppress_tokens=None,
        **{**sides, **sizes, **ends, **starts, **settings},
    )
    model = transformers.WhisperForConditionalGeneration(config)
    told: Any = model.generation_config
    told.is_multilingual, told.return_timestamps, told._from_model_config = True, False, False
    told.lang_to_id = {name: number[name] for name in ("<|en|>", "<|zh|>", "<|de|>")}
    told.task_to_id = {name: number[f"<|{name}|>"] for name in ("transcribe", "translate")}
    told.no_timestamps_token_id = number["<|notimestamps|>"]
    model.save_pretrained(folder)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, header: list[str], rows: list[tuple[Any, ...]]) -> str:
    """Write a TSV without quotes, a CSV with them, or JSON lines."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in rows]
    elif path.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in [tuple(header), *rows]]
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return str(path)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_sentences(path: Path) -> str:
    return write_rows(path, ["sentence", "label"], [(text, i % 2) for i, text in enumerate(SENTENCES)])


def write_tags(path: Path) -> str:
    rows = [(text.split(), [i % 2 for i in range(len(text.split()))]) for text in SENTENCES]
    return write_rows(path, ["tokens", "ner_tags"], rows)


def write_questions(path: Path) -> str:
    """Write questions as SQuAD has them: with two right answers, one, or none; texts of one window and of several."""
    context = "the good film a bad plot the a film a good good plot bad film the a plot bad good the film"  # 22 words
    rows = [
        ("the plot", context, ["bad plot", "plot"], [16, 20]),
        ("good film a bad", "the film", [], []),
        ("a", context, ["good good plot bad"], [38]),
        ("film", "a bad film the", ["film"], [6]),
    ]
    entries = [(question, text, {"text": answers, "answer_start": begins}) for question, text, answers, begins in rows]
    return write_rows(path, ["question", "context", "answers"], entries)


def write_texts(path: Path) -> str:
    return write_rows(path, ["text"], [(text,) for text in SENTENCES])


def write_pairs(path: Path) -> str:
    return write_rows(path, ["en", "de"], [(text, "gut Film Ende") for text in SENTENCES])


def write_alike(path: Path) -> str:
    rows = [("the film", "a film"), ("the film", "film film"), ("bad plot", "a bad plot"), ("good good", "a film")]
    return write_rows(path, ["anchor", "positive"], rows)


def write_summaries(path: Path) -> str:
    return write_rows(path, ["document", "summary"], [(text, text.split()[-1]) for text in SENTENCES])


def write_images(path: Path) -> str:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(path.parent / f"{number}.png")
    return write_rows(path, ["image", "label"], [(f"{i}.png", ["Positive", "negative"][i % 2]) for i in range(4)])


def write_objects(path: Path) -> str:
    """Write images with two objects, one and none, boxes as COCO has them."""
    pytest.importorskip("pycocotools", reason="average precision needs the extra 'detection'")
    write_images(path.with_suffix(".csv"))
    boxes = [[[0, 0, 6, 5], [3, 2, 9, 8]], [], [[1.5, 2, 4, 4]], [[2, 2, 30, 4]]]  # the last one beyond the edge
    names = [["Positive", "negative"], [], ["negative"], ["Positive"]]
    rows = [
        (f"{index}.png", {"bbox": of_image, "category": labels})
        for index, (of_image, labels) in enumerate(zip(boxes, names, strict=True))
    ]
    return write_rows(path, ["image", "objects"], rows)


def write_wave(path: Path, samples: Any, rate: int = 16_000) -> None:
    """Write samples between -1 and 1, or channels x samples, as a WAV file of 16 bits."""
    channels = np.atleast_2d(samples)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T * 32767).round().astype("<i2").tobytes())


def write_sounds(path: Path, header: Sequence[str], values: Sequence[str]) -> str:
    """Write recordings of several lengths, in all up to a second, with a value each."""
    pytest.importorskip("soundfile", reason="recordings need the extra 'audio'")
    random = np.random.default_rng(0)
    for number in range(len(values)):
        write_wave(path.parent / f"{number}.wav", random.uniform(-0.5, 0.5, 4_000 + 1_700 * number))
    return write_rows(path, list(header), [(f"{number}.wav", value) for number, value in enumerate(values)])


def write_spoken(path: Path) -> str:
    pytest.importorskip("jiwer", reason="word error rates need the extra 'audio'")
    return write_sounds(path, ["audio", "text"], [text.replace('"', "") for text in SENTENCES])


def write_commands(path: Path) -> str:
    return write_sounds(path, ["audio", "label"], ["positive", "negative", "negative", "positive"])


# A model, and data for it, of each task.
SAVED: dict[str, tuple[Callable[[Path], str], Callable[[Path], str], str]] = {
    "text-classification": (save_bert, write_sentences, "rows.tsv"),
    "token-classification": (
        lambda folder: save_bert(folder, transformers.BertForTokenClassification),
        write_tags,
        "rows.jsonl",
    ),
    "question-answering": (
        lambda folder: save_bert(folder, transformers.BertForQuestionAnswering),
        write_questions,
        "rows.jsonl",
    ),
    "fill-mask": (save_masked_bert, write_texts, "rows.csv"),
    "text-generation": (save_gpt2, write_texts, "rows.csv"),
    "summarization": (save_t5, write_summaries, "rows.csv"),
    "translation": (save_t5, write_pairs, "rows.tsv"),
    "image-classification": (save_vit, write_images, "rows.csv"),
    "object-detection": (save_yolos, write_objects, "rows.jsonl"),
    "automatic-speech-recognition": (save_wav2vec2, write_spoken, "rows.csv"),
    "audio-classification": (
        lambda folder: save_wav2vec2(folder, transformers.Wav2Vec2ForSequenceClassification),
        write_commands,
        "rows.csv",
    ),
    "sentence-similarity": (save_sentence_encoder, write_alike, "rows.csv"),
}
