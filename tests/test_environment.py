"""What lockkit says of the machine and of its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy

from lockkit.environment import peak_resident_bytes


def test_peak_memory_is_this_process_own_not_that_of_the_one_that_started_it():
    held = numpy.ones(400_000_000 // 8)
    assert peak_resident_bytes() > held.nbytes
    code = "from lockkit.environment import peak_resident_bytes; print(peak_resident_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.nbytes


def test_env_sees_wheels_that_shadow_each_other(tmp_path):
    fake = tmp_path / "onnxruntime-1.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 1.0\n")
    for path, expected in ((os.devnull, False), (str(tmp_path), True)):
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-m", "lockkit", "env", "--json", "-"],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
        shadowed = [line for line in found["problems"] if "onnxruntime 1.0" in line and "shadow" in line]
        assert bool(shadowed) == expected
        assert found["versions"]["torch"] and found["torch_devices"] and found["onnxruntime_providers"]
