"""A real browser that looks at a page as wide as a desk, or as narrow as a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from typing import NamedTuple

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge")
WIDTHS = (1200, 360)
# The page is shown in a frame, whose width does not depend on that of the browser's window.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><style>body{{margin:0}}iframe{{border:0;display:block}}</style>
<iframe src="{page}" width="{width}" height="{height}"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement;
  const all = selector => [...page.querySelectorAll(selector)];
  const found = {{
    width: root.clientWidth,
    scrolled: root.scrollWidth,
    beyond: all("p, li, h1, h2, h3, img, svg, pre, figcaption, .scroll, summary, table:not(.scroll table)")
      .filter(part => part.getBoundingClientRect().right > root.clientWidth + 1).map(part => part.tagName),
    tags: [...new Set(all("body *").map(part => part.tagName.toLowerCase()))],
    images: all("img").map(image => [image.getAttribute("src"), image.naturalWidth]),
    tables: all("table").map(table => table.scrollWidth - table.clientWidth),
    text: page.body.innerText,
  }};
  document.body.setAttribute("data-found", JSON.stringify(found));
}})</script>"""


class Seen(NamedTuple):
    """What a browser shows.

    Attributes:
        width: Of the page.
        scrolled: Its width with all that one reaches by scrolling sideways.
        beyond: Kinds of elements that run out of the page.
        tags: Kinds of elements.
        images: Address and width of each picture's file; 0 where it was not loaded.
        tables: By how much each table is wider than its place.
        text: What one reads.
    """

    width: int
    scrolled: int
    beyond: list
    tags: list
    images: list
    tables: list
    text: str


def look(page, width, picture, height=1600):
    """Show a page in a frame of this width, keep a picture of it, and return what is seen."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(BROWSERS)}")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.name, width=width, height=height), encoding="utf-8")
    for what in (f"--screenshot={picture}", "--dump-dom"):
        result = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--allow-file-access-from-files", "--virtual-time-budget=5000"),
                *(f"--user-data-dir={page.with_name('profile')}", f"--window-size={width},{height}"),
                *(what, frame.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    shown = pixels(picture)
    assert shown[:2] == (width, height)
    assert shown[2] > 50, "a blank page has few"
    [found] = re.findall(r'data-found="([^"]*)"', result.stdout)
    return Seen(**json.loads(html.unescape(found)))


def check_it_fits(seen, width):
    """Check that nothing runs out of the page."""
    assert seen.width == width
    assert seen.scrolled <= width, "the page scrolls sideways"
    assert seen.beyond == []


def pixels(png):
    """Return width, height and how many different bytes stand in the picture data."""
    content = png.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    data, place = b"", 8
    while place < len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        data += content[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += 12 + size
    return width, height, len(set(zlib.decompress(data)))
