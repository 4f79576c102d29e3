"""The translation example, on a tiny model and local files."""

from __future__ import annotations

import ast
import gzip
import io
import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from example_program import TRAINS_AND_MEASURES, pushes_of, run_example, run_with, steps_logged
from iwslt_distribution import distribution, tar, zipped
from local_hub import local_hub
from local_models import MANY_LANGUAGES, save_t5, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_parcor import EvaluationRecord

pytest.importorskip("sacrebleu", reason="BLEU needs the extra 'translation'")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_translation.py"
WORDS = {"Hund": "dog", "Katze": "cat", "rot": "red", "sieht": "sees", "und": "and", "Haus": "house"}
SIDES = {"source": "de", "target": "en"}
OVERRIDES = (
    "encoder_layers=1,decoder_layers=2,d_model=16,encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=64"
)


@pytest.fixture
def files(tmp_path):
    names = list(WORDS)
    german = [f"{a} {b} {c}." for a in names for b in names[:3] for c in names[:2]]
    for split, lines in {"train": german, "validation": german[:5], "test": german[5:9]}.items():
        english = [" ".join(WORDS[word] for word in line.rstrip(".").split()) + "." for line in lines]
        for language, texts in {"de": lines, "en": english}.items():
            (tmp_path / f"{split}.{language}.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
        (tmp_path / f"{split}.tsv").write_text(
            "".join(f"{a}\t{b}\n" for a, b in zip(["de", *lines], ["en", *english], strict=True))
        )
    return tmp_path


def settings(folder: Path, **changes: object) -> dict[str, object]:
    return {
        **TRAINS_AND_MEASURES,
        **{f"{split}_{side}_file": str(folder / f"{split}.{language}.gz")
           for split in ("train", "validation", "test") for side, language in SIDES.items()},
        "output_dir": str(folder / "out"), "do_predict": True,
        "vocabulary_size": 40, "config_overrides": OVERRIDES, "max_tokens": 100, "max_length": 40,
        "num_train_epochs": 3, "learning_rate": 0.01, "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2,
        "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "save_strategy": "epoch",
        "generation_max_length": 8, "defense_norm": float("inf"), "defense_epsilon": 0.001, **changes,
    }  # fmt: skip


def run(monkeypatch, folder: Path, **changes: object) -> Path:
    return run_with(SCRIPT, settings(folder, **changes), monkeypatch)


def test_flags_last_decoder_layer_and_average(files, monkeypatch, capsys):
    flags = [part for name, value in settings(files).items() for part in (f"--{name}", str(value))]
    defense = ["--defense_target_modules", "last-decoder-layer", "--defense_start_epoch", "1"]
    run_example(SCRIPT, [*flags, *defense, "--average_checkpoints", "2"], monkeypatch)
    out = files / "out"
    defended = ["loss_corrupted" in entry for entry in steps_logged(out)]
    assert defended == [index >= len(defended) // 3 for index in range(len(defended))]
    saved = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2:]
    one, two, mean = (load_file(folder / "model.safetensors") for folder in (*saved, out))
    assert all(torch.equal(mean[name], ((one[name].double() + two[name].double()) / 2).float()) for name in mean)
    for split, count in (("eval", 5), ("test", 4)):
        results = json.loads((out / f"{split}_results.json").read_text())
        assert results[f"{split}_samples"] == count
        assert {f"{split}_bleu", f"{split}_tokenized_bleu"} <= set(results)
    assert len((out / "generated_predictions.txt").read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    assert "bleu, detokenised: nrefs:1|case:mixed|eff:no|tok:13a" in printed
    assert "tokenized_bleu, of tokens: nrefs:1|case:mixed|eff:no|tok:none" in printed
    assert json.loads((out / "defense_config.json").read_text())["defense"] == "multi_step_risk"


@pytest.mark.slow
def test_letters_that_training_did_not_have_are_missed(files, monkeypatch):
    """The same translations have a lower score where references have a letter that the vocabulary lacks."""
    found = {}
    for name in ("plain", "other"):
        output = run(monkeypatch, files, output_dir=str(files / name), do_predict=False, num_train_epochs=12)
        found[name] = json.loads((output / "eval_results.json").read_text())["eval_bleu"]
        path = files / "validation.en.gz"
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"dog", "\u00e7dog".encode())))
    assert found["other"] < found["plain"]


