"""The promise that a new corruption, or a new defense, is one module and one line in the catalogue: tried out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_parcor

PACKAGE = Path(hf_parcor.__file__).parent
CORRUPTION = '''
"""Every weight multiplied by one number, as a miscalibrated memory would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.corruptions.corruption import Corruption, GradientSource, Strength, named


@dataclass(frozen=True)
class Gain(Corruption):
    """`a = (gain - 1) w`."""

    gain: float
    title: ClassVar[str] = "gain error"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("gain", "gain of the memory", "x{}"),)

    def __str__(self) -> str:
        return f"gain x{self.gain:g}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        return named(weights, [(self.gain - 1) * weight for weight in weights.values()])
'''
DEFENSE = '''
"""The loss of the batch, and so many times that at the corrupted weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_parcor.defenses.defense import ConstrainedDefense
from hf_parcor.defenses.step import DefendedStep


@dataclass(frozen=True)
class Emphasis(ConstrainedDefense):
    """`L(w) + emphasis L(w + a)`."""

    emphasis: float = field(default=3.0, metadata={"help": "how much the corrupted loss counts"})

    @property
    def passes(self) -> int:
        """Two."""
        return 2

    def minimize(self, step: DefendedStep) -> None:
        """Run both passes."""
        step.backward(lambda loss: loss)
        step.displace(self.update(step, self.constraint.epsilon))
        step.backward(lambda loss: self.emphasis * loss)
'''
PROGRAM = """
import torch
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from hf_parcor import CorruptionEvaluator, EvaluationRecord, ParameterDefenseTrainer
from hf_parcor import ParameterDefenseTrainingArguments, RobustnessReport
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.records.curves import Series
from hf_parcor.reports.plots import plot_comparison

sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(**sizes))
rows = [{"input_ids": torch.randint(9, (4,)), "labels": index % 2} for index in range(8)]

# A defense: flags, training, its file.
flags = "--defense emphasis --defense_emphasis 2.5 --defense_epsilon 0.2 --output_dir out --max_steps 2"
(arguments,) = HfArgumentParser(ParameterDefenseTrainingArguments).parse_args_into_dataclasses(
    [*flags.split(), "--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]
)
trainer = ParameterDefenseTrainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
assert trainer.defense.emphasis == 2.5 and trainer.defense_config.defended_steps == 2
trainer.save_model("out")
text = open("out/defense_config.json").read()
assert '"emphasis"' in text and "2.5" in text

# A corruption: the command line's words, records, titles, axes.
batch = {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": torch.tensor([0, 1] * 4)}
corruptions = read_corruptions(["gain=1.5,2"], [])
record = CorruptionEvaluator(model, ClassificationMetric([batch]), progress=False).evaluate(corruptions)
again = EvaluationRecord.from_json(record.to_json())
series = {Series.of(row) for row in again.corruptions}
assert [(one.title, one.unit) for one in series] == [("gain error", "gain of the memory")]
assert [next(iter(series)).level(row) for row in again.corruptions] == ["x1.5", "x2"]
assert "gain error" in RobustnessReport(again).to_markdown("out/report.md").read_text()
axis = plot_comparison({"one": again}, "accuracy").axes[0]
assert "gain" in axis.get_xlabel()
print("kept")
"""


@pytest.mark.slow
def test_it_is_kept(tmp_path):
    package = tmp_path / "hf_parcor"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder, module, name, text in (
        ("corruptions", "gain", "Gain", CORRUPTION),
        ("defenses", "emphasis", "Emphasis", DEFENSE),
    ):
        (package / folder / f"{module}.py").write_text(text.lstrip(), encoding="utf-8")
        catalogue = package / folder / "catalogue.py"
        lines = catalogue.read_text(encoding="utf-8")
        lines = lines.replace("MappingProxyType(\n    {", f'MappingProxyType(\n    {{\n        "{module}": {name},')
        lines = lines.replace("from hf_parcor", f"from hf_parcor.{folder}.{module} import {name}\nfrom hf_parcor", 1)
        catalogue.write_text(lines, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.endswith("kept\n"), result.stderr[-2000:]
