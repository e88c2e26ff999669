"""Sections as one self-contained HTML page, and as Markdown. Everything that comes from results is escaped."""

from __future__ import annotations

import html
import io
import re

from lockkit.report.sections import Curve, Section, Table

_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:#1d2430;background:#fff;margin:0 auto;max-width:68rem;padding:1rem}
h1{font-size:1.7rem;margin:.5rem 0}h2{font-size:1.3rem;margin:2.2rem 0 .6rem;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1rem 0}
.figures div{border:1px solid #d7dce3;border-radius:.5rem;padding:.7rem}
.figures b{display:block;font-size:1.2rem;line-height:1.3}.figures span{color:#56606e;font-size:.85rem}
.scroll{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .7rem;border-bottom:1px solid #e3e7ec;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem}
p{overflow-wrap:anywhere}svg{width:100%;max-width:36rem;height:auto}footer{color:#56606e;font-size:.85rem;margin-top:3rem}
"""


def html_page(sections: list[Section], made_by: str) -> str:
    """The page: inline style, inline SVG, no script and nothing loaded from anywhere."""
    body = "\n".join(_html_section(section, number) for number, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>lockkit report</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>lockkit report</h1>\n{body}\n<footer>{html.escape(made_by)}</footer></body></html>\n"
    )


def _html_section(section: Section, position: int) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
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
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def svg(curve: Curve, salt: str) -> str:
    """A curve as inline SVG; `salt` keeps the ids of one page's plots apart."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curve.lines.items():
        # Labels are data, not formulas; a leading underscore would hide a line.
        label = name.replace("$", r"\$").replace("_", " ")
        across, up = zip(*points, strict=True) if points else ((), ())
        if curve.bars:
            axes.bar(across, up, label=label)
        else:
            axes.plot(across, up, marker="o", markersize=3, label=label)
    if curve.log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")  # labels between decades run into each other
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=curve.title, xlabel=curve.across, ylabel=curve.up)
    if 1 < len(curve.lines) <= 12:
        axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"lockkit-{salt}", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Identifiers such as axes_1 come back in every plot; a page may have each only once.
    return re.sub(r'(\bid="|="#|url\(#)', lambda match: f"{match[1]}p{salt}-", text)


def markdown(sections: list[Section]) -> str:
    """For a model card."""
    parts = []
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += ["\n".join(f"- {_plain(label)}: **{_plain(value)}**" for label, value in section.figures)]
        parts += [_plain(text) for text in section.text]
        for table in section.tables:
            if table.rows:
                lines = [table.head, ["---"] + ["---:"] * (len(table.head) - 1), *table.rows]
                parts.append("\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown leaves alone."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
