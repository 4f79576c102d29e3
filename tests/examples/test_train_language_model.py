"""The example script on a few lines: the LSTM whose state is carried on, and any other causal language model."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from example_program import TRAINS_AND_MEASURES, run_with
from for_each import for_each
from local_models import save_gpt2
from torch.utils.data import DataLoader
from trainings import QUIET
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from hf_parcor import CorruptionEvaluator, EvaluationRecord
from hf_parcor.evaluation import LanguageModelMetric

pytest.importorskip("datasets", reason="the examples need the extra 'examples'")

import train_language_model as example

SCRIPT = Path(example.__file__)
PENN = Path(__file__).parents[3] / "shared" / "data" / "ptb_lm"
WORDS = ["a", "b", "c", "d", "e", "f", "<unk>", "N"]
WATCHED = {"watched_corruptions": ["quantization=4"]}
TINY_LSTM = "hidden_size=6,embedding_size=4,num_hidden_layers=2"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def lines_of(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 6))) for _ in range(count)]


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress("\n".join(lines_of(0, 30)).encode()))
    (tmp_path / "valid.txt").write_text("\n".join([*lines_of(1, 8), "never seen"]))
    return {
        **TRAINS_AND_MEASURES,
        "train_file": str(tmp_path / "train.txt.gz"),
        "validation_file": str(tmp_path / "valid.txt"),
        "config_overrides": TINY_LSTM,
        "output_dir": str(tmp_path / "out"),
        "block_size": 7,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "corruption_trials": 1,
        "corruptions": ["gradient=0.5", "quantization=3", "multi-step=0.5"],
    }


def ten_lines(model, tokens, pieces, end) -> float:
    """Return the mean loss of a token, word by word."""
    length = -(-len(tokens) // pieces)
    total = 0.0
    for start in range(0, len(tokens), length):
        state, before = torch.zeros(1, model.evaluation_state.shape[1]), end if start == 0 else tokens[start - 1]
        for token in tokens[start : start + length]:
            with torch.no_grad():
                output = model(torch.tensor([[before]]), state=state)
            total -= float(output.logits[0, 0].log_softmax(-1)[token])
            state, before = output.state, token
    return total / len(tokens)


@pytest.mark.slow
def test_log_perplexity_is_that_of_a_loop_and_of_the_saved_folder(settings, tmp_path, monkeypatch, capsys):
    out = run_with(SCRIPT, settings, monkeypatch)
    assert "gradient-based" in capsys.readouterr().out
    found = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    assert (out / "modeling_awd_lstm.py").exists()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    lines = Path(settings["validation_file"]).read_text().splitlines()
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    assert tokenizer.decode(tokens[-3:]) == "<unk> <unk> <eos>"
    assert len(tokenizer) == 9 == model.config.vocab_size
    assert ten_lines(model, tokens, 2, tokenizer.eos_token_id) == pytest.approx(found, rel=1e-5)
    record = EvaluationRecord.load(out / "robustness.json")
    assert record.clean.mean("loss") == found
    assert not record.metric_info["loss"].greater_is_better
    losses = [row.mean("loss") for row in record.corruptions]
    assert losses[0] > found
    assert losses[2] > found
    again = {**settings, "model_name_or_path": str(out), "config_overrides": None, "do_train": False}
    again = run_with(
        SCRIPT, {**again, "output_dir": str(tmp_path / "again"), "corruptions": ["gradient=0.5"]}, monkeypatch
    )
    evaluated = EvaluationRecord.load(again / "robustness.json")
    assert evaluated.weights == record.weights  # with no state in it
    assert evaluated.model == record.model == f"{tmp_path.name}/{out.name}", "where it was trained, not measured"
    assert [row.mean("loss") for row in evaluated.rows()] == [found, losses[0]]
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert all("loss_corrupted" in entry for entry in logs if "loss" in entry)


@pytest.mark.slow
def test_training_reads_the_text_in_its_order(settings, tmp_path, monkeypatch):
    """Where nothing moves or drops, the losses of the steps are those of the text as it is evaluated."""
    fixed = "initializer_range=3,activation_regularization=0,temporal_regularization=0,weight_drop=0,output_dropout=0"
    still = f"{TINY_LSTM},{fixed},embedding_dropout=0,input_dropout=0,hidden_dropout=0"
    given = {**settings, "config_overrides": still, "learning_rate": 0.0, "num_train_epochs": 1, "block_size": 4}
    given |= {"validation_file": settings["train_file"], "per_device_eval_batch_size": 3, "skip_corruptions": True}
    out = run_with(SCRIPT, {**given, "defense": "none"}, monkeypatch)
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    lines = gzip.decompress(Path(settings["train_file"]).read_bytes()).decode().splitlines()
    count = sum(len(line.split()) + 1 for line in lines)
    steps = [entry["loss"] for entry in logs if "loss" in entry]
    sizes = [12] * (len(steps) - 1) + [count - 12 * (len(steps) - 1)]
    mean = sum(loss * size for loss, size in zip(steps, sizes, strict=True)) / count
    assert mean == pytest.approx(json.loads((out / "eval_results.json").read_text())["eval_loss"], abs=1e-4)


@pytest.mark.slow
@for_each("given", [{}, {"gradient_accumulation_steps": 2}, {"eval_strategy": "steps", "eval_steps": 3, **WATCHED}])
def test_a_run_that_goes_on_in_the_middle_of_an_epoch_is_the_whole_run(settings, tmp_path, monkeypatch, given):
    """With all its dropout, and under the defense."""
    given = {**settings, **given, "skip_corruptions": True, "save_strategy": "steps", "save_steps": 1}
    whole = run_with(SCRIPT, given, monkeypatch)
    state = json.loads((whole / "trainer_state.json").read_text())
    part = tmp_path / "part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    assert state["global_step"] / 2 > 2
    run_with(SCRIPT, {**given, "output_dir": str(part), "resume_from_checkpoint": "true"}, monkeypatch)
    for name in ("model.safetensors", "eval_results.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name
    (part / "checkpoint-2" / "training_state_0.pt").unlink()
    again = {**given, "output_dir": str(part), "resume_from_checkpoint": str(part / "checkpoint-2")}
    with pytest.raises(ValueError, match="expected the state of the text"):
        run_with(SCRIPT, again, monkeypatch)


@pytest.mark.slow
@for_each(
    "given",
    [
        {"model_type": "gpt2", "config_overrides": "n_embd=8,n_layer=1,n_head=2"},
        {
            "model_type": "llama",
            "config_overrides": "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2,"
            "intermediate_size=8",
        },
        {"model_name_or_path": "saved", "config_overrides": None},
    ],
)
def test_any_causal_language_model(settings, tmp_path, monkeypatch, given):
    if "model_name_or_path" in given:
        given = {**given, "model_name_or_path": save_gpt2(tmp_path / "saved")}
    given = {**settings, **given, "num_train_epochs": 1, "defense_epsilon": 0.01}
    out = run_with(SCRIPT, given, monkeypatch)
    found = json.loads((out / "eval_results.json").read_text())
    record = EvaluationRecord.load(out / "robustness.json")
    assert record.clean.mean("loss") == found["eval_loss"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    lines = Path(settings["validation_file"]).read_text().splitlines()
    tokens = [
        t for line in lines for t in (*tokenizer(line, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]
    losses = []
    for start in range(0, len(tokens), 7):
        ids = torch.tensor([tokens[start : start + 7]])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)
        losses += (-scores[0, :-1].gather(-1, ids[0, 1:, None])).flatten().tolist()
    assert sum(losses) / len(losses) == pytest.approx(found["eval_loss"], rel=1e-5)


@for_each("tokens, streams, block_size", [(20, 1, 6), (20, 3, 4), (21, 3, 7), (5, 5, 2), (17, 4, 9)])
def test_each_token_is_predicted_once_from_the_one_before(tokens, streams, block_size):
    text, end = torch.arange(100, 100 + tokens), 7
    rows = example.Streams(text, streams, block_size, end)
    following, targets = {end: 100, **{token: token + 1 for token in text.tolist()}}, []
    last = None
    for batch in DataLoader(rows, batch_size=streams, collate_fn=default_data_collator):
        assert len(batch["input_ids"]) == streams
        assert batch["continues"].tolist() == [last is not None] * streams
        if last is not None:
            counting = batch["shift_labels"][:, 0] != -100
            assert torch.equal(batch["input_ids"][counting, 0], last[counting])
        last = batch["shift_labels"][:, -1]
        for before, target in zip(batch["input_ids"].flatten(), batch["shift_labels"].flatten(), strict=True):
            if target != -100:
                targets.append(int(target))
                assert following[int(before)] == target
    assert sorted(targets) == text.tolist()


def test_gradients_are_those_of_the_carried_state():
    """Of batches that say what they begin with, in any order, as of those that go on."""
    model = example.load_model(example.ModelArguments(config_overrides=TINY_LSTM), example.word_tokenizer(["a b c d"]))
    rows = example.Streams(torch.randint(6, (40,)), 2, 6, 0)
    batches = list(DataLoader(rows, batch_size=2, collate_fn=default_data_collator))
    told = example.with_states(model, batches)
    with torch.no_grad():
        going_on = [float(model(**batch).loss) for batch in batches]
        by_itself = [float(model(**batch).loss) for batch in reversed(told)]
    assert by_itself == pytest.approx(going_on[::-1])
    metric = LanguageModelMetric(batches)
    record = CorruptionEvaluator(model, example.InOrder(metric), told, progress=False).evaluate([])
    assert record.clean.mean("loss") == metric(model)["loss"]


def test_each_evaluation_counts_the_tokens_that_are_predicted(tmp_path):
    """The Trainer counts the labels of some models, GPT-2 among them, without a shift."""
    model = AutoModelForCausalLM.from_pretrained(save_gpt2(tmp_path / "model")).eval()
    tokens = torch.randint(model.config.vocab_size, (37,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(block[None]).logits[0, :-1], block[1:], reduction="none")
            for block in tokens.split(8)
        ]
    arguments = TrainingArguments(str(tmp_path / "out"), per_device_eval_batch_size=5, **QUIET)
    rows = example.Blocks(tokens, 8, 0)
    trainer = Trainer(model=model, args=arguments, eval_dataset=rows, data_collator=default_data_collator)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


@for_each(
    "change, says",
    [
        ({"train_file": None}, "expected --train_file or --dataset_name"),
        ({"do_train": False}, "expected --model_name_or_path or --tokenizer_name"),
        ({"text_column_name": "sentence"}, "expected a column 'sentence'"),
        ({"per_device_train_batch_size": 10_000}, "expected at least 10000 tokens"),
        ({"config_overrides": "weight_drop=1.0"}, "weight_drop: expected a rate"),
        ({"model_name_or_path": "saved"}, "expected a new model"),
        ({"train_file": "empty.txt"}, "expected lines with words"),
        ({"train_file": "null.jsonl"}, "expected a value of 'text' in each row, got none in row 2"),
        ({"do_train": False, "do_eval": False, "do_predict": True}, "got --do_predict alone"),
        ({"max_train_tokens": -1}, "max_train_tokens: expected a whole number >= 1, got -1"),
        (WATCHED, "expected evaluations in training"),
    ],
)
def test_bad_input(settings, tmp_path, monkeypatch, change, says):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "null.jsonl").write_text('{"text": "a film"}\n{"text": null}\n')
    save_gpt2(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        run_with(SCRIPT, {**settings, **change}, monkeypatch)
    assert not (tmp_path / "out" / "robustness.json").exists()


@pytest.mark.slow
def test_the_penn_treebank_has_the_words_that_everybody_counts():
    if not PENN.is_dir():
        pytest.skip("the Penn Treebank is not beside the project: shared/data/ptb_lm")
    files = [str(PENN / f"ptb.{split}.txt.gz") for split in ("train", "valid")]
    lines = example.load_lines(example.DataArguments(None, None, None, *files), ["train", "validation"], None)
    tokenizer = example.word_tokenizer(lines["train"])
    tokens = example.encode(lines["validation"], tokenizer, None)
    assert (len(tokenizer), len(tokens)) == (10_000, 73_760)
    assert tokenizer.convert_ids_to_tokens(tokens[:3].tolist()) == ["consumers", "may", "want"]
