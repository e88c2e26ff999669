"""The origin of a copy of a model: its name, its licence files, and the metadata of its card.

Licences ask that their text, notices and terms stay with every copy, and that a changed copy says so. A lock and an
export are changed copies. They keep the original's files (`LEGAL_FILES`) and the YAML of its card (card.py).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lockkit.errors import first_line
from lockkit.files import CARD
from lockkit.models.card import read_metadata, strings
from lockkit.models.identity import public_name

_LEGAL_WORDS = (
    *("licence", "license", "notice", "copying", "copyright", "terms", "policy", "acceptable*use", "prohibited*use"),
    *("attribution", "agreement", "disclaimer"),
)
# Patterns of the names of licence files, for any mixture of upper and lower case: the Hub's client compares case.
LEGAL_FILES = [
    f"*{''.join(f'[{letter.upper()}{letter}]' if letter.isalpha() else letter for letter in word)}*"
    for word in _LEGAL_WORDS
]
_LEGAL_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf", ".docx")
_LEGAL_MOST_BYTES = 20 * 2**20


@dataclass(frozen=True)
class Origin:
    """Where a copy comes from, and under which terms.

    Attributes:
        name: public name of the model (`lockkit.models.identity.public_name`).
        hub_id: its id on the Hub; None for `demo` and for a local folder.
        metadata: the YAML of its card; empty if it has none.
        files: names of its licence files.
        problem: why its card could not be read; empty if it could, or if there is none.
    """

    name: str
    hub_id: str | None
    metadata: dict[str, Any]
    files: tuple[str, ...]
    problem: str = ""

    @property
    def licence(self) -> str | None:
        """The licence that the card names, or else the first licence file. None if there is neither."""
        named = ", ".join(strings(self.metadata.get("license")))
        if named in ("", "other", "unknown"):
            named = ", ".join(strings(self.metadata.get("license_name")))
        return named or next((name for name in self.files if re.search("licen[cs]e|copying", name, re.I)), None)

    def warning(self, out: Path) -> str:
        """One line for the user if the licence is not known; empty if it is."""
        unread = f"; its card cannot be read: {self.problem}" if self.problem else ""
        if self.licence is not None:
            return f"the card of {self.name} was not copied{unread}" if unread else ""
        return f"{self.name} names no licence{unread}: ask its owner before you publish {out}"

    def record(self) -> dict[str, Any]:
        """The licence and its files as JSON values."""
        return {"name": self.licence, "files": list(self.files)}

    def paragraph(self, changes: str) -> str:
        """The section on the licence in the card of a copy, in Markdown.

        Args:
            changes: what was changed, in one or more sentences.
        """
        if self.licence is None:
            terms = (
                f"`{self.name}` names no licence: it has no licence file, and its card names none. Without a licence, "
                "nobody may\npublish or use a copy. Ask the owner first."
            )
        else:
            files = f" ({', '.join(f'`{name}`' for name in self.files)} in this folder)" if self.files else ""
            terms = (
                f"The terms of `{self.name}` also apply to this copy: {self.licence}{files}. Read them before you\n"
                "publish or use it. Some ask for more, for example a name that begins with the original's."
            )
        return f"## Licence and changes\n\n{terms}\n\n**This is a changed copy.** {changes}\n"


def origin_of(model: str, folder: Path) -> Origin:
    """Read the origin of a copy of a model.

    Args:
        model: `demo`, a local folder, or a Hub id, as the user gave it.
        folder: the model's folder.
    """
    hub_id = model if model != "demo" and not Path(model).exists() else None
    try:
        metadata, problem = read_metadata(folder / CARD), ""
    except ValueError as error:
        metadata, problem = {}, first_line(error)
    return Origin(public_name(model), hub_id, metadata, tuple(legal_files(folder)), problem)


def legal_files(folder: Path) -> list[str]:
    """Names of the licence files in a folder: licences, notices, policies and terms of use."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if any(fnmatchcase(path.name, pattern) for pattern in LEGAL_FILES)
        and path.suffix.lower() in _LEGAL_SUFFIXES
        and path.is_file()
        and path.stat().st_size <= _LEGAL_MOST_BYTES
        and not path.name.startswith(".")
    )


def copy_legal_files(origin: Origin, source: Path, folder: Path) -> None:
    """Copy the licence files of `origin` from `source` to `folder`, unchanged."""
    for name in origin.files:
        shutil.copyfile(source / name, folder / name)
