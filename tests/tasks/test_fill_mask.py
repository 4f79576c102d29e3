"""Tokens that are hidden: the same ones in every walk, as many and as BERT's, and never those around a text."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
import transformers
from for_each import for_each
from letter_tokenizers import bytes_of_text, unigrams_at_left, word_pieces
from local_models import save_bert, save_masked_bert, write_rows

from hf_parcor.cli import main
from hf_parcor.errors import InputError
from hf_parcor.evaluation.identity.row_fingerprint import data_fingerprint
from hf_parcor.records import EvaluationRecord
from hf_parcor.tasks import TASKS, Encoding, Processed, Rows, load_rows
from hf_parcor.tasks.fill_mask import _around, hide

TASK = TASKS["fill-mask"]
TOKENIZERS = {"word pieces": word_pieces(), "bytes": bytes_of_text(), "unigrams": unigrams_at_left()}
for tokenizer in TOKENIZERS.values():
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
IGNORED = -100


class NoPositions(torch.nn.Module):
    config = transformers.PretrainedConfig()


def processed_by(name, length=12):
    return Processed(NoPositions(), TOKENIZERS[name], Encoding(max_length=length))


def rows_of(*texts):
    return Rows("rows", [{"text": text} for text in texts], ("text",))


def windows_of(name, *texts, length=12):
    return TASK.examples(rows_of(*texts), {"text": "text"}, processed_by(name, length))


@for_each("name", TOKENIZERS)
def test_windows_hold_all_of_each_text_with_special_tokens_around(name):
    tokenizer, texts = TOKENIZERS[name], ["ab cd", "a b c d e f g h i j " * 3, "j"]
    windows = windows_of(name, *texts)
    around = tokenizer.num_special_tokens_to_add()
    assert max(len(window["input_ids"]) for window in windows) == 12
    special = set(tokenizer("a")["input_ids"]) - set(tokenizer("a", add_special_tokens=False)["input_ids"])
    inside = [[token for token in window["input_ids"] if token not in special] for window in windows]
    assert all(len(window["input_ids"]) == len(part) + around for window, part in zip(windows, inside, strict=True))
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert list(chain(*inside)) == list(chain(*whole))
    assert windows[0]["input_ids"] == tokenizer(texts[0])["input_ids"]
    assert windows[-1]["input_ids"] == tokenizer(texts[-1])["input_ids"]
    assert len(windows) == sum(math.ceil(len(tokens) / (12 - around)) for tokens in whole)


@for_each("name", TOKENIZERS)
def test_what_is_hidden_depends_on_the_window_alone(name):
    processed = processed_by(name)
    windows = windows_of(name, "ab cd", "a b c d e f g h i j " * 3, "j", "b a")
    kept = {}
    for size in (1, 2, 3, 50):
        batches = TASK.batches(windows, processed, size)
        assert data_fingerprint(batches) == data_fingerprint(batches)
        kept[size] = [
            (row[mask > 0].tolist(), labels[mask > 0].tolist())
            for batch in batches
            for row, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        ]
        assert all((batch["labels"][batch["attention_mask"] == 0] == IGNORED).all() for batch in batches)
    assert kept[1] == kept[2] == kept[3] == kept[50]
    state = torch.random.get_rng_state()
    for window in windows:
        hide(window["input_ids"], processed.processor)
    assert torch.equal(state, torch.random.get_rng_state()), "draws of others stay as they are"


def far_from(share, found, count):
    """Return how many standard deviations of a binomial distribution a share is off."""
    return abs(found / count - share) / math.sqrt(share * (1 - share) / count)


def test_as_many_are_hidden_as_by_bert_and_in_the_same_ways():
    tokenizer = TOKENIZERS["word pieces"]
    drawn = torch.Generator().manual_seed(0)
    rows = [[2, *torch.randint(4, 20, (98,), generator=drawn).tolist(), 3] for _ in range(400)]
    windows = [hide(row, tokenizer) for row in rows]
    after, labels = (torch.tensor([window[name] for window in windows]) for name in ("input_ids", "labels"))
    before, hidden = torch.tensor(rows), labels != IGNORED
    assert torch.equal(labels[hidden], before[hidden])
    assert torch.equal(after[~hidden], before[~hidden])
    assert not hidden[:, [0, -1]].any()
    assert far_from(0.15, int(hidden.sum()), 98 * 400) < 4
    count, masked = int(hidden.sum()), int((after[hidden] == tokenizer.mask_token_id).sum())
    assert far_from(0.8 + 0.1 / len(tokenizer), masked, count) < 4  # any other may be the mask as well
    stay = int((after[hidden] == before[hidden]).sum())
    assert far_from(0.1 + 0.1 / len(tokenizer), stay, count) < 4
    others = after[hidden & (after != before) & (after != tokenizer.mask_token_id)]
    assert len(others.unique()) > 0.8 * len(tokenizer)


def test_a_window_of_one_token_hides_it():
    for token in range(4, 20):
        assert hide([2, token, 3], TOKENIZERS["word pieces"])["labels"] == [IGNORED, token, IGNORED]


def test_in_training_others_are_hidden_each_time():
    processed = processed_by("word pieces")
    windows = windows_of("word pieces", "a b c d e f g h i j")
    collator = TASK.training_collator(processed)
    torch.manual_seed(0)
    seen = {tuple(collator(windows)["labels"][0].tolist()) for _ in range(20)}
    assert len(seen) > 5
    assert all(row[0] == row[-1] == IGNORED for row in seen)


def test_rows_without_a_token_are_left_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b\n\nc\n \n")
    rows = load_rows(str(path))
    examples = TASK.examples(rows, TASK.find_columns(rows, {}), processed_by("word pieces"))
    assert len(examples) == 2
    with pytest.raises(InputError, match="rows: expected a token of text or more, got none"):
        windows_of("word pieces", "", " ")


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"max_length: expected more than the 2 special tokens around a text, got 2"):
        windows_of("word pieces", "a", length=2)
    assert [len(window["input_ids"]) for window in windows_of("word pieces", "a b", length=3)] == [3, 3]
    with pytest.raises(
        InputError, match=r"around a text, got function, which makes \[2, 5, 3\] of 'a', and \[4\] without"
    ):
        _around(lambda text, verbose: {"input_ids": [2, 5, 3]}, "a", [4])
    folder = save_bert(tmp_path / "without", transformers.BertForMaskedLM)
    with pytest.raises(InputError, match=r"tokenizer: expected one with a mask token, got that of .* without"):
        TASK.load_processor(folder)
    with pytest.raises(InputError, match="metric: expected one of perplexity, loss, accuracy for fill-mask, got 'f1'"):
        TASK.metric("f1", processed_by("word pieces"), [])


@pytest.mark.slow
def test_a_text_is_learned(tmp_path, monkeypatch):
    """From the command line, with the task that the head is for."""
    monkeypatch.chdir(tmp_path)
    folder = save_masked_bert(tmp_path / "model")
    data = write_rows(tmp_path / "rows.csv", ["text"], [("the good film a bad plot",)] * 40)
    measured = f"--dataset {data} --corruptions quantization=8 --output-dir"
    assert main(f"evaluate {folder} {measured} before".split()) == 0
    flags = "--num-train-epochs 60 --learning-rate 0.01 --per-device-train-batch-size 20 --use-cpu --report-to none"
    more = f"--save-strategy no --disable-tqdm true --defense-epsilon 0.01 --train-dataset {data}"
    assert main(f"train {folder} {measured} after {flags} {more}".split()) == 0
    before, after = (EvaluationRecord.load(f"{name}/robustness.json") for name in ("before", "after"))
    (untrained,), (trained,) = (record.clean.metrics["perplexity"] for record in (before, after))
    assert 1 <= trained < untrained / 5
