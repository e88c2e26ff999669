"""The program as a whole: help, plan, env, error messages, and output that is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

import lockkit
from lockkit.bench.run import BenchResult
from lockkit.environment import describe_environment
from lockkit.export.manifest import Manifest
from lockkit.files import EXPORT_MANIFEST
from lockkit.lock.plan import plan_model
from lockkit.models.load import DEMO
from lockkit.verify.result import VerifyResult

COMMANDS = [
    "plan",
    "lock",
    "export",
    "verify",
    "kernel",
    "bench",
    "attack",
    "generate",
    "serve",
    "report",
    "card",
    "sign",
    "web",
    "push",
    "env",
]

# What each command is called in Python.
VERBS = {
    "plan": ["plan_model"],
    "lock": ["lock_model", "LockConfig"],
    "export": ["export_model", "ExportConfig"],
    "verify": ["verify_export", "VerifyConfig"],
    "kernel": ["build_kernel", "install_kernel", "remove_kernel"],
    "bench": ["bench_export", "BenchConfig"],
    "attack": ["run_audit", "audit_config", "AuditConfig"],
    "generate": ["open_model", "generate_text", "GenerateConfig"],
    "serve": ["serve_export", "open_app", "ServeConfig"],
    "report": ["write_report"],
    "card": ["write_card", "write_bom"],
    "sign": ["sign_folder", "SignConfig", "check_signature", "CheckConfig"],
    "web": ["web_folder"],
    "push": ["push_folder", "PushConfig"],
    "env": ["describe_environment"],
}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_complete_and_fits_80_columns(cli, command):
    done = cli(*filter(None, [command, "--help"]))
    assert done.code == 0
    assert max(len(line) for line in done.out.splitlines()) <= 80
    for mark in ("<Runtime", "<bool>", "<list", "…"):
        assert mark not in done.out
    for expected in ["Examples", f"lockkit {command}"] if command else COMMANDS:
        assert expected in done.out


def test_commands_are_listed_in_the_order_of_the_work_and_whole(cli):
    lines = cli("--help").out.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_each_command_has_its_verb_in_python():
    assert list(VERBS) == COMMANDS
    names = [name for names in VERBS.values() for name in names]
    assert set(lockkit.__all__) == {"__version__", *names}
    for command, names in VERBS.items():
        assert f"    {command:<10} {', '.join(names)}" in lockkit.__doc__
        assert all(callable(getattr(lockkit, name)) for name in names)


def test_importing_lockkit_loads_no_library():
    code = "import sys, lockkit; print({'torch', 'transformers', 'pydantic', 'typer', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lock", "demo", "x", "--depth", "abc"], "--depth"),
        (["lock"], "MODEL"),
        (["lokc"], "Did you mean 'lock'?"),
        (["env", "--x"], "--x"),
        (["lock", "demo", "x", "--deph", "8"], "No such option: --deph: did you mean --depth?"),
        (["bench", "x", "--batchsize", "8"], "did you mean --batch-size?"),
        (["lock", "demo", "x", "--depth", "1.5"], "'--depth': must be a whole number"),
        (["lock", "demo", "x", "--overwrite=yes"], "`lockkit lock --help`"),
        (["plan", "demo", "--depth"], "`lockkit plan --help`"),
    ],
)
def test_bad_use_is_one_line_that_points_to_the_help(cli, arguments, named):
    done = cli(*arguments)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert named in done.err and "--help" in done.err


def test_without_arguments_the_help_is_shown(cli):
    done = cli()
    assert done.code == 0 and done.err == ""
    assert done.out == cli("--help").out == cli("-h").out


def test_version_is_the_packages(cli):
    import importlib.metadata

    assert cli("--version").out.strip() == f"lockkit {importlib.metadata.version('lockkit')}"


def test_json_to_standard_output_has_no_tables(cli):
    done = cli("env", "--json", "-")
    found = json.loads(done.out)
    assert found["schema"] == "lockkit-environment/1" and done.err == ""
    assert found["operator"][0].startswith("not compiled") or "GPU" in found["operator"][1]
    assert cli("plan", "demo", "--json", "/proc/x.json").err.endswith("change --json\n")


def test_quiet_prints_results_only(cli, originals, tmp_path):
    loud, quiet = (
        cli("export", originals("llama"), tmp_path / name, *more) for name, more in (("a", ()), ("b", ("-q",)))
    )
    assert loud.err and not quiet.err and "wrote" in quiet.out
    failed = cli("-q", "export", originals("llama"), tmp_path / "b")
    assert failed.code == 2 and "change OUT" in failed.err


def test_the_shell_completes_commands_options_and_values():
    for words, position, expected in (
        ("lockkit ex", 1, "export"),
        ("lockkit export --prec", 2, "--precision"),
        ("lockkit export a b --precision i", 5, "int8\nint4"),
    ):
        environment = os.environ | {
            "_LOCKKIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": f"{position}",
        }
        program = "import sys; sys.argv = ['lockkit']; from lockkit.cli.app import main; main()"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == expected


def test_a_missing_onnxruntime_is_named_with_its_extras(originals, tmp_path):
    """As where neither the extra `cpu` nor `gpu` is installed."""
    program = (
        "import sys; sys.modules |= {'onnxruntime': None, 'onnxruntime_genai': None}\n"
        f"sys.argv = ['lockkit', 'export', {str(originals('llama'))!r}, {str(tmp_path / 'onnx')!r}]\n"
        "from lockkit.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        "lockkit: this needs onnxruntime_genai, which is not installed: pip install 'lockkit[cpu]', or 'lockkit[gpu]' for "
        "an NVIDIA GPU"
    )


def test_errors_are_one_line_and_debug_shows_the_traceback(originals, tmp_path):
    arguments = ["lock", str(originals("llama")), str(tmp_path / "o"), "--data", str(tmp_path / "missing")]
    for command, traceback in (
        (arguments, False), (["--debug", *arguments], True), ([*arguments, "--debug"], True)
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "lockkit", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert ("Traceback" in done.stderr) == traceback
        assert "there is no file or folder" in done.stderr


def test_a_damaged_description_of_the_chains_is_named(cli, locks, tmp_path):
    broken = tmp_path / "locked"
    shutil.copytree(locks("llama"), broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"dlr": config["dlr"] | {"depth": "many"}}))
    for command in (("export", broken, tmp_path / "out"), ("generate", broken)):
        done = cli(*command)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "config.json" in done.err and "tokenizer" not in done.err and done.err.count("change MODEL") == 1


def test_an_export_without_its_manifest_is_one_plain_line(cli, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO / name, tmp_path)
    (tmp_path / "model.onnx").touch()
    reference = ("--reference", "demo")
    for command, option, *others in (
        ("verify", "EXPORT", *reference), ("serve", "EXPORT"), ("generate", "MODEL"), ("bench", "EXPORT")
    ):  # fmt: skip
        done = cli(command, tmp_path, *others)
        assert done.code == 2 and done.err.endswith(
            f"{tmp_path} has no {EXPORT_MANIFEST}, so it is not an export of lockkit: change {option}\n"
        )


def test_a_leading_tilde_is_the_home_folder(cli, originals, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(originals("llama"), tmp_path / "model")
    assert cli("plan", "~/model", "--depth", "4").code == 0
    assert cli("export", "~/model", "--", "~/onnx").code == 0 and (tmp_path / "onnx" / "model.onnx").is_file()
    done = cli("lock", "~/model", "~/model")
    assert done.code == 2 and "MODEL's own folder" in done.err


def test_the_schema_has_one_name_in_python_and_one_in_json():
    plan = plan_model("demo", [8])
    manifest = Manifest(
        versions={}, model_type="llama", locked=False, precision="fp32", provider="cpu", source_sha256={}, files={}
    )
    for found, record in (
        (plan, plan.record()),
        (environment := describe_environment(), environment.record()),
        (manifest, manifest.model_dump(by_alias=True)),
    ):
        assert next(iter(record)) == "schema" and record["schema"] == found.schema_version
        assert "schema_version" not in record
    for model in (Manifest, BenchResult, VerifyResult):
        assert model.model_fields["schema_version"].alias == "schema"
