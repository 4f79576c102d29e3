"""Parallel text: what is read, what is refused with file and line, and what is left out and counted."""

from __future__ import annotations

import gzip
import json

import pytest
from for_each import for_each
from local_models import MANY_LANGUAGES
from transformers import AutoTokenizer

from hf_parcor.translation import encode, from_rows, read_parallel_files, read_rows

PAIRS = [("Ein Hund läuft.", "A dog runs."), ("Zwei Katzen\u2028schlafen.", "Two cats sleep.")]


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(side):
    return "".join(f"{pair[side]}\n" for pair in PAIRS)


OBJECTS = [{"translation": {"de": source, "en": target}} for source, target in PAIRS]
COLUMNS = [{"de": source, "en": target, "id": 7} for source, target in PAIRS]
FILES = {
    "rows.tsv": "id\ten\tde\n" + "".join(f"7\t{target}\t{source}\n" for source, target in PAIRS),
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in OBJECTS),
    "columns.json": json.dumps(COLUMNS, indent=1),
    "bytes-and-windows.tsv": "\ufeffde\ten\r\n" + "".join(f"{source}\t{target}\r\n" for source, target in PAIRS),
}


@for_each("packed", ["", ".gz"])
@for_each("name", FILES)
def test_one_file(tmp_path, name, packed):
    text = read_rows(write(tmp_path / f"{name}{packed}", FILES[name]), "de", "en")
    assert list(zip(text.sources, text.targets, strict=True)) == PAIRS
    assert text.report == f"{tmp_path / name}{packed}: 2 pairs"


@for_each("packed", ["", ".gz"])
def test_two_files(tmp_path, packed):
    source, target = (write(tmp_path / f"train.{side}{packed}", lines(side)) for side in (0, 1))
    text = read_parallel_files(source, target)
    assert list(zip(text.sources, text.targets, strict=True)) == PAIRS, "only \\n ends a line"


def test_a_data_set_of_the_hub():
    datasets = pytest.importorskip("datasets", reason="the examples need the extra 'examples'")
    text = from_rows(datasets.Dataset.from_list(OBJECTS), "de", "en", "IWSLT/iwslt2017, train")
    assert list(zip(text.sources, text.targets, strict=True)) == PAIRS


def test_empty_sentences_are_left_out_and_counted(tmp_path):
    source = write(tmp_path / "a.de", "eins\n\n \ndrei\nvier\n\n")
    target = write(tmp_path / "a.en", "one\ntwo\n\n\nfour\nfive\n")
    text = read_parallel_files(source, target)
    assert (text.sources, text.targets, text.places) == (["eins", "vier"], ["one", "four"], [1, 5])
    assert text.skipped == {"empty source": [2, 3, 6], "empty target": [4]}
    assert text.report.endswith("2 pairs; left out 4: empty source (lines 2, 3, 6), empty target (line 4)")


