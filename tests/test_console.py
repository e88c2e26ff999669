"""Terminals, pipes and locales as users have them: every command works, and results are written before they are printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import COMMANDS

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
