"""Rows from files: what they say, and nothing else; what is wrong with them, in one line."""

from __future__ import annotations

import csv
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st
from local_models import write_rows, write_wave

from hf_parcor.errors import InputError
from hf_parcor.records.data import EvaluationData
from hf_parcor.tasks import Rows, load_rows, read_file
from hf_parcor.tasks.classification import class_numbers, classes_of

GOOD = [
    (
        "a.tsv",
        'text\tlabel\na "bad" plot\t0\nNA\t1\n',
        [{"text": 'a "bad" plot', "label": 0}, {"text": "NA", "label": 1}],
    ),
    ("a.TSV", "text\tlabel\r\n1\tx\r\n", [{"text": 1, "label": "x"}]),
    ("a.csv", 'text,label\n"a, ""b""\nc",-1\n', [{"text": 'a, "b"\nc', "label": -1}]),
    ("a.csv", "\ufefftext\ncaf\u00e9 \u2028 x\n", [{"text": "caf\u00e9 \u2028 x"}]),
    ("a.csv", "text,score\na,1.5\nb,2\n", [{"text": "a", "score": "1.5"}, {"text": "b", "score": "2"}]),
    ("a.json", json.dumps([{"text": "a", "labels": [1]}]), [{"text": "a", "labels": [1]}]),
    ("a.json", json.dumps({"version": 1, "data": [{"text": "a"}]}), [{"text": "a"}]),
    ("a.json", '{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
    ("a.json", '{"text": "a", "label": 1}\n', [{"text": "a", "label": 1}]),
    ("a.json", '{\n "tokens": ["a", "b"],\n "tags": [0, 1]\n}', [{"tokens": ["a", "b"], "tags": [0, 1]}]),
    ("a.json", '{"text": "a", "labels": [1]}', [{"text": "a", "labels": [1]}]),
    ("a.json", '{"answers": {"text": ["a"]}, "context": "a"}', [{"answers.text": ["a"], "context": "a"}]),
    ("a.json", '{"data": []}', []),
    (
        "a.jsonl",
        '{"translation": {"de": "gut", "en": "good"}}\n\n',
        [{"translation.de": "gut", "translation.en": "good"}],
    ),
    ("a.txt", "one\n\ntwo\n", [{"text": "one"}, {"text": ""}, {"text": "two"}]),
    ("a.csv", "", []),
    ("a.csv", "text,label\n007,01\n008,02\n", [{"text": "007", "label": "01"}, {"text": "008", "label": "02"}]),
    ("a.tsv", "text\tlabel\n-0\t+1\n", [{"text": "-0", "label": "+1"}]),
    ("a.csv", "text,label\n\u0661, 1\n", [{"text": "\u0661", "label": " 1"}]),
    ("a.csv", f'text,label\n"{"x" * 150_000}",1\n', [{"text": "x" * 150_000, "label": 1}]),
    ("a.jsonl", '\ufeff{"text": "\\ud83d\\ude00 \\\\ud83d"}\n', [{"text": "\U0001f600 \\ud83d"}]),
    ("a.jsonl", '{"label": 1.0}\n{"label": true}\n', [{"label": 1.0}, {"label": True}]),
]
DAMAGED = bytearray(gzip.compress(b"text,label\ngood,1\nbad,0\n" * 200, mtime=0))
DAMAGED[30] ^= 255
DAMAGED[31] ^= 255
BAD = [
    ("a.tsv", b"text\tlabel\na\t1\nb\n", r"a\.tsv: expected 2 cells \(text, label\) in line 3, got 1; mend"),
    ("a.csv", b'text,label\n"a,1\n', "expected comma-separated values in line 2"),
    ("a.json", b'[{"text": ', "expected JSON in line 1, got Expecting value"),
    ("a.json", b'[{"text": 1},\n{"text": ]', "expected JSON in line 2, got Expecting value"),
    ("a.json", b'"text"', "expected a list of objects in line 1, got str"),
    ("a.json", b'{"text": {"0": "a", "1": "b"}}', "expected a list of objects in line 1, got dict"),
    ("a.json", b"{}", "expected a list of objects in line 1, got dict"),
    ("a.jsonl", b'{"text": "a"}\n{"text', "expected a JSON object in line 2, got Unterminated string"),
    ("a.jsonl", b"[1]\n", "expected an object with the columns by name in line 1, got list"),
    ("a.txt", b"\xff\xfe\x00", "expected text in UTF-8"),
    ("a.csv.gz", gzip.compress(b"text\na\n" * 99, mtime=0)[:-9], "expected a file that can be read"),
    ("a.csv.gz", b"text\na\n", "expected a file that can be read, got Not a gzipped file"),
    ("a.csv.gz", bytes(DAMAGED), r"expected a file that can be read, got Error -3 .*; restore or convert it"),
    (
        "a.csv",
        b"text,label,text\ngood,1,bad\n",
        "columns of different names in line 1, got 'text' twice; mend",
    ),
    ("a.tsv", b"text\tlabel\ttext\ngood\t1\tbad\n", "expected columns of different names in line 1, got 'text' twice"),
    (
        "a.jsonl",
        b'{"a": 0}\n{"a": 1, "a": 2}\n',
        "expected a JSON object in line 2, got 'a' twice in one object;",
    ),
    ("a.json", b'[{"a": 1, "a": 2}]', "expected JSON, got 'a' twice in one object; mend"),
    ("a.jsonl", b'{"a": {"b": 1}, "a.b": 2}\n', "expected columns of different names in line 1, got 'a.b' twice"),
    ("a.jsonl", b'{"a": 0}\n{"text": "x \\ud800"}\n', r"expected text in line 2, got half of a character \(\\ud800\)"),
    ("a.json", b'[{"a": 0}, {"text": ["\\uDC00"]}]', r"expected text in row 2, got half of a character \(\\udc00\)"),
    ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "expected a JSON object in line 1, got Exceeds the limit"),
    ("a.json", b"[" * 200_000, "expected JSON, got .*recursion"),
    ("a.csv", None, "expected a file, found none"),
    ("a.parquet", b"PAR1", r"expected a file that ends in \.csv, \.tsv, \.json, \.jsonl, \.txt, or these and \.gz"),
]


