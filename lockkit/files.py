"""Atomic output folders and files, JSON, and hashes of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import LockkitError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LOCK_RECORD = "lockkit.json"
EXPORT_MANIFEST = "lockkit_manifest.json"
CARD = "README.md"  # the Hub's name of a model card
_OUR_FILES = (LOCK_RECORD, EXPORT_MANIFEST)
# No space left, quota exceeded, file larger than this process may write.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output_folder(out: Path, overwrite: bool) -> None:
    """Check an output folder before any work is done.

    Raises:
        UsageError: `out` exists and `overwrite` is off, lockkit did not write it, or its parent cannot be written to.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} exists and is not a folder: change OUT")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} exists: change OUT, or add --overwrite")
        if not any((out / name).is_file() for name in _OUR_FILES):
            raise UsageError(f"{out} was not written by lockkit, so --overwrite does not replace it: change OUT")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    _check_writable(parent, "OUT")


def check_output_file(path: Path, option: str, suffixes: Collection[str] = ()) -> None:
    """Check an output file before any work is done.

    Args:
        path: the file to write.
        option: the option that names it, for the error.
        suffixes: allowed suffixes, such as `.html`; any by default.

    Raises:
        UsageError: `path` is a folder, its folder does not exist or cannot be written to, or its suffix is not allowed.
    """
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir():
        raise UsageError(f"{path} is a folder, or its folder does not exist: change {option}")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{path} does not end in one of {', '.join(suffixes)}: change {option}")
    if not _is_special(path):
        _check_writable(path.resolve().parent, option)


def _check_writable(folder: Path, option: str) -> None:
    try:
        Path(tempfile.mkdtemp(prefix=".lockkit-", dir=folder)).rmdir()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): change {option}") from error


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout."""
    return path.exists() and not path.is_file()


def check_apart(out: Path, source: Path) -> None:
    """Check that an output folder is not the folder that is read, inside it, or around it.

    Raises:
        UsageError: it is.
    """
    out, source = out.resolve(), source.resolve()
    if out == source or out in source.parents or source in out.parents:
        raise UsageError(f"{out} is MODEL's own folder, or one contains the other: change OUT")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` at the end of the `with` block.

    After a failure (including a full disk and Ctrl-C) the temporary folder is removed and a previous `out` is unchanged.

    Raises:
        UsageError: `check_output_folder` refuses `out`, or the disk is full.
    """
    check_output_folder(out, overwrite)
    out = out.absolute()
    temporary = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        with readable_disk_errors(out):
            temporary.mkdir(parents=True)
            yield temporary
            check_output_folder(out, overwrite)  # another process may have written it in the meantime
            if out.exists():
                old = out.parent / f".{out.name}.old-{os.getpid()}"
                out.rename(old)
                temporary.rename(out)
                shutil.rmtree(old)
            else:
                temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def readable_disk_errors(out: Path, option: str = "OUT") -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one line that names the folder and the option to change.

    Raises:
        UsageError: the disk is full, or `out` cannot be written to.
    """
    try:
        yield
    except LockkitError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL
        # safetensors and onnxruntime report a full disk in the text of their own errors.
        if (
            full
            or "No space left on device" in str(error)
            or any(f"os error {number}" in str(error) for number in FULL)
        ):
            raise UsageError(f"the disk is full while writing {out}: free some space, or change {option}") from error
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise UsageError(f"cannot write {out} ({error.strerror}): change {option}") from error
        raise


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. The file written there replaces `path` at the end of the `with` block.

    After a failure the temporary file is removed and a previous `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: `path` is either complete or as it was before.

    If `path` is a link, the file it points to is replaced. A device or a pipe is written to directly.
    """
    if _is_special(path):
        path.write_bytes(content)
        return
    with replaced(path.resolve()) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON as `write_text` does.

    Raises:
        ValueError: a figure is not finite. Nothing is written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def schema_record(value: DataclassInstance) -> dict[str, Any]:
    """A dataclass as JSON values. Its field `schema_version` is called `schema`."""
    return {"schema" if name == "schema_version" else name: found for name, found in asdict(value).items()}


def read_json(path: Path, option: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        option: the option that gave it, for the error.

    Raises:
        UsageError: the file is missing, unreadable, not JSON, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): change {option}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}): change {option}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object: change {option}")
    return value
