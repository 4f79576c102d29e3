"""What all plots share: a figure without a window, colours and markers that can be told apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers; markers differ too.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, whose parts make room for each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'hf-parcor[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def line_styles() -> Iterator[tuple[str, str]]:
    """Yield a colour and a marker for each line, without end."""
    return zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), strict=False)
