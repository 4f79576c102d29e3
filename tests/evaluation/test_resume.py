"""A sweep that is interrupted and resumed has the record of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    SweepRecord,
    by_kind,
)
from hf_parcor.evaluation import ClassificationMetric, measurement, trials
from hf_parcor.evaluation.identity import fingerprint
from hf_parcor.evaluation.passes import prefixes
from hf_parcor.evaluation.resume import append_to_checkpoint, begin_checkpoint
from hf_parcor.evaluation.trials import Trial
from hf_parcor.injection import CorruptionSize

CORRUPTIONS = [
    GradientCorruption(CorruptionConstraint(epsilon=1.0)),
    MultiStepCorruption(CorruptionConstraint(epsilon=1.0)),
    GaussianNoise(0.3),
]


class Interrupted(ClassificationMetric):
    """Raises at one of its calls."""

    left = -1

    def of_batch(self, model, batch):
        Interrupted.left -= 1
        if Interrupted.left == 0:
            raise KeyboardInterrupt
        return super().of_batch(model, batch)


@pytest.fixture
def sweep(classifier, batches):
    def run(path=None, *, calls=0, model=classifier, data=batches, corruptions=CORRUPTIONS, **options):
        Interrupted.left = calls or -1
        probe = LayerProbe(model, Interrupted(data), data, targets=by_kind(model), progress=False)
        return probe.evaluate(corruptions, **{"trials": 2, **options}, checkpoint=path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("together", "calls"), [(1, 29), (3, 37)])  # a part is tried out before it is measured
def test_interrupted_again_and_again(sweep, tmp_path, monkeypatch, together, calls, classifier, bits_of):
    monkeypatch.setattr(measurement, "BETWEEN_WRITES", together)
    expected, before = sweep().to_json(), bits_of(classifier)
    path, finished, record = tmp_path / "folder" / "sweep.jsonl", [], None
    while record is None:
        with suppress(KeyboardInterrupt):
            record = sweep(path, calls=calls)
        finished.append(len(path.read_text().splitlines()) - 1)
        path.write_bytes(path.read_bytes() + b'{"number": 7, "see'[: len(finished) % 19])  # as a kill would leave it
        assert len(finished) < 100
    assert record.to_json() == expected
    assert bits_of(classifier) == before
    assert len(finished) > 2
    assert finished == sorted(finished)
    assert sweep(path, calls=1).to_json() == expected, "and nothing is measured again"


def test_a_part_is_made_ready_when_its_turn_comes(classifier, batches, tmp_path, monkeypatch):
    """So a sweep that is killed often gets on: what a part costs before its first trial is not paid for all parts."""
    monkeypatch.setattr(measurement, "BETWEEN_WRITES", 3)
    path, sought = tmp_path / "sweep.jsonl", []

    def seek(model, parts, run):
        finished = len(path.read_text().splitlines()) - 2  # but for the head and the clean model
        sought.append((next(iter(parts.popitem()[1])), finished))
        return {}, [], None

    monkeypatch.setattr(prefixes, "plan_prefixes_of_values", seek)
    targets = {name: [name] for name in ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1")}
    probe = LayerProbe(classifier, ClassificationMetric(batches), batches, targets=targets, progress=False)
    noise = [GaussianNoise(std) for std in (0.1, 0.2, 0.3)]
    probe.evaluate(noise, trials=1, checkpoint=path)
    assert all(name.startswith(target) for (name, _), target in zip(sought, targets, strict=True))
    assert [finished for _, finished in sought] == [0, 3, 6]
    probe.evaluate(noise, trials=1, checkpoint=path)
    assert len(sought) == 3, "and nothing is made ready when nothing is left"


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("kind", [LayerProbe, CorruptionEvaluator])
def test_weights_are_hashed_once(classifier, batches, tmp_path, monkeypatch, kind, checkpoint):
    hashed, update = [], fingerprint._update
    monkeypatch.setattr(
        fingerprint, "_update", lambda digest, name, tensor: (hashed.append(name), update(digest, name, tensor))
    )
    kind(classifier, ClassificationMetric(batches), batches, progress=False).evaluate(
        CORRUPTIONS, checkpoint=tmp_path / "run" if checkpoint else None
    )
    assert hashed.count("classifier.weight") == 1


def test_an_evaluator_resumes_too(classifier, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "BETWEEN_WRITES", 1)
    path = tmp_path / "record.jsonl"

    def run(calls, checkpoint):
        Interrupted.left = calls
        evaluator = CorruptionEvaluator(classifier, Interrupted(batches), batches, progress=False)
        return evaluator.evaluate(CORRUPTIONS, trials=2, checkpoint=checkpoint)

    expected = run(-1, None)
    with pytest.raises(KeyboardInterrupt):
        run(12, path)
    assert run(-1, path) == expected


def test_what_is_odd_is_noted_alike_and_said(classifier, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trials.logger, "warning", said.append)

    def run(metric):
        probe = LayerProbe(classifier, metric, targets={"head": ["classifier"]}, progress=False)
        return probe.evaluate([GaussianNoise(0.1)], trials=1, checkpoint=tmp_path / "odd").to_json()

    first = run(odd)
    assert "x was 'broken' with seed 0" in first
    assert any("x was 'broken' with seed 0" in line for line in said)
    assert run(odd) == first


def odd(model):
    return {"x": "broken", "y": float("inf"), "z": 0.1 + 0.2}


class TestRefused:
    @pytest.fixture
    def path(self, sweep, tmp_path):
        path = tmp_path / "sweep.jsonl"
        sweep(path, corruptions=CORRUPTIONS[2:])
        return path

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("changed", "differing"),
        [
            ({"seed": 1}, "seed (0, now 1)"),
            ({"trials": 3}, "trials (2, now 3)"),
            ({"corruptions": CORRUPTIONS[1:]}, "corruptions ("),
        ],
    )
    def test_other_settings(self, sweep, path, changed, differing):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"got one with other {re.escape(differing)}.*; give another path, or"):
            sweep(path, **{"corruptions": CORRUPTIONS[2:], **changed})
        assert path.read_bytes() == before

    def test_another_model(self, sweep, path, tiny_bert):
        with pytest.raises(ValueError, match="got one with other weights"):
            sweep(path, corruptions=CORRUPTIONS[2:], model=tiny_bert(initializer_range=0.5))
        with pytest.raises(ValueError, match=r"got one with other configuration .*, weights"):
            sweep(path, corruptions=CORRUPTIONS[2:], model=tiny_bert(layer_norm_eps=0.1))

    def test_other_data(self, sweep, path, batches):
        with pytest.raises(ValueError, match=r"got one with other data .*, metric_data") as refused:
            sweep(path, corruptions=CORRUPTIONS[2:], data=batches[::-1])
        assert not re.search(r"\w{41}", str(refused.value).partition("got")[2]), "no digest at length"

    def test_another_version(self, sweep, path, monkeypatch):
        monkeypatch.setattr("hf_parcor.evaluation.identity.run.library_versions", lambda: {"torch": "0"})
        with pytest.raises(ValueError, match="got one with other versions"):
            sweep(path, corruptions=CORRUPTIONS[2:])

    @pytest.mark.slow
    @pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"{}\n", b'{"kind": "x"}\n', b"\xff\x00\n1", b"notes"])
    def test_foreign_files(self, sweep, path, content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"sweep\.jsonl: expected a checkpoint of a measurement"):
            sweep(path)
        assert path.read_bytes() == content

    def test_another_format(self, sweep, path):
        path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
        with pytest.raises(ValueError, match="expected a checkpoint of format 2, got 1"):
            sweep(path, corruptions=CORRUPTIONS[2:])

    @pytest.mark.slow
    @pytest.mark.parametrize("line", ["{}", "3", "{", '{"number": "x", "size": null, "metrics": {}, "odd": {}}'])
    def test_damaged_in_the_middle(self, sweep, path, line):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
        with pytest.raises(
            ValueError, match=r"expected a finished trial in line 3, .* the file is damaged: remove it"
        ):
            sweep(path, corruptions=CORRUPTIONS[2:])


PROGRAM = """
import os, random, signal, sys, threading, time
from pathlib import Path
import torch, transformers as tf
from tqdm import tqdm
from hf_parcor import CorruptionConstraint, GaussianNoise, GradientCorruption, LayerProbe, MultiStepCorruption, by_kind
from hf_parcor.evaluation import ClassificationMetric, measurement
from hf_parcor.evaluation.identity import fingerprint

tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())  # by default all processes share one, which a killed child may hold for ever
torch.set_num_threads(1)
torch.manual_seed(0)
measurement.BETWEEN_WRITES = 3
folder, kills = Path(sys.argv[1]), 0
config = tf.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
model = tf.BertForSequenceClassification(config)
batches = [{"input_ids": torch.randint(20, (4, 6)), "labels": torch.randint(2, (4,))} for _ in range(2)]
targets = {kind: target for kind, target in by_kind(model).items() if kind in ("attention", "embedding", "output")}
constraint = CorruptionConstraint(epsilon=1.0)
corruptions = [GradientCorruption(constraint), MultiStepCorruption(constraint), GaussianNoise(0.3)]

def sweep(path=None):
    probe = LayerProbe(model, ClassificationMetric(batches), batches, targets=targets, progress=False)
    return probe.evaluate(corruptions, checkpoint=path)

def lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0

begun = time.perf_counter()
expected = sweep(folder / "whole.jsonl").to_json()
seconds, draw = time.perf_counter() - begun, random.Random(0)
resumed, path = 0, folder / "0.jsonl"
while kills < 12:
    child = os.fork()
    if not child:
        sweep(path)
        os._exit(0)
    # It is killed soon after so many lines, however slow the machine is by then.
    enough, ended = draw.randint(0, lines(folder / "whole.jsonl")), 0
    while not ended and lines(path) < enough:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        time.sleep(draw.uniform(0.0, 0.2) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        kills += 1
        resumed += lines(path) > 2
    if kills % 4 == 0 or not os.WIFSIGNALED(status):
        assert sweep(path).to_json() == expected, f"after {kills} kills"
        path = folder / f"{time.monotonic_ns()}.jsonl"
assert resumed > 3, resumed
print(kills, "kills,", resumed, "with finished trials")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("12 kills")


TRIALS = {
    0: Trial(0, {"x": 0.1 + 0.2, "y": float("inf")}, None, {"y": "inf"}),
    1: Trial(3, {"ε": -1e-300}, CorruptionSize(5, 1 / 3)),
    2: Trial(4, {"x": 2.0}, CorruptionSize(0, float("inf"))),
}


def test_every_torn_file_keeps_its_whole_lines(tmp_path):
    path, run = tmp_path / "checkpoint", {"seed": 0}
    assert begin_checkpoint(path, run) == {}
    header = len(path.read_bytes())
    append_to_checkpoint(path, TRIALS)
    content = path.read_bytes()
    assert begin_checkpoint(path, run) == TRIALS
    for length in range(header, len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n") - 1
        assert begin_checkpoint(path, run) == dict(list(TRIALS.items())[:whole])
        assert path.read_bytes() == content[: content[:length].rindex(b"\n") + 1]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_finished_trials_are_whole_when_the_disk_is_waited_for(tmp_path, monkeypatch):
    path, sizes, sync = tmp_path / "checkpoint", [], os.fsync
    begin_checkpoint(path, {})
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), sync(file)))
    append_to_checkpoint(path, TRIALS)
    assert sizes == [path.stat().st_size]


