"""Terminals, pipes and locales as users have them: every command works, and results are written before they are printed."""

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
from test_cli import COMMANDS

import lockkit
from lockkit.bench.run import BenchResult, Loaded, Measurement, Ratio
from lockkit.cli.bench import _show
from lockkit.cli.console import TerminalProgress, console, duration, figures_table, on_the_point
from lockkit.export import export_model
from lockkit.generate import GenerateConfig, open_model
from lockkit.generate import generate as generate_text

# Runs several commands in one process. Prints the exit codes to standard error.
PROGRAM = """
import json, sys
from lockkit.cli.app import main
codes = []
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        codes.append(stop.code)
print(json.dumps(codes), file=sys.stderr)
"""
DOCS = Path(__file__).parents[1] / "docs"
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SHORT = ("--tokens", "64", "--block-tokens", "16", "--prompts", "1", "--new-tokens", "2", "--data", DOCS)


@pytest.fixture(scope="module")
def original(originals):
    return originals("llama")


@pytest.fixture(scope="module")
def export(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "onnx"
    export_model(str(original), out)
    return out


def run(*commands: tuple[object, ...], env: dict[str, str] | None = None, **options) -> tuple[list[int], bytes]:
    """The exit codes of several commands of the program, and what they print."""
    lines = json.dumps([[str(part) for part in command] for command in commands], ensure_ascii=False)
    options = {"stdout": subprocess.PIPE} | options
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, lines],
        stderr=subprocess.PIPE, env=os.environ | (env or {}), check=False, **options,
    )  # fmt: skip
    last = done.stderr.decode(errors="replace").splitlines()[-1]
    assert last.startswith("["), done.stderr.decode(errors="replace")
    return json.loads(last), done.stdout


def verify(export, original, out, *options: object) -> tuple[object, ...]:
    return ("verify", export, "--reference", original, "--json", out, *SHORT, *options)


@pytest.mark.parametrize(
    ("encoding", "env"),
    [("cp1252", {"PYTHONIOENCODING": "cp1252"}), ("ascii", C_LOCALE)],
)
def test_every_command_prints_in_any_encoding(original, export, tmp_path, encoding, env):
    one_round = ("--rounds", "1", "--prompt-length", "4", "--new-tokens", "2", "--runtime", "onnxruntime")
    codes, printed = run(
        *((command, "--help") for command in COMMANDS),
        ("plan", "demo"),
        ("attack", "--list"),
        ("generate", export, "--prompt", "日本 é", "--max-new-tokens", "64"),
        verify(export, original, tmp_path / "verify.json"),
        ("bench", export, "--json", tmp_path / "bench.json", *one_round),
        ("plan", "größe\udcff"),
        env=env,
    )
    assert codes == [0] * (len(COMMANDS) + 5) + [2]
    text = printed.decode(encoding)
    assert "<= " in text and ">= " in text and "passed" in text
    assert "\u2501" not in text and "+---" in text  # tables in ASCII
    assert json.loads((tmp_path / "verify.json").read_text())["passed"]
    assert (tmp_path / "bench.json").is_file()


def test_in_an_ascii_locale_a_prompt_is_utf_8(export):
    """As an argument, and on standard input with a byte-order mark."""
    words = "größe = '日本'"
    expected = generate_text(open_model(str(export)), words, GenerateConfig(max_new_tokens=8)).text
    commands = [("generate", export, "--max-new-tokens", "8", "--prompt", prompt) for prompt in (words, "-")]
    codes, printed = run(*commands, env=C_LOCALE, input=words.encode("utf-8-sig"))
    assert codes == [0, 0]
    assert printed.decode("ascii") == 2 * (expected.encode("ascii", "replace").decode() + "\n")


def test_a_prompt_that_is_not_text_is_one_plain_line(export):
    for prompt, given in (("b\udcff", b""), ("-", b"\xff")):
        command = [sys.executable, "-m", "lockkit", "generate", export, "--prompt", prompt]
        done = subprocess.run(command, input=given, capture_output=True, check=False)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"change --prompt" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_printed_is_written(original, export, tmp_path):
    with Path("/dev/full").open("wb") as full:
        codes, _ = run(verify(export, original, tmp_path / "verify.json"), stdout=full)
        done = subprocess.run(
            [sys.executable, "-m", "lockkit", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert codes == [2]
    assert json.loads((tmp_path / "verify.json").read_text())["passed"]
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"standard output" in done.stderr


def test_a_reader_that_leaves_early_changes_no_result(original, export, tmp_path):
    """As in `lockkit ... | head -1`. The exit code is that of the work, so a failed gate stays a failed gate."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        codes = [
            *run(verify(export, original, tmp_path / "failed.json", "--max-perplexity-ratio", "0.5"), stdout=writer)[0],
            *run(("generate", export, "--max-new-tokens", "200"), stdout=writer)[0],
        ]
        command = [sys.executable, "-m", "lockkit", "export", original, tmp_path / "onnx"]
        quiet = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    finally:
        os.close(writer)
    assert codes == [1, 0] and (tmp_path / "failed.json").is_file()
    assert quiet.returncode == 0 and (tmp_path / "onnx" / "lockkit_manifest.json").is_file()


# A user's text, with brackets and colons that mean something to Rich.
NAME = "my[bold]model[/bold] :smile: [attack]"


def test_decimal_points_stand_below_each_other():
    assert on_the_point(["1.5", "12.25", "", "3", "–"]) == [" 1.5 ", "12.25", "     ", " 3   ", "    –"]
    rows = [("a[b]", "1,234.5", "29 min"), ("longer", "0.25", "3 h")]
    with console.capture() as capture:
        console.print(figures_table("title", ("name", "kB\nper token", "time"), rows))
    first, second = capture.get().splitlines()[-3:-1]
    assert first.index(".") == second.index(".") and "a[b]" in first


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
    assert all(text in out for text in ("a[bold]b", "c[/]", NAME[:20], "2.000", "3.000"))


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


@pytest.mark.parametrize("ci", ["", "true"])  # transformers hands its records to the root logger where CI is set
def test_verbose_output_has_each_configuration_once(originals, ci):
    command = [sys.executable, "-m", "lockkit", "generate", originals("llama"), "--max-new-tokens", "1", "-v"]
    done = subprocess.run(command, env=os.environ | {"CI": ci}, capture_output=True, text=True, check=True)
    assert done.stderr.count("Model config LlamaConfig") == 1
