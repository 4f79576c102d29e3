"""Recordings and what is heard in them: the same samples from whatever holds them, and transcripts as written out."""

from __future__ import annotations

import io
import json
import logging
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
import torch
import transformers
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from local_models import (
    LETTERS,
    NAMED,
    SAVED,
    save_wav2vec2,
    save_whisper,
    write_commands,
    write_rows,
    write_spoken,
    write_wave,
)

from hf_parcor import CorruptionConstraint, GaussianNoise, GradientCorruption, LayerProbe, by_layer
from hf_parcor.errors import InputError
from hf_parcor.evaluation import CTCMetric, TranscriptScore
from hf_parcor.tasks import TASKS, Encoding, Processed, Rows, load_rows, task_of
from hf_parcor.tasks.audio import audio_seconds, read_audio

soundfile = pytest.importorskip("soundfile", reason="recordings need the extra 'audio'")
pytest.importorskip("jiwer", reason="word error rates need the extra 'audio'")

SPEECH = TASKS["automatic-speech-recognition"]
RATE = 16_000


def sine(rate, seconds=0.5, frequency=440):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def held_as(kind, path):
    """Return the recording of a file as it may be held."""
    if kind == "file":
        return path
    if kind == "name":
        return str(path)
    if kind == "bytes":
        return path.read_bytes()
    if kind == "mapping of bytes":
        return {"bytes": path.read_bytes(), "path": "elsewhere.wav"}
    if kind == "mapping of a path":
        return {"bytes": None, "path": str(path)}
    samples, rate = soundfile.read(path, dtype="float32")
    return {"array": samples.T, "sampling_rate": rate, "path": "elsewhere.wav"}