@for_each(("name", "text", "rows"), GOOD)
@for_each("packed", [False, True])
def test_good_files(name, text, rows, packed, tmp_path):
    path = tmp_path / (f"{name}.gz" if packed else name)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_file(path) == rows


def test_the_suffix_of_gzip_in_capitals(tmp_path):
    (tmp_path / "a.CSV.GZ").write_bytes(gzip.compress(b"text\na\n"))
    assert read_file(tmp_path / "a.CSV.GZ") == [{"text": "a"}]


def test_the_limit_of_a_cell_is_that_of_other_code_again(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 150_000)
    before = csv.field_size_limit()
    read_file(tmp_path / "a.csv")
    assert csv.field_size_limit() == before


@for_each(("name", "content", "says"), BAD)
def test_bad_files(name, content, says, tmp_path):
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_file(tmp_path / name)


@given(total=st.integers(1, 5), count=st.none() | st.integers(1, 6))
def test_the_first_rows(total, count):
    rows = Rows("rows.tsv", [{"text": number} for number in range(total)], ("text",), data=EvaluationData(split="dev"))
    first = rows.first(count)
    assert first.column("text") == list(range(total))[:count]
    if len(first.entries) == total:
        assert first == rows  # a record then says that it is the whole split
    else:
        assert (first.data.split, first.data.rows) == (f"dev[:{count}]", count)


@for_each(
    ("split", "count", "flags"),
    [
        *(("", 3, {"limit": "3"}), ("dev", None, {"split": "dev"}), ("dev", 3, {"split": "dev", "limit": "3"})),
        ("train+test", 3, {"split": "train+test", "limit": "3"}),
        ("train+test[:5]", None, {"split": "train+test[:5]"}),  # all of the one, and five rows of the other
        ("train+test[:5]", 3, {"split": "train+test[:5]", "limit": "3"}),
        ("train[:5]+test", None, {"split": "train[:5]+test"}),
        ("train[2:8]", None, {"split": "train[2:8]"}),
        ("train[:50%]", 3, {"split": "train[:50%]", "limit": "3"}),
        ("train[:34%](pct1_dropremainder)", 3, {"split": "train[:34%](pct1_dropremainder)", "limit": "3"}),
    ],
)
def test_flags_name_the_rows_again(split, count, flags):
    rows = Rows("org/reviews", list(range(9)), ("text",), data=EvaluationData("org/reviews", split=split))
    assert rows.first(count).data.flags == {"dataset": "org/reviews", **flags}


