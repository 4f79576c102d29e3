"""Colours that colour-blind readers can tell apart."""

from __future__ import annotations

# Okabe and Ito's palette; "currentColor" stands for its black, so that it is seen on a dark page too.
LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")

# Seven colours of cividis (Nuñez, Anderton and Renslow, 2018), from light to dark.
_CIVIDIS = ("#FEE838", "#D2C060", "#A59C74", "#7C7B78", "#575C6D", "#273F6D", "#00224E")


def shade(share: float) -> tuple[str, str]:
    """Return the colour for a share from 0 (light) to 1 (dark), and the colour of text on it.

    Examples:
        >>> shade(0.0), shade(1.0)
        (('#FEE838', '#000'), ('#00224E', '#FFF'))
    """
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    left = min(int(place), len(_CIVIDIS) - 2)
    channels = [
        round(low + (high - low) * (place - left))
        for low, high in zip(_channels(_CIVIDIS[left]), _channels(_CIVIDIS[left + 1]), strict=True)
    ]
    return "#{:02X}{:02X}{:02X}".format(*channels), "#000" if luminance(channels) > 0.179 else "#FFF"


def luminance(channels: list[int]) -> float:
    """Return the relative luminance of WCAG 2; above 0.179 black text has the higher contrast, below it white.

    Examples:
        >>> luminance([255, 255, 255])
        1.0
    """
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (channel / 255 for channel in channels)
    ]
    return round(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2], 6)


def _channels(color: str) -> list[int]:
    return [int(color[place : place + 2], 16) for place in (1, 3, 5)]