class TestSamples:
    @for_each("kind", ["file", "name", "bytes", "mapping of bytes", "mapping of a path", "samples"])
    @for_each("rate", [RATE, 8_000, 44_100])
    @for_each("channels", [1, 2])
    def test_whatever_holds_them(self, kind, rate, channels, tmp_path):
        wave = sine(rate)
        write_wave(tmp_path / "a.wav", wave if channels == 1 else np.stack([2 * wave, 0 * wave]), rate)
        recording = held_as(kind, tmp_path / "a.wav")
        samples = read_audio(recording, RATE)
        assert samples.dtype == np.float32
        assert samples.shape == (RATE // 2,)
        inner = slice(500, -500)  # what resamples knows nothing beyond the ends
        np.testing.assert_allclose(samples[inner], sine(RATE)[inner], atol=1e-3)
        assert audio_seconds(recording) == 0.5

    @for_each("kind", ["WAV", "FLAC", "OGG"])
    def test_files_of_several_kinds(self, kind, tmp_path):
        held = io.BytesIO()
        soundfile.write(held, sine(RATE), RATE, format=kind)
        inner = slice(500, -500)
        np.testing.assert_allclose(read_audio(held.getvalue(), RATE)[inner], sine(RATE)[inner], atol=0.02)

    @for_each(
        ("value", "says"),
        [
            ("missing.wav", r"no file .*missing\.wav"),
            ("broken.wav", "Format not recogni[sz]ed"),
            ("empty.wav", "a recording without a sample"),
            (7, "no file .*7"),
            (None, "NoneType"),
            ({"bytes": None, "path": None}, "NoneType"),
            ({"array": [0.0]}, "sampling_rate"),
            (1.5, "float"),
            (..., "NoneType"),
        ],
    )
    def test_what_is_none(self, value, says, tmp_path):
        (tmp_path / "broken.wav").write_text("no sound")
        write_wave(tmp_path / "empty.wav", np.zeros(0))
        of_row = {} if value is ... else {"audio": value}  # what JSON may have
        rows = Rows(str(tmp_path / "rows.csv"), [{"audio": {}}, of_row], ("audio",))
        with pytest.raises(InputError, match=rf"expected a recording.* in row 2, got .*{says}.*; mend the data"):
            rows.audio("audio", 1, RATE)
        with pytest.raises(InputError, match=rf"in row 2, got .*{says}"):
            rows.audio_seconds("audio", 1)

    def test_a_broken_one_is_told_before_anything_is_measured(self, tmp_path):
        rows = load_rows(write_spoken(tmp_path / "rows.csv"))
        (tmp_path / "3.wav").write_text("no sound")
        folder = save_wav2vec2(tmp_path / "model")
        with pytest.raises(InputError, match="in row 4"):
            SPEECH.examples(rows, SPEECH.find_columns(rows, {}), loaded(folder))


@for_each("kind", ["metadata of a folder", "data set"])
def test_a_data_set_with_recordings_is_read_as_the_files_are(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    of_files = load_rows(write_spoken(tmp_path / "rows.csv"))
    column = "file_name" if kind == "metadata of a folder" else "audio"
    if kind == "metadata of a folder":
        texts = [(row["audio"], row["text"]) for row in of_files.entries]
        rows = load_rows(write_rows(tmp_path / "metadata.csv", ["file_name", "text"], texts))
    else:
        recordings = [{"bytes": (tmp_path / row["audio"]).read_bytes(), "path": None} for row in of_files.entries]
        held = datasets.Dataset.from_dict({"audio": recordings, "text": of_files.texts("text")})
        features = datasets.Features({**held.features, "audio": datasets.Audio(decode=False)})
        (tmp_path / "data").mkdir()
        held.cast(features).cast_column("audio", datasets.Audio(8_000)).to_parquet(tmp_path / "data" / "train.parquet")
        rows = load_rows(str(tmp_path / "data"), "train")
    assert SPEECH.find_columns(rows, {}) == {"audio": column, "text": "text"}
    assert rows.texts("text") == of_files.texts("text")
    for index in range(len(of_files.entries)):
        samples = rows.audio(column, index, RATE)
        np.testing.assert_array_equal(samples, of_files.audio("audio", index, RATE))


@pytest.mark.skipif(find_spec("torchcodec") is not None, reason="datasets reads such folders with torchcodec")
def test_a_folder_that_datasets_cannot_read_says_why(tmp_path):
    pytest.importorskip("datasets")
    write_spoken(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").unlink()
    with pytest.raises(InputError, match=r"got .*torchcodec"):
        load_rows(str(tmp_path), "train")


def loaded(folder, **encoding):
    processed = Processed(SPEECH.load_model(folder).eval(), SPEECH.load_processor(folder), Encoding(**encoding))
    SPEECH.prepare(processed)
    return processed


def batches_of(processed, rows, size):
    return SPEECH.batches(SPEECH.examples(rows, SPEECH.find_columns(rows, {}), processed), processed, size)


@pytest.mark.slow
@for_each("save", [save_wav2vec2, save_whisper])
def test_recordings_share_batches_with_those_of_like_length_and_hear_nothing_of_them(save, tmp_path):
    """Frames of padding do not count: nothing is heard in a batch that is not heard alone."""
    rows = load_rows(write_spoken(tmp_path / "rows.csv"))
    processed = loaded(save(tmp_path / "model"))
    found = []
    for size in (1, 2, 6):
        batches = batches_of(processed, rows, size)
        metric = SPEECH.metric("wer", processed, batches)
        parts = [metric.of_batch(processed.model, batch) for batch in batches]
        found.append([pair for heard, said, _ in parts for pair in zip(heard, said, strict=True)])
    assert found[0] == found[1] == found[2]
    assert [text for _, text in found[0]] == [row["text"] for row in rows.entries]  # the later, the longer
    assert len({heard for heard, _ in found[0]}) > 2
    shortest_last = Rows(rows.source, rows.entries[::-1], rows.columns)
    lengths = [len(batch["labels"]) for batch in batches_of(processed, shortest_last, 4)]
    (first, *_) = batches_of(processed, shortest_last, 4)
    assert lengths == [4, 2]
    assert first["labels"].shape[0] == 4
    assert SPEECH.metric("wer", processed, batches_of(processed, shortest_last, 4))(processed.model) == pytest.approx(
        SPEECH.metric("wer", processed, batches_of(processed, rows, 6))(processed.model)
    )


class TestWhisper:
    @pytest.mark.slow
    @for_each("language", [None, "en", "de"])
    @for_each("length", [None, 9])
    def test_what_it_writes(self, language, length, tmp_path, caplog, monkeypatch):
        rows = load_rows(write_spoken(tmp_path / "rows.csv"))
        processed = loaded(save_whisper(tmp_path / "model"), source_language=language, max_length=length)
        assert ("none of 3 languages is named" in caplog.text) == (language is None)
        model, processor = processed.model, processed.processor
        labels = SPEECH.examples(rows, SPEECH.find_columns(rows, {}), processed).labels
        named = [] if language is None else [f"<|{language}|>", "<|transcribe|>"]
        assert all(
            processor.tokenizer.decode(row).startswith("".join([*named, "<|notimestamps|>"])) for row in labels
        ), "the model puts the start before them by itself"
        assert ("texts of column 'text' have more than 9 tokens and are cut" in caplog.text) == (length == 9)
        batches = batches_of(processed, rows, 3)
        with monkeypatch.context() as patch:
            decoded, read = [], Rows.audio
            patch.setattr(Rows, "audio", lambda *given: decoded.append(given) or read(*given))
            metric = SPEECH.metric("wer", processed, batches)
        assert len(decoded) <= 3, "not all recordings, to know how long texts are"
        found = metric(model)
        longest = max(map(len, labels))
        asked = {} if language is None else {"language": language, "task": "transcribe"}
        settings = {"max_new_tokens": length or longest + longest // 5 + 10, "do_sample": False, **asked}
        heard = []
        for row in rows.entries:
            samples = soundfile.read(str(tmp_path / row["audio"]))[0]
            features = processor.feature_extractor(samples, sampling_rate=RATE, return_tensors="pt")
            tokens = model.generate(**features, **settings)
            heard += processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        texts = [row["text"] for row in rows.entries]
        kept = [processor.tokenizer.decode(row, skip_special_tokens=True) for row in labels]
        assert (kept == texts) == (length is None)
        expected = TranscriptScore()(predictions=heard, references=kept)
        assert {name: found[name] for name in expected} == pytest.approx(expected)

    @for_each("language", ["xx", "fr"])
    def test_a_language_that_it_does_not_know(self, language, tmp_path):
        processed = loaded(save_whisper(tmp_path))
        before = processed.processor.tokenizer.prefix_tokens, processed.processor.tokenizer("a")["input_ids"]
        with pytest.raises(InputError, match=f"source_language: expected a language .*got '{language}'"):
            SPEECH.prepare(Processed(processed.model, processed.processor, Encoding(source_language=language)))
        tokenizer = processed.processor.tokenizer
        assert (tokenizer.prefix_tokens, tokenizer("a")["input_ids"]) == before
        assert getattr(processed.model.generation_config, "language", None) is None

    @pytest.mark.slow
    @for_each("saved", ["de", "german", "<|de|>"])
    @for_each("task", [None, "translate"])
    @for_each("asked", [None, "en"])
    def test_what_was_saved_with_it_counts_where_no_language_is_named(self, saved, task, asked, tmp_path, caplog):
        """A fine-tuned model is saved so: what is generated and what labels begin with are of one language."""
        caplog.clear()
        folder = save_whisper(tmp_path)
        told = transformers.GenerationConfig.from_pretrained(folder)
        told.language, told.task = saved, task
        told.save_pretrained(folder)
        processed = loaded(folder, source_language=asked)
        model, (tokens,) = processed.model, processed.processor.tokenizer(["a"])["input_ids"]
        start = processed.processor.tokenizer.convert_ids_to_tokens(tokens)[:4]
        does = "transcribe" if asked else task or "transcribe"
        assert start == ["<|startoftranscript|>", f"<|{asked or 'de'}|>", f"<|{does}|>", "<|notimestamps|>"]
        features = torch.zeros(1, 8, 100)
        begun = model._retrieve_init_tokens(
            features, 1, model.generation_config, model.config, 100, {"num_segment_frames": 100}
        )
        assert begun[0].tolist() == tokens[: len(begun[0])]
        assert "source_language" not in caplog.text

    def test_a_model_without_languages_is_told_of_none(self, tmp_path):
        with pytest.raises(InputError, match="source_language: expected none for Wav2Vec2ForCTC"):
            loaded(save_wav2vec2(tmp_path), source_language="en")

    def test_longer_recordings_are_cut_and_said(self, tmp_path, caplog):
        rows = load_rows(write_spoken(tmp_path / "rows.csv"))
        write_wave(tmp_path / "2.wav", sine(RATE, 1.5))
        processed = loaded(save_whisper(tmp_path / "model"))
        with caplog.at_level(logging.WARNING):
            SPEECH.examples(rows, SPEECH.find_columns(rows, {}), processed)
        assert "1 of 6 recordings are longer than the 1 seconds that the model hears" in caplog.text

    @for_each("language", [None, "de"])
    @for_each("asked", [60, 62, 64, None])
    def test_a_text_has_no_more_tokens_than_positions(self, language, asked, tmp_path):
        """Before it stand its language, what is to be done, and that there are no times."""
        folder = save_whisper(tmp_path)
        texts = ["a" * 10, "b" * 50] if asked is None else ["a" * 10] * 2
        write_wave(tmp_path / "a.wav", sine(RATE))
        rows = load_rows(write_rows(tmp_path / "rows.csv", ["audio", "text"], [("a.wav", text) for text in texts]))
        processed = loaded(folder, source_language=language, max_length=asked)
        metric = SPEECH.metric("wer", processed, batches_of(processed, rows, 2))
        assert metric(processed.model)["wer"] > 0

    def test_it_is_no_translator(self, tmp_path):
        """Its class is named as those are that read texts."""
        folder = save_whisper(tmp_path)
        rows = Rows("rows", [{"en": "a", "de": "b"}], ("en", "de"))
        assert task_of(folder, rows, {}) is SPEECH


class TestCTC:
    def test_a_model_without_a_head_gets_one_for_the_letters_of_its_tokenizer(self, tmp_path):
        """As those that were trained on speech alone, which are fine-tuned."""
        folder = save_wav2vec2(tmp_path)
        transformers.Wav2Vec2Model.from_pretrained(folder, vocab_size=32, ctc_loss_reduction="sum").save_pretrained(
            folder
        )
        torch.manual_seed(0)
        model = SPEECH.load_model(folder, to_train=True)
        assert isinstance(model, transformers.Wav2Vec2ForCTC)
        assert model.lm_head.out_features == len(LETTERS)
        assert (model.config.pad_token_id, model.config.ctc_loss_reduction) == (0, "mean")
        other = save_wav2vec2(tmp_path / "own", vocab_size=32)
        assert SPEECH.load_model(other, to_train=True).lm_head.out_features == 32, "a head remains"

    @for_each("zero", [True, False])
    def test_a_recording_that_is_too_short_for_its_text(self, zero, tmp_path, caplog):
        """Its loss would be infinite, and the gradient of all others lost; of two equal letters it needs one more."""
        caplog.clear()
        save_wav2vec2(tmp_path, ctc_zero_infinity=zero)
        write_wave(tmp_path / "a.wav", sine(RATE, 0.1))  # four frames
        texts = ["bade", "baad", "bad", "abba"]
        rows = load_rows(write_rows(tmp_path / "rows.csv", ["audio", "text"], [("a.wav", text) for text in texts]))
        processed = loaded(str(tmp_path))
        (batch,) = batches_of(processed, rows, 4)
        output = processed.model(**batch)
        assert output.logits.shape[1] == 4
        assert "2 of 4 recordings have fewer frames than their texts need" in caplog.text
        assert torch.isfinite(output.loss)
        output.loss.backward()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in processed.model.parameters())

    @for_each("size", [1, 2])
    @for_each("kind", [transformers.Wav2Vec2ForCTC, transformers.Wav2Vec2ForSequenceClassification])
    def test_a_recording_without_a_frame_is_refused(self, size, kind, tmp_path):
        folder = save_wav2vec2(tmp_path, kind)
        write_wave(tmp_path / "a.wav", sine(RATE))
        write_wave(tmp_path / "b.wav", sine(RATE)[:30])
        written = [("a.wav", "a", "positive"), ("b.wav", "b", "negative")]
        rows = load_rows(write_rows(tmp_path / "rows.csv", ["audio", "text", "label"], written))
        task = task_of(folder, rows, {})
        processed = Processed(task.load_model(folder), task.load_processor(folder))
        with pytest.raises(InputError, match=r"expected recordings of a frame .* 0\.001875 seconds in row 2; leave"):
            task.examples(rows, task.find_columns(rows, {}), processed)

    def test_a_text_without_a_letter_is_refused(self, tmp_path):
        rows = load_rows(write_spoken(tmp_path / "rows.csv"))
        processed = loaded(save_wav2vec2(tmp_path / "model"))
        empty = Rows(rows.source, [*rows.entries[:1], {**rows.entries[1], "text": ""}], rows.columns)
        with pytest.raises(InputError, match="a token or more in each text of column 'text', got none in row 2"):
            batches_of(processed, empty, 2)

    @for_each(
        ("spelled", "way"),
        [
            (str, ""),
            (str.upper, "in lower case"),
            (str.title, "in lower case"),
            (lambda text: f"«{text}!» – ".replace(" ", ", ", 1), "without ! , « » –"),
        ],
    )
    def test_texts_are_taken_in_the_letters_that_the_model_knows(self, spelled, way, tmp_path, caplog):
        rows = load_rows(write_spoken(tmp_path / "rows.csv"))
        processed = loaded(save_wav2vec2(tmp_path / "model"))
        texts = [row["text"] for row in rows.entries]
        other = Rows(rows.source, [{**row, "text": spelled(row["text"])} for row in rows.entries], rows.columns)
        with caplog.at_level(logging.WARNING):
            labels = SPEECH.examples(other, SPEECH.find_columns(other, {}), processed).labels
        assert labels == processed.processor.tokenizer(texts)["input_ids"]
        assert (f"texts are taken {way}" in caplog.text) == bool(way)
        assert ("texts are taken" in caplog.text) == bool(way)

    def test_what_is_in_no_vocabulary_is_said_and_counts_as_wrong(self, tmp_path, caplog):
        rows = load_rows(write_spoken(tmp_path / "rows.csv"))
        processed = loaded(save_wav2vec2(tmp_path / "model"))
        odd = Rows(rows.source, [{**row, "text": "good film 77"} for row in rows.entries], rows.columns)
        with caplog.at_level(logging.WARNING):
            batches = batches_of(processed, odd, 6)
        assert "12 characters are none of the model's vocabulary" in caplog.text
        (batch,) = batches
        references = SPEECH.metric("wer", processed, batches).of_batch(processed.model, batch)[1]
        assert references == ["good film <unk><unk>"] * 6

    @for_each("broken", [float("nan"), float("inf")])
    def test_frames_that_are_not_finite_are_no_text(self, broken, tmp_path):
        rows = load_rows(write_spoken(tmp_path / "rows.csv"))
        processed = loaded(save_wav2vec2(tmp_path / "model"))
        batches = batches_of(processed, rows, 3)
        metric = SPEECH.metric("wer", processed, batches)
        assert "predictions_not_finite" not in metric(processed.model)
        with torch.no_grad():
            processed.model.lm_head.bias[3] = broken
        found = metric(processed.model)
        assert found["predictions_not_finite"] == 1
        assert found["wer"] == 1

    def test_equal_letters_of_a_reference_remain(self, tmp_path):
        processed = loaded(save_wav2vec2(tmp_path))
        tokenizer = processed.processor.tokenizer
        labels = torch.tensor([[*tokenizer("good plot")["input_ids"], -100, -100]])
        batch = {"input_values": torch.zeros(1, 4_000), "labels": labels}
        assert CTCMetric(tokenizer, [batch], TranscriptScore()).of_batch(processed.model, batch)[1] == ["good plot"]


LETTER = st.sampled_from("ab ")


class TestTranscriptScore:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.text(LETTER, max_size=8), st.text(LETTER, max_size=8)), min_size=1, max_size=4))
    def test_is_the_edit_distance_by_the_length(self, pairs):
        said, heard = zip(*pairs, strict=True)
        words = sum(len(text.split()) for text in said)
        if not words:
            with pytest.raises(ValueError, match="expected a word in one of"):
                TranscriptScore()(predictions=list(heard), references=list(said))
            return
        found = TranscriptScore()(predictions=list(heard), references=list(said))
        apart = [(text.split(), other.split()) for text, other in pairs]
        assert found["wer"] == pytest.approx(sum(distance(*pair) for pair in apart) / words)
        letters = [(" ".join(one), " ".join(other)) for one, other in apart]
        assert found["cer"] == pytest.approx(
            sum(distance(*pair) for pair in letters) / sum(len(one) for one, _ in letters)
        )

    def test_case_and_punctuation_count_where_they_are_asked_for(self):
        texts = {"predictions": ["dont stop"], "references": ["Don't stop."]}
        assert TranscriptScore()(**texts) == {"wer": 0.0, "cer": 0.0}
        assert TranscriptScore(normalized=False)(**texts)["wer"] == 1.0
        assert TranscriptScore().identity() != TranscriptScore(normalized=False).identity()


