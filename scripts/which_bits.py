"""Which parts of a trained model take which bits? Scores, a recipe for a budget, and the front, measured.

    python -m scripts.which_bits --system sst2 --model MODEL --data FOLDER --output scripts/results/recipe/sst2
    python -m scripts.which_bits --system images --model WEIGHTS --data FOLDER --output scripts/results/recipe/images
    python -m scripts.which_bits --system translation --data FOLDER --output scripts/results/recipe/translation
    python -m scripts.which_bits --system decoder --data WHEEL --output scripts/results/recipe/decoder
    python -m scripts.which_bits --system embeddings --model MODEL --data FOLDER \
        --output scripts/results/recipe/embeddings

`sst2` trains MODEL, a folder or a name on the Hub, on 2,048 sentences, `images` takes `resnet20.safetensors` of a
folder of trained weights, `translation` trains a small model on Multi30k by `scripts.reproduce_translation`, `decoder`
takes the pretrained GPT-2 of the wheel microformer-mgm, unpacked in WHEEL, `embeddings` takes a MODEL of
sentence-transformers as it is. Every linear or convolutional part is scored and measured in every format on some rows:
half of the dev sentences, 1,000 test images, the validation sentences, 48 sequences, every fourth paraphrase; so are
pairs of parts. Recipes, by each cost that they may be chosen by, are judged on other rows: the 1,821 test sentences,
4,000 test images, the BLEU of 500 test translations, 192 sequences, all other paraphrases. No data comes with the
decoder: its sequences are its own samples, on which a loss rises, but for chance, by the divergence from the model as
it is. Paraphrases are two English translations, in Tatoeba, of one German sentence: the first ones are searched for
among the second ones. Formats have one scale a channel: with one for each group of 32 weights the BERT loses little at
3 bits, and there is nothing to choose. Those of `sst2` and `embeddings` are torchao's: where that is installed and
`torchao.json` was written, torchao rounds a copy of the model by that file, it is judged on the same rows, and
`deployed.json` says what came out. The budget is what 4 bits take for all parts (3 bits of `embeddings`, which lose
nothing at 4), scales included, rounded up to a tenth. The output folder gets what `hf-parcor probe --recipe` writes.
What is finished is kept, so an interrupted run goes on. It runs on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel

from hf_parcor import Quantization, RecipeReport, by_module, export_recipe, measure_recipes, recipe, sensitivity
from hf_parcor.evaluation import ClassificationMetric, EmbeddingMetric
from hf_parcor.evaluation.metrics import BatchMetric, LanguageModelMetric, WithDivergence
from hf_parcor.evaluation.metrics.language_model import padded_windows
from hf_parcor.evaluation.metrics.loss import LossMetric
from hf_parcor.recipes import front, measure_pairs, uniform_recipe
from hf_parcor.records.metric_info import SHARE
from hf_parcor.strict_json import read_strict_json, to_strict_json
from hf_parcor.targets.groups import Groups
from hf_parcor.tasks import TASKS, Processed, Rows, read_file
from scripts import reproduce_paper_1, reproduce_translation, sst2_runs
from scripts.campaigns import DEVICE, PLAIN, Run, begin, campaign_parser, note_run, of_study
from scripts.translation_studies import STUDIES

FORMATS, TORCHAO, OF_EMBEDDINGS = (
    tuple(Quantization(bits, per="channel", code_range=codes, arithmetic=numbers) for bits in all_bits)
    for codes, numbers, all_bits in (
        ("restricted", "float32", (8, 6, 5, 4, 3)),
        ("full", "weight", (8, 6, 5, 4, 3)),
        ("full", "weight", (8, 4, 3, 2)),
    )
)
PROBES = 1
PAIRS = 20
SCORED, SAMPLES, SAMPLED_AT_ONCE, IN_BATCH = 48, 240, 60, 8
FEWEST_WORDS, PARAPHRASES_IN_BATCH = 5, 50


class Judged(NamedTuple):
    """A trained model, what its parts are measured on, and what whole recipes are judged on."""

    title: str
    folder: Path
    model: nn.Module
    metric: BatchMetric
    judge: BatchMetric
    shown: str
    groups: Groups | None = None
    beside: Sequence[str] = ("loss",)
    formats: Sequence[Quantization] = FORMATS
    of_budget: int = 4


def sst2(options: argparse.Namespace) -> Judged:
    """Return the BERT of 2,048 sentences."""
    run = Run("plain", PLAIN, options.seeds[0])
    folder = sst2_runs.train(options, run)
    note_run(options.output, options.work, run, options.threads)
    model, batches = sst2_runs.model_and_batches(options, folder)
    test = sst2_runs.sentence_batches(AutoTokenizer.from_pretrained(folder), options.data / "test.tsv.gz")
    return Judged(
        "a small BERT on SST-2",
        folder,
        model,
        ClassificationMetric(batches[::2]),  # sorted by length: a half that is like the other
        ClassificationMetric(test),
        "accuracy",
        beside=("loss", "accuracy"),
        formats=TORCHAO,
    )


def images(options: argparse.Namespace) -> Judged:
    """Return the ResNet-20 of the trained weights."""
    options.weights, options.device = Path(options.model), DEVICE
    model = reproduce_paper_1.load_model(options, 20)
    batches, _ = reproduce_paper_1.load_batches(str(options.data / reproduce_paper_1.FILES["test"]), 5_000)
    parts = {
        name: target
        for name, target in by_module(model).items()
        if isinstance(model.get_submodule(name), (nn.Conv2d, nn.Linear))
    }
    return Judged(
        "a ResNet-20 on CIFAR-10",
        options.work / "resnet20",
        model,
        ClassificationMetric(batches[:4]),
        ClassificationMetric(batches[4:]),
        "accuracy",
        groups=parts,
        beside=("loss", "accuracy"),
    )


def translation(options: argparse.Namespace) -> Judged:
    """Return the small model of Multi30k."""
    study = STUDIES["multi30k"]
    folder = reproduce_translation.train(options, study, Run("plain", PLAIN, options.seeds[0]))
    options.test_sentences = 500
    judged = reproduce_translation.Measured(options, study, folder)
    batches, _ = judged.sorted_batches(reproduce_translation.read(options, study, "validation"))
    return Judged(
        "a small translation model on Multi30k",
        folder,
        judged.model,
        LossMetric(batches),
        judged.metric,
        "tokenized_bleu",
    )


def samples(model: Any, count: int, seed: int) -> list[list[int]]:
    """Return sequences of tokens that a decoder draws from its own distribution, each from its start to its end.

    Args:
        model: The decoder, as Transformers has it, in evaluation mode.
        count: How many.
        seed: Of PyTorch's generator.
    """
    torch.manual_seed(seed)
    start, end = model.config.bos_token_id, model.config.eos_token_id
    found = []
    for first in range(0, count, SAMPLED_AT_ONCE):
        prompts = torch.full((min(SAMPLED_AT_ONCE, count - first), 1), start, device=model.device)
        drawn = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,  # Transformers draws from the 50 likeliest unless told
            max_length=model.config.n_positions,
        )
        # What follows the end pads those that were done before others.
        found += [row[: row.index(end) + 1] if end in row else row for row in drawn.tolist()]
    return found


def sequence_batches(sequences: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Return batches for a causal model, of sequences that are about as long; every token but the first counts."""
    ordered = [{"input_ids": one, "labels": one} for one in sorted(sequences, key=len)]
    batches = (padded_windows(ordered[first : first + IN_BATCH]) for first in range(0, len(ordered), IN_BATCH))
    return [{name: values.to(DEVICE) for name, values in batch.items()} for batch in batches]


