"""Which layers of a small BERT on SST-2 take which bits? Scores, a recipe for a budget, and the front, measured.

    python -m scripts.recipe_sst2 --model MODEL --data FOLDER --output scripts/results/recipe

MODEL is a folder or a name on the Hub, FOLDER holds `train_sentences.tsv.gz`, `dev.tsv.gz` and `test.tsv.gz`. The
model is trained by `examples/train_sst2.py` on 2,048 sentences, and every linear module is scored and measured in
every format on one half of the dev sentences; recipes, by each cost that they may be chosen by, are judged on the
1,821 test sentences. Formats have one scale a channel: with one for each group of 32 weights this model loses little
at 3 bits, and there is nothing to choose. The output folder gets what `hf-parcor probe --recipe` writes, and
`runs.json` with what made it. What is finished is kept, so an interrupted run goes on. It runs on a GPU where there
is one.
"""

from __future__ import annotations

from transformers import AutoTokenizer

from hf_parcor import Quantization, RecipeReport, export_recipe, measure_recipes, recipe, sensitivity
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.recipes import front
from hf_parcor.records.metric_info import SHARE
from scripts.campaigns import PLAIN, Run, note_run
from scripts.sst2_runs import model_and_batches, parse_options, sentence_batches, train

COMMAND = "python -m scripts.recipe_sst2 --model MODEL --data FOLDER --output scripts/results/recipe"
FORMATS = tuple(Quantization(bits, per="channel") for bits in (8, 6, 5, 4, 3))
BITS = 4.1  # what 4 bits take for all, scales included
PROBES = 1


def main() -> None:
    """Train, score, choose, measure and write down."""
    options = parse_options(__doc__, {"plain": PLAIN}, "runs/recipe_sst2", seeds=1)
    run = Run("plain", PLAIN, options.seeds[0])
    folder = train(options, run)
    note_run(options.output, options.work, run, options.threads, command=COMMAND)
    model, batches = model_and_batches(options, folder)
    metric = ClassificationMetric(batches[::2])  # sorted by length: a half that is like the other
    judge = ClassificationMetric(sentence_batches(AutoTokenizer.from_pretrained(folder), options.data / "test.tsv.gz"))
    scores = sensitivity(model, metric, FORMATS, probes=PROBES, checkpoint=folder / "sensitivity.jsonl")
    scores = scores.stating("accuracy", unit=SHARE)
    chosen = recipe(scores, bits=BITS)
    recipes = front(scores, chosen) | {
        f"by {cost}": recipe(scores, bits=BITS, by=cost) for cost in ("loss", "accuracy")
    }
    measured = measure_recipes(model, judge, recipes, checkpoint=folder / "recipe_measured.jsonl")
    scores.save(options.output / "sensitivity.json")
    measured.save(options.output / "recipe_measured.json")
    export_recipe(chosen, options.output)
    report = RecipeReport(scores, chosen, measured, title="Which parts of a small BERT on SST-2 take which bits?")
    report.to_html(options.output / "recipe.html")
    report.to_markdown(options.output / "README.md")
    print(*report.verdict, sep="\n")


if __name__ == "__main__":
    main()
