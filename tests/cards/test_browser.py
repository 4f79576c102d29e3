"""Cards as pages in a real browser, wide as a desk and narrow as a phone; the pictures are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from browser import WIDTHS, check_it_fits, look
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_parcor.cards import with_probe, write_card

CARDS = Path(__file__).parents[2] / "model_cards"
COMMITTED = ("sst2-minilm-probed-defended", "sst2-minilm-multi_step_risk-1")
# What the Hub does with tables and pictures: a table scrolls by itself, a picture is no wider than the page.
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>card</title><style>
body{{margin:0 auto;padding:16px;max-width:48rem;box-sizing:border-box;font:16px/1.6 sans-serif}}
body{{overflow-wrap:break-word}} table{{display:block;overflow-x:auto;border-collapse:collapse}}
th,td{{border:1px solid #ccc;padding:4px 8px}} img{{max-width:100%}} pre{{overflow-x:auto;padding:8px}}
pre,code{{background:#f4f4f4}}</style><body>{body}</body></html>"""
TAGS = {
    *("h1", "h2", "h3", "p", "ul", "li", "em", "strong", "code", "pre", "a", "img"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}


@pytest.fixture
def folder_of(tmp_path, facts_with, probed_record, probe_of):
    """Return the folder of a card that is committed, or of one by hand with every part and a hostile name."""

    def build(name):
        folder = tmp_path / "card"
        if name in COMMITTED:
            return Path(shutil.copytree(CARDS / name, folder))
        facts = facts_with(probed_record, name="<b>tiny</b>|<img src=x onerror=alert(1)> " + "long_name_" * 9)
        write_card(folder, with_probe(facts, probe_of(groups=("a_group_with_a_long_name.0", "<i>1</i>", "2"))))
        return folder

    return build


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["by hand", *COMMITTED])
def test_a_card_is_a_page(folder_of, tmp_path, name, width):
    folder = folder_of(name)
    card = ModelCard.load(folder / "README.md")
    page = folder / "page.html"
    body = MarkdownIt("commonmark").enable("table").render(card.text)  # without the front matter, as on the Hub
    page.write_text(PAGE.format(body=body), encoding="utf-8")
    seen = look(page, width, tmp_path / f"{name}-{width}.png", height=2400)
    check_it_fits(seen, width)
    assert set(seen.tags) <= TAGS, "a name became an element"
    assert not [
        word for word in ("library_name", "model-index", "<!--", "hf_parcor:begin", "\\", "| ") if word in seen.text
    ]
    assert sorted(address for address, _ in seen.images) == sorted(path.name for path in folder.glob("*.png"))
    assert all(loaded > 200 for _, loaded in seen.images)
    assert seen.tables
    assert max(seen.tables) <= (0 if width == max(WIDTHS) else 60), "little of a table is reached by scrolling alone"
    assert seen.text.count("Robustness to parameter corruption") == 1
    assert "AAAI" in seen.text, "the end of the card is there"
