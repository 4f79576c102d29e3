"""What the commands take on a large decoder: seconds and memory, each in a process of its own, as a user types them.

    python -m scripts.large_decoders --data FOLDER --output scripts/results/large_decoders --rows 2

A Llama with random bfloat16 weights, by default of TinyLlama's 1.1 billion, is saved with a tokenizer of the words of
Penn Treebank, and measured on a few windows of its text: what it costs, and nothing of how accurate it is. Memory is
the most that was resident (by the kernel's account of the process, files that are mapped included), and what is
compared is how much more that is than for measuring the model as it is. On the way it is looked at whether weights
come back (a last corruption of strength 0 measures what no corruption does), whether the files keep their weights (by
the records' fingerprints), and whether a probe that was killed goes on where it was. What is finished is kept, so an
interrupted run goes on; `--commands` measures some anew. It runs on the CPU.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_parcor.reports.tables import markdown_table
from scripts.campaigns import machine, write_table
from scripts.random_corruption_theory import END, words_of

MODEL, TEXT, MAP, OFFLOADED = "decoder", "text.txt", "map.json", "offloaded"
AS_IT_IS, KILLED, WENT_ON = "evaluate: the model as it is", "probe: each layer, killed", "probe: each layer, went on"
PROBE = "probe: each layer, noise and 4 bits"
ONE_LAYER = "--target-modules last-decoder-layer"
# What follows `hf-parcor`; strength 0 comes last, and finds what no corruption does where weights came back. Not after
# flips that are found without data: they save next to nothing, and strength 0 saves all that it is told to corrupt.
COMMANDS = {
    AS_IT_IS: "evaluate --target-modules model.norm --corruptions gaussian=0",  # 2,048 weights
    "evaluate: noise": "evaluate --corruptions gaussian=0.01,0",
    "evaluate: 4 bits": "evaluate --corruptions quantization=4 gaussian=0",
    "evaluate: along the gradient, one layer": f"evaluate {ONE_LAYER} --corruptions gradient=0.1 gaussian=0",
    "evaluate: along the gradient": "evaluate --corruptions gradient=0.1 gaussian=0",
    "evaluate: a worst bit flip": "evaluate --corruptions worst-bit-flips=1 gaussian=0",
    "evaluate: a worst bit flip, one layer": f"evaluate {ONE_LAYER} --corruptions worst-bit-flips=1 gaussian=0",
    "evaluate: three worst bit flips, found without data": "evaluate --corruptions worst-bit-flips=3:search=data-free",
    "evaluate: noise, a map by itself": "evaluate --device-map auto --corruptions gaussian=0.01,0",
    "evaluate: noise, half on the disk": f"evaluate --device-map {MAP} --offload-folder {OFFLOADED} "
    "--corruptions gaussian=0.01,0",
    PROBE: "probe --group layers --corruptions gaussian=0.01 quantization=4",
    "probe: a first look": "probe --quick",
    "probe: a recipe": "probe --recipe bits=4.5 --cells 3 --pairs 0",
}
INDICATORS = "measure_indicators: one layer"
PROGRAM = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_parcor import CorruptionConstraint, measure_indicators
tokenizer = AutoTokenizer.from_pretrained({model!r})
tokens = tokenizer(open({text!r}).read() + tokenizer.eos_token, return_tensors="pt")["input_ids"].view(-1, {length})
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype="auto")
record = measure_indicators(
    model,
    [{{"input_ids": tokens, "labels": tokens}}],
    [CorruptionConstraint(epsilon=0.1)],
    target_modules=["last-decoder-layer"],
    probes=1,
    draws=2,
)
record.save("indicators.json")
"""
BEFORE_THE_KILL = 12  # measurements, at least


