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
BOM = "bom.cdx.json"
SIGNATURE = "model.sig"
ADDED_FILES = (CARD, BOM, SIGNATURE)  # written or changed after a lock or an export is finished
_RECORDS = (LOCK_RECORD, EXPORT_MANIFEST)
_HIDDEN = ".lockkit-"  # begins the name of everything temporary inside an output folder
_NOT_CONTENT = ("lost+found", ".DS_Store")  # what the system puts into an otherwise empty folder
# No space left, quota exceeded, file larger than this process may write.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV, errno.ENAMETOOLONG, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENOTEMPTY, errno.ESTALE, errno.EIO),
)


def check_output_folder(out: Path, overwrite: bool, option: str = "OUT") -> None:
    """Check an output folder before any work is done.

    If a process was killed while it wrote `out`, what it left is completed or removed first.

    Args:
        out: the folder to write.
        overwrite: whether its content may be replaced.
        option: the option that names it, for the error.

    Raises:
        UsageError: `out` exists and `overwrite` is off, it contains a file that lockkit did not write, another process
            writes it, or it cannot be written to.
    """
    with readable_disk_errors(out, option):
        _recover(real_path(out), out, option)
        _check_folder(out, overwrite, option)


def _check_folder(out: Path, overwrite: bool, option: str) -> None:
    folder = real_path(out)
    check_name(folder, option)
    if out.is_symlink() and not folder.exists():
        raise UsageError(f"{out} is a link to {folder}, which does not exist: change {option}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{out} exists and is not a folder: change {option}")
    if folder.is_dir() and content(folder):
        _check_replaceable(folder, out, overwrite, option)
    check_results_folder(out, option)


def _check_replaceable(folder: Path, out: Path, overwrite: bool, option: str) -> None:
    """Raise a UsageError unless `overwrite` is on and lockkit wrote everything in a folder that is not empty."""
    if not any((folder / name).is_file() for name in _RECORDS):
        reason = "was not written by lockkit, so --overwrite does not replace it" if overwrite else "exists already"
        raise UsageError(f"{out} {reason}: change {option}")
    if not overwrite:
        raise UsageError(f"{out} exists: change {option}, or add --overwrite")
    ours = {*_RECORDS, *ADDED_FILES, *_files_in_record(folder)}
    for entry in content(folder):
        for path in [entry] if not entry.is_dir() else sorted(entry.rglob("*")) or [entry]:
            name = path.relative_to(folder).as_posix()
            if not path.is_dir() and name not in ours:
                raise UsageError(
                    f"{out} contains {name}, which is not a file of the result there, so --overwrite does not delete "
                    f"it: move it, or change {option}"
                )


def files_below(folder: Path) -> list[str]:
    """The names of all files in a folder and the folders in it, relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _files_in_record(folder: Path) -> list[str]:
    """The names of the files in the record of a lock or in the manifest of an export; none if it cannot be read."""
    record = next(folder / name for name in _RECORDS if (folder / name).is_file())
    try:
        return list(json.loads(record.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


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
            _check_writable(target.parent, option)


def check_name(path: Path, option: str) -> None:
    """Check that a name is valid Unicode, which safetensors, onnx and onnxruntime need.

    Raises:
        UsageError: it is not. In an ASCII locale, this is the case for every name outside ASCII.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise UsageError(
            f"{path} is not a valid name in this locale: change {option}, or set the environment variable PYTHONUTF8=1"
        )


def check_results_folder(folder: Path, option: str) -> None:
    """Check a folder in which files are added, before any work is done. It need not exist.

    Raises:
        UsageError: it cannot be created or written to.
    """
    with readable_disk_errors(folder, option):
        existing = real_path(folder)
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UsageError(f"{folder} cannot be a folder, because {existing} is a file: change {option}")
        _check_writable(existing, option)


