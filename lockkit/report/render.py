"""Sections as one self-contained HTML page, and as Markdown. All text from results is escaped."""

from __future__ import annotations

import html
import re

from lockkit.report.page import Section, Table
from lockkit.report.plot import svg

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#56606e;--line:#d7dce3;--page:#fff;--card:#f6f8fa;--warn:#8a3b00;
--c0:#0b66c3;--c1:#d1480b;--c2:#1b7f3b;--c3:#8a3fbf;--c4:#a8780a;--c5:#0c8a8a;--c6:#c2307a;--c7:#6b4a2f;--c8:#5a6b1f}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#9aa5b4;--line:#3a424e;--page:#14181e;--card:#1c222b;
--warn:#ffb27a;--c0:#6db3ff;--c1:#ff9966;--c2:#68d08a;--c3:#cd9bf5;--c4:#e6c056;--c5:#5fd4d4;--c6:#ff8fc4;--c7:#d0a988;
--c8:#b9cf6a}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:72rem;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.35rem;margin:2.5rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:1.1rem;margin:2rem 0 .5rem;overflow-wrap:anywhere}
h2{border-top:1px solid var(--line);padding-top:1.2rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,10rem),1fr));gap:.7rem;margin:1rem 0}
.figures div{border:1px solid var(--line);background:var(--card);border-radius:.5rem;padding:.7rem}
.figures b{display:block;font-size:1.15rem;line-height:1.3;overflow-wrap:anywhere}
.figures span,footer{color:var(--soft);font-size:.85rem}
.warning{color:var(--warn);font-weight:600}
.scroll{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.875rem}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;max-width:20rem}
td{overflow-wrap:break-word}td.t{min-width:11rem}th.n{text-align:right}td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{position:sticky;left:0;background:var(--page);padding-left:0;max-width:11rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
p{overflow-wrap:anywhere;max-width:46rem}svg{display:block;width:100%;max-width:34rem;height:auto;color:var(--ink)}
footer{margin-top:3rem}
"""
LONG_CELL = 16  # characters; longer text gets a minimum width, so that it does not break into single words
_NUMBER = re.compile(r"[<>–]?\s?[-+]?[\d.,]*(e[-+]?\d+)?\s?%?|> budget|\d+, \d+")


def html_page(sections: list[Section], made_by: str) -> str:
    """The HTML page. Style and SVG are inline; there are no scripts and no external resources."""
    body = "\n".join(_html_section(section, number) for number, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>lockkit report</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>lockkit report</h1>\n{body}\n<footer>{html.escape(made_by)}</footer></body></html>\n"
    )


def _html_section(section: Section, position: int) -> str:
    heading = "h3" if section.part else "h2"
    parts = [f"<section><{heading}>{html.escape(section.title)}</{heading}>"]
    if section.warning:
        parts.append(f'<p class="warning">{html.escape(section.warning)}</p>')
    if section.figures:
        cards = "".join(
            f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
            for label, value in section.figures
        )
        parts.append(f'<div class="figures">{cards}</div>')
    parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
    parts += [_html_table(table) for table in section.tables if table.rows]
    plots = [f"<div>{svg(curve, f'{position}-{index}')}</div>" for index, curve in enumerate(section.curves)]
    if plots:
        parts.append(f'<div class="plots">{"".join(plots)}</div>')
    return "\n".join(parts) + "</section>"


def _html_table(table: Table) -> str:
    numeric = [all(_NUMBER.fullmatch(cell) for cell in column) for column in zip(*table.rows, strict=True)]
    head = "".join(
        f'<th class="n">{html.escape(cell)}</th>' if right else f"<th>{html.escape(cell)}</th>"
        for cell, right in zip(table.head, numeric, strict=True)
    )
    rows = "".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in table.rows)
    # The tabindex makes the scrollable region reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.head[0])}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _html_cell(cell: str) -> str:
    kind = ' class="n"' if _NUMBER.fullmatch(cell) else ' class="t"' if len(cell) > LONG_CELL else ""
    return f"<td{kind}>{html.escape(cell)}</td>"


def markdown(sections: list[Section]) -> str:
    """Sections as Markdown, for a model card; without curves."""
    parts = []
    for section in sections:
        parts.append(f"{'###' if section.part else '##'} {_plain(section.title)}")
        if section.warning:
            parts.append(f"**{_plain(section.warning)}**")
        if section.figures:
            parts.append("\n".join(f"- {_plain(label)}: **{_plain(value)}**" for label, value in section.figures))
        parts += [_plain(text) for text in section.text]
        for table in section.tables:
            if table.rows:
                lines = [table.head, ["---"] * len(table.head), *table.rows]
                parts.append("\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text in one line, escaped so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
