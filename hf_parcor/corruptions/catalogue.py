"""All corruptions by the name that records and command lines use: one line each; their flags; those of Table 1."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions.bit_flips import BitFlips
from hf_parcor.corruptions.corruption import Corruption
from hf_parcor.corruptions.drift import ConductanceDrift
from hf_parcor.corruptions.gradient import GradientCorruption
from hf_parcor.corruptions.multi_step import MultiStepCorruption
from hf_parcor.corruptions.noise import GaussianNoise, UniformNoise
from hf_parcor.corruptions.pruning import Pruning
from hf_parcor.corruptions.quantization import FloatQuantization, Quantization
from hf_parcor.corruptions.random import RandomCorruption
from hf_parcor.corruptions.worst_bit_flips import WorstBitFlips
from hf_parcor.errors import InputError, nearest

CORRUPTIONS: Mapping[str, type[Corruption]] = MappingProxyType(
    {
        "random": RandomCorruption,
        "gradient": GradientCorruption,
        "multi_step": MultiStepCorruption,
        "gaussian": GaussianNoise,
        "uniform": UniformNoise,
        "drift": ConductanceDrift,
        "quantization": Quantization,
        "float_quantization": FloatQuantization,
        "pruning": Pruning,
        "bit_flips": BitFlips,
        "worst_bit_flips": WorstBitFlips,
    }
)


def catalogue_name(corruption: Corruption) -> str | None:
    """Return the name of a corruption in the catalogue; None for one of another class, also if derived.

    Examples:
        >>> catalogue_name(GaussianNoise(0.02))
        'gaussian'
    """
    return next((name for name, kind in CORRUPTIONS.items() if type(corruption) is kind), None)


def corruptions_of_table_1() -> list[Corruption]:
    """Return the kinds of corruption of paper 2, Table 1, a random one and bit flips, at strengths for a small BERT.

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
    words: Sequence[str],
    strengths: Sequence[float] = (),
    norm: float = 2.0,
    top_n: int | None = None,
    *,
    flag: str = "--corruptions",
) -> list[Corruption]:
    """Return one corruption for each word and strength.

    The strength of a corruption is the radius of its constraint, or else its first setting.

    Args:
        words: Names in the catalogue, with `-` or `_`; `NAME=S,S` has strengths of its own. Other settings follow a
            colon: `NAME:SETTING=VALUE,...`, `NAME=S,S:SETTING=VALUE,...`; `norm` and `top-n` are the constraint's.
        strengths: For those that have none of their own.
        norm: Order of the constraint's norm, for those that have none of their own.
        top_n: The constraint's largest number of corrupted weights, likewise.
        flag: Whose words they are, for messages.

    Raises:
        InputError: An unknown name or setting, a strength that is none, no strength, or one corruption twice.

    Examples:
        >>> print(*read_corruptions(["gradient", "quantization=4"], [0.1, 0.2]), sep=", ")
        gradient-based L2 ε=0.1, gradient-based L2 ε=0.2, 4-bit quantization
        >>> print(*read_corruptions(["quantization=4,3:per=32", "float-quantization=mxfp4"], []), sep=", ")
        4-bit quantization per group of 32, 3-bit quantization per group of 32, MXFP4
        >>> print(*read_corruptions(["gradient=2e-4:norm=inf", "random=0.1:top-n=100"]), sep=", ")
        gradient-based L∞ ε=0.0002, random L2 ε=0.1 n=100
    """
    found: list[Corruption] = []
    for word in words:
        name, own, more = _parts(word, flag)
        of_word = list(map(repr, strengths)) if own is None else own
        if not of_word:
            head, colon, settings = word.partition(":")
            example = f"{head.rstrip('=')}={_some_strengths(name)[0]}{colon}{settings}"
            raise InputError(f"{flag} {word}: expected at least one strength, got none; give {example}, say")
        for strength in of_word:
            chosen = _corruption(name, word, strength, more, norm, top_n, flag)
            if chosen in found:
                raise InputError(f"{flag}: expected each corruption once, got {chosen} twice; leave one out")
            found.append(chosen)
    if not found:
        raise InputError(f"{flag}: expected at least one, got none; name one, or leave the flag out")
    return found


def _some_strengths(name: str) -> tuple[str, str]:
    """Return strengths that a corruption may have: bits or counts, formats, or radii, rates or times."""
    kind: Any = CORRUPTIONS[name]
    return {"int": ("4", "3"), "str": ("nf4", "mxfp4")}.get(str(fields(kind)[0].type), ("0.1", "0.2"))


def _parts(word: str, flag: str) -> tuple[str, list[str] | None, dict[str, Any]]:
    """Return the name, its own strengths, and further settings."""
    head, _, settings = word.partition(":")
    name, given, own = head.partition("=")
    name = name.replace("-", "_")
    if name not in CORRUPTIONS:
        known = [entry.replace("_", "-") for entry in CORRUPTIONS]
        raise InputError(
            f"{flag}: expected some of {', '.join(known)}, got {word!r}"
            f"{nearest(name.replace('_', '-'), known)}; name one of them"
        )
    more = [one.partition("=") for one in settings.split(",") if one]
    for setting, _, value in more:
        if not setting or not value:
            raise InputError(f"{flag} {word}: expected SETTING=VALUE after the colon; write both")
    own_strengths = [one for one in own.split(",") if one] if given else None
    return name, own_strengths, {setting: value for setting, _, value in more}


def _corruption(
    name: str, word: str, strength: str, more: Mapping[str, str], norm: float, top_n: int | None, flag: str
) -> Corruption:
    kind: Any = CORRUPTIONS[name]
    first, *others = fields(kind)
    constrained = first.name == "constraint"
    known = [field.name for field in others] + ["norm", "top_n"] * constrained
    given = {setting.replace("-", "_"): _plain(value) for setting, value in more.items()}
    for setting in given:
        if setting not in known:
            raise InputError(
                f"{flag}: expected settings of {name}: {', '.join(known) or 'none'}, got {setting!r} in "
                f"{word!r}{nearest(setting, known)}; leave it out, or name one of them"
            )
    value: Any = strength if first.type == "str" else _plain(strength)
    if first.type == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and first.type != "str":
        example = f"{name}={','.join(_some_strengths(name))}"
        raise InputError(f"{flag}: expected strengths as {example}, got {word!r}; write numbers with commas")
    chosen: Corruption
    try:
        if constrained:
            of_constraint = {"p": given.pop("norm", norm), "top_n": given.pop("top_n", top_n)}
            chosen = kind(constraint=CorruptionConstraint(epsilon=value, **of_constraint), **given)
        else:
            chosen = kind(**{first.name: value}, **given)
    except (NotImplementedError, TypeError, ValueError) as error:
        said = re.sub(r"^p: ", "norm: ", str(error))
        raise InputError(f"{flag} {word}: {said}") from error
    return chosen


def _plain(word: str) -> Any:
    """Return what a word of a command line stands for: a whole number, a number, true, false, or itself.

    Examples:
        >>> [_plain(word) for word in ("32", "1e-3", "false", "channel")]
        [32, 0.001, False, 'channel']
    """
    if word in ("true", "false"):
        return word == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