def _check_writable(folder: Path, option: str) -> None:
    try:
        Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=folder)).rmdir()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): change {option}") from error


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout."""
    return path.exists() and not path.is_file()


def real_path(path: Path) -> Path:
    """The absolute path without links."""
    return Path(os.path.realpath(path))


def check_apart(out: Path, source: Path, of: str = "MODEL", option: str = "OUT") -> None:
    """Check that an output folder is not the folder that is read, inside it, or around it.

    Args:
        out: the output folder.
        source: the folder that is read.
        of: what `source` is, for the error.
        option: the option that names `out`, for the error.

    Raises:
        UsageError: it is.
    """
    ours, theirs = real_path(out), real_path(source)
    if _is_or_contains(ours, theirs) or _is_or_contains(theirs, ours):
        raise UsageError(f"{out} is {of}'s own folder, or one contains the other: change {option}")


def _is_or_contains(folder: Path, path: Path) -> bool:
    """Whether two paths are one folder, or the first contains the second, also under another name (a bind mount)."""
    if not folder.exists():
        return folder == path or folder in path.parents
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


# --- folders


def scratch_folder(out: Path, name: str) -> Path:
    """The path of a hidden folder for temporary data of `out`.

    It is beside `out`. It is inside `out` if that is a folder on another file system than its parent (a mount point),
    or if its parent cannot be written to.
    """
    out = real_path(out)
    if out.is_dir() and (out.stat().st_dev != out.parent.stat().st_dev or not os.access(out.parent, os.W_OK | os.X_OK)):
        return out / f"{_HIDDEN}{name}"
    return out.parent / f".{_short(out.name)}{_HIDDEN}{name}"


def _short(name: str) -> str:
    """A file name, cut if a longer one made from it could exceed the limit of file systems (255 bytes)."""
    return name if len(os.fsencode(name)) <= 200 else name[:40]


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False, option: str = "OUT") -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end of the `with` block.

    A new `out` appears as a whole. In an `out` that exists, the content is replaced entry by entry, the record of the
    result last: so `out` may be a mount point, and keeps its owner and permissions. After a failure (including a full
    disk and Ctrl-C) the temporary folder is removed and a previous `out` is unchanged. If the process is killed, the
    next call for `out` completes the replacement or removes what is left.

    Raises:
        UsageError: `check_output_folder` refuses `out`, or the disk is full.
    """
    from filelock import FileLock

    check_output_folder(out, overwrite, option)
    folder = real_path(out)
    with readable_disk_errors(out, option):
        prefix = _inside(folder) if folder.is_dir() else _beside(folder)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))
        try:
            with FileLock(staging / "in-use"):
                new = staging / "new"
                new.mkdir()
                yield new
                _permissions_as_the_umask_says(new)
                _check_folder(out, overwrite, option)  # another process may have written it in the meantime
                if folder.exists():
                    _replace_content(folder, staging)
                else:
                    new.rename(folder)
        finally:
            if not _unfinished(staging):
                shutil.rmtree(staging, ignore_errors=True)


def _inside(folder: Path) -> Path:
    """The beginning of the path of a temporary folder inside `folder`."""
    return folder / f"{_HIDDEN}partial-"


def _beside(folder: Path) -> Path:
    """The beginning of the path of a temporary folder beside `folder`."""
    return folder.parent / f".{_short(folder.name)}.partial-"


def content(folder: Path) -> list[Path]:
    """The entries of a folder, except temporary ones and those of the system. The record of the result is last."""
    entries = [p for p in folder.iterdir() if not p.name.startswith(_HIDDEN) and p.name not in _NOT_CONTENT]
    return sorted(entries, key=lambda path: (path.name in _RECORDS, path.name))


def _replace_content(folder: Path, staging: Path) -> None:
    """Replace the content of `folder` by that of `staging`/new.

    The old content moves to `staging`/old, whose name becomes `replaced` when all of it is there. So the state of the
    folder is known at any moment. The record is absent as long as the folder is incomplete.
    """
    (staging / "old").mkdir()
    try:
        for entry in reversed(content(folder)):
            entry.rename(staging / "old" / entry.name)
        (staging / "old").rename(staging / "replaced")
        _move_content(staging / "new", folder)
    except BaseException:
        _finish(staging, folder)
        raise


def _move_content(source: Path, target: Path) -> None:
    for entry in content(source):
        entry.rename(target / entry.name)


def _unfinished(staging: Path) -> bool:
    """Whether a replacement was begun and neither completed nor undone."""
    return any(
        (staging / marker).is_dir() and content(staging / source)
        for marker, source in (("old", "old"), ("replaced", "new"))
    )


def _finish(staging: Path, folder: Path) -> None:
    """Undo a replacement whose old content has not moved completely; complete any other."""
    if (staging / "old").is_dir():
        _move_content(staging / "old", folder)
    elif (staging / "replaced").is_dir():
        _move_content(staging / "new", folder)


def _recover(folder: Path, out: Path, option: str) -> None:
    """Complete or remove what killed processes left of `folder`.

    Raises:
        UsageError: a process that runs writes into it.
    """
    from filelock import FileLock, Timeout

    found: list[Path] = []
    for prefix in (_inside(folder), _beside(folder)):
        with contextlib.suppress(OSError):  # the folder does not exist, or may not be listed
            found += [path for path in prefix.parent.iterdir() if path.name.startswith(prefix.name)]
    for staging in found:
        if not (staging / "in-use").is_file():
            continue
        try:
            with FileLock(staging / "in-use", timeout=0):
                _finish(staging, folder)
                shutil.rmtree(staging, ignore_errors=True)
        except Timeout as error:
            raise UsageError(f"another process writes {out}: wait for it, or change {option}") from error


def _permissions_as_the_umask_says(new: Path) -> None:
    """Give the files of a new folder the permissions that ordinary files get. Some libraries write private ones."""
    mode = new.stat().st_mode & 0o666
    for path in new.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockkit"


# What a download can leave in place of a file, by its first bytes in lower case. A text may begin with "<", too.
_IMPOSTORS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
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
    temporary = path.with_name(f".{_short(path.name)}.partial-{os.getpid()}")
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
