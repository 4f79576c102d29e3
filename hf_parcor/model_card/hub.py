"""A card, or results alone, on the Hub."""

from __future__ import annotations

from huggingface_hub import HfApi

from hf_parcor.model_card.card import read_card, with_metadata
from hf_parcor.model_card.commit import Change, Published, publish
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.model_card.folder import card_of, files_beside
from hf_parcor.model_card.front_matter import beside_earlier_results, values_of
from hf_parcor.model_card.metadata import model_index

_LONGEST_MESSAGE = 150


def push_card(
    facts: ModelFacts,
    repo_id: str,
    *,
    create_pr: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    api: HfApi | None = None,
) -> Published:
    """Make or update the card of a model on the Hub, with the facts, the results and the picture beside it.

    The card there keeps what others wrote. It is committed only if nobody changed the repository in between; if
    somebody did, it is read and updated again. If the Hub asks to wait, that is done, a few times.

    Args:
        facts: What to say.
        repo_id: The model on the Hub; it is made if need be, but not for a pull request.
        create_pr: Whether to open a pull request instead, for the models of others.
        dry_run: Whether to send nothing, and only return the difference.
        revision: The branch; None for main.
        token: None, the default, for the one that `hf auth login` stored, or `HF_TOKEN`.
        api: A client; None for one with this token.

    Raises:
        HubError: The Hub cannot be reached or refuses. Nothing local was changed: call again.
        ValueError: The card on the Hub cannot be updated; see `updated_card`.
    """
    files = files_beside(facts)
    change = Change(
        lambda text: card_of(facts, files, text),
        files,
        _message(f"Robustness to parameter corruption of {facts.name}"),
    )
    api = api or HfApi(token=token)
    return publish(api, change, repo_id, create_pr=create_pr, dry_run=dry_run, revision=revision)


def push_results(
    facts: ModelFacts,
    repo_id: str,
    *,
    create_pr: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    api: HfApi | None = None,
) -> Published:
    """Add results alone to the `model-index` of a card on the Hub, as `evaluate.push_to_hub` does with one.

    Of our earlier results only those of the same corruptions are replaced. The text and all other metadata stay.

    Args:
        facts: Where the results come from; leave corruptions out to push few.
        repo_id: As in `push_card`.
        create_pr: As in `push_card`.
        dry_run: As in `push_card`.
        revision: As in `push_card`.
        token: As in `push_card`.
        api: As in `push_card`.

    Raises:
        HubError: As in `push_card`.
        ValueError: As in `push_card`.
    """

    def update(text: str) -> str:
        earlier = values_of(read_card(text).front_matter).get("model-index")
        return with_metadata(text, {"model-index": beside_earlier_results(earlier, model_index(facts))})

    change = Change(update, {}, _message(f"Results under parameter corruption of {facts.name}"))
    api = api or HfApi(token=token)
    return publish(api, change, repo_id, create_pr=create_pr, dry_run=dry_run, revision=revision)


def _message(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_MESSAGE]