class TestSplitOff:
    @given(total=st.integers(2, 40), share=st.floats(0.001, 0.999), seed=st.integers(0, 5))
    def test_each_row_is_in_one_of_both_in_its_order(self, total, share, seed):
        rows = Rows("rows.tsv", [{"text": number} for number in range(total)], ("text",))
        training, held_out = rows.split_off(share, seed)
        both = [part.column("text") for part in (training, held_out)]
        assert sorted(both[0] + both[1]) == list(range(total))
        assert both == [sorted(part) for part in both]
        assert min(map(len, both)) >= 1
        assert abs(len(both[1]) - total * share) <= 1
        assert held_out.data.rows == len(both[1])
        assert rows.split_off(share, seed)[1].data == held_out.data != training.data

    @given(total=st.integers(3, 40), seed=st.integers(0, 5), inside=st.booleans(), data=st.data())
    def test_a_row_is_called_by_its_number_in_the_file(self, total, seed, inside, data):
        bad = data.draw(st.integers(0, total - 1))
        entries = [{"label": "god" if number == bad else "good", "text": str(number)} for number in range(total)]
        part = Rows("rows.tsv", entries, ("label", "text")).split_off(0.5, seed)[inside]
        part = part.first(len(part.entries) - 1) if len(part.entries) > 1 else part
        if bad in map(int, part.texts("text")):
            with pytest.raises(InputError, match=rf"got 'god' in column 'label', row {bad + 1} \("):
                class_numbers(part, "label", {"bad": 0, "good": 1})
            with pytest.raises(InputError, match=rf"in row {bad + 1};"):
                replace(part, entries=[row if row["label"] == "good" else {} for row in part.entries]).column("label")


