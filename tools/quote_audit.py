"""The example in docs/audit.md, from the summary of an audit.

    python tools/quote_audit.py audit/summary.json --name "Gemma 3 270M" --note "26 min on 2 CPU threads"

Replaces what stands between the marks `<!-- example -->` and `<!-- end of example -->`: which audit it is, its verdict, its
ratios of operations, tokens, memory and activations with the two runs behind each, the attention-only bound, and the
effective depth. Nothing else in the documentation quotes figures of that audit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from textwrap import fill

from lockkit.attack.record import Summary, read_summary
from lockkit.attack.sentences import KINDS
from lockkit.attack.target import RESOURCE_TITLES
from lockkit.errors import UsageError
from lockkit.files import write_text

DOCUMENT = Path(__file__).parents[1] / "docs" / "audit.md"
BEGIN, END = "<!-- example -->", "<!-- end of example -->"
QUOTED = ("flops", "tokens", "peak_tensor_bytes", "saved_bytes")  # seconds depend on the machine
WIDTH = 120  # of a line of text
UNITS = {"flops": (1e9, "GFLOP"), "tokens": (1, "tokens")}  # all others are in MB


def main() -> None:
    """Replace the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("summary", type=Path, help="summary.json of the audit")
    parser.add_argument("--name", help="the original's name (that of its folder)")
    parser.add_argument("--note", help="how long it took, on what")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="the page (docs/audit.md)")
    arguments = parser.parse_args()
    summary = read_summary(json.loads(arguments.summary.read_text(encoding="utf-8")))
    text = arguments.document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(f"{arguments.document} has no place for the example ({BEGIN}): change --document")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    text = example(summary, arguments.name or f"`{summary.original}`", arguments.note)
    write_text(arguments.document, f"{before}{BEGIN}\n{text}{END}{after}")


def example(summary: Summary, name: str, note: str | None = None) -> str:
    """The text of the example, as Markdown."""
    facts = [f"commit {summary.git_hash}", *([note] if note else [])]
    depth = summary.effective_depth
    lines = [
        _wrapped(
            f"For {name}, locked at depth {depth['depth']}, the suite `{summary.config['suite']}` ({'; '.join(facts)}) says:"
        ),
        "",
        _wrapped(f"> {summary.verdict.sentence}", subsequent_indent="> "),
        "",
        "| attackers | resource | ratio | on the lock | on the original |",
        "|---|---|---|---|---|",
    ]
    for task in summary.tasks.values():
        for kind, title in KINDS.items():
            found = getattr(task, kind)
            lines += [
                f"| {title} | {RESOURCE_TITLES[key]} | {ratio.says} "
                f"| {_end(ratio.best_attack, ratio.locked, key)} | {_end(ratio.best_attack_original, ratio.original, key)} |"
                for key in QUOTED
                if (ratio := found.get(key))
            ]
        bounds = [
            f"{b.says} in {RESOURCE_TITLES[k]}" for k, b in task.attention_only_bound.items() if b and k in QUOTED
        ]
        lines += ["", _wrapped(f"Bound for every lock of this shape: {', '.join(bounds)}.")] if bounds else []
    lines += ["", f"Effective depth: {depth['says']} of {depth['depth']}.", ""]
    return "\n".join(lines)


def _wrapped(text: str, **settings: str) -> str:
    return fill(text, WIDTH, break_on_hyphens=False, **settings)


def _end(attack: str | None, cost: float | None, resource: str) -> str:
    if attack is None or cost is None:
        return "–"
    divisor, unit = UNITS.get(resource, (1e6, "MB"))
    return f"{attack}: {cost / divisor:,.0f} {unit}"


if __name__ == "__main__":
    main()
