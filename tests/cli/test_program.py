"""The program as a shell sees it: start-up, pipes, signals, encodings, settings files."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import yaml
from for_each import for_each
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from hf_parcor import CorruptionRecord, EvaluationRecord, SweepRecord
from hf_parcor.cli.main import build_parser, main
from hf_parcor.cli.sources import check_sources
from hf_parcor.cli.terminal import show
from hf_parcor.errors import InputError
from hf_parcor.records.evaluation import CorruptionKind

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def program(*words, launcher=(), **settings):
    command = [sys.executable, *launcher, "-m", "hf_parcor", *map(str, words)]
    environment = {**ENVIRONMENT, **settings.pop("env", {})}
    return subprocess.run(command, capture_output=True, check=False, env=environment, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])  # what is written comes late, or at once
def test_a_reader_that_leaves_is_no_failure(tmp_path, record, unbuffered):
    path = record(tmp_path)
    code = "import sys; from hf_parcor.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "compare", f"a={path}", f"b={path}"]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    read = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=True)
    reading, writing = os.pipe()
    process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(reading)  # nobody reads
    os.close(writing)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 141
    assert read.stderr.startswith(err), "nothing is said that is not said to a reader"


@pytest.mark.slow
def test_several_processes_measure_together_and_one_speaks(run, tmp_path, classifier_folder, sentences):
    words = ["probe", classifier_folder, "--dataset", sentences, "--batch-size", 2, "--quiet"]
    words += ["--corruptions", "gaussian=0.5", "quantization=2", "--output-dir"]
    one = run(*words, tmp_path / "1")
    two = program(*words, tmp_path / "2", launcher=TORCHRUN, env={"OMP_NUM_THREADS": "1"})
    assert (one.code, two.returncode) == (0, 0), two.stderr.decode()
    assert two.stdout.decode() == one.out
    assert two.stderr.count(b"the record is in") == 1
    assert (tmp_path / "2" / "probe.json").read_bytes() == (tmp_path / "1" / "probe.json").read_bytes()


@pytest.mark.slow
def test_exit_codes_and_streams_of_a_mistake_and_of_a_bug(tmp_path):
    result = program("report", tmp_path / "nöwhere.json")
    assert result.returncode == 2
    assert result.stdout == b""
    assert result.stderr.decode().count("\n") == 1
    assert "nöwhere.json" in result.stderr.decode()
    code = """
