"""Training and measuring of one translation model, for `reproduce_translation.py`."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from campaigns.arms import Run
from campaigns.notes import note_run
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from hf_parcor import CorruptionEvaluator, LayerProbe
from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import GenerationMetric
from hf_parcor.records import EvaluationRecord, SweepRecord
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
from translation.study import Study

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_translation.py"
SPLITS = ("train", "validation", "test")
BATCH = 32
BEAMS = 5


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


def train(options: argparse.Namespace, study: Study, run: Run) -> Path:
    """Train one model, unless it is there already, and return the folder with the mean of its last checkpoints.

    What an arm shares with the plain one of the same seed, the epochs before its defense starts, is trained once: it
    goes on from the plain one's checkpoint. A run that was interrupted goes on from its own last one.
    """
    folder: Path = options.work / run.file_name
    if not (folder / "train_results.json").exists():
        flags = {
            **study.training,
            **files_of(options, study, "train"),
            "source_lang": study.languages[0],
            "target_lang": study.languages[1],
            "num_train_epochs": study.epochs,
            "seed": run.seed,
            "output_dir": folder,
            "save_strategy": "epoch",
            "logging_steps": 50,
            "report_to": "none",
        }
        interrupted = any(folder.glob("checkpoint-*"))
        if interrupted:
            flags["resume_from_checkpoint"] = "true"
        elif run.arm.defense is not None:
            start = epoch_checkpoint(options.work / f"plain-seed{run.seed}", int(run.arm.defense.start_epoch))
            if start is not None:
                flags["resume_from_checkpoint"] = start
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, str(EXAMPLE), "--do_train", *arguments, *run.arm.flags], check=True)
        unknown = {"train_seconds": None} if interrupted else {}
        note_run(options.output, options.work, run, torch.get_num_threads(), **unknown)
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
        self.model = freeze_positions(AutoModelForSeq2SeqLM.from_pretrained(folder))
        source = AutoTokenizer.from_pretrained(folder)
        beside = folder / "target_tokenizer"
        target = AutoTokenizer.from_pretrained(beside) if beside.is_dir() else source
        text = read(options, study, "test").first(options.test_sentences)
        rows = encode(text, source, target, study.training.get("max_length", 256), cut=True).rows
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        collate = DataCollatorForSeq2Seq(source, model=self.model)
        starts = range(0, len(order), BATCH)
        self.batches = [dict(collate([rows[index] for index in order[s : s + BATCH]])) for s in starts]
        scores = BleuScores(tokenize=None if study.tokenized else tokenize_13a, lowercase=study.lowercase)
        self.metric = GenerationMetric(
            target,
            self.batches,
            AgainstTexts(scores, [text.targets[index] for index in order]),
            num_beams=BEAMS,
            early_stopping=True,
            max_new_tokens=study.max_new_tokens,
        )

    def corrupted(self, path: Path, corruptions: Sequence[Corruption], target: str | None = None) -> EvaluationRecord:
        """Measure the model, or what is missing, under corruptions of all of it or of a part."""
        if not path.exists():
            evaluator = CorruptionEvaluator(
                self.model, self.metric, self.batches, target_modules=target, progress=False
            )
            unfinished = path.with_suffix(".jsonl")
            evaluator.evaluate(corruptions, trials=1, checkpoint=unfinished).save(path)
            unfinished.unlink(missing_ok=True)
        return EvaluationRecord.load(path)

    def layer_by_layer(self, path: Path, corruption: Corruption) -> SweepRecord:
        """Measure the model, or what is missing, with one layer after the other corrupted."""
        if not path.exists():
            unfinished = path.with_suffix(".jsonl")
            probe = LayerProbe(self.model, self.metric, self.batches, progress=False)
            probe.evaluate([corruption], checkpoint=unfinished).save(path)
            unfinished.unlink(missing_ok=True)
        return SweepRecord.load(path)


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
