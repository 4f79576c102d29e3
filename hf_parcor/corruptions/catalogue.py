"""All corruptions by the name that records and command lines use: one line each; their flags; those of Table 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions.bit_flips import BitFlips
from hf_parcor.corruptions.corruption import Corruption
from hf_parcor.corruptions.gradient import GradientCorruption
from hf_parcor.corruptions.multi_step import MultiStepCorruption
from hf_parcor.corruptions.noise import GaussianNoise, UniformNoise
from hf_parcor.corruptions.quantization import Quantization
from hf_parcor.corruptions.random import RandomCorruption
from hf_parcor.errors import InputError, nearest

CORRUPTIONS: Mapping[str, type[Corruption]] = MappingProxyType(
    {
        "random": RandomCorruption,
        "gradient": GradientCorruption,
        "multi_step": MultiStepCorruption,
        "gaussian": GaussianNoise,
        "uniform": UniformNoise,
        "quantization": Quantization,
        "bit_flips": BitFlips,
    }
)


def corruptions_of_table_1() -> list[Corruption]:
    """Return the kinds of corruption of paper 2, Table 1, and bit flips, at strengths that break a small BERT.

    Examples:
        >>> print(*corruptions_of_table_1()[:2], sep=", ")
        random L2 ε=20, gradient-based L2 ε=0.1
    """
    return [
        RandomCorruption(CorruptionConstraint(p=2, epsilon=20.0)),
        *(GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in (0.1, 0.2, 0.5)),
        *(GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=epsilon)) for epsilon in (2e-4, 5e-4)),
        MultiStepCorruption(CorruptionConstraint(p=2, epsilon=0.1)),
        MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=2e-4)),
        *(GaussianNoise(std) for std in (0.01, 0.02)),
        *(UniformNoise(bound) for bound in (0.02, 0.04)),
        *(Quantization(bits) for bits in (6, 5, 4)),
        *(BitFlips(rate=rate) for rate in (1e-8, 1e-7)),
    ]


def read_corruptions(
    words: Sequence[str], strengths: Sequence[float] = (), norm: float = 2.0, top_n: int | None = None
) -> list[Corruption]:
    """Return one corruption for each word and strength, as they are written in flags.

    The strength of a corruption is the radius of its constraint, or else its first setting.

    Args:
        words: Names in the catalogue, with `-` or `_`; `NAME=S,S` has strengths of its own.
        strengths: For those that have none of their own.
        norm: Order of the constraint's norm.
        top_n: The constraint's largest number of corrupted weights.

    Raises:
        InputError: An unknown name, a strength that is none or out of range, or no strength.

    Examples:
        >>> print(*read_corruptions(["gradient", "quantization=4"], [0.1, 0.2]), sep=", ")
        gradient-based L2 ε=0.1, gradient-based L2 ε=0.2, 4-bit quantization
    """
    found = []
    for word in words:
        name, own = _parts(word)
        of_word = strengths if own is None else own
        if not of_word:
            raise InputError(
                f"--strengths: expected at least one for {word}, got none; give {word}=0.1, or --strengths 0.1, say"
            )
        try:
            found += [_corruption(name, strength, norm, top_n) for strength in of_word]
        except (NotImplementedError, TypeError, ValueError) as error:
            raise InputError(str(error)) from error
    if not found:
        raise InputError("--corruptions: expected at least one, got none; name one, or leave the flag out")
    return found


def _parts(word: str) -> tuple[str, list[float] | None]:
    name, given, own = word.partition("=")
    name = name.replace("-", "_")
    if name not in CORRUPTIONS:
        known = [entry.replace("_", "-") for entry in CORRUPTIONS]
        raise InputError(
            f"--corruptions: expected some of {', '.join(known)}, got {word!r}"
            f"{nearest(name.replace('_', '-'), known)}; name one of them"
        )
    try:
        return name, [float(strength) for strength in own.split(",") if strength] if given else None
    except ValueError as error:
        raise InputError(
            f"--corruptions: expected strengths as {name}=0.1,0.2, got {word!r}; write numbers with commas"
        ) from error


def _corruption(name: str, strength: float, norm: float, top_n: int | None) -> Corruption:
    kind: Any = CORRUPTIONS[name]
    first = fields(kind)[0]
    chosen: Corruption
    if first.name == "constraint":
        chosen = kind(constraint=CorruptionConstraint(p=norm, epsilon=strength, top_n=top_n))
    else:
        whole = first.type == "int" and strength.is_integer()
        chosen = kind(**{first.name: int(strength) if whole else strength})
    return chosen
