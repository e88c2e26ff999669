"""`lockkit bench` beside llama.cpp, which runs tiny GGUF files. No test depends on speed."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from test_export import exports, models  # noqa: F401 (fixtures)

from lockkit.bench import BenchConfig, BenchResult, bench
from lockkit.bench.llama_cpp import LlamaCpp, start_server
from lockkit.errors import UsageError

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from test_gguf import write_gguf

QUICK = ("--prompt-length", "20", "--new-tokens", "6", "--rounds", "2", "--threads", "1")
PROMPT = [[7, 300, 12, 9] * 8]


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_is_measured_beside_an_export(file, exports, cli, tmp_path):  # noqa: F811
    out = tmp_path / "bench.json"
    outcome = cli(
        *("bench", exports("llama", True), "--against", file, "--against", exports("llama", False)),
        *("--batch-size", "1", "--batch-size", "3", *QUICK, "--json", out),
    )
    assert outcome.code == 0, outcome.err
    result = BenchResult.model_validate_json(out.read_text())
    (found,) = [model for model in result.models if model.runtime == "llama.cpp"]
    assert (found.model, found.size_bytes, found.locked) == ("tiny.gguf", file.stat().st_size, None)
    assert found.peak_memory_bytes > found.size_bytes
    ratios = {(ratio.runtime, ratio.batch_size) for ratio in result.ratios if ratio.against == "tiny.gguf (llama.cpp)"}
    assert ratios == {("onnxruntime", 1), ("onnxruntime", 3), ("onnxruntime-genai", 1), ("onnxruntime-genai", 3)}
    for row in (row for row in result.measurements if row.runtime == "llama.cpp"):
        first = row.batch_size * row.prompt_length / row.prefill_tokens_per_second
        assert row.time_to_first_token_seconds == pytest.approx(first)
        assert 0 < row.step_seconds["p50"] <= row.step_seconds["p99"] < 10
    assert "xllamacpp" in result.versions


def test_every_row_has_its_prompt_and_its_new_tokens(file):
    config = BenchConfig(batch_sizes=[1, 3], prompt_lengths=[20, 30], new_tokens=9, threads=1)
    model = LlamaCpp(file, config, None)
    for rows, length in ((1, 20), (3, 20), (3, 30)):
        times = model.generate(np.random.default_rng(0).integers(1, 1000, (rows, length)), 9)
        assert len(times) == 9 and times == sorted(times)


def test_nothing_is_added_to_a_prompt_and_nothing_of_it_is_kept(file):
    server = start_server(file, rows=1, tokens=64, threads=1)
    answers = [server.handle_completions({"prompt": PROMPT, "max_tokens": 2}) for _ in range(2)]
    for answer in answers:
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (len(PROMPT[0]), 0)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"PK" + content, "not a GGUF file"),
        (lambda content: content[:2000], "key-value"),
        (lambda content: content[: len(content) // 2], "incomplete"),
        (lambda content: content.replace(b"qwen2", b"grok9"), "grok9"),
    ],
)
def test_a_gguf_file_that_llama_cpp_cannot_read(file, exports, cli, tmp_path, damage, reason):  # noqa: F811
    file.write_bytes(damage(file.read_bytes()))
    out = tmp_path / "bench.json"
    short = (*QUICK, "--runtime", "onnxruntime")
    outcome = cli("bench", exports("llama", True), "--against", file, *short, "--json", out)
    assert outcome.code == 2 and not out.exists() and not outcome.out
    (line,) = outcome.err.splitlines()
    assert re.fullmatch(f"lockkit: .*tiny.gguf.*{reason}.*: change --against", line)


def test_bad_use_names_the_option(file, exports, monkeypatch):  # noqa: F811
    export = exports("llama", True)
    with pytest.raises(UsageError, match=r"no file .*missing.gguf: change --against"):
        bench(export, ["missing.gguf"])
    with pytest.raises(UsageError, match="--provider"):
        bench(export, [str(file)], BenchConfig(provider="cuda"))
    config = BenchConfig(batch_sizes=[2], prompt_lengths=[250], new_tokens=10)  # of the model's 256
    with pytest.raises(UsageError, match=r"context of 260 tokens: change --prompt-length or --new-tokens"):
        LlamaCpp(file, config, None).generate(np.full((2, 250), 7), 10)
    with pytest.raises(UsageError, match=r"context of 310 tokens: change --prompt-length or --new-tokens"):
        LlamaCpp(file, config, None).generate(np.full((2, 300), 7), 10)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as if it were not installed
    with pytest.raises(UsageError, match=r"pip install 'lockkit\[bench\]'"):
        bench(export, [str(file)])
