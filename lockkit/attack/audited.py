"""What was audited: the names, family, sizes and precision of both models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.attack.record import AuditedModel, Summary
from lockkit.errors import counted
from lockkit.files import CARD, LOCK_RECORD
from lockkit.models.card import is_hub_id, read_metadata, strings

if TYPE_CHECKING:
    from lockkit.attack.subjects import Subject, Subjects


def audited_model(subjects: Subjects, subject: Subject) -> dict[str, Any]:
    """The `AuditedModel` of the lock or of the original, as JSON values."""
    from lockkit.models.checkpoint import stored_dtype
    from lockkit.models.families import family_of
    from lockkit.models.load import load_config

    folder, has_chains = subjects.folders[subject], subject == "locked" and subjects.has_chains
    config = load_config(folder)
    return AuditedModel(
        named=_named(folder, subjects.record if has_chains else {}),
        family=family_of(config).model_type,
        parameters=subjects.parameters(subject),
        layers=config.num_hidden_layers,
        depth=subjects.depth if has_chains else None,
        dtype=str(stored_dtype(folder, config)).removeprefix("torch."),
    ).record()


def _named(folder: Path, lock_record: dict[str, Any]) -> dict[str, str]:
    """Names of the model that the one in `folder` was made from or is a copy of, by file. No local paths."""
    if isinstance(name := lock_record.get("model"), str) and name:
        return {LOCK_RECORD: name if is_hub_id(name) else name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]}
    try:
        bases = strings(read_metadata(folder / CARD).get("base_model"))
    except ValueError:  # a broken card names nothing
        bases = []
    name = ", ".join(filter(is_hub_id, bases))
    return {CARD: name} if name else {}


def audited_sentence(summary: Summary) -> str:
    """One sentence on what was audited, with both models' names, families, sizes and precisions as far as they are known."""
    locked = summary.models["locked"] if summary.models else None
    original = summary.models["original"] if summary.models else None
    what = [*_described(locked, summary.locked)] if locked else _known_before(summary)
    against = [*_described(original, summary.original)] if original else []
    return f"Audited: {_with(summary.locked, what)}, compared with {_with(summary.original, against)}."


def _described(model: AuditedModel, name: str) -> list[str]:
    """The properties of a model, in words."""
    told: dict[str, str] = {}
    for file, other in model.named.items():
        if other != name:
            told[other] = f"a lock of {other}" if file == LOCK_RECORD else f"its card names {other}"
    return [
        *told.values(),
        f"family {model.family}",
        f"{model.parameters / 1e6:,.1f} M parameters",
        counted(model.layers, "layer"),
        *([f"chains of depth {model.depth}"] if model.depth is not None else []),
        f"weights in {model.dtype}",
    ]


def _known_before(summary: Summary) -> list[str]:
    """What a summary without `models` says of the lock."""
    layers, depth = len(summary.lock.get("layers") or []), summary.lock.get("depth")
    known = [counted(layers, "layer")] if layers else []
    return known + ([f"chains of depth {depth}"] if summary.has_chains and depth else [])


def _with(name: str, properties: list[str]) -> str:
    return f"{name} ({', '.join(properties)})" if properties else name