def decoder(options: argparse.Namespace) -> Judged:
    """Return the pretrained GPT-2 of microbiomes, whose sequences are genera from the most to the least abundant."""
    loaded: nn.Module = GPT2LMHeadModel.from_pretrained(options.data / "mgm" / "resources" / "general_model")
    model = loaded.to(DEVICE).eval()
    folder = options.work / "decoder"
    kept = folder / f"samples-seed{options.seeds[0]}.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(to_strict_json(samples(model, SAMPLES, options.seeds[0])) + "\n", encoding="utf-8")
    sequences = read_strict_json(kept)
    judge = LanguageModelMetric(sequence_batches(sequences[SCORED:]))
    return Judged(
        "a GPT-2 of microbiomes",
        folder,
        model,
        LanguageModelMetric(sequence_batches(sequences[:SCORED])),
        WithDivergence(judge, model),
        "perplexity",
    )


def paraphrases(folder: Path) -> list[dict[str, str]]:
    """Return English sentences that translate the same German one: of each of these the first two, in their order.

    Args:
        folder: With `train.tsv.gz`, `dev.tsv.gz` and `test.tsv.gz`, each with the columns `en` and `de`.
    """
    found: dict[str, dict[str, None]] = {}
    for part in ("train", "dev", "test"):
        for row in read_file(folder / f"{part}.tsv.gz"):
            found.setdefault(row["de"], {})[row["en"]] = None
    pairs = [list(sentences)[:2] for sentences in found.values() if len(sentences) > 1]
    return [{"anchor": one, "positive": two} for one, two in pairs if len(one.split()) >= FEWEST_WORDS]


