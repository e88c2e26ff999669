"""The style of a report's page: light and dark, one column on a phone, contents beside the text on a desktop.

The colours --c0, --c1, ... are those of curves (plot.py). The shadows at the edges of a table show that it scrolls.
So does a hint above it. Its height follows from two widths, without a script: 100% is the table's, and 100cqi that of the
region that it scrolls in. If the table fits, the hint has no height.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#56606e;--line:#d7dce3;--page:#fff;--card:#f6f8fa;--warn:#8a3b00;
--bad:#b3140f;--badcard:#fdecea;--good:#176b33;--goodcard:#e9f6ec;--shade:rgba(0,0,0,.22);
--c0:#0b66c3;--c1:#d1480b;--c2:#1b7f3b;--c3:#8a3fbf;--c4:#a8780a;--c5:#0c8a8a;--c6:#c2307a;--c7:#6b4a2f;--c8:#5a6b1f}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#9aa5b4;--line:#3a424e;--page:#14181e;--card:#1c222b;
--warn:#ffb27a;--bad:#ff8f86;--badcard:#3a1d1c;--good:#7fd89a;--goodcard:#17301f;--shade:rgba(255,255,255,.28);
--c0:#6db3ff;--c1:#ff9966;--c2:#68d08a;--c3:#cd9bf5;--c4:#e6c056;--c5:#5fd4d4;--c6:#ff8fc4;--c7:#d0a988;--c8:#b9cf6a}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:96rem;
padding:1rem}
main,header{min-width:0}
h1{font-size:1.6rem;margin:.5rem 0 0}h2{font-size:1.35rem;margin:2.5rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:1.1rem;margin:2rem 0 .5rem;overflow-wrap:anywhere}
h2{border-top:1px solid var(--line);padding-top:1.2rem}
a{color:var(--c0)}
header p,.facts,.hint{color:var(--soft);font-size:.85rem}header p{margin:.2rem 0 1rem}
.verdicts{list-style:none;padding:0;margin:0 0 1rem}
.verdicts li,.verdict{border-left:.3rem solid var(--line);background:var(--card);padding:.5rem .8rem;margin:.5rem 0;
overflow-wrap:anywhere;max-width:none}
.verdicts a{font-weight:600;display:block}.verdict{font-weight:600}
.verdicts .bad,.verdict.bad{border-color:var(--bad);background:var(--badcard);color:var(--bad)}
.verdicts .good,.verdict.good{border-color:var(--good);background:var(--goodcard)}
nav{font-size:.875rem}nav ul{list-style:none;padding:0;margin:.3rem 0}nav li{padding:.1rem 0;overflow-wrap:anywhere}
nav .part{padding-left:1rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9rem),1fr));gap:.7rem;margin:1rem 0}
.figures div{border:1px solid var(--line);background:var(--card);border-radius:.5rem;padding:.7rem}
.figures b{display:block;font-size:1.15rem;line-height:1.3;overflow-wrap:anywhere}
.figures span{color:var(--soft);font-size:.85rem}
.about{max-width:none;margin:.3rem 0}
.warning{color:var(--warn);font-weight:600}
.scroll{container-type:inline-size}.wide{width:fit-content;min-width:100%}
.hint{position:sticky;left:0;width:100cqi;height:0;margin:0;overflow:hidden;
padding-top:clamp(0px,(100% - 100cqi - .5px)*999,1.5rem)}.hint span{position:absolute;top:0;left:0}
.scroll{overflow-x:auto;margin:1rem 0;background:linear-gradient(90deg,var(--page) 30%,transparent) 0 0/2.5rem 100% local,
linear-gradient(270deg,var(--page) 30%,transparent) 100% 0/2.5rem 100% local,
linear-gradient(90deg,var(--shade),transparent) 0 0/.8rem 100% scroll,
linear-gradient(270deg,var(--shade),transparent) 100% 0/.8rem 100% scroll;background-repeat:no-repeat}
table{border-collapse:collapse;font-size:.875rem}
th,td{padding:.3rem .55rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;max-width:20rem}
.dense th,.dense td{padding-left:.3rem;padding-right:.3rem}
td{overflow-wrap:break-word}td.t{min-width:11rem}th.n{text-align:right}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{position:sticky;left:0;background:var(--page);padding-left:0;max-width:11rem}
tr.bad td{color:var(--bad);font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
p{overflow-wrap:anywhere;max-width:52rem}svg{display:block;width:100%;max-width:38rem;height:auto;color:var(--ink)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;margin:1rem 0}
dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere;min-width:0}
.facts dt{font-weight:400}
@media(max-width:40rem){dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}}
@media(min-width:64rem){body{display:grid;grid-template-columns:12rem minmax(0,1fr);column-gap:2rem;padding:1.5rem 2rem}
header{grid-column:1/-1}nav{position:sticky;top:1rem;align-self:start;max-height:calc(100vh - 2rem);overflow-y:auto}
main>section:first-child h2{margin-top:0;border-top:0;padding-top:0}}
@media print{nav,.hint{display:none}.scroll{overflow:visible}}
"""