@pytest.mark.slow
def test_two_vocabularies_and_a_table(files, monkeypatch):
    out = run(
        monkeypatch,
        files,
        train_file=str(files / "train.tsv"),
        vocabulary_size=30,
        target_vocabulary_size=35,
        vocabulary_kind="bpe",
        do_predict=False,
        defense="none",
        corruptions=["quantization=2"],
        watched_corruptions=["quantization=2"],
        eval_strategy="epoch",
    )
    record = EvaluationRecord.load(out / "robustness.json")
    clean, rounded = (row.mean("bleu") for row in record.rows())
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    watched = [entry[name] for entry in history if (name := "eval_robustness_2_bit_quantization_bleu") in entry]
    assert len(watched) == 3
    assert watched[-1] == rounded
    assert clean == json.loads((out / "eval_results.json").read_text())["eval_bleu"]
    assert len(AutoTokenizer.from_pretrained(out)) == 30
    assert len(AutoTokenizer.from_pretrained(out / "target_tokenizer")) == 35
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (30, 35)
    assert not any("loss_corrupted" in entry for entry in steps_logged(out))

    checkpoint = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    tuned = files / "tuned"
    run(monkeypatch, files, **pretrained(checkpoint), output_dir=str(tuned), do_eval=False, max_train_samples=9)
    assert json.loads((tuned / "train_results.json").read_text())["train_samples"] == 9
    assert all("loss_corrupted" in entry for entry in steps_logged(tuned))
    assert len(AutoTokenizer.from_pretrained(tuned / "target_tokenizer")) == 35
    assert steps_logged(tuned)[0]["loss_clean"] < steps_logged(out)[0]["loss"], "it goes on from what was learned"

    (checkpoint / "target_tokenizer").rename(files / "elsewhere")
    with pytest.raises(ValueError, match="expected target_tokenizer beside a model with two vocabularies"):
        run(monkeypatch, files, **pretrained(checkpoint))


@pytest.mark.slow
def test_the_average_is_pushed_once_when_it_is_measured(files, monkeypatch):
    pushes = pushes_of(monkeypatch)
    asked = {"push_to_hub": True, "hub_strategy": "end", "average_checkpoints": 2, "corruptions": ["quantization=4"]}
    out = run(monkeypatch, files, **asked)
    ((weights, facts),) = pushes
    one, two = (
        load_file(folder / "model.safetensors")
        for folder in sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2:]
    )
    assert all(torch.equal(weights[name], ((one[name].double() + two[name].double()) / 2).float()) for name in one)
    measured = EvaluationRecord.load(out / "robustness.json").corruptions[0]
    assert facts.corruptions[0].metrics["bleu"].values == measured.metrics["bleu"]


def pretrained(folder: Path | str) -> dict[str, object]:
    """Return settings for a model that has its vocabulary and its shape."""
    return {"model_name_or_path": str(folder), "vocabulary_size": None, "config_overrides": None}


