"""The table of the memory that a defended step takes, and what of it can be known without measuring."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from for_each import for_each

from scripts.training_memory import ADAPTERS, BASE, BFLOAT16, FLOAT32, K1, K2, WAYS, WHOLE, bytes_of

pytest.importorskip("peft", reason="adapters need the extra 'peft'")
PAGE = (Path(__file__).parents[2] / "hf_parcor" / "training" / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| ([^|]+?) +\| (float32|bfloat16) +\| ([^|]+?) +\| +([\d.]+) \| +([\d.]+) \|$", PAGE, re.MULTILINE
)


def test_the_page_has_a_row_for_each_way():
    assert [row[:3] for row in ROWS] == [(way.defended, str(way.dtype)[6:], way.said) for way in WAYS]


@pytest.mark.slow
@for_each(
    ("index", "least"),
    [
        (WAYS.index(next(way for way in WAYS if (way.defended, way.defense, way.dtype) == chosen)), least)
        for chosen, least in (
            ((WHOLE, K1, FLOAT32), 4),
            ((WHOLE, K2, BFLOAT16), 4),
            ((ADAPTERS, K1, BFLOAT16), 4),
            ((BASE, WAYS[-1].defense, FLOAT32), 4),
        )
    ],
)
def test_the_page_says_what_is_measured(index, least):
    """The weights at which the corrupted pass runs are beside those that come back: 4 bytes for each of float32.

    In 16 bits 2 of them, and 2 of a gradient.
    """
    each, of_all = bytes_of(WAYS[index])
    assert (f"{each:.1f}", f"{of_all:.2f}") == ROWS[index][3:]
    assert each >= least