def distance(said, heard):
    """By recursion, for short ones."""
    if not said or not heard:
        return len(said) + len(heard)
    changed = distance(said[1:], heard[1:])
    if said[0] == heard[0]:
        return changed
    return 1 + min(changed, distance(said[1:], heard), distance(said, heard[1:]))


def save_with(folder, model, extractor, tokenizer=None, processor=transformers.Wav2Vec2Processor):
    model.save_pretrained(folder)
    if tokenizer is None:
        (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(LETTERS)}))
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    processor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


SIZES = {**tiny.encoder(len(LETTERS)), "initializer_range": 0.5}


def save_wav2vec2_bert(folder):
    extractor = transformers.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8, stride=2)
    widths = {"feature_projection_input_dim": 16, "output_hidden_size": 8, "conv_depthwise_kernel_size": 3}
    config = transformers.Wav2Vec2BertConfig(**SIZES, **widths, pad_token_id=0)
    return save_with(folder, transformers.Wav2Vec2BertForCTC(config), extractor)


def save_parakeet(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    inner = {**SIZES, "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3}
    config = transformers.ParakeetCTCConfig(
        vocab_size=len(LETTERS), encoder_config=transformers.ParakeetEncoderConfig(**inner), pad_token_id=0
    )
    pieces = {letter if letter != "|" else "▁": number for number, letter in enumerate(LETTERS)}
    raw = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>")
    try:
        extractor = transformers.ParakeetFeatureExtractor(feature_size=16)
    except ImportError as error:  # of earlier Transformers, without librosa
        pytest.skip(str(error).strip().splitlines()[0])
    return save_with(folder, transformers.ParakeetForCTC(config), extractor, tokenizer, transformers.ParakeetProcessor)


def save_speech_to_text(folder):
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "input_feat_per_channel": 8}
    lengths = {"max_source_positions": 200, "max_target_positions": 40, "conv_channels": 8, "init_std": 0.5}
    config = transformers.Speech2TextConfig(vocab_size=len(LETTERS), **sides, **widths, **lengths)
    extractor = transformers.Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8)
    return save_with(folder, transformers.Speech2TextForConditionalGeneration(config), extractor)


