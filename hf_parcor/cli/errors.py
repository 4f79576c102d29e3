"""What ends a command: a user's mistake, or an interruption. Everything else is a bug, and keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_parcor.input_error import InputError


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The user stopped a command; the message says how it goes on."""


@contextmanager
def refused(*kinds: type[Exception]) -> Iterator[None]:
    """Let exceptions of these kinds be a user's mistake.

    Only for what checks arguments, and nothing else, inside: a bug there would lose its traceback.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(str(error)) from error


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Let Ctrl-C say how the work goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(how) from error
