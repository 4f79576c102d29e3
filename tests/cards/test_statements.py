"""Each statement of a card: facts of which it holds, facts of which it does not, and it is said of the first."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from for_each import for_each

from hf_parcor.cards import EvaluationData, with_probe
from hf_parcor.cards.folder import card_of
from hf_parcor.cards.text import CURVES

DEFENSE = {"defense": "sam", "settings": {"alpha": 0.5, "steps": None}, "target_modules": ["head"]}


@pytest.fixture
def made(facts_with, record_of, probe_of, probed_record):
    """Return a card whose record is changed, and of which is said what `facts_with` takes."""

    def build(record=None, *, probe=None, seeds=(), pictures=(CURVES,), **options):
        first = replace(record_of(), **(record or {}))
        if seeds:
            options["record"] = [first, *(replace(record_of(clean=clean), weights=f"{clean}") for clean in seeds)]
        elif probe is not None:
            options["record"] = replace(probed_record, **(record or {}))
        else:
            options["record"] = first
        facts = facts_with(**options)
        if probe is not None:
            facts = with_probe(facts, probe_of(**probe))
        return re.sub(" +", " ", card_of(facts, dict.fromkeys(pictures, b"")))

    return build


def once(record_of):
    return {"corruptions": record_of(values=(0.5,)).corruptions}


# Words of a statement; the facts that have it; the nearest ones that must not. A function is of `record_of`.
STATEMENTS = {
    # What it is of
    "It was measured with hf_parcor on": ({}, {"record": {"corruptions": ()}}),
    "has not been measured": ({"record": {"corruptions": ()}}, {"record": {"corruptions": ()}, "probe": {}}),
    "open to corruption (`all`)": ({}, {"record": {"target": {"target_modules": "all", "exclude_modules": ["a"]}}}),
    "(`all that are trained`)": ({"record": {"target": {}}}, {}),
    "exclude_modules `a`": ({"record": {"target": {"target_modules": "all", "exclude_modules": ["a"]}}}, {}),
    "layers `0`": ({"record": {"target": {"target_modules": "all", "layers": [0]}}}, {}),
    "The model was made from [org/bert]": ({}, {"base_model": ""}),
    "It was trained on [org/reviews]": ({}, {"datasets": []}),
    ", small, test, 6 rows": (
        {"evaluated_on": EvaluationData("Reviews", "org/reviews", "small", "test", "", 6)},
        {"evaluated_on": EvaluationData("Reviews", "org/reviews", "", "test", "", 6)},
    ),
    # Repetitions
    "n counts random trials": ({}, {"seeds": (0.7,)}),
    "n counts models that were trained alike": ({"seeds": (0.7,)}, {}),
    "Everything was measured once": (lambda of: {"record": once(of)}, {}),
    # What stands beside it
    "![accuracy of tiny-bert against the strength of": ({}, {"pictures": ()}),
    "Noticed while measuring": ({"record": {"notes": ("slow",)}}, {}),
    "- slow": ({"record": {"notes": ("slow",)}}, {}),
    "### Which part is weak?": ({"probe": {}}, {}),
    "gradient-based L2 ε=0.5: noted": ({"probe": {"notes": ["noted"]}}, {"probe": {}}),
    # Defense
    "were defended in training by `sam`": ({"defense": DEFENSE}, {"defense": {**DEFENSE, "defended_steps": 0}}),
    "in all of its 1,000 steps": (
        {"defense": {**DEFENSE, "defended_steps": 1000, "trained_steps": 1000}},
        {"defense": {**DEFENSE, "defended_steps": 999, "trained_steps": 1000}},
    ),
    "in 999 of 1,000 steps": (
        {"defense": {**DEFENSE, "defended_steps": 999, "trained_steps": 1000}},
        {"defense": {**DEFENSE, "defended_steps": 1000, "trained_steps": 1000}},
    ),
    "in 9 of an unknown number of steps": (
        {"defense": {**DEFENSE, "defended_steps": 9}},
        {"defense": {**DEFENSE, "defended_steps": 9, "trained_steps": 10}},
    ),
    "not defended in training, as far as is known": (
        {"defense": None},
        {"defense": {**DEFENSE, "defended_steps": 0, "trained_steps": 8}},
    ),
    "in none of 8 steps": (
        {"defense": {**DEFENSE, "defended_steps": 0, "trained_steps": 8}},
        {"defense": {**DEFENSE, "defended_steps": 0}},
    ),
    "| alpha | 0.5 |": ({"defense": DEFENSE}, {"defense": {**DEFENSE, "settings": {"alpha": 0.3}}}),
    "| steps |": ({"defense": {**DEFENSE, "settings": {"steps": 2}}}, {"defense": DEFENSE}),
    "| target_modules | head |": ({"defense": DEFENSE}, {"defense": {**DEFENSE, "target_modules": None}}),
    # How to reproduce
    "python train.py --seed 1": ({}, {"command": ""}),
    "data of the gradients (SHA-256): not given": ({"record": {"data": ""}}, {}),
    "data of the gradients (SHA-256): ab12": ({}, {"record": {"data": "cd34"}}),
    "- weights (SHA-256): not known": ({"seeds": (0.7,)}, {"record": {"weights": "ab12"}, "seeds": (0.7,)}),
    "- weights (SHA-256):": ({"record": {"weights": "ab12"}}, {}),
    "- corrupted: target_modules: all": ({}, {"record": {"target": {"target_modules": ["head"]}}}),
    "- torch: 2.0": ({}, {"record": {"versions": {"torch": "2.1"}}}),
    # Front matter
    "- parameter-corruption": ({}, {"record": {"corruptions": ()}}),
    "- adversarial-parameter-defense": ({"defense": DEFENSE}, {"defense": {**DEFENSE, "defended_steps": 0}}),
    "base_model: org/bert": ({}, {"base_model": ""}),
    "datasets:\n- org/reviews": ({}, {"datasets": []}),
    "metrics:\n- accuracy": ({}, {"metric": "loss"}),
    "pipeline_tag: text-classification": ({}, {"task": ""}),
    "type: unknown\n dataset": ({"task": ""}, {}),
    "type: unknown\n split": ({"evaluated_on": EvaluationData("dev.tsv", split="test")}, {}),
    "\n config: small": (
        {"evaluated_on": EvaluationData("Reviews", "org/reviews", "small")},
        {"evaluated_on": EvaluationData("Reviews", "org/reviews")},
    ),
    "\n revision: abc": (
        {"evaluated_on": EvaluationData("Reviews", "org/reviews", revision="abc")},
        {"evaluated_on": EvaluationData("Reviews", "org/reviews")},
    ),
    "\n split: test": ({}, {"evaluated_on": EvaluationData("Reviews", "org/reviews")}),
    "repetitions: trials": ({}, {"seeds": (0.7,)}),
    "repetitions: trainings": ({"seeds": (0.7,)}, {}),
    "standard_deviation:": ({}, lambda of: {"record": once(of)}),
}


@pytest.mark.slow
@for_each("words", STATEMENTS)
def test_is_said_where_it_holds_and_nowhere_else(made, record_of, words):
    holds, does_not = STATEMENTS[words]
    for facts, said in ((holds, True), (does_not, False)):
        assert (words in made(**(facts(record_of) if callable(facts) else facts))) is said


def test_the_picture_does_not_claim_each_corruption(made):
    """What was measured at one strength has no curve."""
    assert "each corruption" not in made()
