"""Words that a user writes: numbers, names, pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

from hf_parcor.input_error import InputError, nearest


def number(word: str) -> float:
    """Return a number, `inf` among them.

    Examples:
        >>> number("1e-3"), number("inf")
        (0.001, inf)
    """
    try:
        return float(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {word!r}") from error


def at_least(smallest: int) -> Callable[[str], int]:
    """Return what reads whole numbers from the smallest on.

    Examples:
        >>> at_least(1)("12")
        12
    """

    def whole(word: str) -> int:
        try:
            value = int(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {word!r}") from error
        if value < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {smallest} on, got {word}")
        return value

    return whole


def share(word: str) -> float:
    """Return a number between 0 and 1, both excluded.

    Examples:
        >>> share("0.1")
        0.1
    """
    value = number(word)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {word}")
    return value


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """Return what reads one of some words.

    Examples:
        >>> one_of(["layers", "kinds"])("kinds")
        'kinds'
    """

    def word_of(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {word!r}{nearest(word, known)}")
        return word

    return word_of


def pairs(words: Iterable[str], flag: str) -> dict[str, str]:
    """Return what words such as `text=review` say.

    Raises:
        InputError: A word has no name or no value.

    Examples:
        >>> pairs(["text=review"], "--column")
        {'text': 'review'}
    """
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise InputError(f"{flag}: expected NAME=VALUE, got {word!r}; write both, with = between them")
        found[name] = value
    return found
