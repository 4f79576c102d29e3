"""Robustness on the model card: facts from records, the card from facts, and both on the Hub."""

from hf_parcor.evaluation.data import EvaluationData
from hf_parcor.model_card.commit import Destination, HubError, Published
from hf_parcor.model_card.facts import ModelFacts, ProbeFacts
from hf_parcor.model_card.folder import write_card
from hf_parcor.model_card.gathering import facts_of, with_probe
from hf_parcor.model_card.hub import push_card, push_results

__all__ = [
    "Destination",
    "EvaluationData",
    "HubError",
    "ModelFacts",
    "ProbeFacts",
    "Published",
    "facts_of",
    "push_card",
    "push_results",
    "with_probe",
    "write_card",
]
