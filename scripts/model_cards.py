"""Cards of the models that a command of ours makes, from the records of these runs.

    python -m scripts.model_cards

Each folder `model_cards/NAME` gets `robustness_facts.json`, the card rendered from it, and its pictures;
`model_cards/README.md` lists them. Nothing there is edited by hand: run this again after a campaign. A test compares.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_parcor.cards import EvaluationData, ModelFacts, facts_of
from hf_parcor.cards.folder import FACTS, card_of, files_beside
from hf_parcor.cards.front_matter import RESULTS_FOLDER
from hf_parcor.records import EvaluationRecord, SweepRecord
from hf_parcor.records.metric_info import SHARE
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.tables import markdown_table
from hf_parcor.training import DefenseConfig
from scripts import probe_sst2, quickstart, reproduce_sst2
from scripts.campaigns import Arm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
CARDS = ROOT / "model_cards"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
SST2 = EvaluationData("SST-2", "stanfordnlp/sst2", split="validation")
SNIPPETS = EvaluationData("film-review snippets of vaderSentiment", split="256 held-out sentences")
CAMPAIGN = "python -m scripts.reproduce_sst2 --model MODEL --data FOLDER --output scripts/results/sst2"
DEFAULT = "multi_step_risk-1"  # the arm of the campaign with the default defense
HARDEST = "gradient-based L2 ε=0.1"
HEAD = """# Models that you can train

Each card describes a model that one of our commands trains. `python -m scripts.model_cards` writes the cards from the
records in `scripts/results`. Do not edit them by hand: a test compares them. A card covers as many models as it has
seeds, and `robustness_facts.json` beside it has the values of each.

The weights are not published. To make them, run the command on the card; it starts from
[all-MiniLM-L6-v2](https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), a BERT of 6 layers. For other ways
to train, see the [tables](../scripts/README.md). This is [a card in a browser](pages/wide.png).
"""


def all_facts() -> Iterator[ModelFacts]:
    """Yield the facts of every model, from the records alone."""
    for name, flags in quickstart.ARMS.items():
        yield facts_of(
            EvaluationRecord.load(RESULTS / "quickstart" / f"{name}.json"),
            name=f"quickstart-minilm-{name}",
            evaluated_on=SNIPPETS,
            command="bash scripts/quickstart.sh",
            **shared(Arm(name, flags)),
        )
    yield facts_of(
        [EvaluationRecord.load(RESULTS / "sst2" / f"{DEFAULT}-seed{seed}.json") for seed in (1, 2, 3)],
        name=f"sst2-minilm-{DEFAULT}",
        evaluated_on=SST2,
        datasets=[SST2.id],
        command=CAMPAIGN,
        **shared(reproduce_sst2.ARMS[DEFAULT]),
    )
    yield facts_of(
        SweepRecord.load(RESULTS / "probes" / "defended-seed1-layers.json"),
        name="sst2-minilm-probed-defended",
        evaluated_on=SST2,
        datasets=[SST2.id],
        command=probe_sst2.COMMAND,
        **shared(probe_sst2.ARMS["defended"]),
    )


def shared(arm: Arm) -> dict[str, Any]:
    """Return what all of them have, and how they were defended; `ClassificationMetric` measured, as shares."""
    common = {"base_model": BASE, "task": "text-classification", "unit": SHARE}
    if arm.defense is None:
        return common
    config = DefenseConfig(arm.defense, target_modules=arm.arguments.defense_target_modules).to_dict()
    del config["hf_parcor_version"]  # that of today, not of then
    return {**common, "defense": config}


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
    for folder in {path.parent for path in CARDS.glob(f"*/{FACTS}")} - {CARDS / facts.name for facts in found}:
        shutil.rmtree(folder)
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
