"""The unperturbed prefix of a model's computation: run once, reused by every later pass."""

from hf_parcor.prefix.plan import plan_prefix, plan_prefix_of_values
from hf_parcor.prefix.reuse import PrefixReuse, recording_together
from hf_parcor.prefix.starts import NothingToReuse, PrefixError

__all__ = [
    "NothingToReuse",
    "PrefixError",
    "PrefixReuse",
    "plan_prefix",
    "plan_prefix_of_values",
    "recording_together",
]
