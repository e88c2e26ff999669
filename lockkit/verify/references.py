"""The PyTorch models that an export is compared with, and the held-out text for all models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lockkit import text
from lockkit.errors import UsageError
from lockkit.measure.records import MeasuredText
from lockkit.models.families import is_locked
from lockkit.models.identity import public_name, weight_hashes
from lockkit.models.load import load_config, load_tokenizer, resolve_model
from lockkit.models.lock_record import LockRecord, read_lock_record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lockkit.export.manifest import Manifest
    from lockkit.export.session import ExportSession
    from lockkit.verify.config import VerifyConfig

SPLIT = "evaluate"


@dataclass
class Reference:
    """A PyTorch model to compare with, not loaded yet.

    Attributes:
        name: as given.
        folder: its files.
        config: its configuration.
    """

    name: str
    folder: Path
    config: PreTrainedConfig

    def has_weights(self, sha256: dict[str, str]) -> bool:
        """Whether the folder has weight files with the names and hashes in `sha256`."""
        return sha256.items() <= weight_hashes(self.folder).items()


@dataclass
class References:
    """The original, the locked model, or both."""

    original: Reference | None
    locked: Reference | None

    def all(self) -> dict[str, Reference]:
        """Those that were given, by kind: `original`, `locked`."""
        return {kind: reference for kind, reference in vars(self).items() if reference is not None}

    def source_of(self, manifest: Manifest) -> Literal["original", "locked"]:
        """The kind of the model that was exported.

        Raises:
            UsageError: that model was not given.
        """
        if manifest.locked and self.locked is None:
            raise UsageError("the export is of a locked model: add --reference with the locked model's folder")
        if not manifest.locked and self.original is None:
            raise UsageError("the export is of an original model: add --reference with that model")
        return "locked" if manifest.locked else "original"


def find_references(names: list[str]) -> References:
    """Find one or two models. Their configurations say which is the original and which is locked.

    Args:
        names: `demo`, folders or Hub ids.

    Raises:
        UsageError: there is no model, a model cannot be found, or two are of the same kind.
    """
    if not names:
        raise UsageError("nothing to compare with: add --reference MODEL, the PyTorch model of the export")
    found = References(None, None)
    for name in names:
        folder = resolve_model(name, "--reference")
        reference = Reference(name, folder, load_config(folder))
        kind = "locked" if is_locked(reference.config) else "original"
        other = getattr(found, kind)
        if other is not None:
            raise UsageError(
                f"{other.name} and {name} are both {kind} models: give one --reference for the original "
                "and one for the locked model"
            )
        setattr(found, kind, reference)
    return found


def held_out_rows(session: ExportSession, given: References, config: VerifyConfig) -> tuple[torch.Tensor, MeasuredText]:
    """Token ids of held-out text, `[rows, block]`, and their description.

    Raises:
        UsageError: the export and a reference have different vocabularies or tokenizers, there is too little text, or
            continuations do not fit into the model's context.
    """
    references = list(given.all().values())
    record = _record(given.locked)
    source, column = config.data, config.data_column
    if source == "auto":
        source, column = record.source(given.locked.name if given.locked else ""), column or record.data_column
    text.require_columns(source, config.data_column)
    context = min(getattr(reference.config, "max_position_embeddings", None) or 2**31 for reference in references)
    block = min(config.block_tokens, context)
    if config.prompts and block // 4 + config.new_tokens > context:
        raise UsageError(
            f"prompts of {block // 4} tokens and {config.new_tokens} new ones exceed the model's context "
            f"of {context}: lower --new-tokens or --block-tokens"
        )
    for reference in references:
        sizes = reference.config.vocab_size, session.config["vocab_size"]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"{reference.name} has a vocabulary of {sizes[0]} tokens, the export one of {sizes[1]}: "
                "change --reference to the model of the export"
            )
    if config.tokens < block:
        raise UsageError(
            f"--tokens {config.tokens} is less than a row of {block} tokens: raise it, or lower --block-tokens"
        )
    sizes = block, config.tokens
    tokenizer = load_tokenizer(session.folder, "EXPORT")
    rows = text.token_blocks(tokenizer, text.documents(source, SPLIT, column=column), *sizes)
    text.require_embedded(tokenizer, rows, session.config["vocab_size"], source, "--data")
    for reference in references:
        own = load_tokenizer(reference.folder, "--reference")
        if not torch.equal(rows, text.token_blocks(own, text.documents(source, SPLIT, column=column), *sizes)):
            raise UsageError(
                f"the tokenizer of {reference.name} is not the export's: change --reference to the model of the export"
            )
    return rows, MeasuredText.of(rows, public_name(source), SPLIT)


def _record(locked: Reference | None) -> LockRecord:
    """The record of a locked model; an empty one without a locked model."""
    return read_lock_record(locked.folder, "--reference") if locked else LockRecord({})
