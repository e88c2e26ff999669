"""`tools/compare_precisions.py` on tiny models: every column is measured. Nothing here depends on speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "compare_precisions.py"


def test_every_column_is_measured(originals, locks, tmp_path):
    out = tmp_path / "precisions.json"
    done = subprocess.run(
        [
            *(sys.executable, TOOL, locks("qwen3"), "--original", originals("qwen3"), "--formats", "int4:16"),
            *("--tokens", "512", "--prompt-length", "8", "--new-tokens", "3", "--rounds", "1", "--threads", "1"),
            *("--out", out),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == ["locked", "original"]
    for row in rows:
        assert row["kl_to_pytorch"] > 0 and 0 < row["top1_agreement"] < 1  # int4 is not exact
        assert row["decode_over_fp32_original"] > 0 and row["prefill_over_fp32_original"] > 0
    assert rows[0]["decode_over_original"] > 0 and "decode_over_original" not in rows[1]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(rows)
    assert float(table[2].split("|")[9]) == pytest.approx(rows[0]["decode_over_original"], abs=0.01)