import sys
from hf_parcor.cli import main
from hf_parcor.cli.report import Report
Report.run = lambda self, arguments: 1 / 0
sys.exit(main(["report", "x"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.slow
def test_a_terminal_that_knows_no_greek(tmp_path, record):
    path = record(tmp_path)
    result = program("compare", f"a={path}", f"b={path}", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert result.returncode == 0
    assert b"gradient L2 \\u03b5=1" in result.stdout


LOOKS = """
import sys
from hf_parcor.cli import main
for line in sys.stdin.read().splitlines():
    assert main(line.split()) == 2, line
    loaded = {"torch", "transformers", "accelerate"}.intersection(sys.modules)
    assert not loaded, f"{line} waits for {loaded}"
"""


@pytest.mark.slow
def test_what_needs_no_model_is_told_before_pytorch_is_imported(tmp_path, sentences):
    """Nor is the Hub asked again and again: here it closes every connection, and each name may cost one."""
    (tmp_path / "empty").mkdir()
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text("{}")
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/base"}')
    (tmp_path / "ragged.tsv").write_text("sentence\tlabel\ngood\n")
    local = [
        *("train", "evaluate", "probe", "report", "compare", "card"),
        *(f"{name} model" for name in ("train", "evaluate", "probe")),
        *(f"{name} empty --dataset {sentences}" for name in ("train", "evaluate", "probe")),
        *(f"{name} model --dataset nowhere.tsv" for name in ("train", "evaluate", "probe")),
        *(f"{name} model --dataset {sentences} --corruptions gradiant" for name in ("train", "evaluate", "probe")),
        f"train model --dataset {sentences} --train-dataset nowhere.tsv",
        f"probe model --dataset {sentences} --column text",
        f"probe model --dataset {sentences} --output-dir model/config.json",
        f"probe model --dataset {sentences} --recipe bits=4 --output-dir model/config.json",
        "evaluate model --dataset ragged.tsv",
        f"probe no/such/folder --dataset {sentences}",
        *("card nowhere", "report nowhere.json", "compare nowhere.json", "report model"),
    ]
    remote = [f"{name} nobody/nothing --dataset {sentences}" for name in ("train", "evaluate", "probe")]
    remote += [f"probe adapter --dataset {sentences}", "probe model --dataset nobody/nothing"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []
        Thread(target=close_each, args=(server, asked), daemon=True).start()
        result = subprocess.run(
            [sys.executable, "-c", LOOKS],
            input="\n".join([*local, *remote]),
            env={
                **ENVIRONMENT,
                **{"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"},
                "HF_HOME": str(tmp_path / "home"),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    told = result.stderr.splitlines()
    assert len([line for line in told if line.startswith("hf-parcor: error: ")]) == len(local + remote)
    assert len([request for request in asked if b"/api/models/nobody" in request]) == 1, "after that it is known"


def close_each(server, asked):
    with suppress(OSError):  # where the test is over
        while True:
            connection, _ = server.accept()
            asked.append(connection.recv(1000))
            connection.close()


@for_each(
    ("answer", "downloaded", "refused", "offline"),
    [
        (None, False, False, False),
        (RepositoryNotFoundError, False, True, False),
        (RepositoryNotFoundError, True, False, False),
        (HfHubHTTPError, False, False, False),  # of 5xx: loading may still succeed
        (ConnectionError, False, True, True),
        (ConnectionError, True, False, True),
        (OfflineModeIsEnabled, True, False, True),
    ],
)
def test_what_was_downloaded_is_used_where_the_hub_is_not_reached(
    monkeypatch, tmp_path, sentences, answer, downloaded, refused, offline
):
    def ask(api, name, revision, timeout):
        if answer is not None:
            raise answer.__new__(answer)

    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "model_info", ask)
        patched.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{downloaded}"))
        patched.setattr(constants, "HF_HUB_OFFLINE", answer is OfflineModeIsEnabled)
        if downloaded:
            kept = Path(constants.HF_HUB_CACHE, "models--nobody--nothing")
            for file, content in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", "{}")):
                (kept / file).parent.mkdir(parents=True, exist_ok=True)
                (kept / file).write_text(content)
        arguments = build_parser().parse_args(["probe", "nobody/nothing", "--dataset", sentences])
        with pytest.raises(InputError, match="nobody/nothing") if refused else nullcontext():
            check_sources(arguments)
        assert constants.HF_HUB_OFFLINE is offline


@pytest.fixture
def record():
    def save(folder):
        kind = CorruptionKind("gradient-based", "epsilon", "radius ε", "ε={}")  # without, its reader loads PyTorch
        settings = {"p": 2.0, "epsilon": 1.0, "top_n": None}
        clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
        row = CorruptionRecord("gradient", "gradient L2 ε=1", settings, (0,), {"accuracy": (0.5,)}, kind=kind)
        return EvaluationRecord("m", {}, 1, clean, (row,)).save(folder / "r.json")

    return save


class TestInterrupted:
    @pytest.mark.slow
    def test_ctrl_c_and_again(self, run, tmp_path, classifier_folder, sentences):
        """A probe is interrupted while it measures, and goes on; the record is that of one that was not."""
        words = ["probe", classifier_folder, "--dataset", sentences, "--group", "modules", "--corruptions"]
        words += ["gaussian=0.1,0.2,0.3", "--trials", "5", "--quiet", "--output-dir"]
        command = [sys.executable, "-m", "hf_parcor", *words, str(tmp_path / "out")]
        # A shell that started the tests in the background may have told them to ignore the signal.
        hears = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, **hears)
        checkpoint = tmp_path / "out" / "probe.jsonl"
        deadline = time.monotonic() + 240
        while not checkpoint.exists() or checkpoint.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 130, err.decode()
        assert out == b""
        assert f"what is finished is in {checkpoint}" in err.decode()
        assert not (tmp_path / "out" / "probe.json").exists()
        kept = checkpoint.read_bytes()
        assert run(*words, tmp_path / "out").code == 0
        assert checkpoint.read_bytes().startswith(kept[: kept.rindex(b"\n")])
        assert run(*words, tmp_path / "whole").code == 0
        assert SweepRecord.load(tmp_path / "out/probe.json") == SweepRecord.load(tmp_path / "whole/probe.json")


LINES_AND_SETTINGS = [
    # a command line beside --config, what the file says, and the command line that means the same
    ("probe", {"model": "m", "dataset": "d"}, "probe m --dataset d"),
    ("probe other --trials 2", {"model": "m", "trials": 7}, "probe other --trials 2"),
    ("probe m", {"strengths": [0.5, "1e-1"], "norm": "inf"}, "probe m --strengths 0.5 1e-1 --norm inf"),
    ("probe m", {"strengths": 2, "corruptions": "gradient"}, "probe m --strengths 2 --corruptions gradient"),
    ("probe m --strengths 1", {"strengths": [2, 3]}, "probe m --strengths 1"),
    ("probe m", {"strengths": []}, "probe m --strengths"),
    ("probe m", {"column": {"text": "a", "label": "b"}}, "probe m --column text=a --column label=b"),
    ("probe m", {"column": ["text=a"], "split": "no"}, "probe m --column text=a --split no"),
    ("probe m", {"json": True, "quiet": False, "seed": None}, "probe m --json"),
    ("probe m", {"greater-is-better": False}, "probe m --no-greater-is-better"),
    ("probe m", {"greater_is_better": True, "prefix": "-x "}, "probe m --greater-is-better '--prefix=-x '"),
    ("probe m", {"target_modules": ["a", "b"], "--batch-size": 4}, "probe m --batch-size 4 --target-modules a b"),
    ("report", {"records": ["a", "b"], "pages": ["p.md"]}, "report a b --pages p.md"),
    ("card", {"run_dir": "a", "only": []}, "card a --only"),
    ("train m", {"learning_rate": "1e-3", "max-steps": 3}, "train m --learning-rate 1e-3 --max_steps 3"),
    ("train m", {"defense_layers": [-1, 2], "optim_args": None}, "train m --defense-layers -1 2"),
    ("train m", {"fp16": True, "use_cpu": False}, "train m --fp16"),
    ("train m", {"defense_reuse_prefix": True}, "train m --defense-reuse-prefix"),
    ("train m", {"defense_reuse_prefix": False}, "train m --no_defense_reuse_prefix"),
    ("train m", {"greater_is_better": False}, "train m --no-greater-is-better"),
    ("train m", {"greater_is_better": True}, "train m --greater_is_better True"),
    ("train m", {"lr_scheduler_kwargs": {"a": 1}}, "train m --lr-scheduler-kwargs='{\"a\": 1}'"),
]


class TestSettingsFile:
    @pytest.mark.parametrize(("line", "settings", "same"), LINES_AND_SETTINGS)
    def test_means_what_the_command_line_means(self, line, settings, same, tmp_path):
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        found, expected = (
            vars(build_parser().parse_args(shlex.split(words))) for words in (f"{line} --config {path}", same)
        )
        assert found | {"config": None, "run": None} == expected | {"run": None}

    def test_flags_of_training(self, run, classifier_folder, sentences):
        settings = {
            **{"model": classifier_folder, "dataset": sentences, "output_dir": "out", "use_cpu": True, "max_steps": 2},
            **{"save_strategy": "no", "report_to": "none", "skip-corruptions": True, "logging_steps": 1},
            **{"learning_rate": "1e-3", "defense_target_modules": ["attention"], "defense_steps": 2},
            "optim_args": None,
        }
        Path("settings.yaml").write_text(yaml.safe_dump(settings))
        assert run("train", "--config", "settings.yaml", "--max-steps", 1).code == 0
        assert json.loads(Path("out/trainer_state.json").read_text())["max_steps"] == 1
        written = json.loads(Path("out/defense_config.json").read_text())
        assert "attention" in json.dumps(written)


FLAG = re.compile(r"--[a-z0-9]+(-[a-z0-9]+)*")


class TestFlags:
    def parsers(self):
        (commands,) = (action for action in build_parser()._actions if action.dest == argparse.SUPPRESS)
        return commands.choices

    def test_one_style_and_one_meaning(self):
        meaning = {}
        for parser in self.parsers().values():
            for action in parser._actions:
                long = [flag for flag in action.option_strings if flag.startswith("--")]
                assert len([flag for flag in long if not flag.startswith("--no-")]) <= 1, "one name for one meaning"
                for flag in action.option_strings:
                    assert FLAG.fullmatch(flag) or flag == "-h"
                    shape = (action.metavar, action.nargs)
                    assert meaning.setdefault(flag, shape) == shape, f"{flag} is one thing here and another there"

    def test_those_of_training_are_shown_in_the_same_style(self, capsys):
        assert main(["train", "--help-all"]) == 0
        shown = re.findall(r"^  (--\S+?)(?:,|\s)", capsys.readouterr().out, flags=re.MULTILINE)
        assert {"--learning-rate", "--defense-epsilon", "--train-dataset", "--output-dir"} <= set(shown)
        assert [flag for flag in shown if not FLAG.fullmatch(flag)] == []

    @pytest.mark.parametrize("name", ["learning-rate", "defense-epsilon", "defense-step-size"])
    def test_and_accepted_in_that_of_transformers(self, name):
        for flag in (f"--{name}", f"--{name.replace('-', '_')}"):
            assert getattr(build_parser().parse_args(["train", "m", flag, "0.25"]), name.replace("-", "_")) == 0.25


def test_another_record_is_moved_aside_and_the_same_one_is_not(tmp_path, capsys):
    path = tmp_path / "robustness.json"
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
    row = CorruptionRecord("quantization", "4 bits", {"bits": 4}, (0,), {"accuracy": (0.5,)})
    first, second = (EvaluationRecord(name, {}, 1, clean, (row,)) for name in ("trained", "evaluated"))
    for record in (first, first, second):
        show(record, "accuracy", path)
    assert EvaluationRecord.load(path) == second
    assert EvaluationRecord.load(tmp_path / "robustness.before.json") == first
    assert capsys.readouterr().err.count("was another record") == 1
