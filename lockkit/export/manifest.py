"""The manifest of an export: its files, its origin, and the software that wrote it.

`lockkit_manifest.json` lists every other file in the folder with its size and SHA-256, so that a user can check that the
export is unchanged. Every file that is read to run the export must be listed: the graph, the files of its weights, the
configurations and the tokenizer. The card is not listed, because its owner edits it. Other files are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lockkit.errors import UsageError
from lockkit.files import (
    ADDED_FILES,
    CARD,
    EXPORT_MANIFEST,
    check_name,
    files_below,
    read_json,
    sha256_of_file,
    write_json,
)
from lockkit.settings import plain_words, shown

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

SCHEMA: Final = "lockkit-export-manifest/1"
MODEL_FILE = "model.onnx"  # logits of the last token of each row
ALL_LOGITS_FILE = "model_all_logits.onnx"  # of all positions. Exports of earlier versions have these in MODEL_FILE
REQUIRED = (MODEL_FILE, "config.json")
OPTIONAL = (ALL_LOGITS_FILE, "generation_config.json", "genai_config.json")  # and the tokenizer's files


def _inside_the_folder(name: str) -> str:
    """Check that a name is that of a file in the folder or a subfolder, on any operating system."""
    parts = PurePosixPath(name).parts
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    if not parts or absolute or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{shown(name)} is outside the folder")
    plain = name.isprintable() and len(name.encode()) <= 255 and str(PurePosixPath(name)) == name
    if name == EXPORT_MANIFEST or not plain:
        raise ValueError(f"{shown(name)} is not the plain name of a file")
    return name


FileName = Annotated[str, AfterValidator(_inside_the_folder)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileRecord(BaseModel):
    """Size and hash of one file."""

    model_config = ConfigDict(extra="forbid")
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Manifest(BaseModel):
    """The content of `lockkit_manifest.json`.

    Attributes:
        schema_version: name and version of this format; `schema` in JSON.
        versions: of lockkit, Python and libraries, by name.
        git_hash: the commit that lockkit ran from.
        model_type: the family (lockkit/models/families.py).
        locked: whether the exported model is locked.
        depth: blocks in each chain of a locked model.
        gains: for each layer of a locked model, the factor of the stream in a block's input.
        precision: number format of the weights.
        provider: the execution provider that the graph is made for.
        block_size: number of weights that share one scale, if they are quantised.
        source_sha256: hash of each weight file of the exported model.
        files: size and hash of each file of the export.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    schema_version: Annotated[Literal["lockkit-export-manifest/1"], Field(alias="schema")] = SCHEMA
    versions: dict[str, str]
    git_hash: str | None = None
    model_type: str
    locked: bool
    depth: int | None = None
    gains: list[float] | None = None
    precision: str
    provider: str
    block_size: int | None = None
    source_sha256: dict[FileName, Sha256]
    files: dict[FileName, FileRecord]


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Add every file in `folder` but the card to the manifest and write it there. Returns the manifest as written."""
    unlisted = (folder / EXPORT_MANIFEST, folder / CARD)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in unlisted)
    files = {
        path.relative_to(folder).as_posix(): FileRecord(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))
        for path in paths
    }
    manifest = manifest.model_copy(update={"files": files})
    write_json(folder / EXPORT_MANIFEST, manifest.model_dump(by_alias=True))
    return manifest


def read_manifest(folder: Path, option: str = "EXPORT") -> Manifest:
    """Read the manifest of an export. Other files are not checked.

    Args:
        folder: the export.
        option: the option that gave it, for the error.

    Raises:
        UsageError: there is no manifest, or it is not valid.
    """
    check_name(folder, option)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: change {option}")
    path = folder / EXPORT_MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} has no {EXPORT_MANIFEST}, so it is not an export of lockkit: change {option}")
    if _is_outside(path, folder):
        raise UsageError(f"{path} is a link out of the folder: copy the file itself, or change {option}")
    raw = read_json(path, option)
    schema = raw.get("schema")
    if schema != SCHEMA:
        raise UsageError(
            f"{path} has the schema {shown(schema)}, but this version of lockkit reads {SCHEMA!r}: change {option}"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise UsageError(
            f"{path} is broken at {shown(where)} ({plain_words([first])}): export again, or change {option}"
        ) from error


def _is_outside(path: Path, folder: Path) -> bool:
    """Whether a path is a link out of its folder.

    The Hub's client keeps the files of a repository in its folder `blobs`, and links to them from `snapshots/REVISION`.
    Such links are not outside.
    """
    target, folder = path.resolve(), folder.resolve()
    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    return not any(target.is_relative_to(root) for root in (folder, *blobs))


def check_manifest(folder: Path, option: str = "EXPORT") -> Manifest:
    """Compare an export with its manifest. Returns the manifest.

    Args:
        folder: the export.
        option: the option that gave it, for the error.

    Raises:
        UsageError: the manifest is missing or not valid; or a file is missing, is a link out of the folder, has another
            size or hash, or is read to run the export and not listed. The message names the first such file.
    """
    manifest = read_manifest(folder, option)
    check_files(folder, manifest, f"export again, or change {option}", option)
    _require_everything_listed(folder, manifest, option)
    return manifest


def check_files(folder: Path, manifest: Manifest, remedy: str, option: str) -> None:
    """Compare the files of a folder with a manifest.

    Args:
        remedy: what to do if one differs, for the error.
        option: the option that gave the folder, for the error.

    Raises:
        UsageError: a file is missing, is a link out of the folder, or has another size or hash.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if path.exists() and _is_outside(path, folder):
            raise UsageError(f"{path} is a link out of the folder: copy the file itself, or change {option}")
        if not path.is_file():
            raise UsageError(f"{path} is missing: {remedy}")
        if path.stat().st_size != record.size_bytes:
            raise UsageError(
                f"{path} has {path.stat().st_size} bytes, but {record.size_bytes} in the manifest: {remedy}"
            )
        if sha256_of_file(path) != record.sha256:
            raise UsageError(f"{path} is not the file that was exported (SHA-256): {remedy}")


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """The names of the files in an export that its manifest does not list. Nothing reads them."""
    return [
        name
        for name in files_below(folder)
        if name not in (EXPORT_MANIFEST, *ADDED_FILES) and name not in manifest.files
    ]


