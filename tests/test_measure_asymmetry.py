"""The asymmetry benchmark on a tiny shape: its counts agree with lockkit/dlr/cost.py, and all files are written."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest

from lockkit.dlr.cost import dlr_saved_values, mlp_saved_values
from lockkit.dlr.mlp import MLPShape

TOOL = Path(__file__).parents[1] / "tools" / "measure_asymmetry.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("measure_asymmetry", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def test_the_table_the_plot_and_the_counts(tool, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install lockkit[report]")
    arguments = "--device cpu --shape tiny --depth 4 --depth 16 --tokens 64 --rounds 1 --warm-up 0 --out"
    tool.main([*arguments.split(), str(tmp_path)])
    result = json.loads((tmp_path / "asymmetry-cpu.json").read_text())
    assert result["schema"] == "lockkit-asymmetry/1" and result["machine"]["cores"] >= 1
    assert arguments in result["command"]
    assert socket.gethostname() not in json.dumps(result["machine"])
    rows = {(row["subject"], row["depth"], row["saver"]): row for row in result["rows"]}
    assert len(rows) == 2 * (2 + 2 * 4)
    shape = MLPShape(64, 192)
    for depth in (4, 16):
        saved = rows["mlp", depth, "plain"]["saved_bytes"]
        assert saved == 64 * 4 * dlr_saved_values(shape, depth)
        assert rows["mlp", depth, "plain"]["ratios"]["saved_bytes"] == pytest.approx(
            dlr_saved_values(shape, depth) / mlp_saved_values(shape)
        )
        assert rows["mlp", depth, "reversal"]["saved_bytes"] == 64 * 4 * (64 + 2 * 192)
        for subject in ("mlp", "layers"):
            plain, reversal = rows[subject, depth, "plain"], rows[subject, depth, "reversal"]
            assert plain["peak_bytes"] >= plain["saved_bytes"] and plain["training_seconds"] > 0
            assert reversal["peak_bytes"] < plain["peak_bytes"]
    assert rows["layers", 16, "checkpointing"]["peak_bytes"] < rows["layers", 16, "plain"]["peak_bytes"]
    table = (tmp_path / "asymmetry-cpu.md").read_text()
    assert table.count("\n| tiny |") == 2 * (1 + 2 * 4) and "reduced" in table
    assert "<svg" in (tmp_path / "asymmetry-cpu.svg").read_text()
    assert "saved bytes 2.15x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [("--tokens 0", "--tokens must be at least 1"), ("--shape tiny --depth 193", "narrowest MLP's width, 192")],
)
def test_impossible_settings_are_refused(tool, arguments, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments.split())
    assert stop.value.code == 2 and reason in capsys.readouterr().err
