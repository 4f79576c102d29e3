"""What holds for every selection: unions, differences, order, and an independent definition of a match."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_parcor.targets import TargetError, find_stacks, select_parameters

ARCHITECTURES = ["bert", "albert", "t5", "bart", "gpt2", "llama-tied"]
WORDS_OF_ALL = ["all", "all-linear", "layer-norm", "attention", "embedding"]
FEW = settings(max_examples=25)

architectures = st.sampled_from(ARCHITECTURES)


def aliases(model: nn.Module) -> dict[str, str]:
    """Map every name of every parameter to its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@st.composite
def entries_of(draw: st.DrawFn, model: nn.Module, min_size: int = 1) -> list[str]:
    """Draw dotted ends of the names of modules and parameters, and words."""
    targets = sorted({prefix for name in aliases(model) for prefix in prefixes(name)})

    def draw_end() -> str:
        parts = draw(st.sampled_from(targets)).split(".")
        return ".".join(parts[draw(st.integers(0, len(parts) - 1)) :])

    count = draw(st.integers(min_size, 4))
    return [draw(st.sampled_from(WORDS_OF_ALL)) if draw(st.booleans()) else draw_end() for _ in range(count)]


@FEW
@given(data=st.data(), architecture=architectures)
def test_a_list_is_the_union_of_its_entries_in_the_order_of_the_model(model_of, data, architecture: str) -> None:
    model = model_of(architecture)
    entries = data.draw(entries_of(model))
    union = set().union(*(select_parameters(model, [entry]) for entry in entries))
    assert list(select_parameters(model, entries)) == [name for name, _ in model.named_parameters() if name in union]


@pytest.mark.slow
@FEW
@given(data=st.data(), architecture=architectures)
def test_exclusion_is_the_difference_and_all_of_it_is_an_error(model_of, data, architecture: str) -> None:
    model = model_of(architecture)
    entries, excluded = data.draw(entries_of(model)), data.draw(entries_of(model))
    with pytest.raises(TargetError, match="exclude_modules to leave some"):
        select_parameters(model, entries, exclude_modules=entries)
    kept = [name for name in select_parameters(model, entries) if name not in select_parameters(model, excluded)]
    if kept:
        assert list(select_parameters(model, entries, exclude_modules=excluded)) == kept
    else:
        with pytest.raises(TargetError, match="exclude_modules to leave some"):
            select_parameters(model, entries, exclude_modules=excluded)


@FEW
@given(data=st.data(), architecture=architectures)
def test_a_match_is_a_match_of_some_prefix_of_some_name(model_of, data, architecture: str) -> None:
    model = model_of(architecture)
    (entry,) = data.draw(
        entries_of(model).filter(lambda drawn: drawn[0] not in WORDS_OF_ALL).map(lambda drawn: drawn[:1])
    )
    by_suffix, by_pattern = set(), set()
    pattern = rf"(.*\.)?{re.escape(entry)}"
    for name, first in aliases(model).items():
        if any(prefix == entry or prefix.endswith("." + entry) for prefix in prefixes(name)):
            by_suffix.add(first)
        if any(re.fullmatch(pattern, prefix) for prefix in prefixes(name)):
            by_pattern.add(first)
    assert set(select_parameters(model, [entry])) == by_suffix
    assert set(select_parameters(model, pattern)) == by_pattern


@FEW
@given(data=st.data(), architecture=architectures)
def test_layers_divide_what_lies_in_the_stacks(model_of, data, architecture: str) -> None:
    model = model_of(architecture)
    stacks = find_stacks(model)
    depth = max(map(len, stacks))
    layers = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1, max_size=3))
    inside = [
        name
        for name, _ in model.named_parameters()
        for stack in stacks
        if name.startswith(tuple(f"{stack.name}.{layer % len(stack)}." for layer in layers))
    ]
    assert list(select_parameters(model, layers=layers)) == inside