class TestGeneratedLength:
    def test_it_is_that_of_the_data(self, files, monkeypatch):
        """With the 20 tokens of Transformers these references would be out of reach."""
        for language, words in {"de": WORDS, "en": WORDS.values()}.items():
            lines = [" ".join([*words] * times) for times in (1, 2, 3)]
            (files / f"long.{language}").write_text("\n".join(lines))
        long = {f"validation_{side}_file": str(files / f"long.{tongue}") for side, tongue in SIDES.items()}
        changes = {"generation_max_length": None, "max_length": None, "do_predict": False, "num_train_epochs": 1}
        out = run(monkeypatch, files, **long, **changes)
        tokenizer = AutoTokenizer.from_pretrained(out)
        longest = max(len(tokenizer(line)["input_ids"]) for line in lines)
        assert longest > 21
        assert "predictions_cut" in (out / "eval_results.json").read_text()
        model = AutoModelForSeq2SeqLM.from_pretrained(out)
        expected = 1 + min(longest + longest // 5 + 10, 64)
        assert model.generation_config.max_length == expected, "who loads the model generates as long texts"

    @pytest.mark.slow
    def test_how_many_translations_hit_it_is_said(self, files, monkeypatch, caplog):
        out = run(monkeypatch, files, generation_max_length=7, generation_num_beams=2, do_eval=False)
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        lines = gzip.decompress((files / "test.de.gz").read_bytes()).decode().splitlines()
        cut = []
        for line in lines:
            inputs = tokenizer(line, return_tensors="pt")
            tokens = model.generate(**inputs, max_length=7, num_beams=2)[0, 1:]
            cut.append(tokenizer.eos_token_id not in tokens)
        found = json.loads((out / "test_results.json").read_text())["test_predictions_cut"]
        assert found == sum(cut) / len(cut) > 0
        assert "did not end within 6 tokens" in caplog.text


class TestPretrainedModels:
    def of_pairs(self, folder: Path, data: str, **changes: object) -> dict[str, object]:
        files = {f"{split}_{side}_file": None for split in ("train", "validation", "test") for side in SIDES}
        tables = {f"{split}_file": data for split in ("train", "validation", "test")}
        return {
            **pretrained(folder), **files, **tables, "source_lang": "en", "target_lang": "de", "max_length": 12,
            "num_train_epochs": 1, "defense": "none", **changes,
        }  # fmt: skip

    @pytest.mark.slow
    def test_a_prefix_is_put_before_each_source(self, files, monkeypatch):
        model, data = save_t5(files / "model"), write_pairs(files / "pairs.tsv")
        with_prefix = files / "prefixed.tsv"
        header, *lines = Path(data).read_text().splitlines()
        with_prefix.write_text("\n".join([header, *(f"good {line}" for line in lines)]))
        losses = []
        for table, prefix in ((data, "good "), (str(with_prefix), ""), (data, "")):
            out = run(monkeypatch, files, **self.of_pairs(model, table, source_prefix=prefix))
            losses.append([json.loads((out / f"{split}_results.json").read_text())[f"{split}_loss"]
                           for split in ("train", "eval", "test")])  # fmt: skip
        assert losses[0] == losses[1] != losses[2]

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", MANY_LANGUAGES)
    def test_languages_are_named(self, kind, files, monkeypatch):
        model, data = MANY_LANGUAGES[kind](files / "model"), write_pairs(files / "pairs.tsv")
        codes = {"source_code": "eng_Latn", "target_code": "deu_Latn"} if kind == "nllb" else {}
        if codes:
            with pytest.raises(ValueError, match="source language: expected one of the model's 4"):
                run(monkeypatch, files, **self.of_pairs(model, data))
        out = run(monkeypatch, files, **self.of_pairs(model, data, max_length=20, **codes))
        tokenizer = AutoTokenizer.from_pretrained(out)
        names = [codes.get("source_code", "en_XX"), codes.get("target_code", "de_DE")]
        assert [tokenizer.src_lang, tokenizer.tgt_lang] == names
        generation = AutoModelForSeq2SeqLM.from_pretrained(out).generation_config
        begun = {generation.forced_bos_token_id, generation.decoder_start_token_id}
        assert tokenizer.convert_tokens_to_ids(names[1]) in begun

    @pytest.mark.slow
    def test_a_generation_configuration_is_told_the_language(self, files, monkeypatch):
        model, data = MANY_LANGUAGES["nllb"](files / "model"), write_pairs(files / "pairs.tsv")
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        path = files / "generation.json"
        path.write_text(json.dumps({**ids, "num_beams": 2, "max_new_tokens": 5}))
        stock, begun = transformers.GenerationMixin.generate, []

        def generate(self, **settings):
            found = stock(self, **settings)
            begun.append((settings.get("num_beams"), self.generation_config.num_beams, int(found[0, 1])))
            return found

        monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
        codes = {"source_code": "eng_Latn", "target_code": "deu_Latn", "generation_config": str(path)}
        run(monkeypatch, files, **self.of_pairs(model, data, max_length=20, do_train=False, **codes))
        assert set(begun) == {(None, 2, AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("deu_Latn"))}

    def test_a_model_without_languages_is_given_none(self, files, monkeypatch):
        model, data = save_t5(files / "model"), write_pairs(files / "pairs.tsv")
        with pytest.raises(ValueError, match="expected a tokenizer that has some"):
            run(monkeypatch, files, **self.of_pairs(model, data, target_code="deu_Latn"))


def empty(folder: Path) -> dict[str, object]:
    (folder / "validation.de.gz").write_bytes(gzip.compress(b""))
    (folder / "validation.en.gz").write_bytes(gzip.compress(b""))
    return {}


def with_a_checkpoint(folder: Path) -> dict[str, object]:
    (folder / "out" / "checkpoint-99").mkdir(parents=True)
    (folder / "out" / "checkpoint-99" / "trainer_state.json").write_text("{}")
    return {"average_checkpoints": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (empty, r"validation\.de\.gz, .*validation\.en\.gz: expected at least one pair of sentences, found none"),
        (lambda folder: {"train_target_file": None}, "train: expected --train_file, or --train_source_file and"),
        (lambda folder: {"train_target_file": str(folder / "test.en.gz")}, "expected as many lines, got 36 and 4"),
        (lambda folder: {"iwslt": "de-en.tgz", "dataset_name": "a/b"}, "--iwslt, --dataset_name: expected one"),
        (lambda folder: {"papers_preparation": True}, "--papers_preparation: expected --iwslt"),
        (
            lambda folder: {"iwslt": "de-en.tgz", "papers_preparation": True, "iwslt_test_sets": ["tst2012"]},
            "iwslt_test_sets: expected --iwslt beside it, and no --papers_preparation, .* got that",
        ),
        (lambda folder: {"iwslt_validation_sets": ["dev2010"]}, "iwslt_validation_sets: expected .* got no --iwslt"),
        (lambda folder: {"vocabulary_kind": "letters"}, "vocabulary_kind: expected bpe or unigram, got 'letters'"),
        (lambda folder: {"max_length": 3}, "expected a pair of at most 3 tokens, found none; left out 36"),
        (lambda folder: {"generation_max_length": 66}, "max_length: expected at most 64 tokens"),
        (lambda folder: {"max_length": 65}, "max_length: expected at most 64 tokens"),
        (
            lambda folder: {"model_name_or_path": str(folder)},
            "config_overrides, vocabulary_size: expected none beside model_name_or_path",
        ),
        (
            lambda folder: {**pretrained(folder), "vocabulary": "v", "vocabulary_kind": "bpe"},
            "vocabulary, vocabulary_kind: expected none beside model_name_or_path",
        ),
        (
            lambda folder: {"vocabulary": str(folder), "target_vocabulary_size": 9},
            "vocabulary_size, target_vocabulary_size: expected none beside vocabulary",
        ),
        (
            lambda folder: {"do_train": False, "do_eval": False, "do_predict": False},
            "expected --do_train, --do_eval, --do_predict or several, got none",
        ),
        (lambda folder: {"max_train_samples": -1}, "max_train_samples: expected a whole number >= 1, got -1"),
        (lambda folder: {"max_eval_samples": 0}, "max_eval_samples: expected a whole number >= 1, got 0"),
        (lambda folder: {"average_checkpoints": 0}, "average_checkpoints: expected a whole number >= 1, got 0"),
        (
            lambda folder: {"average_checkpoints": 2, "do_train": False, "do_eval": True},
            "average_checkpoints: expected --do_train, after which checkpoints are averaged, got none",
        ),
        (
            lambda folder: {"average_checkpoints": 2, "save_strategy": "no"},
            "average_checkpoints: expected checkpoints, got --save_strategy no",
        ),
        (
            lambda folder: {"average_checkpoints": 2, "save_total_limit": 1},
            "average_checkpoints: expected at most 1, since --save_total_limit keeps no more, got 2",
        ),
        (
            lambda folder: {"average_checkpoints": 4},
            "average_checkpoints: expected at most 3, one for each of --num_train_epochs, got 4",
        ),
        (
            lambda folder: {"average_checkpoints": 2, "eval_strategy": "epoch", "load_best_model_at_end": True},
            "average_checkpoints: expected no best checkpoint beside it, .* got --metric_for_best_model loss",
        ),
        (with_a_checkpoint, "output_dir: expected none with checkpoints of another run, .* got .*checkpoint-99"),
        (lambda folder: {"do_train": False}, "vocabulary: expected text to train one on, got none"),
    ],
)
def test_bad_input(files, monkeypatch, change, says):
    with pytest.raises(ValueError, match=says):
        run(monkeypatch, files, **change(files))
    assert not (files / "out" / "train_results.json").exists()