def _require_everything_listed(folder: Path, manifest: Manifest, option: str) -> None:
    """Raise a UsageError if the manifest does not list a file that is read to run the export."""
    from lockkit.models.load import TOKENIZER_FILES

    for name in REQUIRED:
        if name not in manifest.files:
            raise UsageError(f"the manifest of {folder} does not list {name}: export again, or change {option}")
    for name in (*OPTIONAL, *TOKENIZER_FILES):
        if (folder / name).exists() and name not in manifest.files:
            raise UsageError(f"{folder / name} is not in the manifest: remove it, export again, or change {option}")
    for graph in (MODEL_FILE, ALL_LOGITS_FILE):
        weights = _weight_files(folder / graph, option) if graph in manifest.files else set()
        for name in sorted(weights - manifest.files.keys()):
            raise UsageError(
                f"{folder / graph} reads weights from {shown(name)}, which is not in the manifest: "
                f"export again, or change {option}"
            )


def _weight_files(graph: Path, option: str) -> set[str]:
    """Names of the files that a graph reads its tensors from, as written in the graph."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise UsageError(f"{graph} is not an ONNX graph: export again, or change {option}") from error
    outside = (tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return {
        name
        for tensor in outside
        for name in [entry.value for entry in tensor.external_data if entry.key == "location"] or [""]
    }


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """All tensors in a graph: initialisers and attributes, including those of subgraphs and functions."""
    import onnx
    from google.protobuf.message import Message

    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)
