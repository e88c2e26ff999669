"""Output folders: checked before the work, written as a whole, and recovered after a process was killed.

1. `check_output_folder` refuses a folder that cannot be written at the end, or that has files of others.
2. `new_folder` gives a temporary folder. At the end it becomes the output folder by one rename, or, where that exists
   (it may be a mount point), its files replace the content there, the record last.
3. If the process is killed in between, the next call completes or undoes the replacement.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.files import (
    ADDED_FILES,
    EXPORT_MANIFEST,
    HIDDEN,
    LOCK_RECORD,
    WEB_MANIFEST,
    check_name,
    check_writable,
    readable_disk_errors,
    real_path,
    short,
)

_RECORDS = (LOCK_RECORD, EXPORT_MANIFEST, WEB_MANIFEST)
_NOT_CONTENT = ("lost+found", ".DS_Store")  # what the system puts into an otherwise empty folder


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


def _files_in_record(folder: Path) -> list[str]:
    """The names of the files in the record of a lock or in the manifest of an export; none if it cannot be read."""
    record = next(folder / name for name in _RECORDS if (folder / name).is_file())
    try:
        return list(json.loads(record.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


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
        check_writable(existing, option)


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


def scratch_folder(out: Path, name: str) -> Path:
    """The path of a hidden folder for temporary data of `out`.

    It is beside `out`. It is inside `out` if that is a folder on another file system than its parent (a mount point),
    or if its parent cannot be written to.
    """
    out = real_path(out)
    if out.is_dir() and (out.stat().st_dev != out.parent.stat().st_dev or not os.access(out.parent, os.W_OK | os.X_OK)):
        return out / f"{HIDDEN}{name}"
    return out.parent / f".{short(out.name)}{HIDDEN}{name}"


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
    return folder / f"{HIDDEN}partial-"


def _beside(folder: Path) -> Path:
    """The beginning of the path of a temporary folder beside `folder`."""
    return folder.parent / f".{short(folder.name)}.partial-"


def content(folder: Path) -> list[Path]:
    """The entries of a folder, except temporary ones and those of the system. The record of the result is last."""
    entries = [p for p in folder.iterdir() if not p.name.startswith(HIDDEN) and p.name not in _NOT_CONTENT]
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
