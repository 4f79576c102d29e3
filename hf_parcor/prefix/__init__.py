"""The unperturbed prefix of a model's computation: run once, reused by every later pass."""

from hf_parcor.prefix.cut import (
    COMPILED_AS_ONE,
    CalledAgain,
    NothingToReuse,
    PrefixError,
    before_calls,
    check_some_is_left,
    is_compiled,
)
from hf_parcor.prefix.plan import (
    TRIED_PASSES,
    FailuresAsPrefixErrors,
    check_results,
    distance,
    find_prefix,
    leaves_of,
    outputs_of,
    plan_prefix,
    plan_prefixes_of_values,
    try_prefix,
)
from hf_parcor.prefix.recomputed import RecomputedPrefix
from hf_parcor.prefix.reuse import PrefixReuse, recording_together
from hf_parcor.prefix.rows import find_rows

__all__ = [
    "COMPILED_AS_ONE",
    "TRIED_PASSES",
    "CalledAgain",
    "FailuresAsPrefixErrors",
    "NothingToReuse",
    "PrefixError",
    "PrefixReuse",
    "RecomputedPrefix",
    "before_calls",
    "check_results",
    "check_some_is_left",
    "distance",
    "find_prefix",
    "find_rows",
    "is_compiled",
    "leaves_of",
    "outputs_of",
    "plan_prefix",
    "plan_prefixes_of_values",
    "recording_together",
    "try_prefix",
]
