"""Corruptions from words such as `gradient` and `quantization=4,5`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hf_parcor.cli.errors import refused
from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.input_error import InputError, nearest


def asked_for(arguments: argparse.Namespace, strengths: Sequence[float] = ()) -> list[Corruption]:
    """Return the corruptions that the command line asks for.

    Args:
        arguments: Those of `add_corruptions`; without `--corruption` the corruption is gradient-based.
        strengths: Without `--epsilons`.

    Raises:
        InputError: As `read_corruptions`.
    """
    words = ["gradient"] if arguments.corruption is None else arguments.corruption
    given = strengths if arguments.epsilons is None else arguments.epsilons
    return read_corruptions(words, given, arguments.norm, arguments.top_n)


def read_corruptions(
    words: Sequence[str], strengths: Sequence[float], norm: float = 2.0, top_n: int | None = None
) -> list[Corruption]:
    """Return one corruption for each word and strength.

    The strength of a corruption is the radius of its constraint, or else its first setting.

    Args:
        words: Names in the catalogue, with `-` or `_`; `NAME=S,S` has strengths of its own.
        strengths: For those that have none of their own.
        norm: Order of the constraint's norm.
        top_n: The constraint's largest number of corrupted weights.

    Raises:
        InputError: An unknown name, a strength that is none, or no strength.

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
                f"--epsilons: expected at least one strength for {word}, got none; give --epsilons 0.1 0.2, say"
            )
        found += [_corruption(name, strength, norm, top_n) for strength in of_word]
    if not found:
        raise InputError("--corruption: expected at least one, got none; name one, or leave the flag out")
    return found


def _parts(word: str) -> tuple[str, list[float] | None]:
    name, given, own = word.partition("=")
    name = name.replace("-", "_")
    if name not in CORRUPTIONS:
        known = [entry.replace("_", "-") for entry in CORRUPTIONS]
        raise InputError(
            f"--corruption: expected one of {', '.join(known)}, got {word!r}{nearest(name.replace('_', '-'), known)}; "
            "name one of them"
        )
    try:
        return name, [float(strength) for strength in own.split(",") if strength] if given else None
    except ValueError as error:
        raise InputError(
            f"--corruption: expected strengths as {name}=0.1,0.2, got {word!r}; write numbers with commas"
        ) from error


def _corruption(name: str, strength: float, norm: float, top_n: int | None) -> Corruption:
    kind: Any = CORRUPTIONS[name]
    first = fields(kind)[0]
    with refused(ValueError, TypeError, NotImplementedError):
        chosen: Corruption
        if first.name == "constraint":
            chosen = kind(constraint=CorruptionConstraint(p=norm, epsilon=strength, top_n=top_n))
        else:
            whole = first.type == "int" and strength.is_integer()
            chosen = kind(**{first.name: int(strength) if whole else strength})
    return chosen
