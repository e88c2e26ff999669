"""Files and folders that are complete or as they were before, on disks and under names as users have them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lockkit.errors import UsageError
from lockkit.files import EXPORT_MANIFEST, LOCK_RECORD, check_output_file, impostor, replaced, write_json, write_text
from lockkit.output_folders import check_output_folder, new_folder, scratch_folder


def test_a_file_is_complete_or_as_it_was_before(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"größe": 1})
    before = file.read_bytes()
    assert before == '{\n  "größe": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="nan"):
        write_json(file, {"figure": float("nan")})
    with pytest.raises(RuntimeError), replaced(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")
    assert file.read_bytes() == before
    write_text(file, "second")
    assert file.read_text() == "second" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_link_keeps_pointing_to_its_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_a_pipe_is_written_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join()
    assert read == ["text"] and (tmp_path / "pipe").is_fifo()


def test_a_private_file_stays_private(tmp_path):
    file = tmp_path / "a.json"
    file.touch(0o600)
    write_json(file, 1)
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_text() == "1\n"


def test_a_file_name_that_is_not_unicode_is_written_to_json(tmp_path):
    write_json(tmp_path / "a.json", {"model": "caf\udce9"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"model": "caf\udce9"}


def test_a_pointer_and_a_web_page_are_recognised_and_text_is_not(tmp_path):
    file = tmp_path / "file"
    assert impostor(file) is None  # it is not there
    for content, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n  <!doctype HTML>", "web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        (b"<|im_start|>user", None),
        (b"<p>text", None),
        (b"\0" * 300, None),
        (b"", None),
    ):
        file.write_bytes(content)
        found = impostor(file)
        assert found is None if words is None else words in found, content


def test_the_message_says_whether_it_is_a_folder_or_its_folder_is_missing(tmp_path):
    (tmp_path / "file").touch()
    for path, expected in (
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "missing" / "a.json", "missing does not exist"),
        (tmp_path / "file" / "a.json", "file is a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UsageError, match=f"{expected}.*change --json"):
            check_output_file(path, "--json")


# --- folders


def write_result(out: Path, text: str, names: tuple[str, ...] = ("config.json", "model.safetensors")) -> None:
    """Write a folder as `lockkit lock` does: some files and the record."""
    with new_folder(out, overwrite=True) as folder:
        for name in names:
            (folder / name).write_text(text)
        write_json(folder / LOCK_RECORD, {"files": [*names, LOCK_RECORD], "text": text})


def found(out: Path) -> dict[str, str]:
    """The text of each file in a folder; empty for another entry."""
    texts = {path.name: path.read_text() if path.is_file() else "" for path in out.iterdir()}
    return texts | {name: json.loads(text)["text"] for name, text in texts.items() if name == LOCK_RECORD}


FIRST = {"config.json": "first", "model.safetensors": "first", LOCK_RECORD: "first"}
SECOND = {"config.json": "second", "tokenizer.json": "second", LOCK_RECORD: "second"}


def test_an_existing_folder_keeps_its_identity_and_its_permissions(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir(0o700)
    inode = out.stat().st_ino
    write_result(out, "first")
    (tmp_path / "link").symlink_to(out)
    write_result(tmp_path / "link", "second", ("config.json", "tokenizer.json"))
    assert (tmp_path / "link").is_symlink() and found(out) == SECOND
    monkeypatch.chdir(out)
    write_result(Path(), "first")
    assert found(Path()) == FIRST  # the shell's current folder is not replaced
    assert (out.stat().st_ino, out.stat().st_mode & 0o777) == (inode, 0o700)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    for umask, file_mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with new_folder(tmp_path / oct(umask)) as folder:
                (folder / "private").touch(0o600)  # as some libraries do
                (folder / "inner").mkdir()
                (folder / "inner" / "readable").write_text("")
        finally:
            os.umask(before)
        out = tmp_path / oct(umask)
        modes = [path.stat().st_mode & 0o777 for path in (out, out / "private", out / "inner" / "readable")]
        assert modes == [0o777 & ~umask, file_mode, file_mode]


def dying_rename(survived: int):
    """`Path.rename`, but the process ends at the rename after `survived` others."""
    left, rename = iter(range(survived)), Path.rename
    return lambda *names: rename(*names) if next(left, None) is not None else os._exit(9)


def test_a_killed_replacement_is_undone_or_completed(tmp_path):
    """The process ends at each of its renames. Afterwards the folder is the first or the second result, as a whole."""
    out, states = tmp_path / "out", []
    for survived in range(20):
        shutil.rmtree(out, ignore_errors=True)
        write_result(out, "first")
        child = os.fork()
        if not child:
            Path.rename = dying_rename(survived)
            write_result(out, "second", ("config.json", "tokenizer.json"))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not status:
            break
        visible = {name: text for name, text in found(out).items() if not name.startswith(".")}
        assert LOCK_RECORD not in visible or visible in (FIRST, SECOND)  # an incomplete folder has no record
        check_output_folder(out, overwrite=True)
        states.append(found(out))
        assert states[-1] in (FIRST, SECOND)
    else:
        pytest.fail("the replacement never ended")
    assert found(out) == SECOND and FIRST in states and SECOND in states


def test_a_failed_replacement_is_undone(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    write_result(out, "first")

    def failing(source: Path, target: Path) -> Path:
        if source.name == "model.safetensors":
            raise OSError(16, "Device or resource busy")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UsageError, match=r"cannot write .*busy\): change OUT"):
        write_result(out, "second")
    assert found(out) == FIRST


def test_what_a_killed_process_left_is_removed(tmp_path):
    for out in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        child = os.fork()
        if not child:
            with new_folder(out) as folder:
                (folder / "weights").write_text("many")
                os._exit(9)
        os.waitpid(child, 0)
        assert list(tmp_path.rglob("weights"))
        check_output_folder(out, overwrite=False)
        assert not list(tmp_path.rglob("weights"))
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    code = f"from lockkit.output_folders import check_output_folder; check_output_folder(__import__('pathlib').Path({str(tmp_path)!r}), False)"
    with new_folder(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process writes" in done.stderr


def test_overwrite_deletes_only_what_the_result_consists_of(tmp_path):
    lock, export = tmp_path / "lock", tmp_path / "export"
    write_result(lock, "first", ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "README.md"))
    with new_folder(export) as folder:
        (folder / "model[1].onnx").write_text("first")
        write_json(folder / EXPORT_MANIFEST, {"files": {"model[1].onnx": {}}})
    for out, mine in (
        (lock, "report.html"),
        (lock, "notes/todo.txt"),
        (lock, "model-ema.safetensors"),
        (export, "notes.md"),
        (export, "model1.onnx"),
    ):
        check_output_folder(out, overwrite=True)
        (out / mine).parent.mkdir(exist_ok=True)
        (out / mine).write_text("mine")
        with pytest.raises(UsageError, match=f"{out.name} contains {mine}.*change OUT"):
            check_output_folder(out, overwrite=True)
        (out / mine).unlink()
        if "/" in mine:
            (out / mine).parent.rmdir()


@pytest.mark.parametrize("name", ["ä ö", "line\nbreak", "x" * 255, "日" * 85, "[x]*", "deep/er/out/"])
def test_a_folder_may_have_any_name(tmp_path, name):
    out = tmp_path / name
    check_output_folder(out, overwrite=False)
    write_result(out, "first")
    assert found(out) == FIRST
    assert scratch_folder(out, "work").parent == out.parent
    assert len(list(out.parent.iterdir())) == 1


def test_an_out_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, expected in (
        ("file", "is not a folder"),
        ("file/out/deep", "file is a file"),
        ("dangling", "nowhere, which does not exist"),
        ("loop", "change OUT"),
        ("b\udcff", "not a valid name"),
        ("x" * 256, "File name too long"),
    ):
        with pytest.raises(UsageError, match=f"{expected}.*") as error:
            check_output_folder(tmp_path / name, overwrite=True)
        assert "change OUT" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop"]


# --- real mounts, in a name space of their own

PREAMBLE = """
import os, sys
from pathlib import Path
sys.path.insert(0, TESTS)
from test_files import SECOND, found, write_result, FIRST
from lockkit.errors import UsageError
from lockkit.files import *
from lockkit.output_folders import *
top = Path(TOP)
def refused(function, *arguments):
    try:
        function(*arguments)
    except UsageError as error:
        return str(error)
