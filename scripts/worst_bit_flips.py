"""Do defenses help against the worst bit flips? SST-2, as `reproduce_sst2.py`, flip by flip.

    python -m scripts.worst_bit_flips --model MODEL --data FOLDER --output scripts/results/worst_bit_flips

Each arm is trained with each seed. Then its worst bits are flipped, one after the other, until half of its accuracy
above chance is gone: bits of float32, and of int8 codes. The gradient and the losses of the search are those of one
batch of 32 training sentences, so that the dev sentences, a third of which the accuracy is measured on, have no part
in it. Beside that, as many random flips as the rate says. The output folder gets a record for each run and `table.md`.
Finished measurements are kept, so an interrupted campaign goes on.

Weight clipping (`clipped`): after each step every entry of a matrix is clamped to ±CLIP.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback

from hf_parcor import BitFlips, CorruptionEvaluator, FlipRecord, ParameterDefenseTrainer, measure_flips_to_break
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.records import EvaluationRecord
from scripts.campaigns import ONE_STEP, PLAIN, Arm, Run, mean_and_deviation, note_run, over_runs, risk, write_table
from scripts.sst2_runs import batch_of, model_and_batches, parse_options, read_sentences, run_example_with, train

CLIP = 0.5  # ten standard deviations of a typical matrix, whose largest entries reach 8
FORMATS = {"float32": 5, "int8": 8}  # and after how many flips to give up
RATES = (1e-7, 1e-6, 1e-5)
RATE = 1e-4  # trained with, in the arm that meets flips
EVERY = 3  # dev sentences: a third of the 872


ARMS = {
    "plain": Arm(PLAIN.label, PLAIN.flags),
    "multi_step_risk-1": Arm("K = 1", ONE_STEP),
    # Half of the risk is that of int8 codes, 18,000 of whose bits flip each step: random bit-error training.
    "flipped": Arm(f"flips of int8 at {RATE:g}", risk(0.5, f"bit-flips={RATE:g}:of=int8")),
    "clipped": Arm(
        f"clipped, ±{CLIP:g}",
        PLAIN.flags,
        program=("-c", "from scripts.worst_bit_flips import train_clipped; train_clipped()"),
    ),
}


class ClipWeights(TrainerCallback):
    """Clamps every entry of every matrix after each step."""

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clamp."""
        model: nn.Module = kwargs["model"]
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.clamp_(-CLIP, CLIP)


def train_clipped() -> None:
    """Run the example with the callback in its Trainer."""
    run_example_with(partial(ParameterDefenseTrainer, callbacks=[ClipWeights()]))


def sentences_to_search_on(options: argparse.Namespace, folder: Path) -> list[dict[str, Tensor]]:
    """Return one batch: the first 32 of the training sentences."""
    rows = read_sentences(options.data / "train_sentences.tsv.gz")[:32]
    return [batch_of(AutoTokenizer.from_pretrained(folder), rows)]


def measure(options: argparse.Namespace, run: Run) -> tuple[dict[str, FlipRecord], EvaluationRecord]:
    """Train one model, flip its bits, and return the records; what is there already is not done again."""
    started = time.monotonic()
    paths = {of: options.output / f"{run.file_name}-{of}.json" for of in FORMATS}
    at_random = options.output / f"{run.file_name}-random.json"
    if not all(path.exists() for path in (*paths.values(), at_random)):
        folder = train(options, run)
        model, batches = model_and_batches(options, folder)
        metric = ClassificationMetric([{name: part[::EVERY] for name, part in batch.items()} for batch in batches])
        search = sentences_to_search_on(options, folder)
        for of, path in paths.items():
            if not path.exists():
                own = None if of == "float32" else of
                how: dict[str, Any] = {"of": own, "candidates": 5, "most": FORMATS[of], "chance": 0.5}
                record = measure_flips_to_break(model, metric, search, **how, metric_name="accuracy")
                record.save(path)
        if not at_random.exists():
            corruptions = [BitFlips(rate=rate, of=of) for of in (None, "int8") for rate in RATES]
            CorruptionEvaluator(model, metric, progress=False).evaluate(corruptions, trials=3).save(at_random)
        note_run(options.output, options.work, run, options.threads, seconds=round(time.monotonic() - started, 1))
    return {of: FlipRecord.load(path) for of, path in paths.items()}, EvaluationRecord.load(at_random)


def table(records: dict[str, list[tuple[dict[str, FlipRecord], EvaluationRecord]]]) -> str:
    """Return the arms as Markdown."""
    rates = [f"{of}, rate {rate:g}" for of in FORMATS for rate in RATES]
    heads = ["arm", "clean", *(f"flips to break {of}" for of in FORMATS), "int8, no flip", *rates]
    lines = [f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    for name, of_arm in records.items():
        first = [flips for flips, _ in of_arm]
        cells = [ARMS[name].label, percent([one["float32"].clean for one in first])]
        cells += [", ".join(counted(one[of], FORMATS[of]) for one in first) for of in FORMATS]
        cells.append(percent([one["int8"].values[0] for one in first]))
        for index in range(len(rates)):
            cells.append(percent([record.corruptions[index].mean("accuracy") for _, record in of_arm]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def counted(record: FlipRecord, most: int) -> str:
    """Return how many flips broke a model."""
    return f"> {most}" if record.flips is None else str(record.flips)


def percent(values: Sequence[float]) -> str:
    """Return shares in per cent."""
    return mean_and_deviation([100 * value for value in values], 1)


def main() -> None:
    """Run what is missing, and write the table."""
    options = parse_options(__doc__, ARMS, "runs/sst2")
    arms = {name: ARMS[name] for name in options.arms or ARMS}
    records = over_runs(measure, "runs", options, arms)
    if options.arms:
        return
    text = (
        f"SST-2, every third of the 872 dev sentences, seeds {', '.join(map(str, options.seeds))}: accuracy (%), and "
        "how many of the worst bit flips it takes until half of the accuracy above chance is gone (progressive search "
        "on one batch of 32 training sentences, the losses of 5 tensors a flip). Random flips, the rate is per bit: "
        "mean of three trials.\n\n" + table(records)
    )
    write_table(options.output, text)


if __name__ == "__main__":
    main()
