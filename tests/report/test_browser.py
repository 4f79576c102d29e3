"""Reports in a real browser, wide as a desk and narrow as a phone: not blank, and nothing runs out of the page."""

from __future__ import annotations

import math
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from hf_parcor import RobustnessReport, SweepRecord

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge")
# The page is shown in a frame, whose width does not depend on that of the browser's window.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><style>body{{margin:0}}iframe{{border:0;display:block}}</style>
<iframe src="{page}" width="{width}" height="{height}"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement;
  const beyond = [...page.querySelectorAll("p, li, h1, h2, svg, figcaption, .scroll, summary")]
    .filter(part => part.getBoundingClientRect().right > root.clientWidth + 1).map(part => part.tagName);
  document.title = "done";
  document.body.setAttribute("data-found", `${{root.clientWidth}} ${{root.scrollWidth}} ${{beyond.join(" ")}}`);
}})</script>"""


@pytest.fixture(scope="module")
def browse():
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(BROWSERS)}")

    def run(profile, page, *flags):
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
        ]
        result = subprocess.run(
            [*command, f"--user-data-dir={profile}", "--virtual-time-budget=5000", *flags, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def probe_by_hand(record_of):
    """Return a probe with long names, many strengths, and values that are broken."""
    names = [f"model.decoder.layers.{index}.a_module_with_a_long_name" for index in range(12)]
    strengths = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    values = {name: {e: 0.9 / (1 + e * place) for e in strengths} for place, name in enumerate(names)}
    values[names[3]][10.0] = math.nan
    return {name: record_of(of_name, target=[name]) for name, of_name in values.items()}


def report_of(name, record_of):
    """Return a report made by hand, or one of a real probe whose records are committed."""
    if name == "by hand":
        return RobustnessReport(probe_by_hand(record_of))
    folder = ROOT / "model_cards" / "sst2-minilm-probes"
    arms = {arm: sorted(folder.glob(f"{arm}-seed*-{name}.json")) for arm in ("plain", "defended")}
    return RobustnessReport.compare({arm: [SweepRecord.load(path) for path in paths] for arm, paths in arms.items()})


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


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("name", ["by hand", "kinds", "layers"])
def test_it_fits_the_page(browse, record_of, tmp_path, width, name):
    height = 1600
    report_of(name, record_of).to_html(tmp_path / "report.html")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page="report.html", width=width, height=height), encoding="utf-8")
    picture = tmp_path / f"{name}-{width}.png"
    window = f"--window-size={width},{height}"
    browse(tmp_path / "profile", frame, window, f"--screenshot={picture}")
    assert pixels(picture)[:2] == (width, height)
    assert pixels(picture)[2] > 50, "a blank page has few"
    shown = browse(tmp_path / "profile", frame, window, "--dump-dom")
    [(inner, scrolled, beyond)] = re.findall(r'data-found="(\d+) (\d+) ([^"]*)"', shown)
    assert int(inner) == width
    assert int(scrolled) <= width, "the page scrolls sideways"
    assert beyond == ""
