"""Write the results of `lockkit verify` and `lockkit attack` into the card of a locked folder or of an export.

Only the parts that these commands own change: their text between two comments, and their entries in `model-index`.
What the owner wrote stays. The manifest of an export does not list the card, so it stays valid.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.attack.record import OLD_SCHEMA, SCHEMA, read_summary
from lockkit.errors import UsageError, first_line
from lockkit.export.card import export_card
from lockkit.files import EXPORT_MANIFEST, read_json, readable_disk_errors, sha256_of_file, write_text
from lockkit.lock.card import locked_model_card
from lockkit.models.card import with_results
from lockkit.models.origin import Origin, legal_files
from lockkit.publish.folder import Publishable, open_publishable
from lockkit.publish.results import Results, audit_results, lock_results, ours, verify_results

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard


def write_card(folder: Path, verify: Path | None = None, audit: Path | None = None) -> Path:
    """Write results into the card of a locked folder or an export. A missing card is written first.

    Args:
        folder: the locked folder or the export.
        verify: JSON of `lockkit verify`, of this export or of an export of this locked folder.
        audit: `summary.json` of `lockkit attack`, of this lock.

    Returns:
        The card.

    Raises:
        UsageError: lockkit did not write the folder; a result is broken, or is of another model; the card cannot be
            read or written.
    """
    opened = open_publishable(folder)
    if opened.web:
        raise UsageError(f"{folder} has the card of its export: give results to that, and run lockkit web again")
    found = [_verified(opened, verify)] if verify else []
    found += [_audited(opened, audit)] if audit else []
    opened.require_described()
    card = _card(opened)
    index = card.data.get("eval_results", [])
    new = {"lock": lock_results(opened.record)} if opened.record and opened.record.get("fidelity") else {}
    new |= {results.part: results.index for results in found}
    kept = [entry for entry in index if not any(ours(entry.metric_name, command) for command in new)]
    entries: list[EvalResult] = kept + [entry for own in new.values() for entry in own if _finite(entry)]
    if entries:
        card.data["model_name"] = card.data.get("model_name", opened.title)
        card.data["eval_results"] = entries
    for results in found:
        card.text = with_results(card.text, results.part, results.text)
    with readable_disk_errors(folder, "FOLDER"):
        write_text(opened.card, str(card))
    return opened.card


def _card(opened: Publishable) -> ModelCard:
    """The card in the folder; the one that lockkit would write if there is none."""
    from huggingface_hub import ModelCard

    if not opened.card.is_file():
        return ModelCard(_new_card(opened))
    try:
        return ModelCard.load(opened.card)
    except Exception as error:  # YAML, its types, encoding
        raise UsageError(f"{opened.card} cannot be read ({first_line(error)}): mend its YAML, or remove it") from error


def _new_card(opened: Publishable) -> str:
    files = tuple(legal_files(opened.path))
    if opened.manifest is not None:
        return export_card(opened.manifest, Origin(opened.path.resolve().name, None, {}, files))
    assert opened.record is not None
    name = str(opened.record["model"])
    return locked_model_card(opened.record, Origin(name, name if "/" in name else None, {}, files))


def _finite(entry: EvalResult) -> bool:
    return math.isfinite(entry.metric_value)


def _verified(opened: Publishable, path: Path) -> Results:
    from pydantic import ValidationError

    from lockkit.verify.result import VerifyResult

    raw = read_json(path, "--verify")
    try:
        result = VerifyResult.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{path} is not what lockkit verify --json writes: change --verify") from error
    if opened.manifest is not None:
        same = result.manifest_sha256 == sha256_of_file(opened.path / EXPORT_MANIFEST)
    else:
        same = result.source_sha256 == opened.source_hashes()
    if not same:
        whose = "this export" if opened.manifest is not None else "an export of this lock"
        raise UsageError(f"{path} is not of {whose}: run lockkit verify --json again, or change --verify")
    return verify_results(result, of_export=opened.manifest is not None)


def _audited(opened: Publishable, path: Path) -> Results:
    summary = _summary(path)
    try:
        identity = summary["identity"]
        if not opened.locked or identity["locked_sha256"] != opened.source_sha256():
            raise UsageError(f"{path} is not the audit of this lock: run lockkit attack again, or change --audit")
        if opened.record and identity["original_sha256"] != opened.record["original_sha256"]:
            raise UsageError(
                f"{path} compares this lock with other weights than those of {opened.record['model']}, which it was made "
                "from: run lockkit attack --original with those, or change --audit"
            )
        return audit_results(read_summary(summary).record())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} does not match its schema ({type(error).__name__}: {error}): change --audit"
        ) from error


def _summary(path: Path) -> dict[str, Any]:
    """The summary of an audit, given its file or its folder."""
    path = path / "summary.json" if path.is_dir() else path
    summary = read_json(path, "--audit")
    if summary.get("schema") not in (SCHEMA, OLD_SCHEMA):
        raise UsageError(f"{path} is not the summary.json of an audit ({SCHEMA}): change --audit")
    return summary
