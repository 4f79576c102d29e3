"""Questions become windows over their texts: whoever marks the positions that are trained on answers all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from letter_tokenizers import bytes_of_text, unigrams_at_left, word_pieces
from local_models import save_bert, write_questions, write_rows
from torch import nn

from hf_parcor.errors import InputError
from hf_parcor.evaluation.identity.row_fingerprint import data_fingerprint
from hf_parcor.tasks import TASKS, Encoding, Processed, Rows, load_rows

TASK = TASKS["question-answering"]
NAMES = ("question", "context", "answers.text", "answers.answer_start")
COLUMNS = {"question": "question", "context": "context", "answer": "answers.text", "start": "answers.answer_start"}


class Oracle(nn.Module):
    """Marks the positions that it is told."""

    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, start_positions, end_positions, **others):
        starts, ends = (
            nn.functional.one_hot(positions, input_ids.shape[1]).float()
            for positions in (start_positions, end_positions)
        )
        return SimpleNamespace(loss=self.weight.sum(), start_logits=starts, end_logits=ends)


TOKENIZERS = {"word pieces": word_pieces(), "bytes": bytes_of_text(), "unigrams": unigrams_at_left()}


def processed_by(tokenizer, length=24):
    return Processed(Oracle(), tokenizer, Encoding(max_length=length))


def rows_of(*entries):
    return Rows("rows", [dict(zip(NAMES, entry, strict=True)) for entry in entries], NAMES)


def place_of_none(example):
    return (example["questions"].spans == 0).all(-1).nonzero()[0, 0].item()


@st.composite
def asked(draw):
    """A question and a text with spaces of all kinds, and as the answer some of its words; or none."""
    letters = {"alphabet": "abcdefghijAB", "min_size": 1}
    words = draw(st.lists(st.text(max_size=6, **letters), min_size=1, max_size=30))
    gaps = draw(st.lists(st.sampled_from([" ", "  ", ". ", "\n"]), min_size=len(words), max_size=len(words)))
    pieces = [word + gap for word, gap in zip(words, gaps, strict=True)]
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(first + 3, len(words) - 1)))
    begin, text = len("".join(pieces[:first])), "".join(pieces)
    answer = "".join(pieces[first:last]) + words[last]
    question = " ".join(draw(st.lists(st.text(max_size=2, **letters), min_size=1, max_size=3)))
    return (question, text, [answer], [begin]) if draw(st.booleans()) else (question, text, [], [])


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(entries=st.lists(asked(), min_size=1, max_size=4), size=st.integers(1, 5))
def test_who_marks_the_positions_answers_all_questions(name, entries, size):
    tokenizer, length = TOKENIZERS[name], 24
    processed = processed_by(tokenizer, length)
    examples = TASK.examples(rows_of(*entries), COLUMNS, processed)
    assert [example["questions"].number for example in examples] == sorted(
        example["questions"].number for example in examples
    )
    in_a_window = []
    for index, (question, text, answers, _) in enumerate(entries):
        windows = [example for example in examples if example["questions"].number == index]
        spans = [span for example in windows for span in example["questions"].spans.tolist()]
        covered = {place for begin, end in spans for place in range(begin, end)}
        assert covered >= {place for place, letter in enumerate(text) if letter.isalnum()}, "a word is in no window"
        asking = tokenizer(question, add_special_tokens=False)["input_ids"]
        for example in windows:
            tokens, of_text = example["input_ids"], example["questions"].spans
            assert len(tokens) == len(of_text) <= length
            assert any(tokens[place : place + len(asking)] == asking for place in range(len(tokens)))
            marked = text[of_text[example["start_positions"], 0] : of_text[example["end_positions"], 1]]
            assert marked.strip() in ("", *answers)
            assert (marked == "") == (example["start_positions"] == place_of_none(example))
        in_a_window.append(
            not answers or any(example["start_positions"] != place_of_none(example) for example in windows)
        )
    found = TASK.metric("f1", processed, TASK.batches(examples, processed, size))(Oracle())
    # An answer may be longer than what two windows share, and then in none of them.
    assert found["exact_match"] >= sum(in_a_window) / len(entries) - 1e-9
    assert found["f1"] == 1 or not all(in_a_window)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_padding_changes_no_answer(name):
    """At the left it moves positions, and the characters of tokens with them."""
    entries = [("ab", "a b c d e", ["b c"], [2]), ("c", "ab", [], []), ("a b c d", "e f g h i j a b", ["h"], [6])]
    processed = processed_by(TOKENIZERS[name])
    examples = TASK.examples(rows_of(*entries), COLUMNS, processed)
    together, alone = (TASK.batches(examples, processed, size) for size in (len(examples), 1))
    (batch,) = together
    assert batch["input_ids"].shape[1] > min(len(example["input_ids"]) for example in examples)
    for side in ("start_positions", "end_positions"):
        marked = {(one["questions"].number, one["input_ids"][one[side]]) for one in examples}
        found = {
            (question.number, int(tokens[place]))
            for question, tokens, place in zip(batch["questions"], batch["input_ids"], batch[side], strict=True)
        }
        assert found == marked
    assert TASK.metric("f1", processed, together)(Oracle())["exact_match"] == 1
    assert TASK.metric("f1", processed, alone)(Oracle())["exact_match"] == 1
    without = TASK.collator(processed)([{k: v for k, v in one.items() if k != "questions"} for one in examples])
    assert set(batch) - set(without) == {"questions"}  # as a Trainer trains
    if processed.processor.padding_side == "right":  # else positions count from where the padding begins
        assert data_fingerprint(together) == data_fingerprint(alone)


def test_long_texts_have_windows_that_share_tokens():
    text = " ".join("abcdefghij"[place % 10] for place in range(1000))
    processed = replace(processed_by(word_pieces()), encoding=Encoding())
    examples = TASK.examples(rows_of(("a", text, ["j"], [1998])), COLUMNS, processed)
    assert {len(example["input_ids"]) for example in examples[:-1]} == {384}
    reach = [example["questions"].spans[3:-1, 0] // 2 for example in examples]
    shared = [len(set(one.tolist()) & set(other.tolist())) for one, other in pairwise(reach)]
    assert set(shared) == {128}
    assert [example["start_positions"] > 0 for example in examples] == [False] * (len(examples) - 1) + [True]


FORMS = {
    "as SQuAD": [
        {"answers": {"text": ["b c", "c"], "answer_start": [2, 4]}},
        {"answers": {"text": [], "answer_start": []}},
    ],
    "two lists": [{"answer": ["b c", "c"], "answer_start": [2, 4]}, {"answer": [], "answer_start": []}],
    "two lists, the first as SQuAD calls both": [
        {"answers": ["b c", "c"], "answer_start": [2, 4]},
        {"answers": [], "answer_start": []},
    ],
    "numbers as pandas writes them": [
        {"answers": {"text": ["b c", "c"], "answer_start": [2.0, "4.0"]}},
        {"answers": {"text": [], "answer_start": []}},
    ],
    "mappings": [
        {"answers": [{"text": "b c", "answer_start": 2}, {"text": "c", "answer_start": 4}]},
        {"answers": []},
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_answers(form, tmp_path):
    rows = [{"question": "a", "context": "a b c", **one} for one in FORMS[form]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    processed = processed_by(word_pieces())
    of_file = load_rows(str(path))
    as_data_set = Rows("hub", rows, tuple(rows[0]))  # where nothing is flattened
    for read in (of_file, as_data_set):
        first, second = TASK.examples(read, TASK.find_columns(read, {}), processed)
        assert (first["questions"].answers, second["questions"].answers) == (("b c", "c"), ())
        assert [first["input_ids"][first[f"{side}_positions"]] for side in ("start", "end")] == [5, 6]
        assert second["start_positions"] == second["end_positions"] == 0


@pytest.mark.parametrize("file", ["rows.csv", "rows.tsv"])
def test_tables_have_one_answer_a_row(file, tmp_path):
    header = ["question", "context", "answer", "answer_start"]
    with_none = [("a", "a b c", "b", 2), ("b", "a 7", "7", 2), ("c", "a b", "", "")]
    by_pandas = [(*row, str(start) + ".0" * (start != "")) for *row, start in with_none]
    for rows, answers in (
        *((rows, [("b",), ("7",), ()]) for rows in (with_none, by_pandas)),
        (with_none[:2], [("b",), ("7",)]),
    ):
        read = load_rows(write_rows(tmp_path / file, header, rows))
        examples = TASK.examples(read, TASK.find_columns(read, {}), processed_by(word_pieces()))
        assert [example["questions"].answers for example in examples] == answers


def test_a_question_may_leave_room_for_one_token():
    examples = TASK.examples(rows_of(("a " * 20, "b c d", ["c"], [2])), COLUMNS, processed_by(word_pieces()))
    assert [len(example["input_ids"]) for example in examples] == [24] * 3
    assert [example["start_positions"] for example in examples] == [0, 22, 0]


def test_answers_that_are_off_are_looked_for(caplog):
    rows = rows_of(("a", "b c b", ["b", "c"], [3, 2]), ("a", "d", ["d"], [-1]))
    examples = TASK.examples(rows, COLUMNS, processed_by(word_pieces()))
    assert [example["start_positions"] for example in examples] == [5, 3]
    assert "rows: 2 answers do not begin where the data say" in caplog.text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("a", "b c", ["d"], [0]), r"answers that are parts of their text, got 'd' in row 2"),
        (("a", "b c", ["b", "c"], [0]), r"as many numbers .* got \['b', 'c'\] and \[0\] in row 2"),
        (("a", "b c", ["b"], ["here"]), r"as many numbers .* got \['b'\] and \['here'\] in row 2"),
        (("a", "b c", ["b"], [0.5]), r"as many numbers .* got \['b'\] and \[0.5\] in row 2"),
        (("a", "b c", [True], [0]), r"a text in column 'answers.text', got bool in row 2"),
        (("", "b c", ["b"], [0]), r"a token .* 'question', got none in row 2"),
        (("a", " ", [], []), r"a token .* 'context', got none in row 2"),
        (("a " * 21, "b c", ["b"], [0]), r"room for their text within 24 tokens, got 21 tokens .* in row 2"),
    ],
)
def test_bad_rows(entry, message):
    with pytest.raises(InputError, match=message):
        TASK.examples(rows_of(("a", "b", ["b"], [0]), entry), COLUMNS, processed_by(word_pieces()))


@pytest.mark.slow
def test_a_tokenizer_in_python_is_refused(tmp_path):
    """It does not know which characters its tokens stand for."""
    folder = save_bert(tmp_path / "model", transformers.BertForQuestionAnswering)
    tokenizer = TASK.load_processor(folder)
    assert tokenizer.is_fast
    slow = tmp_path / "slow"
    transformers.CanineTokenizer().save_pretrained(slow)
    transformers.CanineConfig().save_pretrained(slow)
    with pytest.raises(InputError, match="which characters its tokens stand for, got CanineTokenizer"):
        TASK.load_processor(str(slow))


def test_a_head_of_other_classes_gets_two_scores(tmp_path):
    """Of a classifier of three classes, whose configuration would make three of them."""
    numbers = {"label2id": {"a": 0, "b": 1, "c": 2}, "id2label": {0: "a", 1: "b", 2: "c"}}
    folder = save_bert(tmp_path / "model", **numbers)
    rows = load_rows(write_questions(tmp_path / "rows.jsonl"))
    model = TASK.load_model(folder, **TASK.head_settings([(rows, TASK.find_columns(rows, {}))]))
    assert model.qa_outputs.out_features == 2
    model(torch.tensor([[1, 2]]))
