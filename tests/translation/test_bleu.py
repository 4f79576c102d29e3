"""Both BLEUs against sacrebleu's command line, and which is which."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from hf_parcor import CorruptionConstraint, CorruptionEvaluator, GaussianNoise, GradientCorruption
from hf_parcor.evaluation import GenerationMetric
from hf_parcor.translation import BleuScores, tokenize_13a

pytest.importorskip("sacrebleu", reason="BLEU needs the extra 'translation'")

REFERENCES = [
    "Two dogs, one of them white, run through the snow.",
    "A man isn't riding his 3,000-dollar bike.",
    "A Girl sleeps on the dark-red couch in the house.",
]
PREDICTIONS = [
    "Two dogs, one of them black, run across the snow.",
    "A man isn't riding a 3,000-dollar bike.",
    "a girl sleeps on a bright-red couch in the House.",
]


def command_line(tmp_path, predictions, references, *flags):
    for name, texts in (("hypotheses", predictions), ("references", references)):
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "references"), "-i", str(tmp_path / "hypotheses")]
    found = subprocess.run([*command, "-b", "-w", "6", *flags], capture_output=True, text=True, check=True)
    return float(found.stdout)


def test_detokenised(tmp_path):
    found = BleuScores(tokenize=tokenize_13a)(predictions=PREDICTIONS, references=REFERENCES)
    assert found["bleu"] == pytest.approx(command_line(tmp_path, PREDICTIONS, REFERENCES), abs=1e-6)


@pytest.mark.parametrize("lowercase", [False, True])
def test_of_tokens(tmp_path, lowercase):
    tokens = [[tokenize_13a(text) for text in texts] for texts in (PREDICTIONS, REFERENCES)]
    flags = ["--tokenize", "none", "--force", *(["--lowercase"] if lowercase else [])]
    expected = command_line(tmp_path, *tokens, *flags)
    tokenised = BleuScores(lowercase=lowercase)
    assert tokenised(predictions=tokens[0], references=tokens[1]) == {
        "tokenized_bleu": pytest.approx(expected, abs=1e-6)
    }
    both = BleuScores(tokenize=tokenize_13a, lowercase=lowercase)(predictions=PREDICTIONS, references=REFERENCES)
    assert both["tokenized_bleu"] == pytest.approx(expected, abs=1e-6)
    assert (both["tokenized_bleu"] != pytest.approx(both["bleu"], abs=0.1)) == lowercase


def test_the_two_differ_where_the_tokenizer_does():
    """A tokenizer that splits more, as Moses splits hyphens, gives another number: they are not to be compared."""
    found = BleuScores(tokenize=lambda text: tokenize_13a(text).replace("-", " - "))(
        predictions=PREDICTIONS, references=REFERENCES
    )
    assert found["tokenized_bleu"] != pytest.approx(found["bleu"], abs=0.1)


def test_texts_that_are_tokenised_already():
    tokens = [[tokenize_13a(text) for text in texts] for texts in (PREDICTIONS, REFERENCES)]
    back = {token: text for texts in zip((*tokens[0], *tokens[1]), (*PREDICTIONS, *REFERENCES), strict=True)
            for token, text in [texts]}  # fmt: skip
    found = BleuScores(detokenize=back.__getitem__)(predictions=tokens[0], references=tokens[1])
    expected = BleuScores(tokenize=tokenize_13a)(predictions=PREDICTIONS, references=REFERENCES)
    assert found == expected


def test_signatures():
    scores = BleuScores(tokenize=tokenize_13a, lowercase=True)
    assert scores.notes == ()
    scores(predictions=PREDICTIONS, references=REFERENCES)
    detokenised, of_tokens = scores.notes
    assert detokenised.startswith("bleu, detokenised: nrefs:1|case:mixed|eff:no|tok:13a|")
    assert of_tokens.startswith("tokenized_bleu, of tokens: nrefs:1|case:lc|eff:no|tok:none|")


def test_refused():
    with pytest.raises(ValueError, match="tokenize, detokenize: expected one of them, got both"):
        BleuScores(tokenize=str, detokenize=str)


@pytest.mark.slow
def test_a_corrupted_decoder_reuses_the_encoder_with_identical_translations(tiny_model, tokenizer, rows):
    """Beam 5 and BLEU, as Table 6 measures: the encoder runs once a batch, and every number is the same."""
    model = tiny_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that corruptions change what is said
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    batches = [dict(collate(rows[start : start + 4])) for start in (0, 4)]
    encoder, calls = model.get_encoder(), []
    forward = encoder.forward
    encoder.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    corruptions = [GaussianNoise(0.3), GaussianNoise(1.0), GradientCorruption(CorruptionConstraint(epsilon=3.0))]
    metric = GenerationMetric(
        tokenizer, batches, BleuScores(tokenize=tokenize_13a), num_beams=5, max_new_tokens=8, early_stopping=True
    )
    records, counts = [], []
    for reuse in (True, False):
        calls.clear()
        evaluator = CorruptionEvaluator(
            model, metric, batches, target_modules="last-decoder-layer", reuse_prefix=reuse, progress=False
        )
        records.append(evaluator.evaluate(corruptions, trials=2))
        counts.append(len(calls))
    assert [row.metrics for row in records[0].rows()] == [row.metrics for row in records[1].rows()]
    assert counts[0] < counts[1]
    assert any("tok:13a" in note for note in records[0].notes)
