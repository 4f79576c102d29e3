"""Models of many languages: what is encoded, and what generation begins with, against what they are trained on."""

from __future__ import annotations

import pytest
import torch
from local_models import MANY_LANGUAGES, save_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_parcor.errors import InputError
from hf_parcor.evaluation import GenerationMetric
from hf_parcor.languages import languages_of, set_languages

# How each calls German and English.
CODES = {"mbart": ("de_DE", "en_XX"), "mbart50": ("de_DE", "en_XX"), "nllb": ("deu_Latn", "eng_Latn")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of each model; the fixture is the saved state before anybody named a language."""
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in MANY_LANGUAGES.items()}


@pytest.fixture(params=CODES)
def kind(request):
    return request.param


@pytest.fixture
def model(folders, kind):
    return AutoModelForSeq2SeqLM.from_pretrained(folders[kind]).eval()


@pytest.fixture
def tokenizer(folders, kind):
    return AutoTokenizer.from_pretrained(folders[kind])


def test_every_model_has_a_row():
    assert list(CODES) == list(MANY_LANGUAGES)


def named(tokenizer, ids):
    """Return the languages among some tokens."""
    return set(tokenizer.convert_ids_to_tokens(ids)) & set(languages_of(tokenizer))


def test_each_language_has_its_token(tokenizer, kind):
    known = languages_of(tokenizer)
    assert set(CODES[kind]) <= set(known)
    assert tokenizer.convert_ids_to_tokens(list(known.values())) == list(known)
    assert set(known.values()).isdisjoint({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id})
    assert len(known) > 3


def test_both_sides_are_encoded_and_generated_in_their_languages(model, tokenizer, kind):
    german, english = CODES[kind]
    set_languages(model, tokenizer, german, english)
    encoded = tokenizer("good film", text_target="bad film", return_tensors="pt")
    assert named(tokenizer, encoded["input_ids"][0]) == {german}
    assert named(tokenizer, encoded["labels"][0]) == {english}
    found = model.generate(encoded["input_ids"], max_new_tokens=3, do_sample=False)[0].tolist()
    # Teacher forcing feeds the decoder what precedes each label: what generation begins with has to be the same.
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    model(**encoded)
    handle.remove()
    start = seen[0][: 1 + seen[0].index(tokenizer.convert_tokens_to_ids(english))]
    assert found[: len(start)] == start


def test_they_are_saved_with_model_and_tokenizer(model, tokenizer, kind, tmp_path):
    german, english = CODES[kind]
    set_languages(model, tokenizer, german, english)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    set_languages(*again)
    for name in ("forced_bos_token_id", "decoder_start_token_id"):
        assert getattr(model.generation_config, name) == getattr(again[0].generation_config, name)
    assert (again[1].src_lang, again[1].tgt_lang) == (german, english)
    with pytest.raises(InputError, match="expected those of source and target"):
        set_languages(*again, english)  # into which one is no longer clear


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (None, None, "expected those of source and target"),
        ("de", None, "expected those of source and target"),
        ("klingon", "de", "source language: expected one of"),
        ("de", "klingon", "target language: expected one of"),
    ],
)
def test_what_is_not_named_is_refused(model, tokenizer, kind, source, target, says):
    german = CODES[kind][0]
    before = model.generation_config.to_dict(), tokenizer.src_lang
    given = [german if name == "de" else name for name in (source, target)]
    with pytest.raises(InputError, match=says):
        set_languages(model, tokenizer, *given)
    tokenizer("good", text_target="bad")  # this writes the source's language into the target's
    with pytest.raises(InputError, match=says):
        set_languages(model, tokenizer, *given)
    assert (model.generation_config.to_dict(), tokenizer.src_lang) == before


def test_a_part_of_a_name(folders):
    def pair(kind, *names):
        model, tokenizer = (c.from_pretrained(folders[kind]) for c in (AutoModelForSeq2SeqLM, AutoTokenizer))
        set_languages(model, tokenizer, *names)
        return tokenizer.src_lang, tokenizer.tgt_lang

    assert pair("mbart50", "de", "en") == ("de_DE", "en_XX")
    assert pair("nllb", "deu", "deu") == ("deu_Latn", "deu_Latn"), "both are named: a summary, say"
    with pytest.raises(InputError, match="zho_Hans, zho_Hant, got 'zho'"):
        pair("nllb", "zho", "deu")


def test_one_without_languages(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert languages_of(tokenizer) == {}
    set_languages(None, tokenizer)
    with pytest.raises(InputError, match=r"expected a tokenizer that has some, got .* 'de'"):
        set_languages(None, tokenizer, None, "de")


def test_a_metric_refuses_to_guess(model, tokenizer, kind):
    german, english = CODES[kind]
    scored = lambda predictions, references: len(predictions)  # noqa: E731
    inputs = tokenizer(["good film"], return_tensors="pt")
    unmarked = {**inputs, "labels": torch.tensor([[5, 6]])}
    with pytest.raises(InputError, match=r"forced_bos_token_id: expected the token of the language .*"):
        GenerationMetric(tokenizer, [unmarked], scored, max_new_tokens=3)(model)
    set_languages(model, tokenizer, german, english)
    batch = dict(tokenizer(["good film"], text_target=["bad film"], return_tensors="pt"))
    assert GenerationMetric(tokenizer, [batch], scored, max_new_tokens=3)(model) == {
        "score": 1.0,
        "predictions_cut": 1.0,
    }
    other = {"decoder_start_token_id" if kind == "mbart" else "forced_bos_token_id": languages_of(tokenizer)[german]}
    with pytest.raises(InputError, match=f"{english} in the labels, got {german}"):
        GenerationMetric(tokenizer, [batch], scored, max_new_tokens=3, **other)(model)
