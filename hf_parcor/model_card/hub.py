"""A card, or results alone, on the Hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from hf_parcor.model_card.card import read_card, with_metadata
from hf_parcor.model_card.commit import Change, Destination, Published, publish
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.model_card.folder import card_of, files_beside
from hf_parcor.model_card.front_matter import beside_earlier_results, values_of
from hf_parcor.model_card.metadata import eval_result_file, model_index

_LONGEST_MESSAGE = 150
_BENCHMARK = "eval.yaml"  # at the root of a data set that is a registered benchmark


def push_card(facts: ModelFacts, to: Destination) -> Published:
    """Make or update the card of a model on the Hub, with the facts, the results and the pictures beside it.

    The card there keeps what others wrote. It is committed only if nobody changed the repository in between; if
    somebody did, it is read and updated again. If the Hub asks to wait, that is done, a few times.

    Raises:
        HubError: The Hub cannot be reached or refuses. Nothing local was changed: call again.
        ValueError: The card on the Hub cannot be updated; see `updated_card`. Or there is a result for a leaderboard
            that the data set on the Hub does not have.
    """
    files = files_beside(facts)
    message = _message(f"Robustness to parameter corruption of {facts.name}")
    change = Change(lambda text: card_of(facts, files, text), files, message)
    if eval_result_file(facts):
        change = change._replace(check=partial(_check_benchmark, facts))
    return publish(change, to)


def _check_benchmark(facts: ModelFacts, api: HfApi) -> None:
    """Refuse a result for a leaderboard that the Hub does not know.

    Raises:
        ValueError: The data set has no `eval.yaml`, or that no such task, or the task is of another part of the data.
    """
    data = facts.evaluated_on
    try:
        path = Path(api.hf_hub_download(data.id, _BENCHMARK, repo_type="dataset"))
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (EntryNotFoundError, RepositoryNotFoundError, yaml.YAMLError):
        described = None
    tasks = described.get("tasks") if isinstance(described, dict) else None
    known = {str(task.get("id")): task for task in tasks or [] if isinstance(task, dict)}
    task = known.get(facts.benchmark_task)
    if task is None:
        raise ValueError(
            f"benchmark_task: expected a task of {data.id}, as its {_BENCHMARK} on the Hub names them, got "
            f"{facts.benchmark_task!r}, and there {', '.join(known) or 'none'}; leave it out: the leaderboard is for "
            "registered benchmarks"
        )
    pairs = {"config": data.config or "default", "split": data.split}
    other = [name for name, value in pairs.items() if value and str(task.get(name) or value) != value]
    if other:
        raise ValueError(
            f"benchmark_task: expected a result on {other[0]} {task[other[0]]} of {data.id}, as "
            f"{facts.benchmark_task} asks for, got one on {pairs[other[0]]}; measure there, or leave the task out"
        )


def push_results(facts: ModelFacts, to: Destination) -> Published:
    """Add results alone to the `model-index` of a card on the Hub, as `evaluate.push_to_hub` does with one.

    Of our earlier results only those of the same corruptions are replaced. The text and all other metadata stay.

    Args:
        facts: Where the results come from; leave corruptions out to push few.
        to: As in `push_card`.

    Raises:
        HubError: As in `push_card`.
        ValueError: As in `push_card`.
    """

    def update(text: str) -> str:
        earlier = values_of(read_card(text).front_matter).get("model-index")
        return with_metadata(text, {"model-index": beside_earlier_results(earlier, model_index(facts))})

    return publish(Change(update, {}, _message(f"Results under parameter corruption of {facts.name}")), to)


def _message(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_MESSAGE]