"""


def with_mounts(tmp_path: Path, mounts: str, code: str) -> None:
    """Run Python code, after `PREAMBLE`, in a process that sees other file systems. `mounts` are shell commands in `tmp_path`."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the program unshare")
    values = f"TESTS = {str(Path(__file__).parent)!r}\nTOP = {str(tmp_path)!r}\n"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-ec", f'{mounts}\nexec "$0" -c "$1"']
    done = subprocess.run(
        [*command, sys.executable, values + PREAMBLE + code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if done.stderr.startswith("unshare:"):
        pytest.skip("needs user name spaces")
    assert done.returncode == 0, done.stderr


def test_out_may_be_a_mount_point(tmp_path):
    """An empty volume of a container: a file system of its own, or a folder of the same one, in a read-only folder."""
    mounts = """
    mkdir volume folder folder/bind source
    mount -t tmpfs none volume && mkdir volume/lost+found
    mount --bind source folder/bind && mount --bind folder folder2 2>/dev/null || true
    """
    code = """
for out in (top / "volume", top / "folder" / "bind"):
    check_output_folder(out, overwrite=False)
    write_result(out, "first")
    write_result(out, "second", ("config.json", "tokenizer.json"))
    text = found(out)
    text.pop("lost+found", None)
    assert text == SECOND, text
    assert not list(out.parent.glob(".*"))
assert scratch_folder(top / "volume", "work") == top / "volume" / ".lockkit-work"
assert "contains" in refused(check_apart, top / "folder" / "bind" / "inner", top / "source")
"""
    with_mounts(tmp_path, mounts, code)


def test_out_may_be_in_a_read_only_folder(tmp_path):
    mounts = """
    mkdir -p parent/out parent/full
    mount --bind parent parent
    mount -t tmpfs none parent/out
    touch parent/report.json && touch file && mount --bind file parent/report.json
    mount -o remount,ro,bind parent
    """
    code = """
out = top / "parent" / "out"
write_result(out, "first")
write_result(out, "second", ("config.json", "tokenizer.json"))
assert found(out) == SECOND
assert scratch_folder(out, "work").parent == out
for other in (top / "parent" / "full", top / "parent" / "new"):
    assert "Read-only file system): change OUT" in refused(check_output_folder, other, False)
check_output_file(top / "parent" / "report.json", "--json")  # a mounted file cannot be replaced by another
write_json(top / "parent" / "report.json", 1)
assert (top / "file").read_text() == "1\\n"
assert "change --json" in refused(check_output_file, top / "parent" / "b.json", "--json")
"""
    with_mounts(tmp_path, mounts, code)


def test_a_lock_and_its_export_fill_mount_points(originals, tmp_path):
    mounts = """
    mkdir -p parent/locked parent/onnx
    mount --bind parent parent
    for name in locked onnx; do mount -t tmpfs none parent/$name; done
    mount -o remount,ro,bind parent
    """
    code = f"""
from conftest import QUICK
from lockkit import LockConfig, export_model, lock_model
quick = LockConfig(**(QUICK | {{"tokens": 512, "end_to_end_tokens": 0}}))
for overwrite in (False, True):
    lock_model({str(originals("qwen3"))!r}, top / "parent" / "locked", quick, overwrite=overwrite)
    export_model(str(top / "parent" / "locked"), top / "parent" / "onnx", overwrite=overwrite)
assert (top / "parent" / "onnx" / "model.onnx").is_file()
assert not list(top.rglob(".*"))
"""
    with_mounts(tmp_path, mounts, code)


def test_a_disk_that_becomes_full_loses_nothing(tmp_path):
    code = """
out = top / "out"
write_result(out, "first")
def large():
    write_result(out, "x" * 2_000_000)
assert "the disk is full while writing" in refused(large)
assert found(out) == FIRST
"""
    with_mounts(tmp_path, "mkdir out && mount -t tmpfs -o size=1m none out", code)
