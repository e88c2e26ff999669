"""Files that are complete or as they were before."""

from __future__ import annotations

import os
import threading

import pytest

from lockkit.files import replaced, write_json, write_text


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
