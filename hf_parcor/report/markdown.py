"""The report as Markdown: the same words and numbers; tables in place of pictures."""

from __future__ import annotations

from collections.abc import Iterable

from hf_parcor.report.content import Content
from hf_parcor.report.markup import code_of, markdown_table, text_of
from hf_parcor.report.tables import Table


def markdown_page(content: Content) -> str:
    """Return the report as GitHub's Markdown, each name escaped."""
    parts = [f"# {text_of(content.title)}", "## Verdict"]
    shown = set()
    for finding in content.findings:
        headline = [f"**{text_of(finding.headline)}**"] if finding.headline else []
        parts.append(" ".join([*headline, text_of(finding.detail)]).strip())
        if finding.remedy and finding.remedy not in shown:
            parts.append(f"{finding.advice} {code_of(finding.remedy)}")
            shown.add(finding.remedy)
    parts.append("\n".join(f"- {text_of(note)}" for note in content.notes))
    parts += _section("Metric by strength", content.heat_maps)
    parts += _section("Table", [*content.summaries, content.values])
    parts += _section("Settings to reproduce", [content.settings])
    return "\n\n".join(parts) + "\n"


def _section(title: str, tables: Iterable[Table]) -> list[str]:
    parts = [f"## {title}"]
    for table in tables:
        parts += [f"{text_of(table.caption)}:", markdown_table(table.header, table.rows)]
    return parts
