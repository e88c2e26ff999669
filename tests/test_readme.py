"""README is short, in order, and works: what it and docs type is run, with tiny models."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess

import pytest
from conftest import QUICK, command_line
from test_attack import SMALL
from test_docs import PAGES, TYPED, fenced, lockkit_words, shell_lines

from lockkit.models.families import FAMILIES
from lockkit.models.locked import render_modeling_file
from lockkit.text import stdlib_documents
from lockkit.verify import VerifyConfig

README = PAGES["README.md"]
# Run in every page; in README also lock and attack, with little training. test_kernel.py, test_bench.py and the tests
# of the server run the others.
QUICK_COMMANDS = {"plan", "export", "verify", "generate", "card", "sign", "web", "push", "report", "env"}
LITTLE = QUICK | {"data": "corpus.txt", "tokens": 1_024, "end_to_end_tokens": 0, "validation_tokens": 128}
ADDED = {
    "lock": ["--overwrite", *command_line(LITTLE)],
    "export": ["--overwrite"],
    "verify": [
        "--tokens=512",
        "--block-tokens=64",
        "--prompts=1",
        "--new-tokens=4",
        "--min-top1=0.8",
        "--max-perplexity-ratio=1.2",
    ],
    "attack": [
        "--attack=full-ft",
        "--attack=corrected-stack",
        "--task=corpus.txt",
        "--data=corpus.txt",
        *(f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()),
    ],
    "push": ["--dry-run"],
    "web": ["--overwrite"],
}
IN_PYTHON = {
    "LockConfig(depth=32)": "LockConfig(**LITTLE), overwrite=True",
    'precision="int8")': 'precision="int8"), overwrite=True',
    '["demo", "locked"]': '["my-model", "locked"], VerifyConfig(tokens=512, block_tokens=64, prompts=1)',
    '"demo"': '"my-model"',
}


def test_readme_is_one_page_in_order():
    assert len(README.encode()) <= 9_000
    assert re.findall(r"^## (.*)$", README, re.M) == [
        "Is this for me?", "Install", "Quickstart", "Your own model", "Publish", "Run it", "Verify in CI", "Links",
    ]  # fmt: skip


def test_what_is_typed_runs(originals, cli, tmp_path, monkeypatch):
    """README from top to bottom, then the quick lines of docs. A tiny model stands for `demo` and for your own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(originals("qwen3"))
    (tmp_path / "corpus.txt").write_text(
        "\n\n".join(document.text for document in itertools.islice(stdlib_documents(), 12))
    )
    for line in shell_lines(PAGES["docs/publishing.md"]):
        if line.startswith("openssl"):
            subprocess.run(shlex.split(line), check=True, capture_output=True)
    ran = set()  # since the last change of a folder
    for name in TYPED:
        for line in shell_lines(PAGES[name]):
            words = ["my-model" if word == "demo" else word.removeprefix("./") for word in lockkit_words(line) or [""]]
            in_readme = name == "README.md"
            if words[0] not in QUICK_COMMANDS | ({"lock", "attack"} if in_readme else set()):
                continue
            if words[0] != "verify" or "--reference" in words:  # a signature alone is verified without options
                words += [option for option in ADDED.get(words[0], []) if option.split("=")[0] not in words]
            if in_readme or tuple(words) not in ran:
                done = cli(*words)
                assert done.code == 0, f"{name}: {line}\n{done.err}"
                ran = {tuple(words)} | (set() if words[0] in ("lock", "export") else ran)
        for block in fenced(PAGES[name], "python"):
            for typed, little in IN_PYTHON.items():
                block = block.replace(typed, little)
            exec(block, {"LITTLE": LITTLE, "VerifyConfig": VerifyConfig})


def test_the_size_of_the_code_in_a_locked_folder():
    (said,) = re.findall(r"modeling_dlr_lock\.py, in the folder: about (\d+) lines", README)
    for family in FAMILIES.values():
        assert len(render_modeling_file(family).splitlines()) == pytest.approx(int(said), rel=0.05)
