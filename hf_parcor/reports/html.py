"""The report as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element, fromstring, tostring

from hf_parcor.reports.content import Content
from hf_parcor.reports.first_look import FirstLookContent
from hf_parcor.reports.markup import breakable, element, printable
from hf_parcor.reports.panels import Panel, line_signs, panel_as_svg
from hf_parcor.reports.recipe import RecipeContent
from hf_parcor.reports.tables import Table
from hf_parcor.reports.verdict import Finding

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #5c5c5c; --rule: #d8d8d8; --box: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --soft: #a8adb5; --rule: #3a3f47; --box: #21252b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
.verdict { background: var(--box); border-left: .3rem solid #0072B2; padding: .75rem 1rem; }
.verdict p { margin: .5rem 0; }
.verdict .headline { font-weight: 600; margin-bottom: 0; }
.verdict .headline:first-of-type { font-size: 1.15rem; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .35rem 0 1.25rem; }
.scroll { background: linear-gradient(to left, var(--paper) 1rem, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--rule), transparent) right / .75rem 100% no-repeat scroll; }
.hint { display: none; }
pre { background: var(--box); padding: .5rem .75rem; margin: .5rem 0; white-space: pre-wrap; user-select: all; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; max-width: 24rem; overflow-wrap: break-word; }
tr > th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th { vertical-align: bottom; white-space: normal; text-align: center; }
.maps { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.maps figure { max-width: 100%; }
.maps figcaption { max-width: 22rem; }
.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.heat td { text-align: center; border: 1px solid var(--paper); }
.heat td { --mark: rgb(0 114 178 / calc(var(--share, 0) * 60%)); }
.heat td { background: linear-gradient(var(--mark), var(--mark)) var(--paper); }
.heat tr > :last-child { position: sticky; right: 0; background-color: var(--paper); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 1.25rem; }
.panels > figure { display: grid; grid-row: span 3; grid-template-rows: subgrid; margin-bottom: 1.25rem; }
.panels figcaption { align-self: end; }
figure { margin: 0; min-width: 0; }
figure > svg { width: 100%; max-width: 30rem; height: auto; display: block; fill: currentColor; overflow: visible; }
svg * { stroke-linejoin: round; font-family: system-ui, sans-serif; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .25rem 0; }
.legend li { font-size: .85rem; display: flex; align-items: center; gap: .35rem; min-width: 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 30rem) {
  th, td { padding: .25rem .35rem; }
  th:first-child { max-width: 7.5rem; }
  .hint { display: inline; }
  .wide tr > :last-child { box-shadow: -.4rem 0 .4rem -.4rem var(--soft); }
}
@media print { details > * { display: block; } .verdict { border: 1px solid; } }
"""


def html_page(content: Content) -> str:
    """Return the page.

    It is built as a tree and escaped when the tree is written, so that a name is text wherever it stands.
    """
    main = _main(content.title, content.findings, content.notes, content.measured_on)
    maps = element("div", *(_table(table, "heat") for table in content.heat_maps), class_="maps")
    main.append(_section("Heat map", element("p", content.strongest, class_="soft"), maps))
    main.append(_section("Curves", *_curves(content)))
    main.append(_section("Table", *map(_table, content.summaries)))
    main.append(_folded(content.values))
    lines = [element("pre", element("code", command)) for command in content.commands]
    main.append(_section(content.settings.caption, *lines, _table(content.settings, "text")))
    return _written(content.title, main)


def recipe_page(content: RecipeContent) -> str:
    """Return the page of a recipe: the answer, the front of metric against bits, the heat map, and what it is from."""
    main = _main(content.title, content.findings, content.notes)
    if content.front is not None:
        main.append(_section("What fewer bits cost", *_curves(content), _folded(content.front)))
    heat_map = _table(content.heat_map, "heat")
    main.append(_section("Heat map", element("p", content.strongest, class_="soft"), heat_map))
    main.append(_section("What each part gets", _table(content.choice)))
    if content.pairs is not None:
        main.append(_section("Parts that interact", _table(content.pairs)))
    main.append(_section("Which cheap score tells", _table(content.scores)))
    main.append(_section(content.settings.caption, _table(content.settings, "text")))
    return _written(content.title, main)


def first_look_page(content: FirstLookContent) -> str:
    """Return the page of a first look: the answer, and every part with its scores."""
    main = _main(content.title, content.findings, content.notes)
    main.append(_section("Parts", _table(content.parts)))
    return _written(content.title, main)


def framed(page: str) -> str:
    """Return an element of HTML that shows a page inside another one, such as a notebook; no style goes in or out."""
    frame = Element("iframe", srcdoc=page, style="width: 100%; height: 40rem; border: 0; resize: vertical")
    return tostring(frame, encoding="unicode", method="html")


def _main(title: str, findings: Sequence[Finding], notes: Sequence[str], measured_on: str = "") -> Element:
    below = [element("p", measured_on, class_="soft")] if measured_on else []
    return element("main", element("h1", printable(title)), *below, _verdict(findings, notes))


