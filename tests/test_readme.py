"""README.md is true where that is cheap to check: commands, options, links, Python names, floors."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

import lockkit
from lockkit.cli.app import make_app
from lockkit.models.families import FAMILIES
from lockkit.models.locked import render_modeling_file

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(make_app()).commands
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """The contents of all blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def command_lines() -> list[str]:
    """All calls of `lockkit` in shell blocks, without comments; lines that end with a backslash are joined."""
    lines = "".join(fenced("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"lockkit |torchrun .* -m lockkit ", line)]


@pytest.mark.parametrize("line", command_lines())
def test_every_command_exists_with_its_options(line):
    words = shlex.split(line, comments=True)
    name, *arguments = words[words.index("lockkit") + 1 :]
    command = COMMANDS[name]
    # Parsing checks option names, values and the number of arguments, and runs nothing.
    command.make_context(name, arguments)


def test_options_named_in_the_text_exist():
    known = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"`(--[a-z0-9-]+)", README))
    assert named - known - {"--help"} == {"--trust-remote-code"}  # named as an option that is gone


def test_links_and_paths_lead_to_files_of_the_repository():
    links = re.findall(r"\]\(([^)]+)\)", README)
    paths = re.findall(r"\b((?:lockkit|tests|tools|examples)/[\w./-]*\w)", README)
    assert len(links) > 10 and len(paths) > 10
    for path in {*links, *paths}:
        assert (ROOT / path).exists(), path


def test_python_names_exist_for_every_command():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.M)
    table = {command: re.findall(r"`(\w+)`", names) for command, names in rows}
    assert set(table) == set(COMMANDS)
    assert {name for names in table.values() for name in names} == set(lockkit.__all__) - {"__version__"}
    for statement in re.findall(r"^from lockkit import (.*)$", README, re.M):
        assert all(hasattr(lockkit, name) for name in statement.split(", "))


def test_the_floors_are_those_of_the_contract():
    (block,) = (block for block in fenced("") if block.startswith("cli"))
    floors: list[list[str]] = []
    for line in block.splitlines():
        mark, name = re.match(r"(\| )?(\w+) +\S", line).groups()
        if mark:
            floors[-1].append(name)
        else:
            floors.append([name])
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert floors == [layer.split(" | ") for layer in layers]


def test_the_size_of_the_code_in_a_locked_folder():
    (said,) = re.findall(r"modeling_dlr_lock\.py, in the folder: about (\d+) lines", README)
    for family in FAMILIES.values():
        assert len(render_modeling_file(family).splitlines()) == pytest.approx(int(said), rel=0.05)