class TestSweepRecord:
    def test_json(self, sweep, tmp_path):
        record = sweep()
        path = record.save(tmp_path / "new" / "sweep.json")
        assert SweepRecord.load(path) == record
        assert (record.trials, record.seed, len(record.weights), len(record.data)) == (2, 0, 64, 69)
        assert list(record.records) == ["layer-norm", "attention", "embedding", "output", "linear"]
        assert record.model == "BertForSequenceClassification"
        assert record.versions["torch"]
        assert record.clean == record.records["linear"].clean
        assert [(label, row.label) for label, row in record.rows()][3:5] == [
            ("attention", "gradient-based L2 ε=1"),
            ("attention", "multi-step L2 ε=1"),
        ]
        table = record.to_pandas()
        assert list(table.columns[:4]) == ["group", "model", "corruption", "label"]
        assert len(table) == 5 * 2 * (1 + 1 + 1 + 2)

    @pytest.mark.parametrize("damage", ["records", "weights"])
    def test_damaged(self, sweep, tmp_path, damage):
        data = json.loads(sweep(corruptions=CORRUPTIONS[2:]).to_json())
        data[damage] = {} if damage == "records" else data.pop("seed")
        path = tmp_path / "sweep.json"
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"sweep\.json: sweep record: .* damaged: measure again"):
            SweepRecord.load(path)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"sweep\.json: sweep record: expected JSON"):
            SweepRecord.load(path)

    def test_records_of_two_models(self, sweep, tiny_bert):
        one, other = sweep(corruptions=CORRUPTIONS[2:]), sweep(corruptions=CORRUPTIONS[2:], model=tiny_bert())
        mixed = {"a": one.records["linear"], "b": other.records["linear"]}
        with pytest.raises(ValueError, match=r"expected one model.* for 'b'"):
            SweepRecord(mixed, "", 2, 0)
