"""What is raised where input from outside, such as files and names, is not as expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A model, data or settings that were named cannot be used; nothing was changed.

    The message says what was expected, what was found, and what to do. The command line shows it in one line and ends
    with exit code 2, where any other exception is a bug and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is most like a wrong one, or "".

    Examples:
        >>> nearest("acuracy", ["accuracy", "loss"])
        ' (did you mean accuracy?)'
    """
    by_lower_case = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower_case), n=1)
    return f" (did you mean {by_lower_case[close[0]]}?)" if close else ""


def one_line(error: Exception) -> str:
    r"""Return the kind and the first sentence of another library's message, which may have many lines.

    Examples:
        >>> one_line(ValueError("Config name is missing.\nPlease pick one"))
        'ValueError: Config name is missing'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
