"""The report as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

from hf_parcor.report.colors import shade
from hf_parcor.report.content import Content
from hf_parcor.report.drawing import panel, swatch
from hf_parcor.report.markup import element, printable
from hf_parcor.report.panels import Panel
from hf_parcor.report.style import STYLE
from hf_parcor.report.tables import Table


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
