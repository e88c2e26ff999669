"""Locked folders and exports where lockkit is not: transformers 4.57, optimum, onnxruntime's CPU wheel.

The environment is `.venv-consumers` in the repository, built here from `requirements.txt` on
first use. The programs that run in it are the two scripts beside this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from tiny import save_tiny

from lockkit.export import ExportConfig, export_model
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.models.load import load_model, load_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"
PROMPT = "def read(path):"
NEW_TOKENS = 12

pytestmark = pytest.mark.environment


@pytest.fixture(scope="session")
def run_there():
    """Run one of this folder's scripts in the other environment; return the JSON it prints."""
    folder = ROOT / ".venv-consumers"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file() or ready.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", REQUIREMENTS], check=True)
        ready.write_text(REQUIREMENTS.read_text())

    def run(script: str, *arguments: object) -> dict:
        # Outside the repository, so that lockkit cannot be imported from the current folder.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(
            [python, HERE / script, *map(str, arguments)],
            capture_output=True, text=True, cwd=folder, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "gemma3_text", "phi3", "phi"])
def locked(request, tmp_path_factory):
    """A tiny locked model with heads large enough for every runtime, and a RoPE base that is no default."""
    folder = tmp_path_factory.mktemp("consumed") / request.param
    original = save_tiny(request.param, folder / "original", hidden_size=64, head_dim=16, rope_theta=500.0)
    lock_model(str(original), folder / "locked", LockConfig(**QUICK))
    return folder / "locked"


@torch.no_grad()
def expected(folder: Path) -> tuple[list[int], list[float]]:
    """Greedy tokens and the last prompt position's logits, by lockkit's own classes."""
    model, _ = load_model(folder, torch.float32)
    model.set_attn_implementation("eager")
    ids = load_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids
    logits = model(ids).logits[0, -1]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens[0, ids.shape[1] :].tolist(), logits.tolist()


def test_transformers_4_57_loads_runs_saves_and_reloads(locked, run_there, tmp_path):
    found = run_there("load_with_transformers.py", locked, PROMPT, NEW_TOKENS, tmp_path / "again")
    tokens, logits = expected(locked)
    assert found["transformers"].startswith("4.57") and not found["lockkit"]
    assert found["tokens"] == found["tokens_after_reload"] == tokens
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(logits), rtol=1e-4, atol=1e-4)


def test_optimum_generates_the_same_from_the_export(locked, run_there, tmp_path):
    if locked.parent.name in ("gemma2", "phi3"):
        pytest.skip("optimum-onnx 0.1.0 does not know that this family groups its key and value heads")
    export_model(str(locked), tmp_path / "onnx", ExportConfig())
    found = run_there("generate_with_optimum.py", tmp_path / "onnx", PROMPT, NEW_TOKENS)
    tokens, logits = expected(locked)
    assert not found["lockkit"]
    assert found["tokens"] == tokens
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(logits), rtol=1e-3, atol=1e-3)
