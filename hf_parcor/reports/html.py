"""The report as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

from hf_parcor.reports.content import Content, Panel
from hf_parcor.reports.drawing import panel, shade, swatch
from hf_parcor.reports.markup import element, printable
from hf_parcor.reports.tables import Table

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
code { font-family: ui-monospace, monospace; font-size: .9em; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; max-width: 14rem; overflow-wrap: break-word; }
tr > th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th { vertical-align: bottom; white-space: normal; text-align: center; }
.maps { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.maps figure { max-width: 100%; }
.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.heat td { text-align: center; border: 1px solid var(--paper); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; min-width: 0; }
figure > svg { width: 100%; max-width: 30rem; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; stroke: none; }
svg path { stroke-width: 1; }
svg .grid { stroke: var(--rule); }
svg .tick { stroke: currentColor; }
svg .clean { stroke-dasharray: 5 4; fill: none; }
svg .band { stroke: none; fill-opacity: .18; }
svg .line { fill: none; stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .25rem 0; }
.legend li { font-size: .85rem; display: flex; align-items: center; gap: .35rem; min-width: 0; }
.legend svg { flex: none; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 30rem) {
  th, td { padding: .25rem .35rem; }
  th:first-child { max-width: 7.5rem; }
}
@media print { details > * { display: block; } .verdict { border: 1px solid; } }
"""


def html_page(content: Content) -> str:
    """Return the page.

    It is built as a tree and escaped when the tree is written, so that a name is text wherever it stands.
    """
    title = printable(content.title)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    main = element("main", element("h1", title), _verdict(content))
    maps = [_table(table, "heat") for table in content.heat_maps]
    main.append(
        _section("Heat map", [element("p", content.darkest, class_="soft"), element("div", *maps, class_="maps")])
    )
    main.append(
        _section("Curves", [element("div", *[_figure(content, one) for one in content.panels], class_="panels")])
    )
    main.append(_section("Table", [_table(table) for table in content.summaries]))
    full = element("details", element("summary", content.values.caption), _table(content.values))
    main.append(full)
    main.append(_section("Settings to reproduce", [_table(content.settings, "text")]))
    page = element("html", head, element("body", main), lang="en")
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def _verdict(content: Content) -> Element:
    section = element("section", class_="verdict", aria_label="Verdict")
    shown = set()
    for finding in content.findings:
        section.extend(
            element("p", text, class_=kind)
            for text, kind in ((finding.headline, "headline"), (finding.detail, "detail"))
            if text
        )
        if finding.remedy and finding.remedy not in shown:
            section.append(element("p", f"{finding.advice} ", element("code", finding.remedy)))
            shown.add(finding.remedy)
    notes = element("ul", *[element("li", note) for note in content.notes], class_="soft")
    return element("div", section, notes)


def _section(title: str, children: list[Element]) -> Element:
    return element("section", element("h2", title), *children)


def _table(table: Table, kind: str = "") -> Element:
    head = element("tr", *[element("th", printable(name), scope="col") for name in table.header])
    body = element("tbody")
    for place, row in enumerate(table.rows):
        name, *cells = row
        line = element("tr", element("th", printable(name), scope="row"))
        for column, cell in enumerate(cells):
            line.append(_cell(cell, table.shares[place][column] if table.shares else None))
        body.append(line)
    drawn = element("table", element("thead", head), body, aria_label=table.caption)
    if kind:
        drawn.set("class", kind)
    box = element("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=table.caption)
    return element("figure", element("figcaption", printable(table.caption), class_="soft"), box)


def _cell(text: str, share: float | None) -> Element:
    if share is None:
        return element("td", printable(text))
    color, ink = shade(share)
    return element("td", printable(text), style=f"background:{color};color:{ink}")


def _figure(content: Content, one: Panel) -> Element:
    drawn = panel(one.series, one.curves, content.numbers, content.metric, one.title)
    legend = element("ul", class_="legend")
    for place, name in enumerate(one.curves):
        legend.append(element("li", swatch(place), element("span", printable(name))))
    return element("figure", element("figcaption", element("strong", printable(one.title))), drawn, legend)
