"""The unperturbed prefix of a model's computation: run once, reused by every later pass."""

from hf_parcor.prefix.cut import NothingToReuse, PrefixError
from hf_parcor.prefix.plan import plan_prefix, plan_prefix_of_values
from hf_parcor.prefix.plan_recomputed import find_recomputed_prefix, try_recomputed_prefix
from hf_parcor.prefix.recomputed import RecomputedPrefix
from hf_parcor.prefix.reuse import PrefixReuse, recording_together

__all__ = [
    "NothingToReuse",
    "PrefixError",
    "PrefixReuse",
    "RecomputedPrefix",
    "find_recomputed_prefix",
    "plan_prefix",
    "plan_prefix_of_values",
    "recording_together",
    "try_recomputed_prefix",
]