def save_moonshine(folder):
    sides = {
        f"{side}_num_{name}": 2 for side in ("encoder", "decoder") for name in ("hidden_layers", "attention_heads")
    }
    sizes = {"vocab_size": len(LETTERS), "hidden_size": 8, "intermediate_size": 16, "initializer_range": 0.5}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
    model = transformers.MoonshineForConditionalGeneration(transformers.MoonshineConfig(**sides, **sizes, **ends))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    return save_with(folder, model, extractor)


def save_encoder_decoder(folder):
    save_wav2vec2(folder)
    encoder = transformers.AutoConfig.from_pretrained(folder)
    decoder = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.SpeechEncoderDecoderModel(config=config)
    for told in (model.config, model.generation_config):
        told.decoder_start_token_id, told.pad_token_id, told.eos_token_id = 1, 0, 2
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return save_with(folder, model, extractor)


FAMILIES = {
    "wav2vec2": save_wav2vec2,
    "wav2vec2-bert": save_wav2vec2_bert,
    "parakeet": save_parakeet,
    "whisper": save_whisper,
    "moonshine": save_moonshine,
    "speech-to-text": save_speech_to_text,
    "encoder-decoder": save_encoder_decoder,
}


# Their norms over time, or convolutions, reach into the padding, as in Transformers.
PADDED = {"moonshine", "speech-to-text"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_heard_of_those_that_share_a_batch_or_the_prefix(name, tmp_path):
    rows = load_rows(write_spoken(tmp_path / "rows.csv"))
    (tmp_path / "model").mkdir()
    torch.manual_seed(0)
    folder = FAMILIES[name](tmp_path / "model")
    assert task_of(folder, rows, {}) is SPEECH
    processed = loaded(folder)
    heard = []
    for size in (1, 6):
        batches = batches_of(processed, rows, size)
        metric = SPEECH.metric("wer", processed, batches)
        heard.append([text for batch in batches for text in metric.of_batch(processed.model, batch)[0]])
    assert name in PADDED or heard[0] == heard[1]
    found = []
    for reuse in (True, False):
        probe = LayerProbe(processed.model, metric, targets=by_layer(processed.model), reuse_prefix=reuse)
        sweep = probe.evaluate([GaussianNoise(0.3), GradientCorruption(CorruptionConstraint(epsilon=1.0))], trials=1)
        found.append({part: [row.metrics for row in record.rows()] for part, record in sweep.records.items()})
    assert found[0] == found[1]
    assert len({str(rows) for rows in found[0].values()}) > 1, "layers differ"


def save_classifier(folder):
    return save_wav2vec2(folder, transformers.Wav2Vec2ForSequenceClassification)


def save_without_a_head(folder):
    return save_wav2vec2(folder, transformers.Wav2Vec2Model)


ADAPTED = {
    "whisper": (save_whisper, SPEECH, "SEQ_2_SEQ_LM"),
    "for CTC": (save_wav2vec2, SPEECH, None),
    "classifier": (save_classifier, TASKS["audio-classification"], "SEQ_CLS"),
    "without a head": (save_without_a_head, TASKS["audio-classification"], "SEQ_CLS"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
@for_each("named", [True, False])
@for_each("to_train", [True, False])
def test_an_adapter_of_a_model_that_hears(name, named, to_train, tmp_path):
    """PEFT has no task of speech: people name none, or that of texts."""
    peft = pytest.importorskip("peft")
    save, task, kind = ADAPTED[name]
    (tmp_path / "data").mkdir(exist_ok=True)
    write_data = write_spoken if task is SPEECH else write_commands
    rows = load_rows(write_data(tmp_path / "data" / "rows.csv"))
    base = TASKS[task.name].load_model(save(tmp_path / "model"))
    head = {"modules_to_save": ["classifier", "projector"]} if name == "without a head" else {}
    config = peft.LoraConfig(
        target_modules=["q_proj"], task_type=kind if named else None, init_lora_weights=False, **head
    )
    around = peft.get_peft_model(base, config)
    around.save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    assert task_of(adapter, rows, {}) is task
    model = task.load_model(adapter, to_train=to_train)
    processed = Processed(model.eval(), task.load_processor(adapter))
    task.prepare(processed)
    (batch,) = task.batches(task.examples(rows, task.find_columns(rows, {}), processed), processed, 6)
    # What PEFT puts around it for texts hands on what Whisper does not take.
    found, expected = (one.eval()(**batch) for one in (model, around.get_base_model()))
    torch.testing.assert_close(found.logits, expected.logits)
    found.loss.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def save_spectrogram_transformer(folder):
    sizes = {**tiny.encoder(8), "num_mel_bins": 16, "max_length": 50, "patch_size": 8}
    config = transformers.ASTConfig(**{**sizes, **NAMED}, frequency_stride=8, time_stride=8)
    transformers.ASTForAudioClassification(config).save_pretrained(folder)
    transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=50).save_pretrained(folder)
    return str(folder)


SAID = {
    "cut": (save_spectrogram_transformer, "1 of 4 recordings are longer than the 0.5 seconds that the model hears"),
    "silence": (save_classifier, "the model hears what shorter recordings of a batch are padded with"),
    "mask": (save_classifier, ""),
}


@for_each("kind", SAID)
def test_what_a_classifier_hears_is_said(kind, tmp_path, caplog):
    caplog.clear()
    task, (save, said) = TASKS["audio-classification"], SAID[kind]
    folder = save(tmp_path)
    if kind == "silence":
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    rows = load_rows(write_commands(tmp_path / "rows.csv"))
    processed = Processed(task.load_model(folder), task.load_processor(folder))
    task.examples(rows, task.find_columns(rows, {}), processed)
    assert (said in caplog.text) if said else not caplog.text


@pytest.mark.slow
@for_each(
    ("save", "header", "values"),
    [
        (save_spectrogram_transformer, ["audio", "label"], ["positive", "negative"]),
        (save_wav2vec2_bert, ["audio", "text"], ["a", "b"]),
        (save_speech_to_text, ["audio", "text"], ["a", "b"]),
    ],
)
@for_each("samples", [1, 100])
def test_a_recording_without_features_is_refused(save, header, values, samples, tmp_path):
    """What Kaldi computes needs a window: known before anything is measured."""
    folder = save(tmp_path)
    write_wave(tmp_path / "a.wav", sine(RATE))
    write_wave(tmp_path / "b.wav", sine(RATE)[:samples])
    written = list(zip(["a.wav", "b.wav"], values, strict=True))
    rows = load_rows(write_rows(tmp_path / "rows.csv", header, written))
    task = TASKS["audio-classification"] if header[-1] == "label" else SPEECH
    processed = Processed(task.load_model(folder), task.load_processor(folder))
    with pytest.raises(InputError, match=rf"makes features, got one of {samples / RATE:g} seconds, .* in row 2 \("):
        task.examples(rows, task.find_columns(rows, {}), processed)


@for_each("labels", [[["positive", "negative"], ["negative"]], [0.5, 1.0]])
def test_classes_alone_where_the_loss_is_of_classes(labels, tmp_path):
    task = TASKS["audio-classification"]
    write_wave(tmp_path / "a.wav", sine(RATE))
    rows = Rows(
        str(tmp_path / "rows.json"), [{"audio": "a.wav", "label": label} for label in labels], ("audio", "label")
    )
    columns = task.find_columns(rows, {})
    head = task.head_settings([(rows, columns)])
    for save, works in ((save_without_a_head, False), (save_spectrogram_transformer, True)):
        folder = save(tmp_path)
        model = task.load_model(folder, to_train=True, ignore_mismatched_sizes=True, **head)
        processed = Processed(model, task.load_processor(folder))
        if works:
            (batch,) = task.batches(task.examples(rows, columns, processed), processed, 2)
            assert torch.isfinite(model(**batch).loss)
        else:
            with pytest.raises(InputError, match="expected one class for each recording, since the loss of Wav2Vec2"):
                task.examples(rows, columns, processed)


HEADS = {
    "wav2vec 2.0": (transformers.Wav2Vec2ForSequenceClassification, "audio-classification"),
    "for speech": (transformers.Wav2Vec2ForCTC, "automatic-speech-recognition"),
}


@for_each("name", HEADS)
def test_heads_that_are_named_as_those_of_texts_are(name, tmp_path):
    kind, task = HEADS[name]
    folder = save_wav2vec2(tmp_path, kind)
    rows = Rows("rows", [{"text": "a", "label": 0, "audio": "a.wav"}], ("text", "label", "audio"))
    assert task_of(folder, rows, {}).name == task
    assert set(SAVED) == set(TASKS)