def documented_flags() -> list[str]:
    """The command of the docstring, without `python` and the script."""
    lines = ast.get_docstring(ast.parse(SCRIPT.read_text(encoding="utf-8"))).split("\n")
    return shlex.split(next(line for line in lines if line.strip().startswith("python ")))[2:]


SMALL = [
    *("--config_overrides", OVERRIDES, "--vocabulary_size", "60", "--num_train_epochs", "1", "--max_tokens", "400"),
    *("--average_checkpoints", "1", "--defense_start_epoch", "0", "--generation_max_length", "8"),
    *("--report_to", "none", "--use_cpu", "True", "--disable_tqdm", "True"),
]


def test_the_documented_command(monkeypatch, tmp_path, caplog):
    """On a distribution of 46 lines with 2 of a head, so that validation is pairs 23 and 46."""
    sides = [
        [f"{word} {other}" for word in words for other in words][:46] for words in zip(*WORDS.items(), strict=True)
    ]
    sides = [(side * 2)[:46] for side in sides]
    (tmp_path / "de-en.tgz").write_bytes(tar(distribution(train=[[side] for side in sides])))
    monkeypatch.chdir(tmp_path)
    flags = documented_flags()
    assert flags[flags.index("--iwslt") + 1] == "de-en.tgz"
    run_example(SCRIPT, [*flags, *SMALL, "--corruptions", "quantization=4"], monkeypatch)
    assert EvaluationRecord.load(tmp_path / "out" / "robustness.json").rows()[1].mean("tokenized_bleu") >= 0
    for split, count in {"train": 46, "eval": 2, "test": 10}.items():
        results = json.loads((tmp_path / "out" / f"{split}_results.json").read_text())
        assert results[f"{split}_samples"] == count
        assert f"{split}_bleu" not in results, "of tokenised text there is no other BLEU"
    assert "expected about 160,239 pairs, got 46" in caplog.text
    assert "▁&apos;s" not in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


