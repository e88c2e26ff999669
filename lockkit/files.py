"""Names of files, atomic output files, JSON, and hashes of files. Output folders are in output_folders.py."""

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
WEB_MANIFEST = "lockkit_web.json"  # of a folder for transformers.js
CARD = "README.md"  # the Hub's name of a model card
BOM = "bom.cdx.json"
SIGNATURE = "model.sig"
CACHE_VARIABLE = "XDG_CACHE_HOME"  # the environment variable that moves `cache_folder`
HIDDEN = ".lockkit-"  # begins the name of everything temporary inside an output folder
ADDED_FILES = (CARD, BOM, SIGNATURE)  # written or changed after a lock or an export is finished
# No space left, quota exceeded, file larger than this process may write.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV, errno.ENAMETOOLONG, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENOTEMPTY, errno.ESTALE, errno.EIO),
)


def files_below(folder: Path) -> list[str]:
    """The names of all files in a folder and the folders in it, relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_output_file(path: Path, option: str, suffixes: Collection[str] = ()) -> None:
    """Check an output file before any work is done.

    Args:
        path: the file to write.
        option: the option that names it, for the error.
        suffixes: allowed suffixes, such as `.html`; any by default.

    Raises:
        UsageError: `path` is a folder, its folder does not exist or cannot be written to, or its suffix is not allowed.
    """
    with readable_disk_errors(path, option):
        parent = path.absolute().parent
        if path.is_dir():
            raise UsageError(f"{path} is a folder, not a file: change {option}")
        if not parent.is_dir():
            what = "is a file" if os.path.lexists(parent) else "does not exist"
            raise UsageError(f"{path} cannot be written, because {parent} {what}: change {option}")
        if suffixes and path.suffix.lower() not in suffixes:
            raise UsageError(f"{path} does not end in one of {', '.join(suffixes)}: change {option}")
        target = real_path(path)
        if not _is_special(path) and not (target.is_file() and os.access(target, os.W_OK)):
            check_writable(target.parent, option)


def check_name(path: Path, option: str) -> None:
    """Check that a name is valid Unicode, which safetensors, onnx and onnxruntime need.

    Raises:
        UsageError: it is not. In an ASCII locale, this is the case for every name outside ASCII.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise UsageError(
            f"{path} is not a valid name in this locale: change {option}, or set the environment variable PYTHONUTF8=1"
        )


def short(name: str) -> str:
    """A file name, cut if a longer one made from it could exceed the limit of file systems (255 bytes)."""
    return name if len(os.fsencode(name)) <= 200 else name[:40]


def check_writable(folder: Path, option: str) -> None:
    """Check that files can be made in a folder.

    Raises:
        UsageError: they cannot. The message names `option`.
    """
    try:
        Path(tempfile.mkdtemp(prefix=HIDDEN, dir=folder)).rmdir()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): change {option}") from error


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout."""
    return path.exists() and not path.is_file()


def real_path(path: Path) -> Path:
    """The absolute path without links."""
    return Path(os.path.realpath(path))


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
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise UsageError(f"cannot write {out} ({error.strerror}): change {option}") from error
        raise


def cache_folder() -> Path:
    """The folder of files that any run can make again: `$XDG_CACHE_HOME/lockkit`, by default `~/.cache/lockkit`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache") / "lockkit"


# The first bytes of a Git LFS pointer, and what to say of it.
GIT_LFS = b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
# What a download can leave in place of a file, by its first bytes in lower case. A text may begin with "<", too.
_IMPOSTORS = {
    GIT_LFS[0]: GIT_LFS[1],
    **dict.fromkeys(
        (b"<!doctype", b"<html", b"<head", b"<?xml"), "is a web page, not the file itself: download it again"
    ),
}


def impostor(path: Path) -> str | None:
    """What a download has left in place of a file, in words that follow its name, and what to do.

    Returns:
        Words for a Git LFS pointer and for a web page; None for every other file, and for one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError:
        return None
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # without the byte order mark
    return next((words for magic, words in _IMPOSTORS.items() if start.startswith(magic)), None)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. The file written there replaces `path` at the end of the `with` block.

    A file that exists keeps its permissions. After a failure the temporary file is removed and a previous `path` is
    unchanged.
    """
    temporary = path.with_name(f".{short(path.name)}.partial-{os.getpid()}")
    try:
        yield temporary
        if path.is_file():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: `path` is either complete or as it was before.

    If `path` is a link, the file it points to is replaced. A device or a pipe is written to directly, and so is a file
    that cannot be replaced: a mount point, or a file in a read-only folder.
    """
    target = real_path(path)
    if _is_special(path):
        path.write_bytes(data)
        return
    try:
        with replaced(target) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        if error.errno in FULL or not target.is_file() or not os.access(target, os.W_OK):
            raise
        target.write_bytes(data)


def complete_lines(path: Path) -> list[str]:
    """The lines of a file that is appended to. An incomplete last line, which is just being written, is left out."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON as `write_text` does. A file name that is not valid Unicode is written with JSON's escapes.

    Raises:
        ValueError: a figure is not finite. Nothing is written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def schema_record(value: DataclassInstance) -> dict[str, Any]:
    """A dataclass as JSON values. Its field `schema_version` is called `schema`."""
    return {"schema" if name == "schema_version" else name: found for name, found in asdict(value).items()}


def read_json(path: Path, option: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        option: the option that gave it, for the error.

    Raises:
        UsageError: the file is missing, unreadable, a Git LFS pointer, a web page, not JSON, or not a JSON object.
    """
    if words := impostor(path):
        raise UsageError(f"{path} {words}, or change {option}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): change {option}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}): change {option}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object: change {option}")
    return value
