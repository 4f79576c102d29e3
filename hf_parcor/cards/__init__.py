"""Robustness on the model card: facts from records, the card from facts, and both on the Hub."""

from hf_parcor.cards.facts import ModelFacts, ProbeFacts, RecipeFacts, facts_of, with_probe, with_recipe
from hf_parcor.cards.folder import write_card
from hf_parcor.cards.hub import Destination, HubError, Published, push_card, push_results
from hf_parcor.records.data import EvaluationData

__all__ = [
    "Destination",
    "EvaluationData",
    "HubError",
    "ModelFacts",
    "ProbeFacts",
    "Published",
    "RecipeFacts",
    "facts_of",
    "push_card",
    "push_results",
    "with_probe",
    "with_recipe",
    "write_card",
]