def run(words: list[str], options: Namespace, name: str, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run a program in the work folder, and return what it took; what it says is in a `.log` of this name.

    Memory is in bytes: the most that were resident, and of them the most that no file backs, as they were found ten
    times a second. The load is how many processes wanted a core, on average over the last minute.

    Args:
        words: What Python is given.
        options: Those of the command line.
        name: Of the log.
        stop: Asked ten times a second whether the program is to be killed.

    Raises:
        SystemExit: It failed, or it was not killed where that was asked for.
    """
    environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    started, anonymous, ended, stopped = time.monotonic(), 0, 0, False
    path = options.work / f"{name}.log"
    with path.open("wb") as log:
        command, environment = [sys.executable, *words], {**os.environ, **environment}
        process = subprocess.Popen(command, cwd=options.work, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while not ended:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not ended:
                now = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                anonymous = max(anonymous, 1024 * int(now[1]) if now else 0)  # one that has just ended has none
                if not stopped and stop():
                    process.send_signal(signal.SIGKILL)
                    stopped = True
                time.sleep(0.1)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code != (-signal.SIGKILL if stopped else 0):
        raise SystemExit(f"{name}: expected exit code 0, got {code}; it said what is in {path}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_resident": 1024 * usage.ru_maxrss,
        "peak_anonymous": anonymous,
        "load": round(os.getloadavg()[0], 1),
        "found": {},
    }


def make_model(options: Namespace) -> None:
    """Save the model, its tokenizer, the text, and a map that leaves the second half of the layers on the disk."""
    words = words_of(options.data, "train")
    folder = options.work / MODEL
    known = list(dict.fromkeys([END, "<unk>", *words]))[: options.vocabulary]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token=END)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    text = words_of(options.data, "valid")[: options.rows * options.length - 1]  # the end of a row follows
    (options.work / TEXT).write_text(" ".join(text) + "\n", encoding="utf-8")
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # this is a process of its own; in float32 it would be twice as large
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="1GB")
    devices = {
        f"model.layers.{layer}": "cpu" if 2 * layer < options.layers else "disk" for layer in range(options.layers)
    }
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    (options.work / MAP).write_text(json.dumps({**dict.fromkeys(others, "cpu"), **devices}), encoding="utf-8")
    sizes = {"weights": model.num_parameters(), "bytes": sum(one.nbytes for one in model.parameters())}
    (options.work / "model.json").write_text(json.dumps(sizes), encoding="utf-8")


def trials_in(checkpoint: Path) -> list[str]:
    """Return the lines of a checkpoint that are finished trials."""
    return checkpoint.read_text().splitlines()[1:] if checkpoint.exists() else []


def parts_of(label: str) -> tuple[str, ...]:
    """Return what the record calls that which a command took: the probe of all layers is killed on its way."""
    return (KILLED, WENT_ON) if label == PROBE else (label,)


def measured(label: str, options: Namespace) -> dict[str, dict[str, Any]]:
    """Return what a command took, by the names of `parts_of`."""
    name = re.sub(r"\W+", "-", label)
    shutil.rmtree(options.work / name, ignore_errors=True)
    if label == INDICATORS:
        program = PROGRAM.format(model=MODEL, text=TEXT, length=options.length)
        return {label: {"command": "measure_indicators(model, batches, ...)", **run(["-c", program], options, name)}}
    command, *flags = COMMANDS[label].split()
    data = ["--dataset", TEXT, "--max-length", str(options.length), "--batch-size", str(options.rows)]
    draws = [] if {"--quick", "--recipe"}.intersection(flags) else ["--trials", "1"]
    words = [command, MODEL, *data, *draws, *flags, "--output-dir", name]
    typed, python = {"command": f"hf-parcor {' '.join(words)}"}, ["-m", "hf_parcor", *words]
    if label != PROBE:
        return {label: {**typed, **run(python, options, name), "found": found_in(options.work / name)}}
    checkpoint = options.work / name / "probe.jsonl"
    before = run(python, options, f"{name}-killed", lambda: len(trials_in(checkpoint)) > BEFORE_THE_KILL)
    kept = trials_in(checkpoint)
    said = (options.work / f"{name}-killed.log").read_text().replace("\r", "\n")
    shown = [line.strip() for line in said.splitlines() if line.startswith("corruptions:")]
    before["found"] = {"trials": len(kept), "shown": shown[-1:]}
    after, every = run(python, options, name), trials_in(checkpoint)
    found = {"kept": len(kept), "made_anew": len(every) - len(kept), "kept_as_they_were": every[: len(kept)] == kept}
    after["found"] = {**found, **found_in(options.work / name)}
    return {KILLED: {**typed, **before}, WENT_ON: {**typed, **after}}


def found_in(folder: Path) -> dict[str, Any]:
    """Return what a record says of the weights, and whether the last corruption, of strength 0, found them back."""
    records = ("robustness.json", "probe.json", "quick.json", "sensitivity.json")
    (path,) = [path for path in folder.glob("*.json") if path.name in records]
    record = json.loads(path.read_text(encoding="utf-8"))
    found = {"fingerprint_of_weights": record["weights"]}
    if path.name == "robustness.json":
        last = record["corruptions"][-1]
        if last["settings"].get("std") == 0:
            found["came_back"] = last["metrics"] == record["clean"]["metrics"]
        found["corrupted_weights"] = record["parameters"]
    return found


def table(record: dict[str, Any]) -> str:
    """Return the table of all that was measured, and what was looked at on the way."""
    costs, sizes = record["commands"], record["model"]
    as_it_is = costs[AS_IT_IS]["peak_resident"]
    rows = [
        [
            label,
            f"{cost['seconds']:.0f}",
            f"{cost['peak_resident'] / 2**30:.2f}",
            f"{(cost['peak_resident'] - sizes['bytes']) / sizes['weights']:.1f}",
            f"{(cost['peak_resident'] - as_it_is) / sizes['weights']:.1f}",
        ]
        for label, cost in costs.items()
    ]
    header = ["command", "seconds", "GiB at most", "beyond the weights, bytes a weight", "beyond the model as it is"]
    found = [cost["found"] for cost in costs.values()]
    fingerprints = {
        cost["found"]["fingerprint_of_weights"]
        for cost in costs.values()
        if "fingerprint_of_weights" in cost["found"] and OFFLOADED not in cost["command"]  # of what is in memory alone
    }
    back = [one["came_back"] for one in found if "came_back" in one]
    lines = [
        f"{sizes['weights']:,} weights in bfloat16, {sizes['bytes'] / 2**30:.2f} GiB; {record['tokens']:,} tokens of "
        f"text in one batch; {record['machine']}, which other programs shared (load "
        f"{min(cost['load'] for cost in costs.values())} to {max(cost['load'] for cost in costs.values())}): "
        "seconds are upper bounds.",
        "",
        markdown_table(header, rows),
        "",
        f"The weights came back in {sum(back)} of {len(back)} evaluations; records name {len(fingerprints)} "
        "fingerprint of the weights in the files.",
    ]
    if WENT_ON in costs:
        before, after = costs[KILLED]["found"], costs[WENT_ON]["found"]
        lines.append(
            f"The probe was killed after {before['trials']} measurements, and then made {after['made_anew']} more; "
            f"those before {'stayed' if after['kept_as_they_were'] else 'did not stay'} as they were. It had shown "
            f"`{''.join(before['shown'])}`."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the model, run the commands, and write down what they took."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder with ptb.train.txt and ptb.valid.txt, or .gz"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder for the record and the table")
    parser.add_argument("--work", type=Path, default=Path("runs/large_decoders"), help="the folder for the model")
    labels = [*COMMANDS, INDICATORS]
    parser.add_argument("--commands", nargs="+", choices=labels, help="measure these, even if they are in the record")
    sizes = {
        "hidden": 2048,
        "layers": 22,
        "intermediate": 5632,
        "heads": 32,
        "key_value_heads": 4,
        "vocabulary": 32000,
    }
    for name, value in {**sizes, "rows": 4, "length": 128, "threads": 1}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    options = parser.parse_args()
    for folder in (options.output, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    options.work, path = options.work.resolve(), options.output / "record.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"commands": {}}
    for label in options.commands or [label for label in labels if parts_of(label)[0] not in record["commands"]]:
        if not (options.work / "model.json").exists():
            making = get_context("spawn").Process(target=make_model, args=(options,))  # its memory is not ours
            making.start()
            making.join()
            if making.exitcode:
                raise SystemExit(making.exitcode)
        print(f"{label} ...", flush=True)
        costs = {**record["commands"], **measured(label, options)}
        record |= {
            "model": json.loads((options.work / "model.json").read_text(encoding="utf-8")),
            "configuration": {name: getattr(options, name) for name in sizes},
            "tokens": options.rows * options.length,
            "machine": f"{processor()}, {machine(options.threads)}",
            "versions": {"torch": torch.__version__},
        }
        record["commands"] = {part: costs[part] for one in labels for part in parts_of(one) if part in costs}
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_table(options.output, table(record))


def processor() -> str:
    """Return what the CPU calls itself."""
    information = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", information.read_text()) if information.exists() else None
    return named[1].strip() if named else platform.processor()


if __name__ == "__main__":
    main()
