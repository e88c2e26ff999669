"""Output files and folders: complete or absent, checked before the work, and never somebody else's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lockkit.errors import UsageError
from lockkit.files import LOCK_RECORD, check_output_file, write_json, write_text
from lockkit.output_folders import new_folder


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="halfway"), new_folder(out) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as folder:
        (folder / LOCK_RECORD).write_text("first")
        assert not out.exists()
    with pytest.raises(ValueError, match="halfway"), new_folder(out, overwrite=True) as folder:
        (folder / LOCK_RECORD).write_text("second")
        raise ValueError("halfway")
    assert (out / LOCK_RECORD).read_text() == "first"
    with new_folder(out, overwrite=True) as folder:
        (folder / LOCK_RECORD).write_text("third")
    assert (out / LOCK_RECORD).read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_folder_must_be_ours_to_replace(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for out in (file, link, Path(tmp_path)):
        with pytest.raises(UsageError, match="change OUT"), new_folder(out, overwrite=True):
            pytest.fail("the block must not run")


def test_a_model_is_never_replaced_by_its_own_export(cli, locks):
    before = sorted(path.name for path in locks("llama").iterdir())
    for out in (locks("llama"), locks("llama") / "onnx"):
        done = cli("export", locks("llama"), out, "--overwrite")
        assert done.code == 2 and "change OUT" in done.err
    assert sorted(path.name for path in locks("llama").iterdir()) == before


def test_a_file_is_complete_or_as_it_was(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(file)
    write_json(link, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1} and link.is_symlink()
    for broken in (lambda: write_json(link, {"a": float("nan")}), lambda: write_text(file, "half \ud800")):
        with pytest.raises(ValueError):
            broken()
    assert json.loads(file.read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output_file(pipe, "--json")
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        write_json(pipe, [1])
        assert json.load(reader.stdout) == [1]
    assert pipe.is_fifo()


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_files_to_write_are_checked_before_the_work(cli, tmp_path, command):
    for json_file in (tmp_path, tmp_path / "missing" / "a.json", "/proc/a.json"):
        done = cli(command, tmp_path / "no-export", "--json", json_file)
        assert (done.code, done.err.count("\n")) == (2, 1) and "change --json" in done.err


def test_pictures_are_checked_before_the_work(cli, tmp_path, monkeypatch):
    against = ("bench", tmp_path / "no-export", "--against", "demo", "--plot")
    for picture in (tmp_path, tmp_path / "missing" / "a.svg", tmp_path / "a.txt", tmp_path / "a"):
        done = cli(*against, picture)
        assert done.code == 2 and "change --plot" in done.err
    done = cli("bench", tmp_path / "no-export", "--plot", tmp_path / "a.svg")
    assert done.code == 2 and "give --against" in done.err
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    done = cli(*against, tmp_path / "a.svg")
    assert done.code == 2 and "pip install 'lockkit[report]'" in done.err


def test_overwrite_is_proposed_only_where_it_works(cli, originals, tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = cli("lock", originals("llama"), tmp_path)
    assert done.code == 2 and "exists already: change OUT" in done.err and "--overwrite" not in done.err


def test_a_report_is_checked_before_the_work(cli, tmp_path):
    (tmp_path / "page.md").mkdir()
    for page in ("page.txt", "page.html", "missing/page.html"):
        done = cli("report", tmp_path, "--out", tmp_path / page)
        assert done.code == 2 and "change --out" in done.err


def test_a_report_replaces_only_reports(cli, locks, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install lockkit[report]")
    shutil.copy(locks("llama") / LOCK_RECORD, tmp_path / "result.json")
    before = (tmp_path / "result.json").read_bytes()
    (tmp_path / "page.html").write_text("<p>mine</p>")
    (tmp_path / "notes.md").write_text("mine")
    for page, other in (("result.html", "result.json"), ("page.html", "page.html"), ("notes.html", "notes.md")):
        done = cli("report", tmp_path, "--out", tmp_path / page)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert str(tmp_path / other) in done.err and "change --out" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md", "page.html", "result.json"]
    assert (tmp_path / "result.json").read_bytes() == before

    for _ in range(2):  # a report replaces itself
        assert cli("report", tmp_path).code == 0
    (tmp_path / "report.html").unlink()
    assert cli("report", tmp_path).code == 0
    (tmp_path / "report.json").write_text('{"schema": "lockkit-lock/2"}')
    assert cli("report", tmp_path).code == 2
