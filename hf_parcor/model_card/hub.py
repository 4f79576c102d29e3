"""A card, or results alone, on the Hub."""

from __future__ import annotations

from hf_parcor.model_card.card import read_card, with_metadata
from hf_parcor.model_card.commit import Change, Destination, Published, publish
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.model_card.folder import card_of, files_beside
from hf_parcor.model_card.front_matter import beside_earlier_results, values_of
from hf_parcor.model_card.metadata import model_index

_LONGEST_MESSAGE = 150


def push_card(facts: ModelFacts, to: Destination) -> Published:
    """Make or update the card of a model on the Hub, with the facts, the results and the pictures beside it.

    The card there keeps what others wrote. It is committed only if nobody changed the repository in between; if
    somebody did, it is read and updated again. If the Hub asks to wait, that is done, a few times.

    Raises:
        HubError: The Hub cannot be reached or refuses. Nothing local was changed: call again.
        ValueError: The card on the Hub cannot be updated; see `updated_card`.
    """
    files = files_beside(facts)
    message = _message(f"Robustness to parameter corruption of {facts.name}")
    return publish(Change(lambda text: card_of(facts, files, text), files, message), to)


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
