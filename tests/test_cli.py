"""The program as a whole: help, plan, env, error messages, and output that is complete or absent."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK, command_line
from rich.console import Console

import lockkit
from lockkit.bench.run import BenchResult, Loaded, Measurement, Ratio
from lockkit.cli.bench import _show
from lockkit.cli.console import TerminalProgress, console, duration
from lockkit.environment import describe_environment
from lockkit.errors import UsageError
from lockkit.export.manifest import Manifest
from lockkit.files import EXPORT_MANIFEST, LOCK_RECORD, check_output_file, write_json, write_text
from lockkit.lock.plan import plan_model
from lockkit.models.families import FAMILIES, decoder_layers
from lockkit.models.load import DEMO, load_model
from lockkit.output_folders import new_folder
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
        (["lokc"], "lokc"),
        (["env", "--x"], "--x"),
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
    assert done.code == 2 and done.out == ""
    assert done.err == cli("--help").out


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


@pytest.mark.parametrize("depth", [0, 1, 769])
def test_plan_refuses_a_depth_that_lock_refuses(cli, tmp_path, depth):
    plan, lock = cli("plan", "demo", "--depth", depth), cli("lock", "demo", tmp_path / "out", "--depth", depth)
    assert (plan.code, plan.err.count("\n")) == (2, 1)
    assert plan.err == lock.err and f"{depth}" in plan.err


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


def test_a_model_is_never_replaced_by_its_own_export(cli, locks):
    before = sorted(path.name for path in locks("llama").iterdir())
    for out in (locks("llama"), locks("llama") / "onnx"):
        done = cli("export", locks("llama"), out, "--overwrite")
        assert done.code == 2 and "change OUT" in done.err
    assert sorted(path.name for path in locks("llama").iterdir()) == before


# --- files to write


def test_a_file_is_complete_or_as_it_was(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(file)
    write_json(link, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1} and link.is_symlink()
    for broken in (lambda: write_json(link, {"a": float("nan")}), lambda: write_text(file, "half \ud800")):
        with pytest.raises(ValueError):
            broken()
    assert json.loads(file.read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output_file(pipe, "--json")
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        write_json(pipe, [1])
        assert json.load(reader.stdout) == [1]
    assert pipe.is_fifo()


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_files_to_write_are_checked_before_the_work(cli, tmp_path, command):
    for json_file in (tmp_path, tmp_path / "missing" / "a.json", "/proc/a.json"):
        done = cli(command, tmp_path / "no-export", "--json", json_file)
        assert (done.code, done.err.count("\n")) == (2, 1) and "change --json" in done.err


def test_pictures_are_checked_before_the_work(cli, tmp_path, monkeypatch):
    against = ("bench", tmp_path / "no-export", "--against", "demo", "--plot")
    for picture in (tmp_path, tmp_path / "missing" / "a.svg", tmp_path / "a.txt", tmp_path / "a"):
        done = cli(*against, picture)
        assert done.code == 2 and "change --plot" in done.err
    done = cli("bench", tmp_path / "no-export", "--plot", tmp_path / "a.svg")
    assert done.code == 2 and "give --against" in done.err
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    done = cli(*against, tmp_path / "a.svg")
    assert done.code == 2 and "pip install 'lockkit[report]'" in done.err


def test_a_long_task_writes_a_line_now_and_then_without_a_terminal(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("lockkit.cli.console.errors", Console(file=written, markup=False, highlight=False))

    def wait_for(pattern: str) -> None:
        end = time.monotonic() + 20
        while not re.search(pattern, written.getvalue(), re.M):
            assert time.monotonic() < end, written.getvalue()
            time.sleep(0.01)

    with TerminalProgress(log_seconds=0.05) as progress:
        progress.start("layer 3", 400)
        progress.advance(100, "nmse 0.01")
        wait_for(r"^layer 3: 100 of 400, \d s, about \d+ s left, nmse 0\.01$")
        progress.finish("nmse 0.005")
        wait_for(r"^layer 3: nmse 0\.005\nworking \.\.\.$")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_leading_tilde_is_the_home_folder(cli, originals, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(originals("llama"), tmp_path / "model")
    assert cli("plan", "~/model", "--depth", "4").code == 0
    assert cli("export", "~/model", "--", "~/onnx").code == 0 and (tmp_path / "onnx" / "model.onnx").is_file()
    done = cli("lock", "~/model", "~/model")
    assert done.code == 2 and "MODEL's own folder" in done.err


def test_overwrite_is_proposed_only_where_it_works(cli, originals, tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = cli("lock", originals("llama"), tmp_path)
    assert done.code == 2 and "exists already: change OUT" in done.err and "--overwrite" not in done.err


def test_a_report_is_checked_before_the_work(cli, tmp_path):
    (tmp_path / "page.md").mkdir()
    for page in ("page.txt", "page.html", "missing/page.html"):
        done = cli("report", tmp_path, "--out", tmp_path / page)
        assert done.code == 2 and "change --out" in done.err


def test_a_report_replaces_only_reports(cli, locks, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install lockkit[report]")
    shutil.copy(locks("llama") / LOCK_RECORD, tmp_path / "result.json")
    before = (tmp_path / "result.json").read_bytes()
    (tmp_path / "page.html").write_text("<p>mine</p>")
    (tmp_path / "notes.md").write_text("mine")
    for page, other in (("result.html", "result.json"), ("page.html", "page.html"), ("notes.html", "notes.md")):
        done = cli("report", tmp_path, "--out", tmp_path / page)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert str(tmp_path / other) in done.err and "change --out" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md", "page.html", "result.json"]
    assert (tmp_path / "result.json").read_bytes() == before

    for _ in range(2):  # a report replaces itself
        assert cli("report", tmp_path).code == 0
    (tmp_path / "report.html").unlink()
    assert cli("report", tmp_path).code == 0
    (tmp_path / "report.json").write_text('{"schema": "lockkit-lock/2"}')
    assert cli("report", tmp_path).code == 2


# --- a user's text, with brackets and colons that mean something to Rich

NAME = "my[bold]model[/bold] :smile: [attack]"


def test_progress_prints_brackets_as_they_are(capfd):
    with TerminalProgress() as progress:
        progress.start(NAME, 2)
        progress.advance(note="pip install 'lockkit[attack]'")
        console.print(progress.bars.get_renderable(), soft_wrap=True)  # what a terminal shows
        progress.finish("needs 'lockkit[attack]'")
        progress.say("[red]said")
    found = capfd.readouterr()
    assert NAME in found.out and "'lockkit[attack]'" in found.out
    assert found.err == f"{NAME} ...\n{NAME}: needs 'lockkit[attack]'\n[red]said\n"


def test_tables_print_brackets_as_they_are(capfd):
    shape = {"runtime": "[r]", "batch_size": 1, "prompt_length": 2}
    figures = {"prefill_tokens_per_second": 1, "decode_tokens_per_second": 1, "time_to_first_token_seconds": 1}
    _show(
        BenchResult(
            ratios=[Ratio(against="a[bold]b", decode=2, prefill=3, **shape)],
            measurements=[Measurement(model="c[/]", step_seconds={"p50": 1}, **figures, **shape)],
            models=[Loaded(model=NAME, runtime="[r]", size_bytes=1, load_seconds=1, peak_memory_bytes=1)],
            config={},
            versions={},
            git_hash=None,
            machine={},
        )
    )
    out = capfd.readouterr().out
    assert all(text in out for text in ("a[bold]b", "c[/]", f"{NAME} in [r]", "2.000", "3.000"))


def test_a_lock_prints_names_with_brackets_as_they_are(cli, originals, tmp_path):
    model, data, out = tmp_path / "my[bold]model", tmp_path / "my[bold]corpus.txt", tmp_path / "my[red]lock"
    shutil.copytree(originals("qwen3"), model)
    data.write_bytes(b"".join(path.read_bytes() for path in sorted(Path(lockkit.__file__).parent.rglob("*.py"))))
    options = QUICK | {"data": data, "tokens": 512, "end_to_end_tokens": 0, "validation_tokens": 64}
    done = cli("lock", model, out, *command_line(options))
    assert done.code == 0, done.err
    assert "my[bold]model, locked" in done.out and f"wrote {out}" in done.out
    assert f"text: {data}" in done.err
    assert str(model) + "x" in cli("plan", f"{model}x").err


# --- JSON


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
