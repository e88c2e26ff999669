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
from typing import TYPE_CHECKING

from lockkit.errors import LockkitError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LOCK_RECORD = "lockkit.json"
EXPORT_MANIFEST = "lockkit_manifest.json"
_OUR_FILES = (LOCK_RECORD, EXPORT_MANIFEST)
# No space, over quota, file too large (a limit on this process).
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output_folder(out: Path, overwrite: bool) -> None:
    """Check an output folder before any work is done.

    Raises:
        UsageError: `out` exists and `overwrite` is off, `out` contains something that lockkit did not write, or its
            parent folder cannot be written to.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} exists and is not a folder: change OUT")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} exists: change OUT, or add --overwrite")
        if not any((out / name).is_file() for name in _OUR_FILES):
            raise UsageError(f"{out} was not written by lockkit, so --overwrite leaves it alone: change OUT")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    _check_writable(parent, "OUT")


def check_output_file(path: Path, option: str, suffixes: Collection[str] = ()) -> None:
    """Check the path of an output file before any work is done.

    Args:
        option: the option that names the file, for the message.
        suffixes: allowed endings of the file's name, such as `.html`. Empty allows all.

    Raises:
        UsageError: `path` is a folder, its folder does not exist or cannot be written to, or its name has another
            ending.
    """
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir():
        raise UsageError(f"{path} is a folder, or in a folder that does not exist: change {option}")
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
    """Check that the output folder is not the folder that is read, and that neither is inside the other.

    Raises:
        UsageError: they are the same folder, or one is inside the other.
    """
    out, source = out.resolve(), source.resolve()
    if out == source or out in source.parents or source in out.parents:
        raise UsageError(f"{out} is MODEL's own folder, or one lies in the other: change OUT")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` if the block succeeds.

    On any failure (also a full disk or Ctrl-C), the temporary folder is removed, and an existing folder at `out` is
    not changed.

    Raises:
        UsageError: see `check_output_folder`; or the disk is full.
    """
    check_output_folder(out, overwrite)
    out = out.absolute()
    temporary = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        with readable_disk_errors(out):
            temporary.mkdir(parents=True)
            yield temporary
            check_output_folder(out, overwrite)  # another process may have written to it in the meantime
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
    """Turn a full or read-only disk into one line that names the folder and the option to change."""
    try:
        yield
    except LockkitError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL
        # safetensors and onnxruntime raise their own errors. Only the text says that the disk is full.
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
    """Yield a temporary path beside `path`: what is written there replaces `path` if the block succeeds.

    On any failure the temporary file is removed, and an existing file at `path` is not changed.
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
        ValueError: a figure is not finite; nothing is written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def schema_record(value: DataclassInstance) -> dict:
    """A dataclass as a JSON object, in which its `schema_version` is called `schema`."""
    return {"schema" if name == "schema_version" else name: found for name, found in asdict(value).items()}


def read_json(path: Path, option: str) -> dict:
    """Read a JSON object from a file that a user points to with `option`.

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
