"""Reports in a real browser, wide as a desk and narrow as a phone: not blank, and nothing runs out of the page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from browser import WIDTHS, check_it_fits, look

from hf_parcor import RobustnessReport, SweepRecord

ROOT = Path(__file__).parents[2]


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
    folder = ROOT / "scripts" / "results" / "probes"
    arms = {arm: sorted(folder.glob(f"{arm}-seed*-{name}.json")) for arm in ("plain", "defended")}
    return RobustnessReport.compare({arm: [SweepRecord.load(path) for path in paths] for arm, paths in arms.items()})


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["by hand", "kinds", "layers"])
def test_it_fits_the_page(record_of, tmp_path, width, name):
    page = report_of(name, record_of).to_html(tmp_path / "report.html")
    check_it_fits(look(page, width, tmp_path / f"{name}-{width}.png"), width)
