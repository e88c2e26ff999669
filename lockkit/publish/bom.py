"""A bill of materials in CycloneDX 1.6 (an ML-BOM): where a locked folder or an export comes from.

It names the model with the hash of every file, its licence, the model it was made from (its pedigree), the recipe, the
texts with the hashes of their tokens, the figures of the card, and the versions of the software. It has no paths and no
text. It needs the package `cyclonedx-python-lib`, which also validates it against the schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError
from lockkit.files import BOM, SIGNATURE, readable_disk_errors, sha256_of_file, write_text
from lockkit.models.card import read_metadata, strings
from lockkit.publish.folder import Publishable, open_publishable
from lockkit.publish.push import published_files
from lockkit.version import __version__, versions

if TYPE_CHECKING:
    from cyclonedx.model import Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

LIMITATION = (
    "The lock can be undone: the blocks of a chain can be written side by side as an ordinary MLP. "
    "If the original weights are public, it protects nothing."
)


def write_bom(folder: Path, lock: Path | None = None) -> Path:
    """Write the bill of materials of a locked folder or an export. Its figures are those of the card.

    Args:
        folder: that `lockkit lock` or `lockkit export` wrote, with its card.
        lock: the locked folder that an export was made from. The bill then has the recipe, the texts and the original.

    Returns:
        The file, `bom.cdx.json` in the folder.

    Raises:
        UsageError: lockkit did not write a folder, the export was not made from `lock`, or the package is missing.
    """
    try:
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise UsageError("a bill of materials needs cyclonedx-python-lib: pip install 'lockkit[sign]'") from error
    opened = open_publishable(folder)
    bom = json.loads(JsonV1Dot6(_bom(opened, _record(opened, lock))).output_as_string())
    bom["metadata"]["component"]["modelCard"] = _model_card(opened, bom)  # the library has no class for it
    text = json.dumps(bom, indent=2, ensure_ascii=False) + "\n"
    if broken := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise RuntimeError(f"the bill of materials does not match its schema: {broken}")
    with readable_disk_errors(folder, "FOLDER"):
        write_text(folder / BOM, text)
    return folder / BOM


def _record(opened: Publishable, lock: Path | None) -> dict[str, Any]:
    """The record of the lock; empty for the export of an original, or without the locked folder."""
    if lock is None:
        return opened.record or {}
    source = open_publishable(lock, "--lock")
    if source.record is None or opened.manifest is None or source.source_hashes() != opened.source_hashes():
        raise UsageError(f"{opened.path} is not an export of {lock}: change --lock")
    return source.record


def _bom(opened: Publishable, record: dict[str, Any]) -> Bom:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=opened.title,
        version=opened.source_sha256()[:12],
        bom_ref="model",
        licenses=_licences(opened),
        properties=_properties(opened, record),
        components=_files(opened),
        pedigree=Pedigree(ancestors=_ancestors(opened, record), notes=_notes(opened)),
    )
    made_with = record.get("versions") or (opened.manifest.versions if opened.manifest else versions())
    libraries = [_library(name, version) for name, version in made_with.items() if name != "lockkit"]
    texts = _texts(record)
    bom = Bom(components=[*texts, *libraries])
    bom.metadata.component = model
    bom.metadata.tools.components.add(Component(type=ComponentType.APPLICATION, name="lockkit", version=__version__))
    bom.register_dependency(model, [*texts, *libraries])
    return bom


def _files(opened: Publishable) -> list[Component]:
    """Every published file with its SHA-256, without the files that are written later: this one and the signature."""
    from cyclonedx.model.component import Component, ComponentType

    listed = opened.manifest.files if opened.manifest else {}
    return [
        Component(
            type=ComponentType.FILE,
            name=name,
            bom_ref=f"file:{name}",
            hashes=[_sha256(listed[name].sha256 if name in listed else sha256_of_file(opened.path / name))],
        )
        for name in published_files(opened.path)
        if name not in (BOM, SIGNATURE)
    ]


def _ancestors(opened: Publishable, record: dict[str, Any]) -> list[Component]:
    """The model that this one was made from, with its own ancestor."""
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    kind = ComponentType.MACHINE_LEARNING_MODEL
    original = []
    if record:
        name = str(record["model"])
        url = f"pkg:huggingface/{name}" if "/" in name else None
        hashes = [_sha256(record["original_sha256"])]
        original = [Component(type=kind, name=name, hashes=hashes, purl=_purl(url), bom_ref="original")]
    if opened.manifest is None:
        return original
    exported = Component(
        type=kind,
        name="the locked model" if opened.locked else "the original",
        bom_ref="exported",
        hashes=[_sha256(opened.source_sha256())],
        pedigree=Pedigree(ancestors=original) if original else None,
    )
    return [exported]


def _texts(record: dict[str, Any]) -> list[Component]:
    """The texts of a lock: source, split, tokens, and the SHA-256 of the token ids."""
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    data = record.get("data", {})
    splits = data.get("splits") or {}
    return [
        Component(
            type=ComponentType.DATA,
            name=f"{data['source']}, {part}",
            bom_ref=f"data:{part}",
            hashes=[_sha256(data[f"{part}_sha256"])],
            properties=[
                Property(name="lockkit:tokens", value=str(data[f"{part}_tokens"])),
                Property(name="lockkit:split", value=str(splits.get(part, "sampled from the original"))),
            ],
        )
        for part in ("train", "validation", "evaluation")
        if f"{part}_sha256" in data
    ]


def _properties(opened: Publishable, record: dict[str, Any]) -> list[Property]:
    """The recipe of a lock and the settings of an export."""
    from cyclonedx.model import Property

    values = {f"recipe:{name}": value for name, value in record.get("recipe", {}).items()}
    if opened.manifest is not None:
        values |= {f"export:{name}": getattr(opened.manifest, name) for name in ("precision", "provider", "block_size")}
    if commit := record.get("git_hash") or (opened.manifest and opened.manifest.git_hash):
        values["commit"] = commit
    return [Property(name=f"lockkit:{name}", value=str(value)) for name, value in values.items() if value is not None]


def _notes(opened: Publishable) -> str:
    parts = ["Every MLP was replaced by a chain of low-rank blocks, distilled from it."] if opened.locked else []
    return " ".join([*parts, *(["The model was converted to ONNX."] if opened.manifest else [])])


def _licences(opened: Publishable) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    metadata = read_metadata(opened.card)
    names = [name for name in strings(metadata.get("license")) if name != "other"]
    return [LicenseFactory().make_from_string(name) for name in names or strings(metadata.get("license_name"))]


def _model_card(opened: Publishable, bom: dict[str, Any]) -> dict[str, Any]:
    """The part of CycloneDX for models: task, family, texts, figures, limits."""
    from huggingface_hub import ModelCard

    entries = ModelCard.load(opened.card).data.get("eval_results", []) if opened.card.is_file() else []
    family = opened.record["model_type"] if opened.record else opened.manifest.model_type if opened.manifest else ""
    texts = [{"ref": component["bom-ref"]} for component in bom["components"] if component["type"] == "data"]
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": family,
            "modelArchitecture": "DLR-Lock" if opened.locked else family,
            **({"datasets": texts} if texts else {}),
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {
                    "type": entry.metric_name or entry.metric_type,
                    "value": str(entry.metric_value),
                    "slice": entry.dataset_name,
                }
                for entry in entries
            ]
        },
        "considerations": {"technicalLimitations": [LIMITATION] if opened.locked else []},
    }


def _library(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    kind = ComponentType.PLATFORM if name == "python" else ComponentType.LIBRARY
    url = None if name == "python" else f"pkg:pypi/{name}@{version}"
    return Component(type=kind, name=name, version=version, bom_ref=f"software:{name}", purl=_purl(url))


def _sha256(value: str) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=value)


def _purl(text: str | None) -> Any:
    from packageurl import PackageURL

    return PackageURL.from_string(text) if text else None
