"""Writing a report.

1. Find results: JSON files with a known `schema`, in the folder or in folders directly below it; or the one given file.
2. Turn them into sections (`sections/`).
3. Write the page, and Markdown and JSON beside it. Each file is replaced as a whole.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lockkit.errors import UsageError
from lockkit.files import check_output_file, readable_disk_errors, write_text
from lockkit.report.page import Number, Stack
from lockkit.report.render import html_page, markdown
from lockkit.report.sections import builders, sections
from lockkit.version import __version__, git_hash

SCHEMA = "lockkit-report/4"


@dataclass(frozen=True)
class Report:
    """The files of a report, its number of sections, and what the reader has to do about the results."""

    page: Path
    markdown: Path
    record: Path
    sections: int
    notes: list[str]


def write_report(results: Path | list[Path], out: Path | None = None) -> Report:
    """Report on all results in a folder, on one of them, or on those in several places.

    Args:
        results: the folder of a lock, a verification or an audit, or one with several of these; or one file of results;
            or a list of folders and files.
        out: the page; by default `report.html` in the first folder, or beside the first file. Markdown and JSON have the
            same name with another ending.

    Raises:
        UsageError: there are no results, one is broken, `out` cannot be written, or a file is there that no earlier
            report wrote.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("reports draw with matplotlib, which is not installed: pip install 'lockkit[report]'")
    sources = results if isinstance(results, list) else [results]
    for source in sources:
        if not source.exists():
            raise UsageError(f"there is no file or folder {source}: change RESULTS")
    out = out or (sources[0] if sources[0].is_dir() else sources[0].parent) / "report.html"
    check_output_file(out, "--out", (".html", ".htm"))
    for suffix in (".md", ".json"):
        check_output_file(out.with_suffix(suffix), "--out")
    _check_replaceable(out)
    by_file = {path.resolve(): (record, path) for source in sources for record, path in find_results(source)}
    found = list(by_file.values())  # a file that is given twice counts once
    try:
        parts = sections(found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"a result in {', '.join(map(str, sources))} does not match its schema ({type(error).__name__}: {error}): "
            "change RESULTS"
        ) from error
    made_by = f"lockkit {__version__}" + (f", commit {git_hash()}" if git_hash() else "")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"schema": SCHEMA, "made_by": made_by, "created": created, "sections": _values(parts)}
    made_by = f"{created[:16].replace('T', ' ')} UTC, {made_by}"
    texts = {
        out: html_page(parts, made_by),
        out.with_suffix(".md"): markdown(parts),
        out.with_suffix(".json"): json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    with readable_disk_errors(out, "--out"):
        for path, text in reversed(texts.items()):  # the JSON first: it marks all three as a report's
            write_text(path, text)
    page, card, data = texts
    return Report(page, card, data, len(parts), [f"{part.title}: {note}" for part in parts for note in part.notes])


def _values(part: Any) -> Any:
    """Sections, and what is in them, as JSON values. A figure is a number, or null if it is missing or not finite."""
    if isinstance(part, Stack):
        return [_values(line) for line in part.lines]
    if isinstance(part, Number):
        return str(part) if part.value is None and part != "–" else part.value
    if is_dataclass(part):
        return {field.name: _values(getattr(part, field.name)) for field in fields(part)}
    if isinstance(part, Mapping):
        return {name: _values(value) for name, value in part.items()}
    return [_values(entry) for entry in part] if isinstance(part, list | tuple) else part


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


def find_results(source: Path) -> list[tuple[dict, Path]]:
    """All results in a folder, each with its file, or the result in a file. Other files in a folder are ignored.

    Raises:
        UsageError: there are no results.
    """
    known = builders()
    found, unread = [], []
    for path in sorted([*source.glob("*.json"), *source.glob("*/*.json")]) if source.is_dir() else [source]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not JSON, or not readable: another program's file
        schema = value.get("schema") if isinstance(value, dict) else None
        if not isinstance(schema, str):
            continue
        if schema in known:
            found.append((value, path))
        elif schema.partition("/")[0] in {name.partition("/")[0] for name in known}:
            unread.append(f"{path} is of {schema}")
    if not found and unread:
        raise UsageError(f"{unread[0]}, which this version of lockkit does not read: make it again, or change RESULTS")
    if not found:
        raise UsageError(
            f"{source} has no results (JSON of {', '.join(known)}): change RESULTS to what lock, "
            "verify --json, bench --json or attack wrote"
        )
    return found
