"""The demo, with a few seconds of distillation in place of minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def test_demo_goes_all_the_way_and_reports_what_it_measured(tmp_path):
    short = "--coupling 0.05 --tokens 16384 --end-to-end-tokens 0 --validation-tokens 2048"
    done = subprocess.run(
        [sys.executable, DEMO, "--folder", tmp_path / "run", "--depth", "8", "--lock-options", short],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert f"{figures['perplexity']['locked_over_original']:.4f}" in done.stdout
    promised = done.stdout[done.stdout.index("holds") :]
    assert "locked-onnx" in promised
    for name in ("locked/model.safetensors", "locked-onnx/model.onnx_data", "original-onnx/model.onnx", "verify.json"):
        assert (tmp_path / "run" / name).is_file()
