"""`tools/compare_unlocks.py` on a lock whose blocks are the teacher's own units: unlocks must be exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model

TOOL = Path(__file__).parents[1] / "tools" / "compare_unlocks.py"
UNCOUPLED = {"depth": 5, "coupling": 1e-6, "tokens": 512, "end_to_end_tokens": 0, "learning_rate": 1e-9}


def test_uncoupled_blocks_are_unlocked_exactly(originals, tmp_path):
    config = LockConfig(**UNCOUPLED, data="stdlib", validation_tokens=256, device="cpu")
    lock_model(str(originals("qwen3")), tmp_path / "uncoupled", config)
    command = [sys.executable, TOOL, tmp_path / "uncoupled", "--original", originals("qwen3")]
    options = ["--tokens", "1024", "--unlock-tokens", "2048", "--out", tmp_path / "unlocks"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "unlocks.json").read_text())["rows"]
    assert row["row_correlation"] > 0.999
    unlocks = row["unlocks"]
    assert unlocks["linearised-stack"]["kl_to_original"] < 1e-3 < unlocks["random-features"]["kl_to_original"]
    assert unlocks["corrected, 0 tokens"]["kl_to_lock"] < 1e-6
    assert unlocks["warm, 1024 tokens"]["kl_to_lock"] < unlocks["features, 1024 tokens"]["kl_to_lock"]
    assert "2 stages" not in unlocks  # ranks of 10, 10, 10, 9 and 9 cannot be divided into two equal stages
    text, _, *table = (tmp_path / "unlocks.md").read_text().splitlines()
    assert text == "Perplexity and KL divergence on 4,096 tokens of stdlib, split 'evaluate'."
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
