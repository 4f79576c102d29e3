"""Vocabularies: their size, what they give back, and that any two trainings agree."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from for_each import for_each
from transformers import AutoTokenizer

from hf_parcor.translation import train_bpe, train_unigram

TRAIN = {"bpe": (train_bpe, 80), "unigram": (train_unigram, 35)}
PROGRAM = """
import sys, types
import hf_parcor
package = types.ModuleType("hf_parcor.translation")  # without what its __init__ imports: models, PyTorch
package.__path__ = [f"{hf_parcor.__path__[0]}/translation"]
sys.modules[package.__name__] = package
from hf_parcor.translation.vocabulary import train_bpe, train_unigram
texts = sys.stdin.read().splitlines()
for train, size in ((train_bpe, 80), (train_unigram, 35)):
    print(train(texts, size).backend_tokenizer.to_str())
"""


@pytest.fixture(params=TRAIN)
def trained(request, pairs):
    train, size = TRAIN[request.param]
    return train([text for pair in pairs for text in pair], size), size


def test_size_and_special_tokens(trained):
    tokenizer, size = trained
    assert len(tokenizer) == size
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 3)


def test_sentences_come_back(trained, pairs):
    tokenizer, _ = trained
    for text in [text for pair in pairs for text in pair][:20]:
        tokens = tokenizer(text)["input_ids"]
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id in tokenizer("ξ")["input_ids"]


@pytest.mark.parametrize("kind", TRAIN)
def test_spaces_alone_divide_tokenised_text(kind, pairs):
    train, size = TRAIN[kind]
    words = {}
    for split, texts in {True: pairs, False: [[text.replace(".", " .") for text in pair] for pair in pairs]}.items():
        tokenizer = train([text for pair in texts for text in pair], size - 5, split_punctuation=split)
        before = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it &apos;s")
        words[split] = [word for word, _ in before]
    assert words == {True: ["▁it", "▁", "&", "apos", ";", "s"], False: ["▁it", "▁&apos;s"]}


def test_auto_tokenizer_loads_it(trained, pairs, tmp_path):
    tokenizer, _ = trained
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for source, _ in pairs:
        assert loaded(source)["input_ids"] == tokenizer(source)["input_ids"]
    batch = loaded([source for source, _ in pairs[:3]], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}


def test_beside_a_model_it_is_still_the_one_that_loads(tokenizer, tiny_model, pairs, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(pairs[0][0])["input_ids"] == tokenizer(pairs[0][0])["input_ids"]


def test_subwords_of_a_unigram_vocabulary_stand_in_the_order_of_their_probability(pairs):
    """Those of one probability stand in the order of the alphabet, and behind the special ones as ever."""
    texts = [text for pair in pairs for text in pair]
    swapped = str.maketrans("abcdefghijklmnopqrstuvwxyz", "zyxwvutsrqponmlkjihgfedcba")
    texts += [text.translate(swapped) for text in texts]  # so that each word has one of the same probability
    learned = json.loads(train_unigram(texts, 50).backend_tokenizer.to_str())["model"]["vocab"][4:]
    assert learned == sorted(learned, key=lambda entry: (-entry[1], entry[0]))
    assert len({score for _, score in learned}) < len(learned)


@pytest.mark.slow
def test_deterministic_between_processes(pairs, monkeypatch):
    """In this one and in another, with other threads and another order of sets."""
    texts = [text for pair in pairs for text in pair]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    here = [train(texts, size).backend_tokenizer.to_str() for train, size in TRAIN.values()]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    command = [sys.executable, "-c", PROGRAM]
    there = subprocess.run(command, input="\n".join(texts), capture_output=True, text=True, check=True).stdout
    assert there.splitlines() == here


@for_each(
    ("train", "size", "says"),
    [
        (train_bpe, 6, "expected a vocabulary of 6, the texts yield"),
        (train_bpe, 100_000, "expected a vocabulary of 100,000, the texts yield"),
        (train_unigram, 6, "expected room for all letters, got 6"),
        (train_unigram, 100_000, "expected a vocabulary of 100,000, the texts yield"),
    ],
)
def test_a_size_that_the_texts_do_not_yield(train, size, says):
    with pytest.raises(ValueError, match=f"size: {says}"):
        train(["ein Hund", "a dog"], size)
