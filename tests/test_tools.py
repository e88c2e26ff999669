"""The smallest run of each tool without a test file of its own. Nothing here depends on speed."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from lockkit.export import ExportConfig, export_model
from lockkit.models.load import DEMO, load_model

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run `python tools/NAME.py ARGS...` in this process; return its exit code and its standard output."""

    def run(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [f"tools/{name}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, capsys.readouterr().out

    return run


def test_benchmark_lock_compares_every_method_with_the_plain_loop(run_tool, tmp_path):
    out = tmp_path / "figures" / "speed.json"
    code, printed = run_tool("benchmark_lock", "--depth", 2, "--tokens", 32, "--rounds", 2, "--out", out)
    assert code == 0
    result = json.loads(out.read_text())
    assert result["schema"] == "lockkit-lock-speed/1"
    assert result["settings"] == {"shape": "demo", "layers": 4, "depth": 2, "tokens": 32}
    rows = {row["way"]: row for row in result["rows"]}
    assert {"plain loop", "packed x1", "packed x2", "packed x4"} <= set(rows)
    assert rows["plain loop"]["speed_over_plain"] == 1 and rows["plain loop"]["range"] == [1, 1]
    for name, row in rows.items():
        assert row["range"][0] <= row["speed_over_plain"] <= row["range"][1]
        assert row["layer_tokens_per_second"] > 0 and row["share_of_peak"] > 0
        assert f"| {name} | {row['speed_over_plain']:.2f} (" in printed


def test_benchmark_export_compares_a_lock_with_its_original(run_tool, tmp_path):
    folder, out = tmp_path / "models", tmp_path / "speed.json"
    shape = ("--hidden-size", 128, "--layers", 1, "--depth", 2, "--precisions", "fp32")
    assert run_tool("benchmark_export", "prepare", *shape, "--out", folder)[0] == 0
    original, locked = (load_model(folder / name, torch.float32)[0] for name in ("original", "locked"))
    assert sum(p.numel() for p in original.parameters()) == sum(p.numel() for p in locked.parameters())
    small = ("--prompt-lengths", 4, "--new-tokens", 2, "--rounds", 1, "--threads", 1, "--no-kernel")
    assert run_tool("benchmark_export", "measure", folder, *small, "--out", out)[0] == 0
    record = json.loads(out.read_text())
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "depth": 2}
    assert (record["schema"], record["model"], list(record["results"])) == ("lockkit-export-speed/1", shape, ["fp32"])
    (ratio,) = record["results"]["fp32"]["ratios"]
    assert ratio["against"] == "original-fp32" and ratio["decode"] > 0 and ratio["prefill"] > 0


def test_load_test_finds_no_wrong_answers(run_tool, tmp_path):
    model, export, out = tmp_path / "model", tmp_path / "export", tmp_path / "load.json"
    save_tiny("qwen3", model, max_position_embeddings=1024)
    export_model(str(model), export, ExportConfig())
    short = ("--seconds", 0.5, "--long-seconds", 1, "--warm-up", 0, "--prompts", 4)
    code, printed = run_tool("load_test", export, *short, "--out", out)
    result = json.loads(out.read_text())
    assert code == (0 if result["passed"] else 1)  # `passed` also depends on the speed of this machine
    assert ("passed" if result["passed"] else "FAILED") in printed.splitlines()[-1]
    assert [stage["clients"] for stage in result["stages"]] == [1, 16, 64]
    for stage in result["stages"]:
        assert (stage["errors"], stage["wrong_answers"]) == (0, 0), stage["error_kinds"]
        assert stage["requests"] > 0 and stage["tokens_per_second"] > 0 and min(stage["memory_bytes"]) > 1e7
        assert 0 < stage["latency_seconds"]["p50"] <= stage["latency_seconds"]["max"]
    assert len(result["questions"]) == 4


def test_measure_memory_reads_the_record_of_a_lock(run_tool, tmp_path):
    out = tmp_path / "memory.json"
    code, printed = run_tool("measure_memory", "--layers", 1, "--hidden", 64, "--offload", "disk", "--out", out)
    assert code == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    weights = 4 * (2 * 4096 * 64 + 64 * (2 * 64 + 2 * 32) + 3 * 64 * 192)  # embeddings, head, attention, MLP
    assert weights < row["model_bytes"] < 1.02 * weights
    assert row["beyond_idle_bytes"] > 0 and row["predicted_bytes"] > 0 and row["growth"] == 1
    assert f"| disk | 1 | {row['model_bytes'] / 1e6:,.0f} |" in printed


def test_train_demo_model_writes_a_model_and_resumes(run_tool, tmp_path):
    work, out = tmp_path / "work", tmp_path / "model"
    work.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # otherwise a tokenizer is trained, which takes longer
        shutil.copy(DEMO / name, work)
    small = ("--hidden", 32, "--intermediate", 48, "--layers", 1, "--block", 64, "--batch", 2, "--tokens", 4096)
    for steps in (2, 4):
        code, printed = run_tool("train_demo_model", "--steps", steps, *small, "--work", work, "--out", out)
        assert code == 0
    assert "from step 2" in printed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 4096 == len(tokenizer)
    figures = json.loads(printed[printed.index("{") : printed.index("}") + 1])
    assert figures["seen_tokens"] == 4 * 2 * 64 and figures["train_tokens"] == figures["evaluate_tokens"] == 4096
    assert 1 < figures["baseline"] < figures["perplexity"] < 3 * 4096  # four steps hardly lower it
    assert f"| held-out perplexity | **{figures['perplexity']:.2f}** " in (out / "README.md").read_text()


def test_servers_are_compared_under_the_same_load(run_tool, monkeypatch, tmp_path):
    pytest.importorskip("xllamacpp")
    from test_gguf import write_gguf

    monkeypatch.syspath_prepend(str(TOOLS))
    save_tiny("qwen3", tmp_path / "model", max_position_embeddings=1024)
    export_model(str(tmp_path / "model"), tmp_path / "export", ExportConfig())
    write_gguf(tmp_path / "tiny.gguf", context=1024)
    short = ("--clients", 1, 3, "--rounds", 2, "--seconds", 0.3, "--prompts", 4, "--threads", 1, "--max-batch", 2)
    out = tmp_path / "results" / "servers"
    code, printed = run_tool("compare_servers", tmp_path / "export", tmp_path / "tiny.gguf", *short, "--out", out)
    assert code == 0
    result = json.loads(out.with_suffix(".json").read_text())
    kinds = [(row["clients"], row["server"]) for row in result["rows"]]
    assert kinds == [(1, "lockkit serve"), (1, "llama.cpp"), (3, "lockkit serve"), (3, "llama.cpp")]
    for row in result["rows"]:
        assert row["errors"] == 0 and row["requests"] >= 2 * row["clients"] and len(row["rounds"]) == 2
        assert 0 < row["first_text_seconds"]["p50"] <= row["latency_seconds"]["max"]
    ours, theirs = result["tokens_of_one_answer_to_each_prompt"].values()
    assert ours["prompt_tokens"] == theirs["prompt_tokens"] > 0  # both tokenise as `demo` does
    assert set(result["throughput_over_llama_cpp"]) == {"1", "3"}
    assert printed.strip() == out.with_suffix(".md").read_text().strip()
