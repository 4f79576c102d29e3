"""The records of one translation study, measured when they are asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from campaigns.arms import Run

from hf_parcor.corruptions import Corruption
from hf_parcor.records import EvaluationRecord, SweepRecord
from translation.runs import Measured, train
from translation.studies import STUDIES
from translation.study import Study


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

    def _path(self, name: str, seed: int, part: str) -> Path:
        path: Path = self.options.output / f"{name}-seed{seed}-{part}.json"
        return path

    def records(
        self, name: str, part: str, corruptions: Sequence[Corruption], target: str | None = None
    ) -> list[EvaluationRecord]:
        """Return the records of an arm, one a seed, made now if they are not there."""
        found = []
        for seed in self.options.seeds:
            path = self._path(name, seed, part)
            if not path.exists():
                self._measured(name, seed).corrupted(path, corruptions, target)
            found.append(EvaluationRecord.load(path))
        return found

    def sweeps(self, name: str) -> list[SweepRecord]:
        """Return the sweeps through the layers of an arm, one a seed."""
        found = []
        for seed in self.options.seeds:
            path = self._path(name, seed, "layers")
            if not path.exists():
                self._measured(name, seed).layer_by_layer(path, self.study.layers)
            found.append(SweepRecord.load(path))
        return found

    def bleu(self, records: Sequence[EvaluationRecord], row: int) -> list[float]:
        """Return the BLEU of a row of the records, one a seed."""
        return [record.rows()[row].mean(self.metric) for record in records]
