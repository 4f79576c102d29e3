"""Which parameters are corrupted: by name as in PEFT, by kind of module, by position, or by a word."""

from hf_parcor.targets.groups import GROUPINGS, Groups, Targets, by_adapter, by_kind, by_layer, by_module
from hf_parcor.targets.kinds import find_input_embedding
from hf_parcor.targets.matching import WORDS, TargetError
from hf_parcor.targets.selection import Selector, select_parameters, select_trainable, sinusoidal_tables
from hf_parcor.targets.stacks import Stack, find_stacks

__all__ = [
    "GROUPINGS",
    "WORDS",
    "Groups",
    "Selector",
    "Stack",
    "TargetError",
    "Targets",
    "by_adapter",
    "by_kind",
    "by_layer",
    "by_module",
    "find_input_embedding",
    "find_stacks",
    "select_parameters",
    "select_trainable",
    "sinusoidal_tables",
]
