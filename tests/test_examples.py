"""The examples: the demo with a few seconds of distillation, the Slurm script, the container and KServe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import QUICK, command_line

from lockkit.serve.config import API_KEY_VARIABLE, ServeConfig
from lockkit.settings import validated

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def test_demo_runs_all_steps_and_reports_what_it_measured(tmp_path):
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
    promised = done.stdout[done.stdout.index("contents of") :]
    assert "locked-onnx" in promised
    for name in ("locked/model.safetensors", "locked-onnx/model.onnx_data", "original-onnx/model.onnx", "verify.json"):
        assert (tmp_path / "run" / name).is_file()


def test_a_real_model_gets_one_table_and_a_second_run_repeats_nothing(originals, tmp_path):
    """With a tiny model and one precision."""
    lock = " ".join(command_line(QUICK | {"tokens": 1_024, "end_to_end_tokens": 0}))
    command = [
        *(
            sys.executable,
            DEMO.parent / "real" / "real.py",
            "--model",
            originals("qwen3"),
            "--folder",
            tmp_path / "run",
        ),
        *("--precisions", "fp32", "--no-audit", "--lock-options", lock),
        *("--verify-options", "--tokens 256 --block-tokens 64 --prompts 1 --new-tokens 2 --max-perplexity-ratio 0.5"),
        *("--bench-options", "--prompt-length 8 --new-tokens 2 --rounds 1 --runtime onnxruntime"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "run" / "real.md").read_text()
    fidelity = json.loads((tmp_path / "run" / "locked" / "lockkit.json").read_text())["fidelity"]
    assert f"| stdlib | {fidelity['tokens']} | " in table and f"| {fidelity['kl_divergence']:.4f} |" in table
    assert "| fp32 | failed |" in table and "a gate failed" in table  # no ratio is below 0.5
    assert "locked-fp32 | onnxruntime, kernel |" in table and "| pytorch |" in table
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "$ lockkit" not in again.stdout


def test_slurm_script_locks_with_several_workers(originals, tmp_path):
    """With stand-ins for Slurm's own programs, which no test machine has: one node, two tasks on the CPU."""
    programs = {
        "srun": 'exec "$@"',
        "scontrol": "echo 127.0.0.1",
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    options = command_line(QUICK)
    script = Path(__file__).parents[1] / "examples" / "slurm" / "lock.sbatch"
    done = subprocess.run(
        ["bash", script, originals("qwen3"), tmp_path / "out", *options],
        capture_output=True, text=True, check=False, env=environment, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "lockkit.json").read_text())["workers"] == 2


SERVING = DEMO.parent / "serving"


def serve_options(arguments: list[str]) -> ServeConfig:
    """What `lockkit serve` makes of options."""
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return validated(ServeConfig, {name.removeprefix("--").replace("-", "_"): value for name, value in pairs.items()})


def test_the_container_and_kserve_agree_with_each_other_and_with_the_server():
    lines = (SERVING / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    for sources in (rest.split()[:-1] for step, rest in steps if step == "COPY"):
        assert all((DEMO.parents[1] / source).exists() for source in sources)
    entry = json.loads(next(rest for step, rest in steps if step == "ENTRYPOINT"))
    port = serve_options(entry[2:]).port
    assert entry[:2] == ["lockkit", "serve"] and ["EXPOSE", str(port)] in steps

    predictor = yaml.safe_load((SERVING / "kserve.yaml").read_text())["spec"]["predictor"]
    container = predictor["containers"][0]
    config = serve_options(container["args"][1:])
    assert container["ports"][0]["containerPort"] == port == container["readinessProbe"]["httpGet"]["port"]
    assert predictor["timeout"] > config.request_seconds
    assert predictor["terminationGracePeriodSeconds"] > config.shutdown_seconds
    assert predictor["scaleTarget"] == config.max_batch
    assert container["env"][0]["name"] == API_KEY_VARIABLE
    assert container["args"][0].startswith(container["volumeMounts"][0]["mountPath"] + "/")
