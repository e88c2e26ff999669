"""Sections as one self-contained HTML page, and as Markdown. All text from results is escaped.

The page has no scripts. It begins with the verdicts of all its sections and the contents; it ends with the words that it
uses.
"""

from __future__ import annotations

import html
import re

from lockkit.report.glossary import terms_in
from lockkit.report.page import Number, Section, Stack, Table
from lockkit.report.plot import svg
from lockkit.report.style import STYLE

LONG_CELL = 16  # characters; longer text gets a minimum width, so that it does not break into single words
DENSE_TABLE = 8  # columns; the cells of a wider table stand closer together
_NUMBER = re.compile(r"[<>–]?\s?[-+]?[\d.,]*(e[-+]?\d+)?\s?%?|> budget|\d+, \d+")
_MARKS = {True: "good", False: "bad", None: "plain"}


def html_page(sections: list[Section], made_by: str) -> str:
    """The HTML page. Style and SVG are inline; there are no scripts and no external resources."""
    sections = [section for section in sections if not section.empty]
    body = "\n".join(_html_section(section, number) for number, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>lockkit report</title><style>{STYLE}</style></head>\n'
        f"<body><header><h1>lockkit report</h1><p>{html.escape(made_by)}</p>{_verdicts(sections)}</header>\n"
        f"{_contents(sections)}\n<main>{body}\n{_words(sections)}</main></body></html>\n"
    )


def _verdicts(sections: list[Section]) -> str:
    """The verdict of each result, the failed ones first."""
    said = [(number, section) for number, section in enumerate(sections) if section.verdict or section.warning]
    said = [(number, section) for number, section in said if not section.part]
    said.sort(key=lambda entry: entry[1].passed is not False)
    items = "".join(
        f'<li class="{_MARKS[section.passed]}"><a href="#s{number}">{html.escape(section.title)}</a> '
        f"{_about(section)}{html.escape(' '.join([section.verdict or section.warning, *section.notes]))}</li>"
        for number, section in said
    )
    return f'<ul class="verdicts">{items}</ul>' if items else ""


def _about(section: Section) -> str:
    return f'<p class="about">{html.escape(section.about)}</p>' if section.about else ""


def _contents(sections: list[Section]) -> str:
    """Links to the sections."""
    items = "".join(
        f'<li{" class=part" if section.part else ""}><a href="#s{number}">{html.escape(section.title)}</a></li>'
        for number, section in enumerate(sections)
    )
    words = '<li><a href="#words">Words</a></li>' if terms_in(markdown(sections)) else ""
    return f'<nav aria-label="Contents"><b>Contents</b><ul>{items}{words}</ul></nav>'


def _words(sections: list[Section]) -> str:
    """The terms that the page uses."""
    terms = terms_in(markdown(sections))
    if not terms:
        return ""
    entries = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in terms.items())
    return f'<section id="words"><h2>Words</h2><dl class="words">{entries}</dl></section>'


def _html_section(section: Section, position: int) -> str:
    heading = "h3" if section.part else "h2"
    parts = [f'<section id="s{position}"><{heading}>{html.escape(section.title)}</{heading}>']
    parts.append(_about(section))
    if section.verdict:
        parts.append(f'<p class="verdict {_MARKS[section.passed]}">{html.escape(section.verdict)}</p>')
    warnings = [section.warning, *section.notes] if section.warning else section.notes
    parts += [f'<p class="warning">{html.escape(said)}</p>' for said in warnings]
    if section.figures:
        cards = "".join(
            f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
            for label, value in section.figures
        )
        parts.append(f'<div class="figures">{cards}</div>')
    parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
    parts += [_html_table(table) for table in section.tables if table.rows]
    drawn = [curve for curve in section.curves if curve.drawn]
    plots = [f"<div>{svg(curve, f'{position}-{index}')}</div>" for index, curve in enumerate(drawn)]
    if plots:
        parts.append(f'<div class="plots">{"".join(plots)}</div>')
    if section.facts:
        facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in section.facts)
        parts.append(f'<dl class="facts">{facts}</dl>')
    return "\n".join(parts) + "</section>"


def _html_table(table: Table) -> str:
    numeric = [all(map(_is_number, column)) for column in zip(*table.rows, strict=True)]
    head = "".join(
        f'<th class="n">{html.escape(cell)}</th>' if right else f"<th>{html.escape(cell)}</th>"
        for cell, right in zip(table.head, numeric, strict=True)
    )
    rows = "".join(
        f"<tr{' class=bad' if index in table.failed else ''}>" + "".join(map(_html_cell, row)) + "</tr>"
        for index, row in enumerate(table.rows)
    )
    # The tabindex makes the scrollable region reachable by keyboard. The style shows the hint where the table is too wide.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.head[0])}"><div class="wide">'
        f'<p class="hint" aria-hidden="true"><span>The table scrolls sideways.</span></p>'
        f"<table{' class=dense' if len(table.head) > DENSE_TABLE else ''}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )


def _is_number(cell: str) -> bool:
    if isinstance(cell, Stack):
        return all(map(_is_number, cell.lines))
    return isinstance(cell, Number) or _NUMBER.fullmatch(cell) is not None


def _html_cell(cell: str) -> str:
    lines = cell.lines if isinstance(cell, Stack) else (cell,)
    kind = ' class="n"' if _is_number(cell) else ' class="t"' if max(map(len, lines)) > LONG_CELL else ""
    return f"<td{kind}>{'<br>'.join(map(html.escape, lines))}</td>"


def markdown(sections: list[Section]) -> str:
    """Sections as Markdown, for a model card; without curves."""
    parts = []
    for section in sections:
        if section.empty:
            continue
        parts.append(f"{'###' if section.part else '##'} {_plain(section.title)}")
        parts += [_plain(section.about)] if section.about else []
        parts += [f"**{_plain(said)}**" for said in (section.verdict, section.warning, *section.notes) if said]
        if section.figures:
            parts.append("\n".join(f"- {_plain(label)}: **{_plain(value)}**" for label, value in section.figures))
        parts += [_plain(text) for text in section.text]
        for table in section.tables:
            if table.rows:
                lines = [table.head, ["---"] * len(table.head), *table.rows]
                parts.append("\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines))
        if section.facts:
            parts.append("\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in section.facts))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text in one line, escaped so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
