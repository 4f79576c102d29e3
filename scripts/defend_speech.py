"""A speech recognizer in 4 bits: which layers cost the words, and what is left after a little training for it.

    python -m scripts.defend_speech --model MODEL --data FOLDER --output scripts/results/speech

MODEL is the folder that `scripts.moonshine` wrote; FOLDER holds `train.tsv.gz` and `test.tsv.gz` of Tatoeba English-
German. Sentences of 6 to 14 words are spoken by the program flite (`apt install flite`), each by the next of its four
American voices: 640 to train on, 192 others to measure on. The model as it is, and after one epoch in each of these
ways, is measured on them, and on the ten parts of a recording of a person that lie beside the model, with all linear
layers corrupted. Of the model as it is, one layer after the other is rounded to 4 and to 3 bits, too.

Finished runs are kept, so an interrupted campaign goes on. The output folder gets for each model a record of both
recordings, `sweep.json` of the layers, `runs.json`, and `table.md`: mean ± sample standard deviation over seeds, and
Student's t-tests.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    EvaluationRecord,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    Quantization,
    SweepRecord,
    by_layer,
)
from hf_parcor.reports.tables import markdown_table
from hf_parcor.statistics import Alternative
from hf_parcor.strict_json import replace_text
from hf_parcor.tasks import TASKS, Processed, load_rows
from scripts.campaigns import (
    DEVICE,
    ONE_STEP,
    PLAIN,
    Arm,
    Run,
    begin,
    campaign_parser,
    note_run,
    of_study,
    over,
    over_runs,
    risk,
    run_example,
    tables,
    write_table,
)

PROGRAM = ("-m", "hf_parcor", "train")
VOICES = ("awb", "kal16", "rms", "slt")
SENTENCES = {"train": 640, "test": 192}
WORDS = range(6, 15)
BATCH, LEARNING_RATE = 8, 2e-5
LINEAR = "all-linear"
METRIC = "wer"
ARMS = {
    "plain": PLAIN,
    "multi_step_risk-1": Arm("K = 1", ONE_STEP),
    "half-4-bits": Arm("half 4 bits", [*risk(0.5, "quantization=4:per=channel"), "--defense_target_modules", LINEAR]),
}
CORRUPTIONS = [
    *(Quantization(bits, per="channel") for bits in (5, 4)),
    *(Quantization(bits, per=32) for bits in (4, 3)),
    GaussianNoise(0.02),
    GradientCorruption(CorruptionConstraint(epsilon=0.2)),
]
OF_LAYERS = [Quantization(bits, per="channel") for bits in (4, 3)]
HEARD = {"test": "spoken by flite", "human": "spoken by a person"}
AS_IT_IS = "as-it-is"


def sentences(data: Path, split: str) -> list[str]:
    """Return English sentences of a split that are neither short nor long, evenly over all of it."""
    with gzip.open(data / f"{split}.tsv.gz", "rt", encoding="utf-8") as file:
        _, *lines = file.read().splitlines()
    found = dict.fromkeys(line.partition("\t")[0] for line in lines)
    fitting = [text for text in found if len(text.split()) in WORDS]
    return fitting[:: max(1, len(fitting) // SENTENCES[split])][: SENTENCES[split]]


def speak(folder: Path, data: Path) -> None:
    """Write the sentences of both splits as recordings, and a table of each, unless they are there.

    Raises:
        SystemExit: flite is not installed.
    """
    for split in SENTENCES:
        table = folder / f"{split}.tsv"
        if table.exists():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = ["audio\ttext"]
        for number, text in enumerate(sentences(data, split)):
            name = f"{split}/{number}.wav"
            words = ["flite", "-voice", VOICES[number % len(VOICES)], "-t", text, "-o", str(folder / name)]
            try:
                subprocess.run(words, check=True)
            except FileNotFoundError as error:
                raise SystemExit("flite is not installed: apt install flite") from error
            lines.append(f"{name}\t{text}")
        replace_text(table, "\n".join(lines) + "\n")


def subject(model: str | Path, table: Path) -> tuple[Any, Any]:
    """Return a speech recognizer, and what measures its error rates on the recordings of a table."""
    task, rows = TASKS["automatic-speech-recognition"], load_rows(str(table))
    loaded = task.load_model(str(model)).to(DEVICE).eval()
    processed = Processed(loaded, task.load_processor(str(model)))
    task.prepare(processed)
    batches = task.batches(task.examples(rows, task.find_columns(rows, {}), processed), processed, 16)
    return loaded, task.metric(METRIC, processed, batches)


def tables_of(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Yield what is measured on, and its table."""
    yield "test", options.work / "test.tsv"
    yield "human", Path(options.model) / "human.tsv"