TWO_LINES = {"a.de": "eins\nzwei\n", "a.en": "one\ntwo\n"}
BAD_PAIRS = {
    "unequal line counts": (
        {**TWO_LINES, "a.en": "one\ntwo\nthree\n"},
        r"a\.de and .*a\.en: expected as many lines, got 2 and 3; line 3 of .*a\.en has no translation in .*a\.de",
    ),
    "wrong encoding": (
        {**TWO_LINES, "a.de": "eins\nfünf\n".encode("latin-1")},
        r"a\.de, line 2: expected UTF-8, got byte 0xfc at 1",
    ),
    "UTF-16": ({**TWO_LINES, "a.de": "eins\nzwei\n".encode("utf-16")}, r"a\.de, line 1: expected UTF-8"),
    "empty file": ({"a.de": "", "a.en": ""}, r"a\.de, .*a\.en: expected at least one pair of sentences, found none"),
    "nothing but empty lines": (
        {"a.de": "\n\n", "a.en": "one\ntwo\n"},
        r"found none; left out 2: empty source \(lines 1, 2\)",
    ),
    "no file": ({"a.de": "eins\n"}, r"a\.en: expected a file, found none"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_of_files(tmp_path, case):
    files, says = BAD_PAIRS[case]
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=says):
        read_parallel_files(tmp_path / "a.de", tmp_path / "a.en")


BAD_ROWS = {
    "no such column": ("a.tsv", "de\tfr\neins\tun\n", r"a\.tsv, line 1: expected a column 'en' once, found de, fr"),
    "a cell too many": ("a.tsv", "de\ten\neins\tone\nzwei\ttwo\tdeux\n", r"a\.tsv, line 3: expected 2 columns, got 3"),
    "two columns of one name": (
        "a.tsv",
        "de\ten\ten\neins\tone\tun\n",
        r"a\.tsv, line 1: .* 'en' once, found de, en, en",
    ),
    "an empty table": ("a.tsv", "", r"a\.tsv, line 1: expected a column 'de'"),
    "a table of a header": ("a.tsv", "de\ten\n", r"a\.tsv: expected at least one pair"),
    "wrong encoding": ("a.tsv", "de\ten\nfünf\tfive\n".encode("latin-1"), r"a\.tsv, line 2: expected UTF-8"),
    "broken lines": ("a.jsonl", '{"de": "eins", "en": "one"}\n{"de": \n', r"a\.jsonl, line 2: expected an object"),
    "a broken list": ("a.json", '[{"de": "eins",\n "en": "one"},\n', r"a\.json, line \d: expected JSON"),
    "no text": ("a.jsonl", '{"de": "eins", "en": 1}\n', r"a\.jsonl, line 1: expected a text for 'en', got 1"),
    "no such language": ("a.json", '[{"translation": {"de": "eins"}}]', r"a\.json, row 1: expected a text for 'en'"),
    "no texts": ("a.jsonl", "[1]\n", r"a\.jsonl, row 1: expected texts by language, got 1"),
    "another kind": ("a.xml", "<a/>", r"a\.xml: expected a \.tsv, \.json or \.jsonl file, also \.gz, got '\.xml'"),
}


@for_each("content", [b"de\ten\neins\tone\n", gzip.compress(b"de\ten\neins\tone\n" * 99)[:40]])
def test_what_gzip_cannot_read(tmp_path, content):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(content)
    for read in (lambda: read_rows(path, "de", "en"), lambda: read_parallel_files(path, path)):
        with pytest.raises(ValueError, match=r"a\.tsv\.gz: expected a file that gzip can read, got .*; restore it"):
            read()


@for_each("case", BAD_ROWS)
def test_bad_rows(tmp_path, case):
    name, content, says = BAD_ROWS[case]
    with pytest.raises(ValueError, match=says):
        read_rows(write(tmp_path / name, content), "de", "en")


class TestEncoding:
    """Sentences of 10,000 tokens are left out or cut, and either is reported."""

    def text(self):
        long = " ".join(["Hund"] * 9_999)
        rows = [{"de": "der Hund", "en": "the dog"}, {"de": long, "en": "dogs"}, {"de": "Katze", "en": long}]
        return from_rows(rows, "de", "en", "three rows")

    def test_left_out_of_training(self, tokenizer):
        encoded = encode(self.text(), tokenizer, tokenizer, 100)
        assert [tokenizer.decode(row["labels"], skip_special_tokens=True) for row in encoded.rows] == ["the dog"]
        assert encoded.report == "three rows: 1 pairs; left out 2: more than 100 tokens (lines 2, 3)"

    def test_cut_for_measuring(self, tokenizer):
        encoded = encode(self.text(), tokenizer, tokenizer, 100, cut=True)
        assert [(len(row["input_ids"]), len(row["labels"])) for row in encoded.rows][1:] == [(100, 3), (2, 100)]
        assert all(row[side][-1] == tokenizer.eos_token_id for row in encoded.rows for side in ("input_ids", "labels"))
        assert encoded.report == "three rows: 3 pairs; cut 2: more than 100 tokens (lines 2, 3)"

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", MANY_LANGUAGES)
    def test_what_names_the_language_is_not_cut(self, kind, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(MANY_LANGUAGES[kind](tmp_path))
        tokenizer.src_lang, tokenizer.tgt_lang = ("deu_Latn", "eng_Latn") if kind == "nllb" else ("de_DE", "en_XX")
        rows = encode(self.text(), tokenizer, tokenizer, 9, cut=True).rows
        assert sorted({max(len(row["input_ids"]), len(row["labels"])) for row in rows})[-1] == 9
        for row in rows:
            for side, language in (("input_ids", tokenizer.src_lang), ("labels", tokenizer.tgt_lang)):
                assert {language, "</s>"} <= set(tokenizer.convert_ids_to_tokens(row[side]))

    def test_a_prefix(self, tokenizer):
        text = from_rows([{"de": "Hund", "en": "dog"}], "de", "en", "a row")
        (row,) = encode(text, tokenizer, tokenizer, 100, prefix="der ").rows
        assert row == {**tokenizer("der Hund"), "labels": tokenizer("dog")["input_ids"]}

    def test_fit_exactly(self, tokenizer):
        text = from_rows([{"de": "Hund Hund", "en": "dog"}], "de", "en", "a row")
        length = len(tokenizer("Hund Hund")["input_ids"])
        assert encode(text, tokenizer, tokenizer, length).report == "a row: 1 pairs"
        with pytest.raises(ValueError, match=r"a row: expected a pair of at most 2 tokens, found none"):
            encode(text, tokenizer, tokenizer, length - 1)


@for_each("most", [0, -1])
def test_the_first_pairs_are_one_at_least(most):
    text = from_rows(COLUMNS, "de", "en", "a data set")
    assert text.first(None) is text
    assert [len(text.first(count)) for count in (1, 2, 3)] == [1, 2, 2]
    with pytest.raises(ValueError, match=f"expected a whole number >= 1, got {most}"):
        text.first(most)