def embeddings(options: argparse.Namespace) -> Judged:
    """Return a published model of sentence-transformers."""
    task, rows = TASKS["sentence-similarity"], paraphrases(options.data)
    model = task.load_model(options.model).to(DEVICE).eval()
    processed = Processed(model, None)

    def metric(entries: list[dict[str, str]]) -> EmbeddingMetric:
        part = Rows("paraphrases", entries, ("anchor", "positive"))
        examples = task.examples(part, task.find_columns(part, {}), processed)
        return EmbeddingMetric(task.batches(examples, processed, PARAPHRASES_IN_BATCH))

    return Judged(
        "all-MiniLM-L6-v2, which embeds sentences",
        options.work / "embeddings",
        model,
        metric(rows[::4]),
        metric([row for place, row in enumerate(rows) if place % 4]),
        "ndcg@10",
        beside=("loss", "ndcg@10"),
        formats=OF_EMBEDDINGS,
        of_budget=3,
    )


def deployed(judged: Judged, folder: Path, part: str) -> dict[str, float] | None:
    """Return the metrics of a copy that torchao rounded by the recipe's file; None without torchao or a file.

    Args:
        judged: The model.
        folder: With the file.
        part: The name of the part of the model that the file is for; "" for all of it.
    """
    path = folder / "torchao.json"
    if not path.is_file() or importlib.util.find_spec("torchao") is None:
        return None
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    copied = copy.deepcopy(judged.model)
    config = config_from_dict(read_strict_json(path)["quant_type"]["default"])
    quantize_(copied.get_submodule(part), config, filter_fn=None)
    return dict(judged.judge(copied))


SYSTEMS: dict[str, Callable[[argparse.Namespace], Judged]] = {
    "sst2": sst2,
    "images": images,
    "translation": translation,
    "decoder": decoder,
    "embeddings": embeddings,
}
TAKES_MODEL = ("sst2", "images", "embeddings")


def main() -> None:
    """Train, score, choose, measure and write down."""
    parser = campaign_parser(__doc__, None, "runs/which_bits", "the system's files")
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--model", help="a folder or a name on the Hub; of images: the folder with weights")
    options = begin(parser)
    options.work = of_study(options.work, options.system, options.model)
    if options.model is None and options.system in TAKES_MODEL:
        parser.error(f"--model: expected what --system {options.system} starts from, got nothing; see --help")
    options.size = sst2_runs.SIZES["small"]
    judged = SYSTEMS[options.system](options)
    stated: dict[str, Any] = {"unit": SHARE} if judged.shown == "accuracy" else {}
    kept = judged.folder / "sensitivity.jsonl"
    scores = sensitivity(judged.model, judged.metric, judged.formats, judged.groups, probes=PROBES, checkpoint=kept)
    if judged.shown in scores.clean:
        scores = scores.stating(judged.shown, **stated)
    (budget,) = (one for one in judged.formats if one.bits == judged.of_budget)
    bits = math.ceil(round(10 * uniform_recipe(scores, str(budget)).bits, 6)) / 10
    chosen = recipe(scores, bits=bits)
    recipes = front(scores, chosen) | {f"by {cost}": recipe(scores, bits=bits, by=cost) for cost in judged.beside}
    measured = measure_recipes(judged.model, judged.judge, recipes, checkpoint=judged.folder / "recipe_measured.jsonl")
    measured = measured.stating(judged.shown, **stated)
    chosen = measure_pairs(
        judged.model, judged.metric, scores, chosen, pairs=PAIRS, checkpoint=judged.folder / "recipe_pairs.jsonl"
    )
    scores.save(options.output / "sensitivity.json")
    measured.save(options.output / "recipe_measured.json")
    files = [path.name for path in export_recipe(chosen, options.output).files]
    found = deployed(judged, options.output, chosen.loaded_part)
    if found is not None:
        (row,) = (one for one in measured.corruptions if one.label == "recipe")
        said = {"by": "torchao", "metrics": found, "predicted": {name: row.mean(name) for name in found}}
        (options.output / "deployed.json").write_text(to_strict_json(said) + "\n", encoding="utf-8")
    title = f"Which parts of {judged.title} take which bits?"
    report = RecipeReport(scores, chosen, measured, title=title, metric=judged.shown, files=files)
    report.to_html(options.output / "recipe.html")
    report.to_markdown(options.output / "README.md")
    print(*report.verdict, sep="\n")


if __name__ == "__main__":
    main()