def _written(title: str, main: Element) -> str:
    title = printable(title)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    page = element("html", head, element("body", main), lang="en")
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def _verdict(findings: Sequence[Finding], notes: Sequence[str]) -> Element:
    section = element("section", class_="verdict", aria_label="Verdict")
    shown = set()
    for finding in findings:
        section.extend(
            element("p", *breakable(text), class_=kind)
            for text, kind in ((finding.headline, "headline"), (finding.detail, "detail"))
            if text
        )
        if finding.remedy and finding.remedy not in shown:
            section.append(element("p", f"{finding.advice} ", element("code", finding.remedy)))
            shown.add(finding.remedy)
    listed = element("ul", *[element("li", *breakable(note)) for note in notes], class_="soft")
    return element("div", section, listed)


_PHONE, _LETTER, _PADDING, _NAME = 355, 8, 11, 15  # pixels of a narrow screen, of a letter, around a cell; letters


def _is_wide(table: Table) -> bool:
    """Return whether a table is likely to be wider than a phone: headers break between words, names anywhere."""
    if not table.rows:
        return False
    names, *columns = zip(*table.rows, strict=True)
    heads = [max(map(len, head.split() or [""])) for head in table.header]
    letters = [min(_NAME, max(map(len, names))), *(max(map(len, column)) for column in columns)]
    widths = [_LETTER * max(pair) + _PADDING for pair in zip(heads, letters, strict=True)]
    return sum(widths) > _PHONE


def _section(title: str, *children: Element) -> Element:
    return element("section", element("h2", title), *children)


def _table(table: Table, kind: str = "") -> Element:
    head = element("tr", *[element("th", name, scope="col") for name in table.header])
    body = element("tbody")
    for place, row in enumerate(table.rows):
        name, *cells = row
        line = element("tr", element("th", *breakable(name), scope="row"))
        for column, cell in enumerate(cells):
            line.append(_cell(cell, table.shares[place][column] if table.shares else None))
        body.append(line)
    drawn = element("table", element("thead", head), body, aria_label=table.caption)
    wide = _is_wide(table)
    if kind or wide:
        drawn.set("class", " ".join(filter(None, [kind, "wide" * wide])))
    box = element("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=table.caption)
    if kind == "text":  # the heading of its section says what it is
        return box
    hint = [element("span", " (scroll sideways)", class_="hint")] if wide else []
    return element("figure", element("figcaption", table.caption, *hint, class_="soft"), box)


def _folded(table: Table) -> Element:
    """Return a table that is shown when the reader asks for it."""
    return element("details", element("summary", table.caption), _table(table))


def _cell(text: str, share: float | None) -> Element:
    # Sixty per cent at most of one colour: the ink of the page can be read on it, light or dark.
    return element("td", text, **({} if share is None else {"style": f"--share:{share:.3g}"}))


def _curves(content: Content | RecipeContent) -> Iterator[Element]:
    try:
        figures = [_figure(content, one, f"panel-{place}") for place, one in enumerate(content.panels)]
    except ImportError as error:
        yield element("p", f"There are no curves here, since {error}. Their numbers stand in the tables.")
        return
    if figures:
        yield element("div", *figures, class_="panels")
    lines = [line for panel in content.panels for line in panel.lines.values()]
    if any(not math.isnan(point.low) for line in lines for point in line.points):
        yield element("p", "Bars are 95 % confidence intervals; an arrow says that one goes on.", class_="soft")
    if content.no_curves:
        yield element("p", content.no_curves, class_="soft")


def _figure(content: Content | RecipeContent, one: Panel, name: str) -> Element:
    drawn = _inline(panel_as_svg(one, printable(content.metric), content.numbers, name))
    described = f"{content.metric} against {one.axis}. The same numbers stand in the tables."
    drawn[:0] = [element("title", one.title), element("desc", described)]
    drawn.set("role", "img")
    drawn.set("aria-label", printable(one.title))
    legend = element("ul", class_="legend")
    for label, (color, sign) in zip(one.lines, line_signs(), strict=False):
        mark = element("span", sign, style=f"color:{_ink(color)}", aria_hidden="true")
        legend.append(element("li", mark, element("span", label)))
    several = [legend] if len(one.lines) > 1 else []
    return element("figure", element("figcaption", element("strong", one.title)), drawn, *several)


def _inline(svg: str) -> Element:
    """Return a picture as a part of the page: what is black has the colour of its text, and the page its style."""
    drawn = _plain(fromstring(svg))
    used = {value for part in drawn.iter() for name, value in part.items() if name == "href"}
    used |= {value[4:-1] for part in drawn.iter() for name, value in part.items() if name == "clip-path"}
    for part in drawn.iter():
        if f"#{part.get('id')}" not in used:
            part.attrib.pop("id", None)
    return drawn


def _plain(part: Element) -> Element:
    """Return an element of SVG without namespaces, fonts and descriptions of the file."""
    copy = Element(_local(part.tag))
    copy.text = part.text if copy.tag == "text" else None
    for name, value in part.items():
        copy.set(_local(name), _ink(_FONT.sub("", value)) if name == "style" else value)
    copy.extend(_plain(child) for child in part if _local(child.tag) not in ("metadata", "style"))
    return copy


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _ink(style: str) -> str:
    """Return a style in which black is the colour of the page's text, so that it is seen on a dark page too."""
    return style.replace("#000000", "currentColor")


_FONT = re.compile(r"font-family: [^;]*; ?")
