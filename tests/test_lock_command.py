"""The command `lockkit lock`: its folder, its errors, full disks and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import QUICK, command_line

from lockkit.files import LOCK_RECORD
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model


def quick(**changes) -> LockConfig:
    return LockConfig(**(QUICK | changes))


def lock_arguments(original, out):
    options = command_line(QUICK)
    return ["lock", original, out, *options]


def test_the_command_writes_the_folder(cli, originals, tmp_path):
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"))
    assert done.code == 0, done.err
    assert "locked / original" in done.out and "layer 1" in done.err
    record = json.loads((tmp_path / "out" / LOCK_RECORD).read_text())
    assert record["recipe"]["depth"] == QUICK["depth"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{record['fidelity']['perplexity_ratio']:.4f}" in card
    again = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"))
    assert again.code == 2 and "--overwrite" in again.err
    assert cli(*lock_arguments(originals("qwen3"), tmp_path / "out"), "--overwrite").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_removes_what_lockkit_did_not_write(cli, originals, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = cli(*lock_arguments(originals("qwen3"), tmp_path), "--overwrite")
    assert done.code == 2 and "not written by lockkit" in done.err
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth", "49"], "--depth 49 is larger than the MLP's width 48"),
        (["--depth", "1"], "--depth"),
        (["--init", "magic"], "--init"),
        (["--data", "/no/such/file.txt"], "there is no file or folder /no/such/file.txt: change --data"),
        (["--data", "no-such-dataset"], "--data no-such-dataset is no local file or folder"),
        (["--device", "meta"], "--device meta is not available"),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--config", "./no-such-recipe.yaml"], "--config"),
        (["--tokens", "100000000"], "lower --tokens"),
        (["--data", ""], "there is no file or folder : change --data"),
        (["--seed", "99999999999999999999"], "--seed"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(cli, originals, tmp_path, options, message):
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"), *options)
    assert done.code == 2
    assert message in done.err and len(done.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_output_is_refused_before_any_work(cli, originals, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "file" / "out"))
    assert done.code == 2 and "change OUT" in done.err and "layer" not in done.err


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no text"), ("a few words", "too short: distill has 6 tokens")]
)
def test_empty_and_tiny_text_is_refused(cli, originals, tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content)
    done = cli(*lock_arguments(originals("qwen3"), tmp_path / "out"), "--data", tmp_path / "a.txt")
    assert done.code == 2 and message in done.err and "--data" in done.err
    assert not (tmp_path / "out").exists()


PROGRAM = "import resource, signal, sys\n{setup}\nfrom lockkit.cli.app import main\nsys.argv[0] = 'lockkit'\nmain()"


def test_a_full_disk_keeps_finished_layers_only(originals, tmp_path):
    # A limit on file size fails a write just as a full disk does.
    setup = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300_000,) * 2)"
    arguments = [str(a) for a in lock_arguments(originals("qwen3"), tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(setup=setup), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr and "Traceback" not in done.stderr
    assert "finished layers are kept in" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.lockkit-work"]
    again = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(setup=""), *arguments], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and "layer 0" not in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_no_files(originals, tmp_path):
    arguments = [str(a) for a in lock_arguments(originals("qwen3"), tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM.format(setup=""), *arguments, "--tokens", "90000", "--batch-tokens", "16"],
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while "layer 0" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert rest.endswith("interrupted: nothing half-written is left\n") and "Traceback" not in rest  # nothing to resume
    assert list(tmp_path.iterdir()) == []


def test_the_original_is_hashed_once(originals, tmp_path):
    """Hashing opens the file in Python, loading does not."""
    weights = str(originals("qwen3") / "model.safetensors")
    opened = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]) == weights:
            opened.append(arguments)

    sys.addaudithook(watch)  # it stays, and notes opens of this one file
    lock_model(str(originals("qwen3")), tmp_path / "locked", quick(depth=4, tokens=1_024, end_to_end_tokens=0))
    assert len(opened) == 1
