"""Which layer costs the accuracy of a model that GPTQ has quantized? Beside plain rounding on the same grids.

    PYTHONPATH=.venv/quantizers python -m scripts.layers_of_gptq --model MODEL --data FOLDER \
        --output scripts/results/gptq

MODEL is a folder or a name on the Hub of a model of sentence-transformers, FOLDER holds Tatoeba English-German. The
texts are the paraphrases of `scripts.which_bits`: every fourth pair calibrates, all others are measured on. llm-
compressor quantizes a copy of the model by GPTQ, with one scale for each output channel, and all linear layers by
what the model as it is feeds them (its pipeline "basic"): by 256 texts, and by all 2,244. Then one layer after the
other, and all together, has the weights that it made (`Interpolation`), and those that plain rounding makes on the
same grids; at last all together by GPTQ, but for the layer that costs most by it, which is rounded plainly. The
output folder gets both records and `table.md`. What is measured is kept in the `--work` folder, so an interrupted run
goes on.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor import (
    CorruptionEvaluator,
    CorruptionRecord,
    EvaluationRecord,
    Interpolation,
    LayerProbe,
    SweepRecord,
    by_layer,
)
from hf_parcor.reports.tables import markdown_table
from scripts.campaigns import begin, campaign_parser, of_study, write_table
from scripts.which_bits import embeddings, paraphrases

BITS = (3, 2)
TEXTS, TOKENS = (256, 2244), 64  # that calibrate
METRIC = "ndcg@10"
LINEAR = "all linear layers"
WITHIN = "0.model.encoder."
_PARAMETERS = ("weight_scale", "weight_zero_point")


def by_gptq(model: nn.Module, bits: int, texts: list[str]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return the weights of a sentence encoder after GPTQ, and after plain rounding on the same grids.

    Args:
        model: Of sentence-transformers; it stays as it is.
        bits: Of each code, symmetric around zero.
        texts: What calibrates.
    """
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    copied: Any = copy.deepcopy(model)
    inner = copied[0].model
    rows = copied.tokenizer(texts, truncation=True, max_length=TOKENS)
    data = Dataset.from_dict({name: rows[name] for name in ("input_ids", "attention_mask")})
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    method = GPTQModifier(config_groups={"linear": {"targets": ["Linear"], "weights": weights}})
    settings = {"num_calibration_samples": len(texts), "max_seq_length": TOKENS, "pipeline": "basic"}
    oneshot(model=inner, dataset=data, recipe=[method], **settings)
    rounded = dict(model.state_dict())
    for name, module in copied.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            plain = rounded[f"{name}.weight"]
            scale, zero = (getattr(module, parameter) for parameter in _PARAMETERS)
            rounded[f"{name}.weight"] = fake_quantize(plain, scale, zero, scheme.weights).detach()
    found = {name: tensor for name, tensor in copied.state_dict().items() if not name.endswith(_PARAMETERS)}
    return found, rounded


def measure(options: argparse.Namespace) -> tuple[SweepRecord, EvaluationRecord]:
    """Quantize, measure part by part, and all with the layer rounded plainly that costs most by GPTQ."""
    judged = embeddings(options)
    texts = [text for pair in paraphrases(options.data)[::4] for text in pair.values()]
    corruptions, of_all = [], {}
    for bits in BITS:
        for count in TEXTS:
            gptq, nearest = by_gptq(judged.model, bits, texts[:count])
            corruptions.append(Interpolation(1.0, gptq, f"GPTQ by {count:,} texts, {bits} bits"))
            of_all[len(corruptions) - 1] = gptq, nearest
        corruptions.append(Interpolation(1.0, nearest, f"plain rounding, {bits} bits"))
    layers = by_layer(judged.model)
    probe = LayerProbe(judged.model, judged.judge, targets={**layers, LINEAR: "all-linear"})
    judged.folder.mkdir(parents=True, exist_ok=True)
    sweep = probe.evaluate(corruptions, checkpoint=judged.folder / "layers.jsonl")
    spared = []
    for place, (gptq, nearest) in of_all.items():
        weakest = min(layers, key=lambda layer: sweep.records[layer].corruptions[place].mean(METRIC))
        of_layer = {name: tensor for name, tensor in nearest.items() if name.startswith(f"{weakest}.")}
        name = f"{corruptions[place].name}, plain in {weakest.removeprefix(WITHIN)}"
        spared.append(Interpolation(1.0, {**gptq, **of_layer}, name))
    evaluator = CorruptionEvaluator(judged.model, judged.judge, target_modules="all-linear")
    return sweep, evaluator.evaluate(spared, checkpoint=judged.folder / "spared.jsonl")


def table_of(sweep: SweepRecord, spared: EvaluationRecord) -> str:
    """Return a row for each part, in percent, and what all parts have where one is rounded plainly."""
    first = next(iter(sweep.records.values()))
    header = [f"{METRIC} (%) of a copy with", *(_shown(row) for row in first.corruptions)]
    rows = [[part.removeprefix(WITHIN), *map(_percent, record.corruptions)] for part, record in sweep.records.items()]
    of_spared = [[_shown(row), _percent(row)] for row in spared.corruptions]
    tables = [markdown_table(header, rows, longest=None), markdown_table([LINEAR, METRIC], of_spared, longest=None)]
    return "\n\n".join([f"As it is: {_percent(first.clean)}.", *tables]) + "\n"


def _shown(row: CorruptionRecord) -> str:
    return row.label.removeprefix("weights of ")


def _percent(row: CorruptionRecord) -> str:
    return f"{100 * row.mean(METRIC):.1f}"


def main() -> None:
    """Measure, and write the records and their tables."""
    parser = campaign_parser(__doc__, None, "runs/layers_of_gptq", "`train.tsv.gz`, `dev.tsv.gz` and `test.tsv.gz`")
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    options = begin(parser)
    options.work = of_study(options.work, options.model)
    torch.manual_seed(options.seeds[0])  # in which order texts calibrate
    kept, of_spared = options.output / "sweep.json", options.output / "spared.json"
    if not of_spared.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        sweep, spared = measure(options)
        sweep.save(kept)
        spared.save(of_spared)
    write_table(options.output, table_of(SweepRecord.load(kept), EvaluationRecord.load(of_spared)))


if __name__ == "__main__":
    main()
