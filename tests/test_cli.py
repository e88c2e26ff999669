"""The program as a whole: help, plan, env, and files that are either finished or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockkit.errors import UsageError
from lockkit.files import LOCK_RECORD, new_folder
from lockkit.models.families import FAMILIES, decoder_layers
from lockkit.models.load import DEMO, load_model

COMMANDS = ["plan", "lock", "export", "verify", "attack", "generate", "serve", "bench", "kernel", "report", "env"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_complete_and_fits_80_columns(cli, command):
    done = cli(*filter(None, [command, "--help"]))
    assert done.code == 0
    assert max(len(line) for line in done.out.splitlines()) <= 80
    assert "<Runtime" not in done.out  # a default as Python writes it
    for expected in ["Examples", f"lockkit {command}"] if command else COMMANDS:
        assert expected in done.out


def test_help_answers_without_the_heavy_libraries():
    code = (
        "import sys\nfrom lockkit.cli.app import main\nsys.argv = ['lockkit', 'lock', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lock", "demo", "x", "--depth", "abc"], "--depth"),
        (["lock"], "MODEL"),
        (["lokc"], "lokc"),
        (["env", "--x"], "--x"),
    ],
)
def test_bad_use_is_one_line_that_points_to_the_help(cli, arguments, named):
    done = cli(*arguments)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert named in done.err and "--help" in done.err


def test_version_is_the_packages(cli):
    import importlib.metadata

    assert cli("--version").out.strip() == f"lockkit {importlib.metadata.version('lockkit')}"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plan_counts_what_the_model_has(cli, originals, model_type):
    done = cli("plan", originals(model_type), "--depth", 7, "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    model, _ = load_model(originals(model_type))
    mlp = sum(p.numel() for p in decoder_layers(model)[0].mlp.parameters())
    assert plan["schema"] == "lockkit-plan/1"
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["original_mlp_parameters"] == plan["rows"][0]["mlp_parameters"] == mlp
    assert (plan["rows"][0]["smallest_rank"], plan["rows"][0]["rank"]) == (6, 7)  # 48 = 7 * 7 - 1


def test_plan_reads_no_weights(cli, tmp_path):
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    done = cli("plan", tmp_path)
    assert done.code == 0, done.err
    assert "3.4x" in done.out and max(len(line) for line in done.out.splitlines()) <= 80


def test_plan_refuses_a_depth_beyond_the_width(cli):
    done = cli("plan", "demo", "--depth", 769)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "--depth 769" in done.err


def test_env_sees_wheels_that_shadow_each_other(tmp_path):
    fake = tmp_path / "onnxruntime-1.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 1.0\n")
    for path, expected in ((os.devnull, False), (str(tmp_path), True)):
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-m", "lockkit", "env", "--json"],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
        shadowed = [line for line in found["problems"] if "onnxruntime 1.0" in line and "shadow" in line]
        assert bool(shadowed) == expected
        assert found["versions"]["torch"] and found["torch_devices"] and found["onnxruntime_providers"]


def test_errors_are_one_line_and_debug_shows_the_traceback(originals, tmp_path):
    arguments = ["lock", str(originals("llama")), str(tmp_path / "o"), "--data", str(tmp_path / "missing")]
    for options, traceback in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [sys.executable, "-m", "lockkit", *options, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert ("Traceback" in done.stderr) == traceback
        assert "there is no file or folder" in done.stderr


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="halfway"), new_folder(out) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as folder:
        (folder / LOCK_RECORD).write_text("first")
        assert not out.exists()
    with pytest.raises(ValueError, match="halfway"), new_folder(out, overwrite=True) as folder:
        (folder / LOCK_RECORD).write_text("second")
        raise ValueError("halfway")
    assert (out / LOCK_RECORD).read_text() == "first"
    with new_folder(out, overwrite=True) as folder:
        (folder / LOCK_RECORD).write_text("third")
    assert (out / LOCK_RECORD).read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_folder_must_be_ours_to_replace(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for out in (file, link, Path(tmp_path)):
        with pytest.raises(UsageError, match="change OUT"), new_folder(out, overwrite=True):
            pytest.fail("the block must not run")


def test_a_model_is_never_replaced_by_its_own_export(cli, locks):
    before = sorted(path.name for path in locks("llama").iterdir())
    for out in (locks("llama"), locks("llama") / "onnx"):
        done = cli("export", locks("llama"), out, "--overwrite")
        assert done.code == 2 and "change OUT" in done.err
    assert sorted(path.name for path in locks("llama").iterdir()) == before
