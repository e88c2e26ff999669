"""README and docs are true where that can be checked: commands, options, paths, messages, names, floors.

test_readme.py runs what they type. Links between pages, with their anchors, are checked by `make docs`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml

import lockkit
from lockkit.cli.app import make_app
from lockkit.lock.config import make_config
from lockkit.serve.protocol import CompletionRequest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))  # not the first: conf.py is there
from generated import COMMON, insert, verbs  # noqa: E402

COMMANDS = typer.main.get_command(make_app()).commands
TYPED = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in [
        *TYPED,
        "SECURITY.md",
        "CHANGELOG.md",
        *(f"examples/{name}/README.md" for name in ("ci", "lm_eval", "real", "serving")),
    ]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def fenced(text: str, language: str) -> list[str]:
    """The contents of all blocks of code in this language."""
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def shell_lines(text: str) -> list[str]:
    """All lines of shell blocks; lines that end with a backslash are joined."""
    return [line for line in "".join(fenced(text, "bash")).replace("\\\n", " ").splitlines() if line.strip()]


LINES = [(name, line) for name, text in PAGES.items() for line in shell_lines(text)]


def lockkit_words(line: str) -> list[str] | None:
    """The words after `lockkit` in a line that calls it."""
    words = shlex.split(line, comments=True)
    return words[words.index("lockkit") + 1 :] if re.match(r"lockkit |torchrun .* -m lockkit ", line) else None


@pytest.mark.parametrize(("name", "line"), LINES)
def test_every_typed_line_exists_as_typed(name, line):
    """A program that this test does not know fails it, so that no line goes unchecked."""
    words = shlex.split(line, comments=True)
    arguments = lockkit_words(line)
    if arguments:
        # Parsing checks option names, values and the number of arguments, and runs nothing.
        COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[:2] == ["pip", "install"]:
        for extra in "".join(re.findall(r"^\.\[(.*)\]$", words[2])).split(","):
            assert not extra or extra in PROJECT["project"]["optional-dependencies"]
    elif words[0] == "curl":
        request = json.loads(words[words.index("-d") + 1])
        assert CompletionRequest.model_validate(request).prompt
    elif words[0] in ("sbatch", "python"):
        assert (ROOT / words[1]).is_file()
    elif name == "examples/lm_eval/README.md":  # tests/consumers/evaluate_with_lm_eval.py does the same
        tasks = words[words.index("--tasks") + 1] if "--tasks" in words else "."
        assert words[0] in ("lm-eval", "cp", "sed") and (ROOT / "examples/lm_eval" / tasks).exists()
    else:
        assert words[0] == "openssl"  # test_readme.py runs it


@pytest.mark.parametrize("name", PAGES)
def test_commands_options_tools_and_paths_in_the_text_exist(name):
    text = PAGES[name]
    known = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    known |= {
        "--help",
        "--version",
        "--install-completion",
        "--trust-remote-code",
    }  # the last is named as an option that is gone
    assert set(re.findall(r"`(--[a-z0-9-]+)", text)) <= known
    for inline in re.findall(r"`lockkit ([a-z][^`]*)`", text):
        command, *words = inline.split()
        options = {option for parameter in COMMANDS[command].params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= options, inline
    for tool, options in re.findall(r"`python (tools/\w+\.py)([^`]*)`", text):
        assert all(option in (ROOT / tool).read_text() for option in re.findall(r"--[\w-]+", options)), tool
    paths = re.findall(r"(?<![\w/:-])((?:lockkit|tests|tools|examples|docs|\.ci)/[\w./-]*\w)", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    for path in [*(ROOT / path for path in paths), *(ROOT / Path(name).parent / link for link in links)]:
        assert path.exists(), path


def test_the_recipe_is_valid(tmp_path):
    (block,) = fenced(PAGES["docs/recipes.md"], "yaml")
    (tmp_path / "recipe.yaml").write_text(block)
    assert make_config(tmp_path / "recipe.yaml").data == "corpus.txt"


def test_generated_parts_leave_nothing_out():
    pages = {name: insert(text) for name, text in PAGES.items()}
    assert not any(re.search("^<!-- generated:", text, re.M) for text in pages.values())
    for name, command in COMMANDS.items():
        section = pages["docs/cli.md"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        options = {parameter.opts[0] for parameter in command.params if parameter.name not in COMMON}
        assert set(re.findall(r"^`(--[\w-]+)", section, re.M)) == {
            option for option in options if option.startswith("-")
        }
    sections = set(re.findall(r"^### (\w+)$", pages["docs/api.md"], re.M))
    assert sections == set(lockkit.__all__) - {"__version__"} and set(verbs()) == set(COMMANDS)


def test_quoted_messages_are_those_of_the_code():
    code = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "lockkit").rglob("*.py")))
    code = re.sub(r'"\s*f?"', "", code)  # parts of one message on several lines
    quoted = re.findall(
        r"`([^`\n]+)`", "\n".join(re.findall(r"^(?!:)(.+)\n: ", PAGES["docs/troubleshooting.md"], re.M))
    )
    assert len(quoted) > 15
    for message in quoted:
        for part in message.split(" ... "):
            assert part in code, message


def test_version_in_changelog_and_citation():
    assert f"\n## {lockkit.__version__}" in PAGES["CHANGELOG.md"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lockkit.__version__ and citation["license"] == PROJECT["project"]["license"]


def test_the_floors_are_those_of_the_contract():
    (block,) = (block for block in fenced(PAGES["docs/contributing.md"], "") if block.startswith("cli"))
    floors: list[list[str]] = []
    for line in block.splitlines():
        mark, name = re.match(r"(\| )?(\w+) +\S", line).groups()
        if mark:
            floors[-1].append(name)
        else:
            floors.append([name])
    (layers,) = (
        contract["layers"] for contract in PROJECT["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"
    )
    assert floors == [layer.split(" | ") for layer in layers]
