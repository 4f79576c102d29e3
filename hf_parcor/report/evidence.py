"""Is a difference beyond the spread? Welch's t-test, corrected for how many are asked."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from hf_parcor.statistics import Alternative, holm_correction, welch_t_test

LEVEL = 0.05
Key = TypeVar("Key", bound=Hashable)


def adjusted_p_values(
    pairs: Mapping[Key, tuple[Sequence[float], Sequence[float]]], alternative: Alternative
) -> dict[Key, float]:
    """Return Holm's adjusted p-values of Welch's test of first against second, of those that can be tested.

    Left out are those with fewer than two values on a side, with a value that is not finite, and those whose values
    do not differ between repetitions at all: that says nothing about the spread.

    Examples:
        >>> pairs = {"a": ([3.0, 3.1, 2.9], [1.0, 1.1, 0.9]), "b": ([1.0], [2.0]), "c": ([1.0, 1.0], [2.0, 2.0])}
        >>> {key: p < LEVEL for key, p in adjusted_p_values(pairs, Alternative.GREATER).items()}
        {'a': True}
    """
    found = {}
    for key, (first, second) in pairs.items():
        if min(len(first), len(second)) > 1 and all(map(math.isfinite, [*first, *second])):
            test = welch_t_test(first, second, alternative)
            if test.standard_error > 0:
                found[key] = test.p_value
    return dict(zip(found, holm_correction(list(found.values())), strict=True))
