"""The unperturbed prefix of a model's computation: run once, reused by every later pass."""

from hf_parcor.prefix.plan import NothingToReuse, PrefixError, plan_prefix
from hf_parcor.prefix.reuse import PrefixReuse, recording_together

__all__ = ["NothingToReuse", "PrefixError", "PrefixReuse", "plan_prefix", "recording_together"]
