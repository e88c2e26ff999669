"""Locks computed by several processes, started with torchrun on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from conftest import QUICK, command_line
from tiny import save_tiny

from lockkit.errors import UsageError
from lockkit.files import LOCK_RECORD, read_json
from lockkit.workers import Workers

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
OPTIONS = command_line(QUICK)
PHASE_1 = command_line(QUICK | {"end_to_end_tokens": 0})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model of three layers: with two workers there are two waves, and one worker has no layer in the second."""
    return save_tiny("qwen3", tmp_path_factory.mktemp("original") / "model", num_hidden_layers=3)


def lock(workers: int, original, out, options=OPTIONS, setup: dict | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (setup or {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [f"--nproc-per-node={workers}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    start = ["-m", "torch.distributed.run", *launcher, "-m", "lockkit"] if workers > 1 else ["-m", "lockkit"]
    command = [sys.executable, *start, "lock", original, out, *options]
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=environment, check=False, timeout=120
    )


def test_the_number_of_workers_does_not_change_the_weights(original, tmp_path):
    for workers in (1, 2, 4):  # with four, one worker has no layer
        done = lock(workers, original, tmp_path / str(workers), PHASE_1)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote") == 1  # only the first worker prints
    expected = (tmp_path / "1" / "model.safetensors").read_bytes()
    assert (tmp_path / "2" / "model.safetensors").read_bytes() == expected
    assert (tmp_path / "4" / "model.safetensors").read_bytes() == expected
    assert read_json(tmp_path / "2" / LOCK_RECORD, "")["workers"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "4"]


def test_phase_2_divides_each_batch(original, tmp_path):
    """Gradients are summed in another order, so results are equal within rounding."""
    records = []
    for workers in (1, 2):
        done = lock(
            workers, original, tmp_path / str(workers), [*OPTIONS, "--end-to-end-learning-rate=0.005", "--coupling=1"]
        )
        assert done.returncode == 0, done.stderr
        records.append(read_json(tmp_path / str(workers) / LOCK_RECORD, ""))
    one, two = (record["end_to_end"]["kl_divergence_after"] for record in records)
    assert one < records[0]["end_to_end"]["kl_divergence_before"]
    assert two == pytest.approx(one, rel=0.02)


DYING = """
import os, sys
if os.environ.get("RANK") == "1":
    from lockkit.lock import phase_1
    real = phase_1.distil_layers
    def die(tasks, *others):
        {what}
    phase_1.distil_layers = die
"""
# Wait until the other worker has finished a layer.
WAIT = "import time, pathlib; [time.sleep(0.1) for _ in iter(lambda: pathlib.Path(LAYER).exists(), True)]"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (f"{WAIT}; os._exit(9)", "another worker stopped"),
        (
            "from lockkit.errors import DistillationError; raise DistillationError('layer 1 diverged')",
            "worker 1: layer 1 diverged",
        ),
    ],
)
def test_a_worker_that_fails_stops_all_and_keeps_finished_layers(original, tmp_path, what, message):
    (tmp_path / "site").mkdir()
    layer = tmp_path / ".out.lockkit-work" / "layer-0000.safetensors"
    (tmp_path / "site" / "sitecustomize.py").write_text(DYING.format(what=what.replace("LAYER", repr(str(layer)))))
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    done = lock(2, original, tmp_path / "out", setup={"PYTHONPATH": path})
    assert done.returncode != 0
    assert message in done.stderr and "run the same command again" in done.stderr
    assert layer.is_file()
    done = lock(2, original, tmp_path / "out")
    assert done.returncode == 0 and "layer 0" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "x"}, None),  # left over: nothing else can be meant
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, None),
        ({"WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "not MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        (TORCHRUN | {"RANK": "2"}, "contradict"),
        (TORCHRUN | {"RANK": "-1"}, "contradict"),
        (TORCHRUN | {"LOCAL_RANK": "1"}, "contradict"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
    ],
)
def test_variables_of_torchrun_that_were_left_in_the_environment(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        workers = Workers.from_environment()
        assert (workers.count, workers.rank, workers.local_rank) == (1, 0, 0)
        return
    with pytest.raises(UsageError, match=expected) as error:
        Workers.from_environment()
    assert "start lockkit with torchrun, or unset WORLD_SIZE" in str(error.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_never_start_are_one_plain_line(rank):
    """For example, because the variables of another job were left in the environment."""
    code = (
        "import datetime\nfrom lockkit import workers\nworkers.START_TIMEOUT = datetime.timedelta(seconds=1)\n"
        "from lockkit.errors import UsageError\ntry:\n    workers.Workers.from_environment().join('cpu')\n"
        "except UsageError as error:\n    print(error)"
    )
    environment = os.environ | TORCHRUN | {"RANK": str(rank)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert "cannot connect to the other workers at 127.0.0.1:29511" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


RECIPE = "sys.argv += ['--config', 'RECIPE']"
VERSIONS = """
    from lockkit.lock import run
    real = run.versions()
    run.versions = lambda: real | {'torch': '1.0'}
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (RECIPE, "workers differ in 'recipe'"),
        (VERSIONS, "workers differ in 'torch'"),
        ("sys.argv[3] += '-elsewhere'", "give all workers the same OUT and --work, on a disk they share"),
    ],
)
def test_workers_that_differ_are_stopped(original, tmp_path, what, message):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 0.02\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1' and 'lock' in sys.orig_argv:\n"
        f"    {what.replace('RECIPE', str(tmp_path / 'recipe.yaml'))}\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    done = lock(2, original, tmp_path / "out", setup={"PYTHONPATH": path})
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.lockkit-work").exists()