class TestLoadRows:
    def test_a_file_without_rows(self, tmp_path):
        (tmp_path / "a.csv").write_text("text,label\n")
        with pytest.raises(InputError, match="expected at least one row, got none"):
            load_rows(str(tmp_path / "a.csv"))

    def test_a_missing_file_is_not_looked_for_on_the_hub(self, tmp_path):
        with pytest.raises(InputError, match="expected a file, found none"):
            load_rows(str(tmp_path / "nowhere.csv"))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_data_set_that_cannot_be_reached(self):
        pytest.importorskip("datasets")
        with pytest.raises(InputError, match=r"^nobody/nothing: expected a data set on the Hub, .* check name, split"):
            load_rows("nobody/nothing")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_folder_that_datasets_knows(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "validation.jsonl").write_text('{"translation": {"de": "gut", "en": "good"}}\n')
        (tmp_path / "data" / "train.jsonl").write_text('{"translation": {"de": "a", "en": "b"}}\n')
        rows = load_rows(str(tmp_path / "data"))
        assert rows.columns == ("translation.de", "translation.en")
        assert list(rows.entries) == [{"translation.de": "gut", "translation.en": "good"}]
        with pytest.raises(InputError, match="with split 'dev', got ValueError: Unknown split"):
            load_rows(str(tmp_path / "data"), "dev")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.csv.gz"])
    def test_a_file_says_the_same_in_a_folder(self, name, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (folder := tmp_path / "data").mkdir()
        cells = [("good", "01", "NA"), ("bad", "2", "")]
        path = folder / name
        plain = write_rows(folder / name.removesuffix(".gz"), ["sentence", "label", "note"], cells)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(Path(plain).read_bytes()))
            Path(plain).unlink()
        rows = load_rows(str(folder), "train")
        assert list(rows.entries) == list(load_rows(str(path)).entries)
        assert rows.column("label") == ["01", "2"]
        assert (rows.data.name, rows.data.split, rows.data.rows) == ("data", "train", 2)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("named", ["0.wav", "../0.wav"])
    def test_files_lie_beside_the_file_that_names_them(self, named, tmp_path, monkeypatch):
        """Also where a split has several files, each in a folder of its own, and where rows are left out."""
        pytest.importorskip("soundfile")
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        loudness = {"one": 0.25, "two": 0.5}
        for part, loud in loudness.items():
            (folder := tmp_path / "data" / "train" / part / "tables").mkdir(parents=True)
            write_wave(folder / named, np.full(8, loud))
            write_rows(folder / "rows.csv", ["audio", "loud"], [(named, str(loud))] * 2)
        rows = load_rows(str(tmp_path / "data"), "train")
        (flat := tmp_path / "data" / "train" / "one" / "tables" / "rows.csv").rename(flat.with_name("train.csv"))
        types = "[{name: audio, dtype: string}, {name: loud, dtype: string}]"
        flat.with_name("README.md").write_text(f"---\ndataset_info: {{features: {types}}}\n---\n")
        by_datasets = load_rows(str(flat.parent), "train")
        assert not isinstance(by_datasets.entries, list)
        for part in (by_datasets, rows, rows.first(3), rows.part([3, 0], "some"), *rows.split_off(0.5, 0)):
            for index, row in enumerate(part.entries):
                samples = part.audio("audio", index, 16_000)
                np.testing.assert_allclose(samples, np.full(8, float(row["loud"])), atol=1e-3)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_folder_that_names_its_classes(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (folder := tmp_path / "data").mkdir()
        write_rows(folder / "train.csv", ["sentence", "label"], [("good", 1), ("bad", 0)])
        classes = "{name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}"
        features = f"[{{name: sentence, dtype: string}}, {classes}]"
        (folder / "README.md").write_text(f"---\ndataset_info: {{features: {features}}}\n---\n")
        assert load_rows(str(folder), "train").class_names == {"label": ["bad", "good"]}

    def test_names_of_numbered_classes(self):
        datasets = pytest.importorskip("datasets")
        from hf_parcor.tasks.rows import _class_names

        names = datasets.ClassLabel(names=["b", "a"])
        features = datasets.Features({"x": names, "y": datasets.Value("int64"), "z": datasets.List(names)})
        assert _class_names(features) == {"x": ["b", "a"], "z": ["b", "a"]}


def labelled(*labels, names=None):
    class_names = {} if names is None else {"label": names}
    return Rows("rows.csv", [{"label": label} for label in labels], ("label",), class_names)


STARS = {"1": 0, "2": 1, "3": 2}
CODES = {"01": 0, "02": 1, "03": 2}
SIGNS = {"-1": 0, "0": 1, "1": 2}
LETTERS = {"A": 0, "a": 1}


class TestClasses:
    OF_THE_MODEL = {"NEGATIVE": 0, "POSITIVE": 1}  # noqa: RUF012

    @for_each(
        ("rows", "expected"),
        [
            (labelled(1, 0), [1, 0]),
            (labelled("1", " 0", "1.0"), [1, 0, 1]),
            (labelled("positive", "Negative", " POSITIVE "), [1, 0, 1]),
            (labelled(0, 1, names=["positive", "negative"]), [1, 0]),
            (labelled(0, 1, names=["down", "up"]), [0, 1]),
            (labelled(0, 2, names=["positive", "neutral", "negative"]), [1, 0]),
            (labelled(0, 1, names=["negative", "up"]), [0, 1]),
            (labelled([0, 1], ["positive"]), [[0, 1], [1]]),
            (labelled(1.0), [1]),
        ],
    )
    def test_numbers_of_the_model(self, rows, expected):
        assert class_numbers(rows, "label", self.OF_THE_MODEL) == expected

    @for_each(
        ("rows", "says"),
        [
            (labelled(0, -1), r"expected a label of the model \(NEGATIVE = 0, POSITIVE = 1\), got -1 .* row 2"),
            (labelled("positiv"), r"got 'positiv' .* row 1 \(did you mean POSITIVE\?\)"),
            (labelled("positiv"), "choose data with labels"),
            (labelled(2), "got 2 in column 'label'"),
            (labelled(0.5), "got 0.5 in column 'label'"),
            (labelled("01"), "got '01' in column 'label'"),
            (labelled("9" * 5000), "got '99"),
            (labelled(True), "got True in column 'label'"),
            (labelled(0, None), "expected a value of 'label' in each row, got none in row 2"),
            (labelled("positive", " "), "expected a label in each row, got ' ' in column 'label', row 2; "),
            (labelled([0, None]), r"expected a label in each row, got None in column 'label', row 1; "),
            (labelled(math.nan), r"expected a label in each row, got nan in column 'label', row 1; "),
            (labelled([[0]]), r"expected a label of the model .*, got \[0\]"),
            (labelled(1, names=["positive", "neutral", "negative"]), "got 1 = neutral in column 'label'"),
            (labelled(-1, names=["negative", "positive"]), "got -1 in column 'label'"),
        ],
    )
    def test_labels_that_it_does_not_know(self, rows, says):
        with pytest.raises(InputError, match=says):
            class_numbers(rows, "label", self.OF_THE_MODEL)

    @for_each(
        ("of_the_model", "labels", "expected"),
        [
            (STARS, [1, 2, 3], [0, 1, 2]),
            (STARS, ["1", "2"], [0, 1]),
            (STARS, [1.0, "3.0"], [0, 2]),
            (CODES, ["01", "02"], [0, 1]),
            (SIGNS, [0, 1, -1], [1, 2, 0]),
            (LETTERS, ["A", "a"], [0, 1]),
            ({"1.0": 0, "2.0": 1}, [1, 2.0, "1"], [0, 1, 0]),
            ({"False": 0, "True": 1}, [True, "false"], [1, 0]),
            ({" x": 0, "x": 1}, [" x", "x"], [0, 1]),
        ],
    )
    def test_a_name_comes_before_a_number(self, of_the_model, labels, expected):
        assert class_numbers(labelled(*labels), "label", of_the_model) == expected

    @for_each(
        ("of_the_model", "rows", "says"),
        [
            (STARS, labelled(0, 1), r"expected a label of the model \(1 = 0, 2 = 1, 3 = 2\), got 0 .* row 1"),
            (STARS, labelled("0"), "got '0' in column 'label', row 1"),
            (CODES, labelled("1", "2"), r"expected a label of the model .* got '1' .* row 1"),
            (CODES, labelled(3), "got 3 in column 'label', row 1"),
            (
                {"Up": 0, "UP": 1},
                labelled("up"),
                "a label that means one class, got 'up' .* Up = 0 or UP = 1",
            ),
            (
                {"Up": 0, "UP": 1},
                labelled(0, names=["up"]),
                "got 0 = up in column 'label', .* Up = 0 or UP = 1",
            ),
            ({"1.0": 0, "1.00": 1}, labelled(1), "expected a label that means one class, got 1 "),
        ],
    )
    def test_what_may_mean_two_classes(self, of_the_model, rows, says):
        with pytest.raises(InputError, match=says):
            class_numbers(rows, "label", of_the_model)

    @for_each(
        ("rows", "expected"),
        [
            (labelled(0, 2), ["0", "2"]),
            (labelled(0, 100_000), ["0", "100000"]),
            (labelled("10", "9"), ["9", "10"]),
            (labelled(1.0, 2.0, 1), ["1", "2"]),
            (labelled("1.0", "2.0"), ["1", "2"]),
            (labelled(0.5, 1.5), ["0.5", "1.5"]),
            (labelled("02", "01", "1"), ["01", "02", "1"]),
            (labelled(True, False), ["false", "true"]),
            (labelled(True, 1), ["1", "true"]),
            (labelled("A", "a"), ["A", "a"]),
            (labelled("x", " x"), ["x"]),
            (labelled("b", "a", "b"), ["a", "b"]),
            (labelled(0, 1, names=["b", "a"]), ["b", "a"]),
            (labelled(["O", "B"], ["O"]), ["B", "O"]),
        ],
    )
    def test_classes_to_learn(self, rows, expected):
        names = classes_of([(rows, "label")])
        assert names == expected
        numbers = class_numbers(rows, "label", {name: number for number, name in enumerate(names)})
        found = {number for value in numbers for number in (value if isinstance(value, list) else [value])}
        assert found == set(range(len(names)))

    @for_each(
        ("rows", "says"),
        [
            (labelled(-1, -1), "expected labels from 0 on, got -1"),
            (labelled("-1", "0"), "expected labels from 0 on, got -1"),
            (labelled("pos", ""), "expected a label in each row, got '' in column 'label', row 2; "),
            (labelled(["O"], ["O", None]), "expected a label in each row, got None in column 'label', row 2; "),
            (labelled(0.0, math.nan), "expected a label in each row, got nan in column 'label', row 2; "),
            (
                labelled([["O"]]),
                r"expected names or numbers, or lists of these, got \['O'\] in column 'label', row 1",
            ),
        ],
    )
    def test_classes_to_learn_from_no_labels(self, rows, says):
        with pytest.raises(InputError, match=says):
            classes_of([(rows, "label")])

    @pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl"])
    @pytest.mark.parametrize(("of_the_model", "label"), [(STARS, "2"), (CODES, "02"), (SIGNS, "0"), (LETTERS, "a")])
    def test_one_label_is_one_class_in_every_kind_of_file(self, name, of_the_model, label, tmp_path):
        texts = {
            "a.csv": f"text,label\nx,{label}\n",
            "a.tsv": f"text\tlabel\nx\t{label}\n",
            "a.json": json.dumps([{"text": "x", "label": label}]),
            "a.jsonl": json.dumps({"text": "x", "label": label}),
        }
        (tmp_path / name).write_text(texts[name])
        assert class_numbers(load_rows(str(tmp_path / name)), "label", of_the_model) == [1]
