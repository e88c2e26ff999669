"""Locked folders and exports without lockkit: transformers 4.57, optimum, lm-evaluation-harness, CPU wheels.

LangChain's clients talk to `lockkit serve`, which runs in this environment.

The environment is `.venv-consumers` in the repository. The first test builds it from `requirements.txt`.
The scripts beside this file run in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from serving import running_server, tiny_chat_model
from tiny import save_tiny

from lockkit.export import ExportConfig, export_model
from lockkit.export.manifest import ALL_LOGITS_FILE
from lockkit.generate import GenerateConfig, generate, open_model
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.models.load import load_model, load_tokenizer
from lockkit.publish.web import web_folder
from lockkit.targets import Precision

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_onnxruntime.py"
LM_EVAL = Path(__file__).parents[2] / "examples" / "lm_eval"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"
PROMPT = "def read(path):"
NEW_TOKENS = 12

pytestmark = pytest.mark.environment


@pytest.fixture(scope="session")
def run_there():
    """A function that runs a script of this folder in the other environment and returns the JSON it prints."""
    folder = ROOT / ".venv-consumers"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file() or ready.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", REQUIREMENTS], check=True)
        ready.write_text(REQUIREMENTS.read_text())

    def run(script: str, *arguments: object, folder: Path = folder) -> dict:
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
    """A tiny locked model with heads large enough for every runtime, and a RoPE base that is not the default."""
    folder = tmp_path_factory.mktemp("consumed") / request.param
    original = save_tiny(request.param, folder / "original", hidden_size=64, head_dim=16, rope_theta=500.0)
    lock_model(str(original), folder / "locked", LockConfig(**QUICK))
    return folder / "locked"


@torch.no_grad()
def expected(folder: Path) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the logits at the last position of the prompt, from lockkit's classes."""
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
    assert len(found["all_logits"]) == len(load_tokenizer(locked)(PROMPT)["input_ids"]) > 1
    torch.testing.assert_close(torch.tensor(found["all_logits"][-1]), torch.tensor(logits), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """One locked model and its export, for consumers that treat all families the same."""
    folder = tmp_path_factory.mktemp("one")
    original = save_tiny("qwen3", folder / "original", hidden_size=64, head_dim=16)
    lock_model(str(original), folder / "locked", LockConfig(**QUICK))
    export_model(str(folder / "locked"), folder / "onnx", ExportConfig())
    return folder


def test_the_example_needs_onnxruntime_and_tokenizers_only(qwen3, run_there):
    run_there("generate_with_optimum.py", qwen3 / "onnx", PROMPT, NEW_TOKENS)  # builds the environment
    python = ROOT / ".venv-consumers" / "bin" / "python"
    done = subprocess.run(
        [python, EXAMPLE, qwen3 / "onnx", "--prompt", PROMPT, "--new-tokens", str(NEW_TOKENS)],
        capture_output=True, text=True, cwd=qwen3, env={**os.environ, "PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens, _ = expected(qwen3 / "locked")
    want = load_tokenizer(qwen3 / "locked").decode(tokens)
    assert done.stdout.rstrip("\n") == want.rstrip("\ufffd").rstrip("\n")
    imports = {line.split()[1] for line in EXAMPLE.read_text().splitlines() if line.startswith(("import ", "from "))}
    assert imports <= {"argparse", "collections.abc", "json", "pathlib", "numpy", "onnxruntime", "tokenizers"}
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_lm_evaluation_harness_gives_the_export_the_score_of_the_pytorch_model(qwen3, run_there, tmp_path):
    scoring = shutil.copytree(qwen3 / "onnx", tmp_path / "scoring")  # genai reads the graph's name in its configuration
    genai = (scoring / "genai_config.json").read_text()
    (scoring / "genai_config.json").write_text(genai.replace('"model.onnx"', f'"{ALL_LOGITS_FILE}"'))
    found = run_there(
        "evaluate_with_lm_eval.py", tmp_path,
        "hf", f"pretrained={qwen3 / 'locked'},trust_remote_code=True,dtype=float32",
        "onnxruntime", f"pretrained={qwen3 / 'onnx' / ALL_LOGITS_FILE}",
        "onnxruntime-genai", f"pretrained={scoring}",
        folder=LM_EVAL,
    )  # fmt: skip
    assert not found["lockkit"]
    wanted = torch.tensor([float(likelihood) for likelihood, _ in found["hf"]["choices"]])
    assert len(wanted) == 4 * len((LM_EVAL / "stdlib_members.jsonl").read_text().splitlines())
    assert wanted.std() > 1  # nats: the log-likelihoods differ from choice to choice
    for backend in ("onnxruntime", "onnxruntime-genai"):
        assert found[backend]["accuracy"] == found["hf"]["accuracy"]
        likelihoods = torch.tensor([float(likelihood) for likelihood, _ in found[backend]["choices"]])
        torch.testing.assert_close(likelihoods, wanted, rtol=0, atol=1e-3)


def test_langchain_talks_to_the_server(run_there, tmp_path):
    export_model(str(tiny_chat_model(tmp_path / "original")), tmp_path / "tiny-onnx", ExportConfig())
    with running_server(tmp_path / "tiny-onnx") as server:
        found = run_there("talk_with_langchain.py", f"{server.url}/v1", "tiny-onnx", PROMPT)
        settings = {"model": "tiny-onnx", "max_tokens": NEW_TOKENS, "temperature": 0}
        wanted = server.client().completions.create(prompt=[PROMPT, "x"], **settings)
        texts = [choice.text for choice in wanted.choices]
        assert found["text"] == found["text_streamed"] == texts[0]
        assert found["texts"] == found["generations"] == texts
        assert found["text_stopped"] == texts[0].partition(found["stop"])[0]
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPT}]
        chat = server.client().chat.completions.create(messages=messages, **settings)
        assert found["chat"] == found["chat_streamed"] == chat.choices[0].message.content
        assert found["chat_tokens"] == NEW_TOKENS and found["history_tokens"] > NEW_TOKENS


@pytest.mark.skipif(not (shutil.which("npm") and shutil.which("node")), reason="needs Node and npm")
def test_transformers_js_generates_the_same(qwen3):
    folder = ROOT / ".venv-consumers" / "node"
    if not (folder / "node_modules").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "node" / "package.json", folder)
        # Install scripts are off: the packages contain their binaries, and nothing else is downloaded or run.
        npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(npm, cwd=folder, check=True)
    shutil.copy(HERE / "node" / "generate.mjs", folder)

    def tokens(*arguments: object) -> list[int]:
        done = subprocess.run(
            ["node", "generate.mjs", *map(str, arguments)], capture_output=True, text=True, cwd=folder, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["tokens"]

    wanted = expected(qwen3 / "locked")[0]
    assert tokens(qwen3 / "onnx", PROMPT, NEW_TOKENS) == wanted
    exports = [qwen3 / "onnx"]
    for precision in (Precision.int4, Precision.int8):
        exports.append(qwen3 / f"{precision}")
        export_model(str(qwen3 / "locked"), exports[-1], ExportConfig(precision=precision, block_size=16))
    web_folder(exports, qwen3 / "web")
    for dtype, export in zip(("fp32", "q4", "q8"), exports, strict=True):
        own = generate(open_model(str(export)), PROMPT, GenerateConfig(max_new_tokens=NEW_TOKENS)).token_ids
        assert tokens(qwen3 / "web", PROMPT, NEW_TOKENS, dtype) == own
