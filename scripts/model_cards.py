"""Facts and cards of all models that our campaigns trained, from their records.

    python -m scripts.model_cards

Each folder `model_cards/NAME` gets `robustness_facts.json`, the card rendered from it, and its pictures;
`model_cards/README.md` lists them. Nothing there is edited by hand: run this again after a campaign. A test compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_parcor.cards import EvaluationData, ModelFacts, facts_of
from hf_parcor.cards.folder import card_of, files_beside
from hf_parcor.cards.front_matter import RESULTS_FOLDER
from hf_parcor.records import EvaluationRecord, SweepRecord
from hf_parcor.records.metric_info import SHARE
from hf_parcor.reports.markup import markdown_table
from hf_parcor.reports.numbers import Numbers
from hf_parcor.training import DefenseArguments, DefenseConfig, build_defense

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
CARDS = ROOT / "model_cards"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
SST2 = EvaluationData("SST-2", "stanfordnlp/sst2", split="validation")
SNIPPETS = EvaluationData("film-review snippets of vaderSentiment", split="256 held-out sentences")
QUICKSTART = {
    "plain": ["--defense", "none"],
    "defended": ["--defense_epsilon", "0.1", "--defense_steps", "1", "--defense_start_epoch", "0.25"],
}
PROBES = CARDS / "sst2-minilm-probes"
CAMPAIGNS = {
    "sst2": "python -m scripts.reproduce_sst2 --model MODEL --data FOLDER --output scripts/results/sst2",
    "less": "python -m scripts.defend_for_less --model MODEL --data FOLDER --output scripts/results/less",
}
HARDEST = "gradient-based L2 ε=0.1"
HEAD = """# Models of our campaigns

A card for each way of training, made by `python -m scripts.model_cards` from the records in `scripts/results`; nothing
here is edited by hand, and a test compares. Each card tells of as many models as it has seeds; the values of each are
in `robustness_facts.json` beside it. The weights are not published. The base is
[all-MiniLM-L6-v2](https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), a BERT of 6 layers.
Of two more models [probes](sst2-minilm-probes/README.md) say which parts are weak: their cards have a heat map of the
layers. The others were not probed. Two cards as pages in a browser: [on a desk](pages/wide.png),
[on a phone](pages/phone.png).
"""


def all_facts() -> Iterator[ModelFacts]:
    """Yield the facts of every model, from the records alone."""
    for campaign, command in CAMPAIGNS.items():
        folder = RESULTS / campaign
        runs = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
        for arm, names in groupby(sorted(runs), key=lambda name: name.rpartition("-seed")[0]):
            seeds = list(names)
            yield facts_of(
                [EvaluationRecord.load(folder / f"{seed}.json") for seed in seeds],
                name=f"{campaign}-minilm-{arm}",
                evaluated_on=SST2,
                datasets=[SST2.id],
                defense=defense_of(runs[seeds[0]]["flags"]),
                command=command,
                **shared(),
            )
    for arm, flags in QUICKSTART.items():
        record = EvaluationRecord.load(RESULTS / "quickstart" / f"{arm}.json")
        yield facts_of(
            record,
            name=f"quickstart-minilm-{arm}",
            evaluated_on=SNIPPETS,
            defense=defense_of(flags),
            command="bash scripts/quickstart.sh",
            **shared(),
        )
    for run, how in json.loads((PROBES / "runs.json").read_text(encoding="utf-8")).items():
        yield facts_of(
            SweepRecord.load(PROBES / f"{run}-layers.json"),
            name=f"sst2-minilm-probed-{run.rpartition('-seed')[0]}",
            evaluated_on=SST2,
            datasets=[SST2.id],
            defense=defense_of(how["flags"]),
            command=how["command"],
            **shared(),
        )


def shared() -> dict[str, Any]:
    """Return what all of them have in common; `ClassificationMetric` measured, as shares."""
    return {"base_model": BASE, "task": "text-classification", "unit": SHARE}


def defense_of(flags: list[str]) -> dict[str, Any] | None:
    """Return the defense that flags describe, as the card shows it."""
    parser = HfArgumentParser(DefenseArguments)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(flags)
    defense = build_defense(arguments)
    if defense is None:
        return None
    plain = DefenseConfig(defense, target_modules=arguments.defense_target_modules).to_dict()
    return {name: value for name, value in plain.items() if name != "hf_parcor_version"}  # that of today, not of then


def index(facts: list[ModelFacts]) -> str:
    """Return the list of all cards."""
    header = ("card", "models", "no corruption (%)", f"{HARDEST} (%)")
    lines = markdown_table(header, map(row_of, facts)).splitlines()
    linked = [
        f"| [{one.name}]({one.name}/README.md) {line[2:].partition(' ')[2]}"
        for one, line in zip(facts, lines[2:], strict=True)
    ]
    return "\n".join([HEAD, *lines[:2], *linked]) + "\n"


def row_of(facts: ModelFacts) -> list[str]:
    """Return the row of a model in the list."""
    numbers = Numbers(facts.info.unit)
    clean = facts.clean.metrics[facts.metric]
    hardest = [row.metrics[facts.metric].mean for row in facts.corruptions if row.label == HARDEST]
    count = clean.n if facts.repetitions == "trainings" else 1
    return [facts.name, str(count), numbers.value(clean.mean), *(map(numbers.value, hardest) if hardest else ["–"])]


def main() -> None:
    """Write all of them."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = list(all_facts())
    for facts in found:
        files = files_beside(facts)
        folder = CARDS / facts.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if not name.startswith(RESULTS_FOLDER):  # nothing here goes to the Hub
                (folder / name).write_bytes(content)
        (folder / "README.md").write_text(card_of(facts, files), encoding="utf-8")
    (CARDS / "README.md").write_text(index(found), encoding="utf-8")
    print(f"{len(found)} cards in {CARDS.name}/")


if __name__ == "__main__":
    main()