def record_of(options: argparse.Namespace, name: str, heard: str) -> Path:
    """Return where the record of a model lies."""
    path: Path = options.output / f"{name}-{heard}.json"
    return path


def evaluate(options: argparse.Namespace, name: str, model: str | Path) -> list[EvaluationRecord]:
    """Return the records of a model, measured unless they are there."""
    records = []
    for heard, table in tables_of(options):
        path = record_of(options, name, heard)
        if not path.exists():
            evaluator = CorruptionEvaluator(*subject(model, table), target_modules=[LINEAR])
            evaluator.evaluate(CORRUPTIONS, trials=1, checkpoint=options.work / f"{name}-{heard}.jsonl").save(path)
        records.append(EvaluationRecord.load(path))
    return records


def measure(options: argparse.Namespace, run: Run) -> list[EvaluationRecord]:
    """Train and measure one model, unless its records are there already."""
    folder = options.work / run.file_name
    if not all(record_of(options, run.file_name, heard).exists() for heard in HEARD):
        if not (folder / "train_results.json").exists():
            flags = [*run.arm.flags, "--use_cpu"] if DEVICE.type == "cpu" else run.arm.flags
            settings = {
                "dataset": options.work / "test.tsv",
                "train-dataset": options.work / "train.tsv",
                "num_train_epochs": 1,
                "per_device_train_batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
                "warmup_steps": 8,
                "seed": run.seed,
                "output_dir": folder,
                "report_to": "none",
                "save_strategy": "no",
                "logging_steps": 10,
                "limit": 8,  # what it measures by itself is measured below, and more
            }
            run_example([*PROGRAM, options.model], settings, "--skip-corruptions", *flags, threads=options.threads)
        note_run(options.output, options.work, run, options.threads)
    return evaluate(options, run.file_name, folder)


def probe(options: argparse.Namespace) -> SweepRecord:
    """Return what each layer of the model as it is costs, rounded alone, measured unless it was."""
    path = options.output / "sweep.json"
    if not path.exists():
        model, metric = subject(options.model, options.work / "test.tsv")
        sweep = LayerProbe(model, metric, targets={**by_layer(model), LINEAR: LINEAR}).evaluate(
            OF_LAYERS, checkpoint=options.work / "layers.jsonl"
        )
        sweep.save(path)
    return SweepRecord.load(path)


def layer_table(sweep: SweepRecord) -> str:
    """Return a row for each layer: the word error rate with it rounded alone."""
    first = next(iter(sweep.records.values()))
    header = [f"{METRIC} (%) with", *(row.label for row in first.corruptions)]
    rows = [
        [part, *(f"{100 * row.mean(METRIC):.1f}" for row in record.corruptions)]
        for part, record in sweep.records.items()
    ]
    return f"As it is: {100 * first.clean.mean(METRIC):.1f}.\n\n{markdown_table(header, rows, longest=None)}"


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = campaign_parser(__doc__, ARMS, "runs/speech", "`train.tsv.gz` and `test.tsv.gz`")
    parser.add_argument("--model", required=True, help="the folder that scripts.moonshine wrote")
    options = begin(parser)
    options.work = of_study(options.work, options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    speak(options.work, options.data)
    alone = evaluate(options, AS_IT_IS, options.model)
    sweep = probe(options)
    trained = over_runs(measure, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    if options.arms:
        return
    shown = []
    for place, title in enumerate(HEARD.values()):
        of_arms = {arm: [records[place] for records in of_seeds] for arm, of_seeds in trained.items()}
        rows = [[row.label, f"{100 * row.mean(METRIC):.1f}"] for row in alone[place].rows()]
        of_it = markdown_table([f"{METRIC} (%)", "as it is"], rows, longest=None)
        of_all = tables(of_arms, ARMS, costs=True, metric=METRIC, better=Alternative.LESS)
        shown.append(f"## {title.capitalize()}\n\n{of_it}\n\n{of_all}")
    settings = f"one epoch, batches of {BATCH}, learning rate {LEARNING_RATE:g}"
    parts = [
        f"Fine-tuned on {SENTENCES['train']} sentences ({settings}); word error rate in per cent, "
        f"{over(options.seeds)}.",
        *shown,
        f"## The model as it is, one layer rounded\n\n{layer_table(sweep)}",
    ]
    text = "\n\n".join(part.rstrip() for part in parts) + "\n"
    write_table(options.output, text)


if __name__ == "__main__":
    main()
