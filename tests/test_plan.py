"""`lockkit plan`: what it counts, predicts and refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from lockkit.dlr.mlp import MLPShape
from lockkit.lock.config import LockConfig
from lockkit.lock.duration import Speed, predicted_seconds
from lockkit.lock.plan import sizes_by_transformers
from lockkit.models.families import FAMILIES, decoder_layers
from lockkit.models.load import DEMO, load_model
from lockkit.models.sizes import sizes_in_files


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plan_counts_what_the_model_has(cli, originals, model_type):
    done = cli("plan", originals(model_type), "--depth", 7, "--json", "-")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    model, _ = load_model(originals(model_type))
    mlp = sum(p.numel() for p in decoder_layers(model)[0].mlp.parameters())
    assert plan["schema"] == "lockkit-plan/1"
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["original_mlp_parameters"] == plan["rows"][0]["mlp_parameters"] == mlp
    assert (plan["rows"][0]["smallest_rank"], plan["rows"][0]["rank"]) == (6, 7)  # 48 = 7 * 7 - 1


def test_plan_predicts_time_and_disk_for_each_depth(cli, originals, tmp_path):
    """More depth takes no less time, and the disk holds the locked folder and the finished chains."""
    out = tmp_path / "plan.json"
    done = cli("plan", originals("llama"), "--depth", 2, "--depth", 8, "--json", out)
    assert done.code == 0 and "lock:" in done.out
    plan = json.loads(out.read_text())
    assert plan["operations_per_second"] > 1e6
    for row in plan["rows"]:
        assert 0 < row["lock_seconds"] < 1e5
        assert row["lock_disk_bytes"] >= 4 * (plan["parameters"] + plan["layers"] * row["mlp_parameters"])


def test_predicted_time_is_that_of_the_two_measured_locks():
    """Measured on 2 CPU cores (tools/results/fidelity.md): demo 32 s; Gemma 3 270M 1,732 s, with sampling."""
    cores = Speed(
        dense=215e9, sampling=940e9, blocks={32: 190e9}
    )  # `measure_speed` on these cores, when they are quiet
    for shape, sizes, measured in (
        (MLPShape(256, 768), {"layers": 4, "layer_parameters": 850_000, "vocab_size": 4096, "samples": False}, 32),
        (MLPShape(640, 2048), {"layers": 18, "layer_parameters": 5_570_000, "vocab_size": 262_144, "samples": True}, 1732),
    ):  # fmt: skip
        found = predicted_seconds(speed=cores, shape=shape, config=LockConfig(), **sizes)
        assert measured / 1.5 < found < measured * 1.5


def test_plan_reads_no_weights(cli, tmp_path):
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    done = cli("plan", tmp_path)
    assert done.code == 0, done.err
    assert (
        re.search(r"^ 32 +24 .* 3\.4 .* 2\.42 ", done.out, re.M)
        and max(len(line) for line in done.out.splitlines()) <= 80
    )


@pytest.mark.parametrize("depth", [0, 1, 769])
def test_plan_refuses_a_depth_that_lock_refuses(cli, tmp_path, depth):
    plan, lock = cli("plan", "demo", "--depth", depth), cli("lock", "demo", tmp_path / "out", "--depth", depth)
    assert (plan.code, plan.err.count("\n")) == (2, 1)
    assert plan.err == lock.err and f"{depth}" in plan.err


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes_read_without_pytorch_are_those_of_transformers(originals, model_type):
    found = sizes_in_files(originals(model_type))
    assert found is not None and found == sizes_by_transformers(originals(model_type), model_type)


@pytest.mark.parametrize(
    "damage",
    [
        {"hidden_act": "rely"}, {"quantization_config": {"bits": 4}}, {"num_hidden_layers": 3}, {"vocab_size": 4097},
        {"intermediate_size": 64}, {"model_type": "bert"}, {"pad_token_id": 9999}, {"hidden_size": None},
    ],
    ids=lambda damage: next(iter(damage)),
)  # fmt: skip
def test_what_is_not_plain_is_left_to_transformers(originals, tmp_path, cli, damage):
    """Which refuses it, as `lockkit lock` does."""
    shutil.copytree(originals("llama"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | damage))
    assert sizes_in_files(tmp_path / "model") is None
    done = cli("plan", tmp_path / "model")
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_damaged_weights_are_left_to_transformers(originals, tmp_path):
    for name, damage in (
        ("cut", lambda data: data[:-1]), ("head", lambda data: data[:4]), ("none", lambda data: b""),
        ("name", lambda data: data.replace(b"model.layers.1.mlp.up_proj", b"model.layers.1.mlp.up_prox")),
    ):  # fmt: skip
        shutil.copytree(originals("llama"), tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        assert sizes_in_files(tmp_path / name) is None


def test_a_plan_of_a_local_model_imports_neither_pytorch_nor_transformers(originals):
    code = f"import sys, lockkit; lockkit.plan_model({str(originals('gemma2'))!r}); print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
