"""IWSLT's official distribution: what is read of it wherever it lies, what is refused, and the papers' preparation."""

from __future__ import annotations

import gzip
import re
from itertools import chain
from pathlib import Path

import pytest
from for_each import for_each
from iwslt_distribution import YEAR_14, distribution, in_folder, segments, tar, zipped
from local_hub import local_hub

from hf_parcor.translation import (
    IWSLT14_DE_EN_PAIRS,
    moses_tokenizer,
    prepare_iwslt14_de_en,
    read_iwslt,
    train_bpe,
    unlike_papers,
)
from hf_parcor.translation.iwslt14 import EVERY, left_out

FILES = distribution()
OTHER = distribution("en-vi")
EVERYTHING = {**FILES, **OTHER, **distribution("en-de")}
TRAIN = [("de & line 0.0", "en & line 0.0"), ("de & line 0.1", "en & line 0.1"), ("de & line 0.2", "en & line 0.2"),
         ("de & line 1.0", "en & line 1.0"), ("de & line 1.1", "en & line 1.1")]  # fmt: skip

PLACES = {
    "a folder": lambda path: in_folder(FILES, path / "de-en"),
    "a folder above": lambda path: in_folder(FILES, path / "texts" / "de" / "en" / "de-en").parents[2],
    "a .tgz": lambda path: write(path / "de-en.tgz", tar(FILES)),
    "a .tgz of another name": lambda path: write(path / "data.tar.gz", tar(FILES)),
    "a .tar": lambda path: write(path / "de-en.tar", tar(FILES, mode="w:")),
    "a .zip": lambda path: write(path / "de-en.zip", zipped(FILES)),
    "all pairs in a .zip": lambda path: write(path / "DeEnItNlRo-DeEnItNlRo.zip", zipped(EVERYTHING, "DeEnItNlRo")),
    "a year": lambda path: write(
        path / "2014-01.tgz",
        tar({"de/en/de-en.tgz": tar(FILES), "en/vi/en-vi.tgz": tar(OTHER, "en-vi")}, "2014-01/texts"),
    ),
    "a year with all pairs in one, beside what is not looked into": lambda path: write(
        path / "2017-01.tgz",
        tar(
            {
                "DeEnItNlRo/DeEnItNlRo-DeEnItNlRo.zip": zipped(EVERYTHING, "DeEnItNlRo"),
                "en/vi/en-vi.tgz": b"damaged",
                "de/en/de-en": b"no archive",
            },
            "2017-01/texts",
        ),
    ),
    "a .tar that ends with a .zip": lambda path: write(
        path / "2014-01.tar", tar({"de/en/de-en.zip": zipped(FILES)}, "2014-01/texts", mode="w:")
    ),
    "a folder with the archive still in it": lambda path: (
        write(in_folder(FILES, path / "orig" / "de-en").parent / "de-en.tgz", tar(FILES)).parent
    ),
    "a folder with the archive alone": lambda path: (
        write(in_folder({}, path / "orig") / "de-en.tgz", tar(FILES)).parent
    ),
}


def write(path, content):
    path.write_bytes(content)
    return path


