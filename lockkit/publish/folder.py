"""A folder that can be published: a locked checkpoint, an export, or a folder for transformers.js, as lockkit wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockkit.errors import UsageError
from lockkit.export.manifest import Manifest, check_files, check_manifest, read_manifest
from lockkit.files import CARD, EXPORT_MANIFEST, LOCK_RECORD, WEB_MANIFEST, read_json
from lockkit.models.identity import combined_sha256, weight_hashes
from lockkit.models.locked import MODELING_FILE
from lockkit.publish.web import read_web_manifest


@dataclass(frozen=True)
class Publishable:
    """A locked checkpoint, an export, or a folder for transformers.js.

    Attributes:
        path: the folder.
        record: `lockkit.json` of a locked checkpoint; None for an export.
        manifest: of an export; None for a locked checkpoint.
        web: whether this is a folder for transformers.js. Its manifest is that of its first export, with its own files.
    """

    path: Path
    record: dict[str, Any] | None
    manifest: Manifest | None
    web: bool = False

    @property
    def card(self) -> Path:
        """Its model card."""
        return self.path / CARD

    @property
    def title(self) -> str:
        """The first heading of the card, or the name of the folder."""
        text = self.card.read_text(encoding="utf-8", errors="replace") if self.card.is_file() else ""
        headings = (line[2:].strip() for line in text.splitlines() if line.startswith("# "))
        return next(headings, "") or self.path.resolve().name

    @property
    def locked(self) -> bool:
        """Whether the model is locked. An export may be of an original."""
        return self.manifest is None or self.manifest.locked

    def source_hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file of the PyTorch model: of this checkpoint, or of the one that was exported."""
        return weight_hashes(self.path) if self.manifest is None else self.manifest.source_sha256

    def source_sha256(self) -> str:
        """One SHA-256 over `source_hashes`, as `lockkit.json` and audits name a model's weights."""
        return combined_sha256(self.source_hashes())

    def require_described(self, option: str = "FOLDER") -> None:
        """Check that the weights are those of the manifest, or of `lockkit.json`, whose figures the card repeats.

        Raises:
            UsageError: they are not.
        """
        if self.manifest is not None:
            check_files(self.path, self.manifest, f"export again, or change {option}", option)
        elif self.record and self.record.get("weights_sha256", self.source_sha256()) != self.source_sha256():
            raise UsageError(
                f"the weights in {self.path} are not those of its {LOCK_RECORD} (SHA-256): lock again, or change {option}"
            )

    def require_intact(self, option: str = "FOLDER") -> None:
        """Check that the folder is complete and runs everywhere.

        An export is compared with its manifest. The files of a checkpoint must hold all its weights.

        Raises:
            UsageError: a file is missing or damaged, or `lockkit kernel` was run on the export. The message names the
                file, and `option`.
        """
        from lockkit.kernel import has_kernel
        from lockkit.models.checkpoint import Checkpoint
        from lockkit.models.families import family_of
        from lockkit.models.layered import empty_model
        from lockkit.models.load import load_config, load_tokenizer

        if self.manifest is not None and self.web:
            check_files(self.path, self.manifest, f"run lockkit web again, or change {option}", option)
            return
        if self.manifest is not None:
            check_manifest(self.path, option)
            if has_kernel(self.path):
                raise UsageError(
                    f"{self.path} has the operator for this machine's processor, so it does not run elsewhere: run "
                    f"lockkit kernel {self.path} --remove"
                )
            return
        if not (self.path / MODELING_FILE).is_file():
            raise UsageError(f"{self.path} has no {MODELING_FILE}: lock the model again, or change {option}")
        try:
            config = load_config(self.path)
            Checkpoint(self.path, empty_model(config, family_of(config)))
        except UsageError as error:
            raise UsageError(str(error).replace("change MODEL", f"change {option}")) from error
        load_tokenizer(self.path, option)
        self.require_described(option)


def open_publishable(folder: Path, option: str = "FOLDER") -> Publishable:
    """Recognise a folder that `lockkit lock` or `lockkit export` wrote. Its files are not compared with hashes.

    Raises:
        UsageError: there is no such folder, lockkit did not write it, or its description is broken. The message names
            `option`.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: change {option}")
    if (folder / EXPORT_MANIFEST).is_file():
        return Publishable(folder, None, read_manifest(folder, option))
    if (folder / WEB_MANIFEST).is_file():
        return Publishable(folder, None, read_web_manifest(folder, option), web=True)
    if (folder / LOCK_RECORD).is_file() and (folder / "config.json").is_file():
        record = read_json(folder / LOCK_RECORD, option)
        if str(record.get("schema")).startswith("lockkit-lock/"):
            return Publishable(folder, record, None)
    raise UsageError(f"{folder} was not written by lockkit lock, export or web: change {option}")
