"""The unperturbed prefix of a model's computation: run once, reused by every later pass."""

from hf_parcor.prefix.plan import PrefixError, plan_prefix
from hf_parcor.prefix.reuse import PrefixReuse

__all__ = ["PrefixError", "PrefixReuse", "plan_prefix"]
