"""Writing a report.

1. Find results in a folder: JSON files, at most one folder down, whose `schema` is one lockkit reports on.
2. Turn them into sections (`sections.py`).
3. Write the page, and Markdown and JSON beside it; each file is whole, or as it was before.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.files import write_text
from lockkit.report.render import html_page, markdown
from lockkit.report.sections import sections
from lockkit.version import __version__, git_hash

SCHEMA = "lockkit-report/2"
REPORTED = ("lockkit-lock/2", "lockkit-verify/1", "lockkit-attack-summary/2", "lockkit-asymmetry/1")


@dataclass(frozen=True)
class Report:
    """The files of a report."""

    page: Path
    markdown: Path
    record: Path
    sections: int


def write_report(folder: Path, out: Path | None = None) -> Report:
    """Report on all results in `folder`.

    Args:
        folder: of a lock, a verification or an audit, or one that holds several of these.
        out: the page; `report.html` in `folder` by default. Markdown and JSON take its name.

    Raises:
        UsageError: there are no results, one is broken, or `out` cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("reports draw with matplotlib, which is not installed: pip install 'lockkit[report]'")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: change DIR")
    out = out or folder / "report.html"
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out} is not the name of an HTML file in a folder that exists: change --out")
    results = find_results(folder)
    try:
        parts = sections(results)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"a result in {folder} is not what its schema says ({type(error).__name__}: {error}): change DIR"
        ) from error
    made_by = f"lockkit {__version__}" + (f", commit {git_hash()}" if git_hash() else "")
    record = {"schema": SCHEMA, "made_by": made_by, "sections": [asdict(part) for part in parts]}
    texts = {
        out: html_page(parts, made_by),
        out.with_suffix(".md"): markdown(parts),
        out.with_suffix(".json"): json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    for path, text in texts.items():
        try:
            write_text(path, text)
        except OSError as error:
            raise UsageError(f"cannot write {path} ({error.strerror}): change --out") from error
    return Report(*texts, sections=len(parts))


def find_results(folder: Path) -> list[dict]:
    """All results in a folder, audits with their rows.

    Raises:
        UsageError: there is nothing to report in it, or rows are broken.
    """
    found = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not one of ours, or not readable: other programs' files are nobody's business here
        if isinstance(value, dict) and value.get("schema") in REPORTED:
            if value["schema"].startswith("lockkit-attack-summary/"):
                value = _with_rows(value, path)
            found.append(value)
    if not found:
        raise UsageError(
            f"{folder} has no results (JSON of {', '.join(REPORTED)}): change DIR to what lock, "
            "verify --json or attack wrote"
        )
    return found


def _with_rows(summary: dict, path: Path) -> dict:
    """The summary with the rows it was made from: rows.jsonl may hold others, of other settings.

    A last line without its end is a row that an audit is writing, or was stopped at: it counts for nothing yet.
    """
    file = path.parent / "rows.jsonl"
    rows: dict[str, dict] = {}
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{file}, line {number}, is not a row ({error}): remove it, or change DIR") from error
    return summary | {"rows": [rows[key] for key in summary.get("row_keys", []) if key in rows]}
