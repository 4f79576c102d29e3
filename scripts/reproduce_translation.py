"""Paper 2's Tables 1, 2, 3, 4 and 6 and Figure 3 for one translation data set, cell by cell.

    python -m scripts.reproduce_translation --study de-en --data FOLDER --output scripts/results/translation/de-en

FOLDER holds two files of lines for each split, `train.de` and `train.en`, say, also `.gz`, or a table for each,
`train.tsv.gz`. The studies `de-en` and `en-vi` are the papers' own (6 + 6 layers, for a GPU); `multi30k` and `tatoeba`
are small ones for a processor. `--tables 6` does that table alone. Models are trained by
`examples/train_translation.py`; what an arm shares with the plain one of its seed is trained once. Each run, record
and corruption within a record is kept, so an interrupted campaign goes on. The output folder gets records,
`runs.json`, `table.md`, and `figure-3.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from hf_parcor import CorruptionEvaluator, LayerProbe
from hf_parcor.corruptions import Corruption
from hf_parcor.defenses import ConstrainedDefense
from hf_parcor.evaluation import GenerationMetric
from hf_parcor.records import EvaluationRecord, MetricInfo, StoredRecord, SweepRecord
from hf_parcor.reports.panels import line_styles, new_figure
from hf_parcor.reports.tables import markdown_table
from hf_parcor.statistics import MeanAndSpread, student_t_test
from hf_parcor.training.checkpoints import last_checkpoint
from hf_parcor.translation import (
    BleuScores,
    ParallelText,
    average_checkpoints,
    encode,
    freeze_positions,
    last_checkpoints,
    read_parallel_files,
    read_rows,
    tokenize_13a,
)
from scripts.campaigns import DEVICE, Run, mean_and_deviation, note_run, of_study, run_example
from scripts.translation_studies import STUDIES, TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_6, Study

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_translation.py"
SPLITS = ("train", "validation", "test")
BATCH = 32 if DEVICE.type == "cpu" else 128
BEAMS = 5
_Record = TypeVar("_Record", bound=StoredRecord)


def file_of(folder: Path, stem: str, language: str) -> Path:
    """Return `STEM.LANGUAGE` or that and `.gz`."""
    plain = folder / f"{stem}.{language}"
    packed = plain.with_name(f"{plain.name}.gz")
    return packed if packed.is_file() else plain


def files_of(options: argparse.Namespace, study: Study, split: str) -> dict[str, Path]:
    """Return the files of a split, by the flags of the example: one table, or sentences and translations."""
    stem = study.files[SPLITS.index(split)]
    if stem.endswith(".tsv.gz"):
        return {f"{split}_file": options.data / stem}
    source, target = (file_of(options.data, stem, language) for language in study.languages)
    return {f"{split}_source_file": source, f"{split}_target_file": target}


def read(options: argparse.Namespace, study: Study, split: str) -> ParallelText:
    """Return the sentences of a split, and their translations."""
    files = list(files_of(options, study, split).values())
    return read_parallel_files(*files) if len(files) == 2 else read_rows(files[0], *study.languages)


def epoch_checkpoint(folder: Path, epoch: int) -> Path | None:
    """Return the checkpoint at the end of an epoch, None if there is none."""
    for path in folder.glob("checkpoint-*"):
        state = path / "trainer_state.json"
        if state.is_file() and json.loads(state.read_text())["epoch"] == epoch:
            return path
    return None


def losses(folder: Path) -> list[float]:
    """Return the mean of the training losses that a run has logged, one number an epoch."""
    logged: dict[int, list[float]] = {}
    for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
        if "loss" in entry:
            logged.setdefault(math.ceil(entry["epoch"]), []).append(entry["loss"])
    return [round(statistics.fmean(logged[epoch]), 4) for epoch in sorted(logged)]


def train(options: argparse.Namespace, study: Study, run: Run) -> Path:
    """Train one model, unless it is there already, and return the folder with the mean of its last checkpoints.

    What an arm shares with the plain one of the same seed, the epochs before its defense starts, is trained once: it
    goes on from the plain one's checkpoint. A run that was interrupted goes on from its own last one.
    """
    folder: Path = options.work / run.file_name
    trained = (folder / "train_results.json").exists()
    interrupted = trained or last_checkpoint(folder) is not None
    if not trained:
        flags = {
            "logging_steps": 50,
            **study.training,
            **files_of(options, study, "train"),
            "source_lang": study.languages[0],
            "target_lang": study.languages[1],
            "num_train_epochs": study.epochs,
            "seed": run.seed,
            "output_dir": folder,
            "save_strategy": "epoch",
            "report_to": "none",
        }
        if interrupted:
            flags["resume_from_checkpoint"] = "true"
        elif run.arm.defense is not None:
            start = epoch_checkpoint(options.work / f"plain-seed{run.seed}", int(run.arm.defense.start_epoch))
            if start is not None:
                flags["resume_from_checkpoint"] = start
        run_example([EXAMPLE], flags, "--do_train", *run.arm.flags)
    noted = options.output / "runs.json"
    if not noted.exists() or run.file_name not in json.loads(noted.read_text()):
        unknown = {"train_seconds": None} if interrupted else {}
        note_run(options.output, options.work, run, torch.get_num_threads(), losses=losses(folder), **unknown)
    averaged = folder / f"average-{study.average}"
    if not averaged.exists():
        unfinished = averaged.with_name(f"{averaged.name}-unfinished")
        average_checkpoints(last_checkpoints(folder, study.average), unfinished)
        for name in ("tokenizer.json", "tokenizer_config.json", "target_tokenizer"):
            origin = folder / name
            if origin.is_dir():
                shutil.copytree(origin, unfinished / name, dirs_exist_ok=True)
            elif origin.is_file():
                shutil.copy2(origin, unfinished / name)
        unfinished.rename(averaged)
    return averaged


class Measured:
    """One trained model, and the test sentences for it, sorted by length.

    BLEU is of the texts in the files: their subwords are only what gradients are taken on.

    Args:
        options: The command line's.
        study: What it was trained for.
        folder: The model's folder.
    """

    def __init__(self, options: argparse.Namespace, study: Study, folder: Path) -> None:
        self.model = freeze_positions(AutoModelForSeq2SeqLM.from_pretrained(folder)).to(DEVICE)
        self._longest = study.training.get("max_length", 256)
        self._source = AutoTokenizer.from_pretrained(folder)
        beside = folder / "target_tokenizer"
        self._target = AutoTokenizer.from_pretrained(beside) if beside.is_dir() else self._source
        self.batches, texts = self.sorted_batches(read(options, study, "test").first(options.test_sentences))
        scores = BleuScores(tokenize=None if study.tokenized else tokenize_13a, lowercase=study.lowercase)
        self.metric = GenerationMetric(
            self._target,
            self.batches,
            AgainstTexts(scores, texts),
            num_beams=BEAMS,
            early_stopping=True,
            max_new_tokens=study.max_new_tokens,
        )

    def sorted_batches(self, text: ParallelText) -> tuple[list[dict[str, Any]], list[str]]:
        """Return sentences in batches, the shortest first, and the translations in that order."""
        rows = encode(text, self._source, self._target, self._longest, cut=True).rows
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        collate = DataCollatorForSeq2Seq(self._source, model=self.model)
        starts = range(0, len(order), BATCH)
        batches = [dict(collate([rows[index] for index in order[s : s + BATCH]])) for s in starts]
        return batches, [text.targets[index] for index in order]


class AgainstTexts:
    """A score against these texts, in the order of the batches, instead of what labels decode to."""

    def __init__(self, scores: BleuScores, texts: Sequence[str]) -> None:
        self._scores, self._texts = scores, list(texts)

    def __call__(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Return the scores of a corpus."""
        return self._scores(predictions=predictions, references=self._texts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the scores say of themselves."""
        return self._scores.notes

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the scores state of their numbers."""
        return self._scores.info_of(name)


class Campaign:
    """The records of one study, measured when they are asked for.

    Args:
        options: The command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.study: Study = STUDIES[options.study]
        self.metric = "tokenized_bleu"  # what the papers report
        self._measured = cache(self._measure)

    def _measure(self, name: str, seed: int) -> Measured:
        run = Run(name, self.study.arms[name], seed)
        return Measured(self.options, self.study, train(self.options, self.study, run))

    def _kept(
        self, kind: type[_Record], name: str, part: str, measure: Callable[[Measured, Path], _Record]
    ) -> list[_Record]:
        """Return the records of an arm, one a seed, made now, or what is missing, if they are not there."""
        found = []
        for seed in self.options.seeds:
            path = self.options.output / f"{name}-seed{seed}-{part}.json"
            if not path.exists():
                unfinished = path.with_suffix(".jsonl")
                measure(self._measured(name, seed), unfinished).save(path)
                unfinished.unlink(missing_ok=True)
            found.append(kind.load(path))
        return found

    def records(
        self, name: str, part: str, corruptions: Sequence[Corruption], target: str | None = None
    ) -> list[EvaluationRecord]:
        """Return the records of an arm under corruptions of all of the model or of a part, one a seed."""

        def measure(one: Measured, unfinished: Path) -> EvaluationRecord:
            how: dict[str, Any] = {"target_modules": target, "progress": False}
            evaluator = CorruptionEvaluator(one.model, one.metric, one.batches, **how)
            return evaluator.evaluate(corruptions, trials=1, checkpoint=unfinished)

        return self._kept(EvaluationRecord, name, part, measure)

    def sweeps(self, name: str) -> list[SweepRecord]:
        """Return the sweeps through the layers of an arm, one a seed."""

        def measure(one: Measured, unfinished: Path) -> SweepRecord:
            probe = LayerProbe(one.model, one.metric, one.batches, progress=False)
            return probe.evaluate([self.study.layers], checkpoint=unfinished)

        return self._kept(SweepRecord, name, "layers", measure)

    def plain_loss(self, epoch: int) -> str:
        """Return the loss of the plain trainings in the epoch before this one; "-" before the first."""
        if epoch == 0:
            return "-"
        runs = json.loads((self.options.output / "runs.json").read_text())
        return shown([runs[f"plain-seed{seed}"]["losses"][epoch - 1] for seed in self.options.seeds])

    def bleu(self, records: Sequence[EvaluationRecord], row: int) -> list[float]:
        """Return the BLEU of a row of the records, one a seed."""
        return [record.rows()[row].mean(self.metric) for record in records]


DEFENSES = ("plain", "acrt", "awp", "defended")
TARGETS = ("plain", "defended", "last-layer")


def shown(bleu: Sequence[float]) -> str:
    """Return a cell: BLEU over seeds."""
    return mean_and_deviation(bleu, 2)


def by_corruption(
    campaign: Campaign,
    part: str,
    corruptions: Sequence[Corruption],
    arms: Sequence[str],
    paper: Sequence[Sequence[float]],
) -> str:
    """Return a table with a row for each corruption, a column for each arm, and the paper's beside them."""
    records = {name: campaign.records(name, part, corruptions) for name in arms}
    labels = [campaign.study.arms[name].label for name in arms]
    rows = []
    for index, first in enumerate(records[arms[0]][0].rows()):
        cells = [shown(campaign.bleu(of_arm, index)) for of_arm in records.values()]
        rows.append([first.label, *cells, *(f"{value:.2f}" for value in (paper[index] if paper else ()))])
    return markdown_table(["BLEU", *labels, *(f"paper: {label}" for label in labels if paper)], rows)


def table_1(campaign: Campaign) -> str:
    """Return Table 1: all corruptions of the model without and with the defense."""
    paper = TABLE_1.get(campaign.options.study, [])
    return by_corruption(campaign, "table1", campaign.study.table_1, ("plain", "defended"), paper)


def table_2(campaign: Campaign) -> str:
    """Return Table 2: the settings of the defense, without corruption."""
    paper = TABLE_2 if campaign.options.study == "de-en" else {}
    rows = []
    for name, arm in campaign.study.arms.items():
        if name in ("last-layer", "acrt", "awp"):
            continue
        defense = arm.defense
        constraint = defense.constraint if isinstance(defense, ConstrainedDefense) else None
        steps = "-" if defense is None else str(getattr(defense, "steps", 1))
        norm = "-" if constraint is None else "L2" if constraint.p == 2 else "L∞"
        radius = "-" if constraint is None else f"{constraint.epsilon:.2g}"
        start = "random" if getattr(defense, "random_start", False) else ""
        bleu = shown(campaign.bleu(campaign.records(name, "clean", []), 0))
        rows.append([arm.label, norm, steps, radius, start, bleu, *([f"{paper[name]:.2f}"] if paper else [])])
    return markdown_table(["setting", "norm", "K", "ε", "start", "BLEU", *(["paper"] if paper else [])], rows)


def table_3(campaign: Campaign) -> str:
    """Return Table 3: defenses under multi-step corruption and quantization."""
    paper = TABLE_3.get(campaign.options.study, [])
    return by_corruption(campaign, "table3", campaign.study.table_3, DEFENSES, paper)


def table_4(campaign: Campaign) -> str:
    """Return Table 4: defenses without corruption, and the t-tests of Appendix C where there are several seeds."""
    bleu = {name: campaign.bleu(campaign.records(name, "clean", []), 0) for name in DEFENSES}
    paper = TABLE_4.get(campaign.options.study)
    rows = []
    for index, (name, values) in enumerate(bleu.items()):
        tested = ""
        if name != "plain" and len(values) > 1:
            test = student_t_test(MeanAndSpread.from_values(values), MeanAndSpread.from_values(bleu["plain"]))
            tested = f"{test.t:.2f}{'*' if test.is_significant() else ''}"
        beside = ["{:.2f} ± {:.3f}".format(*paper[index])] if paper else []
        rows.append([campaign.study.arms[name].label, shown(values), tested, *beside])
    return markdown_table(["defense", "BLEU", "t: no better than plain", *(["paper"] if paper else [])], rows)


def table_6(campaign: Campaign) -> str:
    """Return Table 6: what is defended against what is corrupted."""
    study = campaign.study
    paper = TABLE_6.get(campaign.options.study, {})
    header = ["defended", "no corruption"]
    rows: list[list[str]] = []
    for name in TARGETS:
        whole = campaign.records(name, "table6-whole", study.whole)
        last = campaign.records(name, "table6-last", study.last, "last-decoder-layer")
        corrupted = [("whole", whole, row) for row in range(1, 1 + len(study.whole))]
        corrupted += [("last layer", last, row) for row in range(1, 1 + len(study.last))]
        if not rows:
            header += [f"{what}: {records[0].rows()[row].label}" for what, records, row in corrupted]
            header += ["paper: no corruption", "whole", "last layer"] if paper else []
        cells = [shown(campaign.bleu(records, row)) for _, records, row in [("", whole, 0), *corrupted]]
        label = "nothing" if name == "plain" else study.arms[name].label
        rows.append([label, *cells, *(f"{value:.2f}" for value in paper.get(name, ()))])
    return markdown_table(header, rows)


def starts(campaign: Campaign) -> str:
    """Return what an earlier start of the proposed defense does: the whole model as it is, and corrupted.

    The loss is that of the plain training at the start: the mean of what was logged in the epoch before.
    """
    study = campaign.study
    epochs = {"plain": study.epochs, "defended": study.start_epoch}
    epochs |= {f"start-{start}": start for start in study.other_starts}
    measured = {name: campaign.records(name, "table6-whole", study.whole) for name in epochs}  # plain first: shared
    header = ["defended", "loss at the start", *(row.label for row in measured["plain"][0].rows())]
    rows: list[list[str]] = []
    for name in sorted(epochs, key=lambda name: (name == "plain", epochs[name])):
        records = measured[name]
        label = "nothing" if name == "plain" else f"from epoch {epochs[name]} on"
        cells = [shown(campaign.bleu(records, row)) for row in range(len(records[0].rows()))]
        rows.append([label, campaign.plain_loss(epochs[name]), *cells])
    return markdown_table(header, rows)


def figure_3(campaign: Campaign) -> str:
    """Return Figure 3 as a table, a row for each layer, and draw it: the BLEU that a corruption of it leaves.

    Bars are means over seeds, with one sample standard deviation; the dashed line is the plain model, not corrupted.
    """
    sweeps = {name: campaign.sweeps(name) for name in TARGETS}
    layers = list(sweeps["plain"][0].records)
    values = {
        name: [[sweep.records[layer].corruptions[0].mean(campaign.metric) for sweep in of_arm] for layer in layers]
        for name, of_arm in sweeps.items()
    }
    figure = new_figure(4.5 + 0.55 * len(layers), 4)
    axes = figure.subplots()
    for place, ((name, of_arm), (color, _)) in enumerate(zip(values.items(), line_styles(), strict=False)):
        heights = [statistics.fmean(bleu) for bleu in of_arm]
        spread = [statistics.stdev(bleu) for bleu in of_arm] if len(of_arm[0]) > 1 else None
        places = [index + (place - 1) * 0.27 for index in range(len(layers))]
        label = campaign.study.arms[name].label
        axes.bar(places, heights, width=0.25, yerr=spread, capsize=3, color=color, label=label)
    clean = statistics.fmean(sweep.clean.mean(campaign.metric) for sweep in sweeps["plain"])
    axes.axhline(clean, color="grey", linestyle="--", linewidth=1, label="plain, no corruption")
    axes.set_xticks(range(len(layers)), [layer.removeprefix("model.") for layer in layers], rotation=30, ha="right")
    axes.set_ylabel(f"BLEU under {campaign.study.layers}")
    axes.set_title(f"{campaign.study.title}: one layer corrupted", fontsize="medium")
    figure.legend(title="defended", frameon=False, loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(campaign.options.output / "figure-3.png", dpi=150)
    header = [f"corrupted: {campaign.study.layers}", *(campaign.study.arms[name].label for name in TARGETS)]
    return markdown_table(
        header, [[layer, *(shown(values[name][row]) for name in TARGETS)] for row, layer in enumerate(layers)]
    )


TABLES: dict[str, Callable[[Campaign], str]] = {
    "1": table_1,
    "2": table_2,
    "3": table_3,
    "4": table_4,
    "6": table_6,
    "starts": starts,
    "figure-3": figure_3,
}


PAPERS = [name for name in TABLES if name != "starts"]


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the files of lines")
    parser.add_argument("--output", type=Path, required=True, help="the folder for records and tables")
    parser.add_argument("--work", type=Path, default=Path("runs/translation"), help="the folder for models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(PAPERS), help="only these, in this order")
    parser.add_argument("--test-sentences", type=int, help="measure on the first so many")
    options = parser.parse_args()
    options.work = of_study(options.work, options.study)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    campaign = Campaign(options)
    study = campaign.study
    sentences = "all test sentences" if options.test_sentences is None else f"{options.test_sentences} test sentences"
    text = [
        f"{study.title}: tokenised BLEU of {sentences}, beam 5, seeds {', '.join(map(str, options.seeds))}; "
        f"{study.epochs} epochs, defended from epoch {study.start_epoch} on, "
        f"mean of the last {study.average} checkpoints.\n"
    ]
    for table in options.tables:
        title = {"figure-3": "Figure 3", "starts": "Where the defense starts"}.get(table, f"Table {table}")
        text.append(f"## {title}\n\n{TABLES[table](campaign)}\n")
        (options.output / "table.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