def pairs_of(text):
    return list(zip(text.sources, text.targets, strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_read_from(place, tmp_path):
    text = read_iwslt(PLACES[place](tmp_path), "de", "en")
    assert (text.pair, text.year, text.sets) == ("de-en", "14", YEAR_14)
    assert pairs_of(text.train()) == TRAIN
    assert text.train().report.endswith("train: 5 pairs")
    assert pairs_of(text.evaluation("tst2011", "dev2010")) == [
        (f"de & {name} {row}", f"en & {name} {row}") for name in ("TED.tst2011", "TED.dev2010") for row in (1, 2)
    ]


FORMS = {
    "'14": ("de-en", 14, YEAR_14, False),
    "'15": ("en-vi", 15, ("TED.dev2010", "TED.tst2012", "TED.tst2013"), True),
    "'17": ("de-en", 17, ("TED.dev2010", "TED.tst2010", "TED.tst2015"), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_year(form, tmp_path):
    pair, year, sets, documents = FORMS[form]
    folder = in_folder(distribution(pair, year, sets, documents=documents), tmp_path / pair)
    source, target = pair.split("-")
    text = read_iwslt(folder, source, target)
    assert (text.year, text.sets) == (str(year), sets)
    assert pairs_of(text.train()) == [
        (f"{source} & line {line}", f"{target} & line {line}") for line in ("0.0", "0.1", "0.2", "1.0", "1.1")
    ]
    assert len(text.evaluation(*sets)) == 2 * len(sets)


def test_the_other_direction_reads_the_same_files(tmp_path):
    text = read_iwslt(in_folder(FILES, tmp_path / "de-en"), "en", "de")
    assert pairs_of(text.train()) == [(english, german) for german, english in TRAIN]
    both = read_iwslt(in_folder(EVERYTHING, tmp_path / "all"), "en", "de")
    assert (text.pair, both.pair) == ("de-en", "en-de"), "its own files are preferred"


def test_an_empty_line_is_left_out_and_counted(tmp_path):
    files = distribution(train=([["eins", "", "drei"]], [["one", "two", ""]]))
    text = read_iwslt(in_folder(files, tmp_path), "de", "en").train()
    assert pairs_of(text) == [("eins", "one")]
    assert {reason: len(places) for reason, places in text.skipped.items()} == {"empty source": 1, "empty target": 1}
    line = FILES["train.tags.de-en.de"].decode().split("\n")[text.places[0] - 1]
    assert "line" in line, "places are those of the file"


BESIDE_THE_SCRIPT = {
    "iwslt2017.py": b"raise SystemExit",
    "data/2017-01-trnmted/texts/DeEnItNlRo/DeEnItNlRo/DeEnItNlRo-DeEnItNlRo.zip": zipped(
        distribution("de-it", 17, ("TED.tst2010",), documents=True)
    ),
    "data/2017-01-trnted/texts/de/en/de-en.zip": zipped(distribution("de-en", 17, documents=True)),
    "data/2017-01-trnted/texts/en/fr/en-fr.zip": b"not asked for",
}


class TestOnTheHub:
    """The archives that lie beside the loading script, with the folders they have there."""

    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        pytest.importorskip("datasets", reason="a Hub on this machine stands in for the one that datasets knows")
        with local_hub({"TED/iwslt": {"main": BESIDE_THE_SCRIPT}}, monkeypatch, tmp_path) as running:
            yield running

    @pytest.mark.slow
    @pytest.mark.parametrize(("source", "target"), [("de", "en"), ("en", "de"), ("de", "it")])
    def test_the_archive_of_the_pair(self, hub, source, target, tmp_path):
        text = read_iwslt("TED/iwslt", source, target, str(tmp_path / "cache"))
        assert (text.source, text.year, len(text.train())) == (source, "17", 5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "says"), [("TED/iwslt", "de-fr, found .*de-en, en-fr"), ("TED/other", "TED/other: .*check name")]
    )
    def test_none(self, hub, name, says):
        with pytest.raises(ValueError, match=says):
            read_iwslt(name, "de", "fr")


def changed(name, old, new, count=1):
    """The distribution with something replaced in one file."""
    content = FILES[name].decode()
    assert old in content
    return {**FILES, name: content.replace(old, new, count).encode()}


def without(*names):
    return {name: content for name, content in FILES.items() if name not in names}


GERMAN, ENGLISH = "train.tags.de-en.de", "train.tags.de-en.en"
DEV = "IWSLT14.TED.dev2010.de-en.de.xml"
OTHER_BYTES = FILES[GERMAN].replace(b"line", b"l\xefne", 1)
SECOND_TALK = "<url>" + FILES[GERMAN].decode().split("<url>")[2]
TWICE = {**FILES, **distribution(sets=("TEDX.tst2012",))}
MALFORMED = {
    "a line too few": (changed(GERMAN, " de &amp; line 1.1 \n", ""), "train", r"talk 2 \(2\), got 1 lines.*line 9"),
    "a title too few": (changed(ENGLISH, "<title>en title 1</title>\n", ""), "train", "talk 1 .* 1 titles"),
    "a talk too few": (changed(GERMAN, SECOND_TALK, ""), "train", "got 1 and 2; talk 2 is none"),
    "other talks": (changed(GERMAN, "<talkid>2<", "<talkid>3<"), "train", "got 2 and 2; talk 2 is 3, .* and 2,"),
    "an open title": (changed(GERMAN, "title 2</title>", "title 2"), "train", r"\.de, line 12: expected </title>"),
    "wrong encoding": ({**FILES, GERMAN: OTHER_BYTES}, "train", r"\.de, line 6: expected UTF-8"),
    "an empty file": ({**FILES, GERMAN: b"", ENGLISH: b""}, "train", "at least one pair"),
    "one language of train": (without(ENGLISH), "train", "expected train.tags.de-en.en"),
    "no train": (without(GERMAN, ENGLISH), "train", "expected train.tags.de-en.de"),
    "an open segment": (changed(DEV, " </seg>", ""), "dev2010", r"line 8: expected <seg"),
    "a segment over two lines": (changed(DEV, "dev2010 1", "dev2010\n1"), "dev2010", r"line 8: expected <seg"),
    "two segments in a line": (changed(DEV, " </seg>\n<seg", " </seg> <seg"), "dev2010", r"line 8: expected <seg"),
    "a segment behind a tag": (changed(DEV, '<seg id="2"', '<hl><seg id="2"'), "dev2010", r"line 9: expected <seg"),
    "a segment without a number": (changed(DEV, ' id="1"', ""), "dev2010", r"line 8: expected <seg"),
    "a segment twice": (changed(DEV, 'id="2"', 'id="1"'), "dev2010", r"line 9: .*once, got number 1"),
    "a segment too few": (
        changed(DEV, '<seg id="2"> de &amp; TED.dev2010 2 </seg>\n', ""),
        "dev2010",
        "got 1 and 2; segment 2 of document 535",
    ),
    "other documents": (changed(DEV, 'docid="535"', 'docid="536"'), "dev2010", "segment 1 of document 536"),
    "a cut file": ({**FILES, DEV: FILES[DEV].partition(b"</doc>")[0]}, "dev2010", "expected </doc>"),
    "no segments": ({**FILES, DEV: b"<mteval>\n</mteval>\n"}, "dev2010", "expected segments, found none"),
    "one language of a set": (without(DEV), "dev2010", "dev2010'.*there are TEDX.dev2012"),
    "no such set": (FILES, "tst2013", "there are TED.dev2010"),
    "two sets of the name": (TWICE, "tst2012", "TED.tst2012 and TEDX.tst2012"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_is_an_error(case, tmp_path):
    files, what, says = MALFORMED[case]
    text = read_iwslt(in_folder(files, tmp_path / "de-en"), "de", "en")
    with pytest.raises(ValueError, match=says):
        text.train() if what == "train" else text.evaluation(what)


def test_no_set_is_named(tmp_path):
    """As where a distribution has no development set, and all of them are asked for."""
    text = read_iwslt(in_folder(FILES, tmp_path / "de-en"), "de", "en")
    with pytest.raises(ValueError, match=r"expected the name of an evaluation set, got none; there are TED\.dev2010"):
        text.evaluation()


CUT = tar(distribution(train=([[f"{n * n * 7919 % 10007} x" for n in range(3000)]], [["x"] * 3000])))
BARE = tar(FILES, mode="w:")
SECOND = BARE.index(b"de-en/IWSLT14.TED.tst2012")  # its header, behind that of other files
DAMAGED = BARE[:SECOND] + b"?" + BARE[SECOND + 1 :]
WRONG = {
    "nothing": (lambda path: path / "nowhere", "found nothing"),
    "nothing, an archive": (lambda path: "data/de-en.tgz", "found nothing"),
    "another pair": (lambda path: in_folder(OTHER, path / "x"), r"expected train\.tags\.de-en"),
    "an archive of another pair": (lambda path: write(path / "a.zip", zipped(OTHER)), r"expected train\.tags\.de-en"),
    "a cut .tgz": (lambda path: write(path / "de-en.tgz", CUT[: len(CUT) // 2]), "expected a whole archive"),
    "a cut .tgz of which all files are there": (
        lambda path: write(path / "de-en.tgz", gzip.compress(BARE)[:-4]), "expected a whole archive",
    ),
    "a damaged .tar": (lambda path: write(path / "de-en.tar", DAMAGED), "expected a whole archive"),
    "a damaged .tar in gzip": (lambda path: write(path / "de-en.tgz", gzip.compress(DAMAGED)), "a whole archive"),
    "a .tar cut between its files": (lambda path: write(path / "de-en.tar", BARE[:SECOND]), "a whole archive"),
    "a cut .zip": (lambda path: write(path / "de-en.zip", zipped(FILES)[:-30]), "damaged one"),
    "another file": (lambda path: write(path / "de-en.tgz", b"<html>404</html>"), "got another file"),
    "a cut archive within": (
        lambda path: write(path / "2014-01.tgz", tar({"de-en.tgz": CUT[:2000]})),
        r"2014-01\.tgz:de-en/de-en\.tgz: expected",
    ),
    "two years": (
        lambda path: in_folder({**FILES, **distribution(year=15)}, path / "x"), "of one year, got those of 14, 15",
    ),
    "two that differ": (
        lambda path: in_folder(without(), in_folder(changed(GERMAN, "line", "Zeile"), path / "a").parent / "b").parent,
        "two that differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_where_there_is_no_such_distribution(case, tmp_path):
    make, says = WRONG[case]
    with pytest.raises(ValueError, match=says):
        read_iwslt(make(tmp_path), "de", "en")


# How people would write what was prepared: Moses' detokeniser, and a capital after a point, which says that it ends a
# sentence. What cannot be known any more is few: dots in a row, a point after a quoted letter.
POINT = re.compile(r"( \. (?:[^\w]* )?)(\w)")
AGREE = 0.999
FOLDER = Path(__file__).parents[3] / "shared" / "data" / "iwslt14_deen_eval"


def prepared(split, count=None):
    if not FOLDER.is_dir():
        pytest.skip("the prepared IWSLT'14 De-En is not beside the project: shared/data/iwslt14_deen_eval")
    lines = gzip.decompress((FOLDER / f"{split}.tsv.gz").read_bytes()).decode().split("\n")[1:-1]
    return [tuple(line.split("\t")) for line in lines][:count]


def as_written(rows):
    from sacremoses import MosesDetokenizer

    sides = []
    for language, side in zip(("de", "en"), zip(*rows, strict=True), strict=True):
        detokenize = MosesDetokenizer(lang=language).detokenize
        cased = (POINT.sub(lambda match: match[1] + match[2].upper(), text) for text in side)
        sides.append([detokenize(text.split(" ")) for text in cased])
    return sides


def share_alike(one, two):
    assert len(one) == len(two)
    return sum(a == b for a, b in zip(one, two, strict=True)) / len(one)


class TestAgainstThePreparedData:
    """`shared/data/iwslt14_deen_eval` is what fairseq's script made of the official distribution."""

    @pytest.mark.slow
    @for_each("split", ["valid", "test"])
    def test_tokens(self, split):
        rows = prepared(split)
        assert len(rows) == IWSLT14_DE_EN_PAIRS["validation" if split == "valid" else split]
        for language, texts, expected in zip(("de", "en"), as_written(rows), zip(*rows, strict=True), strict=True):
            tokenize = moses_tokenizer(language)
            assert share_alike([tokenize(text).lower() for text in texts], expected) >= AGREE

    @for_each("split", ["valid", "train_sample"])
    def test_nothing_that_was_kept_is_left_out(self, split):
        rows = prepared(split)
        assert not [row for row in rows if left_out(*row)]
        ratios = [max(sizes) / min(sizes) for sizes in (tuple(len(side.split()) for side in row) for row in rows)]
        assert max(ratios) == 1.5, "the bound itself is kept"

    def test_the_whole_way(self, tmp_path):
        kept, tests = prepared("train_sample", 1000), prepared("test", 500)
        train, test = ([[side] for side in as_written(kept)], as_written(tests))
        sets = {
            name: [side[start : start + 100] for side in test]
            for name, start in zip(YEAR_14, range(0, 500, 100), strict=True)
        }
        files = distribution(train=train, evaluation=sets)
        # Titles are sentences of the papers too: these two would be the first pairs.
        found = prepare_iwslt14_de_en(read_iwslt(write(tmp_path / "de-en.tgz", tar(files)), "de", "en"))
        expected = [("de title 1", "en title 1"), ("de described 1", "en described 1"), *kept]
        splits = {
            "train": [row for number, row in enumerate(expected, start=1) if number % EVERY],
            "validation": expected[EVERY - 1 :: EVERY],
            "test": tests,
        }
        for split, rows in splits.items():
            assert share_alike(pairs_of(found[split]), rows) >= 0.99, split

    @pytest.mark.slow
    def test_the_joint_vocabulary(self):
        rows = prepared("train_sample")
        tokenizer = train_bpe(chain(*zip(*rows, strict=True)), 10_149, split_punctuation=False)
        assert len(tokenizer) == 10_149
        assert "▁&apos;s" in tokenizer.get_vocab()
        for text in chain(*rows[:200]):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


LEFT_OUT = {
    "as long as may be": (175, 175, None),
    "too long": (176, 175, "175"),
    "as unlike as may be": (3, 2, None),
    "too unlike": (4, 2, "1.5"),
    "too unlike the other way": (2, 4, "1.5"),
}


class TestPreparation:
    @for_each("case", LEFT_OUT)
    def test_lengths(self, case):
        source, target, reason = LEFT_OUT[case]
        found = left_out(" ".join("a" * source), " ".join("b" * target))
        assert found is None if reason is None else reason in found

    def test_a_word_too_long(self):
        assert left_out("a" * 1000, "b") is None
        assert "1,000" in left_out("a" * 1001, "b")

    def build(self, tmp_path, german, english, **changes):
        return read_iwslt(in_folder(distribution(train=([german], [english]), **changes), tmp_path), "de", "en")

    def test_train_and_validation(self, tmp_path):
        german = [f"Satz {number}." for number in range(60)] + ["Zu viele Wörter hier.", ""]
        english = [f"Sentence {number}." for number in range(60)] + ["Few.", "Nothing"]
        found = prepare_iwslt14_de_en(self.build(tmp_path, german, english), ("train", "validation"))
        assert list(found) == ["train", "validation"]
        # Two lines of head are sentences 1 and 2.
        assert pairs_of(found["validation"]) == [("satz 20 .", "sentence 20 ."), ("satz 43 .", "sentence 43 .")]
        assert len(found["train"]) == 62 - 2
        assert pairs_of(found["train"])[:3] == [
            ("de title 1", "en title 1"), ("de described 1", "en described 1"), ("satz 0 .", "sentence 0 ."),
        ]  # fmt: skip
        assert {reason: len(places) for reason, places in found["train"].skipped.items()} == {
            "more than 1.5 times as long": 1,
            "empty source": 1,
        }
        assert "60 pairs; left out 2" in found["train"].report

    def test_entities_stay_and_the_apostrophe_is_made_plain_in_tests_alone(self, tmp_path):
        sets = {name: (["Wie geht’s & wo?"], ["How’s it & where?"]) for name in YEAR_14}
        text = self.build(tmp_path, ["F&E geht’s"], ["R&D ’s here"], evaluation=sets)
        found = prepare_iwslt14_de_en(text)
        assert pairs_of(found["train"])[2] == ("f &amp; amp ; e geht ’ s", "r &amp; amp ; d ’ s here")
        assert pairs_of(found["test"])[0] == (
            "wie geht &apos; s &amp; amp ; wo ?",
            "how &apos;s it &amp; amp ; where ?",
        )

    @pytest.mark.parametrize(
        "changes", [{"pair": "en-vi"}, {"year": 15}, {"sets": YEAR_14[:-1]}, {"sets": ()}], ids=str
    )
    def test_another_distribution_is_refused(self, changes, tmp_path):
        text = read_iwslt(in_folder(distribution(**changes), tmp_path), *changes.get("pair", "de-en").split("-"))
        with pytest.raises(ValueError, match="expected IWSLT'14 De-En"):
            prepare_iwslt14_de_en(text)

    def test_the_counts_are_compared(self, tmp_path):
        found = prepare_iwslt14_de_en(read_iwslt(in_folder(FILES, tmp_path), "de", "en"), ["test"])
        assert "6,750" in unlike_papers(found)
        assert unlike_papers({split: range(count) for split, count in IWSLT14_DE_EN_PAIRS.items()}) is None
        assert unlike_papers({"train": range(153_000)}) is not None, (
            "the 153K of paper 2 are not from this preparation"
        )

    def test_without_sacremoses(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sacremoses", None)
        with pytest.raises(ImportError, match=r"hf-parcor\[moses\]"):
            moses_tokenizer("de")


@for_each("named", [True, False])
def test_segments_of_several_documents(named, tmp_path_factory):
    """Numbers begin again with each document."""
    tmp_path = tmp_path_factory.mktemp("documents")
    files = distribution(sets=())
    for side, language in enumerate(("de", "en")):
        first, second = (segments([f"{language} {name}"], language, target=side == 1, document=name) for name in "ab")
        both = first + second if named else re.sub(r' docid="[^"]*"', "", first + second)
        files[f"IWSLT14.TED.dev2010.de-en.{language}.xml"] = both.encode()
    text = read_iwslt(in_folder(files, tmp_path), "de", "en").evaluation("TED.dev2010")
    assert (pairs_of(text), text.places) == ([("de a", "en a"), ("de b", "en b")], [1, 2])
