"""Writing a report.

1. Find results: JSON files with a known `schema`, in the folder or in folders directly below it.
2. Turn them into sections (`sections/`).
3. Write the page, and Markdown and JSON beside it. Each file is replaced as a whole.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.files import check_output_file, readable_disk_errors, write_text
from lockkit.report.render import html_page, markdown
from lockkit.report.sections import builders, sections
from lockkit.version import __version__, git_hash

SCHEMA = "lockkit-report/2"


@dataclass(frozen=True)
class Report:
    """The files of a report, and its number of sections."""

    page: Path
    markdown: Path
    record: Path
    sections: int


def write_report(folder: Path, out: Path | None = None) -> Report:
    """Report on all results in `folder`.

    Args:
        folder: the folder of a lock, a verification or an audit, or one with several of these.
        out: the page; by default `report.html` in `folder`. Markdown and JSON have the same name with another ending.

    Raises:
        UsageError: there are no results, one is broken, `out` cannot be written, or a file is there that no earlier
            report wrote.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("reports draw with matplotlib, which is not installed: pip install 'lockkit[report]'")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: change DIR")
    out = out or folder / "report.html"
    check_output_file(out, "--out", (".html", ".htm"))
    for suffix in (".md", ".json"):
        check_output_file(out.with_suffix(suffix), "--out")
    _check_replaceable(out)
    results = find_results(folder)
    try:
        parts = sections(results)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"a result in {folder} does not match its schema ({type(error).__name__}: {error}): change DIR"
        ) from error
    made_by = f"lockkit {__version__}" + (f", commit {git_hash()}" if git_hash() else "")
    record = {"schema": SCHEMA, "made_by": made_by, "sections": [asdict(part) for part in parts]}
    texts = {
        out: html_page(parts, made_by),
        out.with_suffix(".md"): markdown(parts),
        out.with_suffix(".json"): json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    with readable_disk_errors(out, "--out"):
        for path, text in reversed(texts.items()):  # the JSON first: it marks all three as a report's
            write_text(path, text)
    page, card, data = texts
    return Report(page, card, data, len(parts))


def _check_replaceable(out: Path) -> None:
    """Refuse to replace files that no report wrote. The JSON of a report marks the page and Markdown beside it."""
    record = out.with_suffix(".json")
    existing = [path for path in (record, out, out.with_suffix(".md")) if path.exists()]
    if not existing:
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not str(found.get("schema")).startswith("lockkit-report/"):
        raise UsageError(f"{existing[0]} exists, and no earlier report wrote it: change --out")


def find_results(folder: Path) -> list[tuple[dict, Path]]:
    """All results in a folder, each with its file. Other files are ignored.

    Raises:
        UsageError: there are no results.
    """
    known = builders()
    found = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not JSON, or not readable: another program's file
        if isinstance(value, dict) and isinstance(value.get("schema"), str) and value["schema"] in known:
            found.append((value, path))
    if not found:
        raise UsageError(
            f"{folder} has no results (JSON of {', '.join(known)}): change DIR to what lock, "
            "verify --json or attack wrote"
        )
    return found
