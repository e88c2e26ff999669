"""`lockkit bench` on tiny models: the figures it reports and the bad use it refuses. No test depends on speed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_export import exports, models  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM

from lockkit.bench import BenchConfig, BenchResult, Runtime, bench
from lockkit.errors import UsageError
from lockkit.export.manifest import read_manifest, unlisted_files

QUICK = ["--prompt-length", "20", "--new-tokens", "6", "--rounds", "2", "--threads", "1"]


def test_models_side_by_side(models, exports, cli, tmp_path):  # noqa: F811
    foreign = tmp_path / "foreign"  # another program's export has no manifest and no genai_config.json
    shutil.copytree(exports("llama", False), foreign)
    for name in ("lockkit_manifest.json", "genai_config.json"):
        (foreign / name).unlink()
    out, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    outcome = cli(
        *("bench", exports("llama", True), "--against", exports("llama", False), "--against", foreign),
        *("--against", models("llama", False), "--batch-size", "1", "--batch-size", "3"),
        *(*QUICK, "--json", out, "--plot", picture),
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("speed of EXPORT over that of the other model")  # ratios first
    assert picture.read_text().startswith("<?xml")
    raw = json.loads(out.read_text())
    assert raw["schema"] == "lockkit-bench/1" and next(iter(raw)) in ("schema", "ratios")
    result = BenchResult.model_validate(raw)
    assert len(result.models) == 6  # two exports in two runtimes, one in onnxruntime alone, one model in PyTorch
    assert len(result.measurements) == 6 * 2
    assert {(r.runtime, r.against) for r in result.ratios} == {
        ("onnxruntime", "llama"),
        ("onnxruntime-genai", "llama"),
        ("onnxruntime", "foreign"),
        ("onnxruntime", "llama (pytorch)"),
        ("onnxruntime-genai", "llama (pytorch)"),
    }
    for found in result.measurements:
        assert found.step_seconds["p50"] <= found.step_seconds["p95"] <= found.step_seconds["p99"]
        assert found.decode_tokens_per_second == pytest.approx(found.batch_size / found.step_seconds["p50"])
    peaks = {(found.model, found.runtime): found.peak_memory_bytes for found in result.models}
    assert peaks["llama", "pytorch"] > 100e6  # PyTorch alone is that large: each process counts its own


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_file_that_cannot_be_written_loses_no_result(models, exports, cli, tmp_path):  # noqa: F811
    out, full = tmp_path / "bench.json", tmp_path / "full.svg"
    full.symlink_to("/dev/full")
    short = ("--runtime", "onnxruntime", "--prompt-length", "8", "--new-tokens", "2", "--rounds", "1", "--threads", "1")
    command = ("bench", exports("llama", True), "--against", exports("llama", False), *short)
    outcome = cli(*command, "--json", out, "--plot", full)
    assert outcome.code == 2 and "change --plot" in outcome.err
    assert "medians over the rounds" in outcome.out
    assert len(BenchResult.model_validate_json(out.read_text()).measurements) == 2
    outcome = cli(*command, "--json", full)
    assert outcome.code == 2 and "change --json" in outcome.err
    assert "medians over the rounds" in outcome.out


def test_bad_use_names_the_option(models, exports, tmp_path):  # noqa: F811
    export = exports("llama", True)
    with pytest.raises(UsageError, match="change EXPORT"):
        bench(models("llama", True))
    with pytest.raises(UsageError, match="change --runtime"):
        bench(export, config=BenchConfig(runtimes=[Runtime.pytorch]))
    with pytest.raises(UsageError, match=r"context of 256"):  # raised in the other process
        bench(export, config=BenchConfig(runtimes=[Runtime.onnxruntime], prompt_lengths=[250], new_tokens=10))


def test_a_model_and_a_shape_given_twice_are_measured_once(models, exports, tmp_path):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(exports("llama", True), export)
    size = sum((export / name).stat().st_size for name in ("model.onnx", "model.onnx_data"))
    (export / "old.onnx").write_bytes(b"mine" * 1000)  # not in the manifest
    assert unlisted_files(export, read_manifest(export)) == ["old.onnx"]
    other = str(exports("llama", False))
    settings = {"runtimes": [Runtime.onnxruntime] * 2, "batch_sizes": [1, 1], "prompt_lengths": [8, 8], "rounds": 1}
    result = bench(export, [other, f"{other}/"], BenchConfig(new_tokens=2, threads=1, **settings))
    assert [found.model for found in result.measurements] == ["export", "llama"]
    assert len(result.ratios) == 1 and result.models[0].size_bytes == size


def test_a_model_of_16_bits_runs_in_both_types_in_pytorch(models, exports, tmp_path):  # noqa: F811
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(models("llama", False), dtype=torch.bfloat16).save_pretrained(half)
    settings = BenchConfig(runtimes=[Runtime.onnxruntime], prompt_lengths=[8], new_tokens=2, rounds=1, threads=1)
    result = bench(exports("llama", True), [str(half)], settings)
    assert [ratio.against for ratio in result.ratios] == ["half (pytorch)", "half (pytorch-16-bit)"]
    assert result.models[1].size_bytes == result.models[2].size_bytes == (half / "model.safetensors").stat().st_size


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", [Runtime.onnxruntime, Runtime.genai])
def test_on_a_gpu_the_work_is_on_the_gpu(models, tmp_path, runtime):  # noqa: F811
    from lockkit.export import ExportConfig, ExportSession, export_model
    from lockkit.export.loading import HEAVY_OPERATORS, placement

    if runtime is Runtime.genai:  # exports need its Python code only, so its libraries may be missing
        genai = pytest.importorskip("onnxruntime_genai", exc_type=ImportError)
        if not hasattr(genai, "Model"):
            pytest.skip("onnxruntime-genai is here without its libraries")
    for name, locked in (("locked", True), ("original", False)):
        export_model(str(models("qwen3", locked)), tmp_path / name, ExportConfig(precision="fp16", provider="cuda"))
        session = ExportSession(tmp_path / name, "cuda")
        providers = {provider for provider, op in placement(session._session) if op in HEAVY_OPERATORS}
        assert providers == {"CUDAExecutionProvider"}
    config = BenchConfig(runtimes=[runtime], provider="cuda", prompt_lengths=[20], new_tokens=6, rounds=2)
    result = bench(tmp_path / "locked", [str(tmp_path / "original")], config)
    assert [ratio.runtime for ratio in result.ratios] == [runtime.value]