HUB_FLAGS = {
    "the Hub's copy": ["--dataset_name", "TED/talks", "--dataset_config_name", "talks-de-en"],
    "the Hub's copy, asked for": [
        *("--dataset_name", "TED/talks", "--dataset_config_name", "talks-de-en"),
        *("--dataset_revision", "refs/convert/parquet"),
    ],
    "the archives beside the script": ["--iwslt", "TED/talks", "--iwslt_test_sets", "tst2010"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HUB_FLAGS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_text_of_the_hub(case, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="data sets of the Hub need the extra 'examples'")
    packed = io.BytesIO()
    rows = [{"translation": {"de": f"de {number}", "en": f"en {number}"}} for number in range(4)]
    datasets.Dataset.from_list(rows).to_parquet(packed)
    copy = {f"talks-de-en/{split}/0000.parquet": packed.getvalue() for split in ("train", "validation", "test")}
    beside = {"talks.py": b"", "data/de-en.zip": zipped(distribution(year=17, documents=True))}
    monkeypatch.setattr(transformers.Trainer, "__init__", raise_reached)
    with local_hub({"TED/talks": {"main": beside, "refs/convert/parquet": copy}}, monkeypatch, tmp_path):
        flags = ["--output_dir", str(tmp_path / "out"), "--do_train", "--do_eval", "--do_predict", *HUB_FLAGS[case]]
        with pytest.raises(Reached):
            run_example(SCRIPT, [*flags, *SMALL, "--vocabulary_size", "18"], monkeypatch)


class Reached(Exception):  # noqa: N818
    """The Trainer was about to be made, with all text read."""


def raise_reached(*_: object, **__: object) -> None:
    raise Reached
