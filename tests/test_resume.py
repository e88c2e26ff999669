"""An interrupted lock resumes and ends with the same weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, command_line

from lockkit.errors import UsageError
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.lock.work import Work

# A process that imports everything once and runs each lock in a fork of itself. So a kill does not cost another start of
# the interpreter. The process itself runs no tensor operation, so forking is safe.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from lockkit.lock import end_to_end
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model

model, folder, settings, kills = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
end_to_end.SAVE_EVERY_SECONDS = 0  # a snapshot after every step

def lock(out, offload):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            lock_model(model, out, LockConfig(**settings, offload=offload))
            code = 0
        finally:
            os._exit(code)
    return child

started = time.monotonic()
assert os.waitpid(lock(folder / "undisturbed", "none"), 0)[1] == 0
whole = time.monotonic() - started
moments = random.Random(0)
killed = lost = 0
for offload in ("none", "disk"):
    out = folder / offload
    while killed < kills * (1 if offload == "none" else 2) // 2:
        child = lock(out, offload)
        time.sleep(moments.uniform(0, 0.5 * whole))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):  # it had finished before the kill
            assert status == 0, status
            if out.exists():
                lost += 1
                import shutil
                shutil.rmtree(out)
        else:
            killed += 1
    if not out.exists():
        assert os.waitpid(lock(out, offload), 0)[1] == 0
print(json.dumps({"killed": killed, "finished_before_the_kill": lost}))
"""


def test_twenty_kills_do_not_change_the_weights(originals, tmp_path):
    command = [sys.executable, "-c", KILLER, str(originals("qwen3")), str(tmp_path), json.dumps(QUICK), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["killed"] == 20
    expected = (tmp_path / "undisturbed" / "model.safetensors").read_bytes()
    for offload in ("none", "disk"):
        assert (tmp_path / offload / "model.safetensors").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "none", "undisturbed"]


@pytest.fixture
def unfinished(originals, tmp_path, monkeypatch):
    """An output folder whose lock stopped after its first layer."""
    from lockkit.errors import DistillationError
    from lockkit.lock import phase_1

    real = phase_1.distil_layers

    def stop_at_the_second(tasks, *others):
        if tasks[0].layer == 1:
            raise DistillationError("stopped by the test")
        return real(tasks, *others)

    with monkeypatch.context() as patch, pytest.raises(DistillationError) as error:
        patch.setattr(phase_1, "distil_layers", stop_at_the_second)
        lock_model(str(originals("llama")), tmp_path / "out", LockConfig(**QUICK))
    assert "run the same command again" in error.value.__notes__[0]
    return tmp_path / "out"


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
from lockkit.cli.app import main
sys.argv = ["lockkit", *sys.argv[1:]]
main()
"""


def test_a_full_disk_in_phase_2_keeps_finished_layers(originals, tmp_path):
    """Files of 18 KB (chains) can be written; larger ones (chains with optimisers) cannot."""
    options = command_line(QUICK | {"offload": "disk"})
    command = [sys.executable, "-c", FULL_DISK, "lock", originals("llama"), tmp_path / "out", *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "the disk is full while writing" in done.stderr and "change --work" in done.stderr
    assert "Traceback" not in done.stderr and "run the same command again" in done.stderr
    assert len(list((tmp_path / ".out.lockkit-work").glob("layer-*.safetensors"))) == 2
    lock_model(str(originals("llama")), tmp_path / "out", LockConfig(**QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_recipe_is_refused_with_the_difference(originals, unfinished):
    with pytest.raises(UsageError, match=r"recipe\.depth: 5 there, 6 now") as error:
        lock_model(str(originals("llama")), unfinished, LockConfig(**QUICK | {"depth": 6}))
    assert "--work" in str(error.value)
    assert not hasattr(error.value, "__notes__")  # the same command would be refused again
    with pytest.raises(UsageError, match="model_sha256"):
        lock_model(str(originals("qwen2")), unfinished, LockConfig(**QUICK))
    # Settings for memory and device do not change the weights, so they may differ.
    lock_model(str(originals("llama")), unfinished, LockConfig(**QUICK | {"cache_gigabytes": 0, "offload": "disk"}))
    assert [path.name for path in unfinished.parent.iterdir()] == ["out"]


def test_two_locks_do_not_share_a_work_folder(originals, unfinished):
    work = unfinished.parent / ".out.lockkit-work"
    holder = Work(work)
    holder.open()
    with pytest.raises(UsageError, match="another `lockkit lock` uses"):
        lock_model(str(originals("llama")), unfinished, LockConfig(**QUICK))
    assert (work / "layer-0000.safetensors").is_file()
    holder.close(finished=False)
    lock_model(str(originals("llama")), unfinished, LockConfig(**QUICK))
    assert [path.name for path in unfinished.parent.iterdir()] == ["out"]


def test_the_work_folder_of_a_killed_process_can_be_used(tmp_path):
    """The marker file remains, but the operating system releases the file lock."""
    code = "import os, pathlib, sys; from lockkit.lock.work import Work\nWork(pathlib.Path(sys.argv[1])).open(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "work")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "work" / "in-use").is_file()
    work = Work(tmp_path / "work")
    work.open()
    assert work.claimed
    work.close(finished=True)
    assert not work.claimed and not (tmp_path / "work").exists()


def test_a_folder_that_is_no_work_folder_is_refused(originals, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a work folder"):
        lock_model(str(originals("llama")), tmp_path / "out", LockConfig(**QUICK, work=str(tmp_path / "thesis")))
    assert Path(tmp_path / "thesis" / "chapter.txt").is_file()


@pytest.mark.parametrize("work", ["file", "file/below"])
def test_the_error_for_an_impossible_work_folder_names_the_option(originals, tmp_path, work):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="change --work"):
        lock_model(str(originals("llama")), tmp_path / "out", LockConfig(**QUICK, work=str(tmp_path / work)))
    assert (tmp_path / "file").read_text() == "x"
