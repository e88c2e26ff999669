"""The parts of the pages that follow from the code.

A comment in a page, such as `<!-- generated: schema lockkit-verify-1 -->`, is replaced by what
`GENERATORS["schema"]("lockkit-verify-1")` returns, in Markdown. So no list of options, fields or attacks is written by
hand.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel

import lockkit
from lockkit.cli.app import make_app
from lockkit.lock.config import LockConfig
from lockkit.targets import LOCK_GATES, Precision, Provider

ROOT = Path(__file__).parents[1]
COMMON = {"help", "quiet", "verbose", "debug"}  # options of every command; the page explains them once
_GENERATED = re.compile(r"^<!-- generated: (\w+) ?(.*?) -->$", re.M)


def insert(markdown: str) -> str:
    """The text of a page with what is generated in it."""
    return _GENERATED.sub(lambda match: GENERATORS[match[1]](*match[2].split()), markdown)


def options(name: str) -> str:
    """The arguments and options of a command, as a list of definitions."""
    command = typer.main.get_command(make_app()).commands[name]  # type: ignore[attr-defined]
    texts = {}
    for parameter in command.params:
        if parameter.name in COMMON:
            continue
        option = parameter.param_type_name == "option"
        takes = "" if getattr(parameter, "is_flag", False) or not option else f" {parameter.metavar or ''}"
        title = (parameter.opts[0] + takes) if option else parameter.metavar or parameter.name.upper()
        texts[f"`{title.strip()}`"] = " ".join((parameter.help or "").split())
    return definitions(texts)


def commands() -> str:
    """Every command: its help, its options."""
    parts = []
    for name, command in typer.main.get_command(make_app()).commands.items():  # type: ignore[attr-defined]
        summary, *rest = (command.help or "").split("\n\n")
        text = "\n\n".join(_help_paragraph(paragraph) for paragraph in rest)
        parts.append(f"## {name}\n\n{' '.join(summary.split())}\n\n{text}\n\n{options(name)}")
    return "\n\n".join(parts)


def _help_paragraph(paragraph: str) -> str:
    """A paragraph of a command's help; after the mark \\b it is one of code."""
    if "\b" in paragraph:
        lines = [line.strip("\b") for line in paragraph.splitlines()]
        return "```bash\n" + "\n".join(re.sub("^    ", "", line) for line in lines if line.strip()) + "\n```"
    return " ".join(paragraph.split())


def gates() -> str:
    """The precisions: where each runs, and the default limits of `verify`."""
    names = list(Precision.fp32.row.gates)
    heads = ["precision", *(f"arithmetic on {provider}" for provider in Provider)]
    heads += [f"`--{name.replace('_', '-')}`" for name in names]
    rows = []
    for precision in Precision:
        arithmetic = [
            precision.row.arithmetic[provider].torch if provider in precision.row.arithmetic else "refused"
            for provider in Provider
        ]
        limits = ["off" if (limit := precision.row.limit(name)) is None else f"{limit:g}" for name in names]
        rows.append([f"`{precision}`", *arithmetic, *limits])
    lock = ", ".join(f"`--{name.replace('_', '-')}` {limit:g}" for name, limit in LOCK_GATES.items())
    return f"{table(heads, rows)}\n\nThe limits from the original to the lock are the same for all precisions: {lock}."


def settings() -> str:
    """The settings of a recipe."""
    texts = {}
    for name, field in LockConfig.model_fields.items():
        default = "" if field.default is None else f" Default: `{json.dumps(field.default)}`."
        texts[f"`{name}`"] = f"{field.description}{default}"
    return definitions(texts)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def definitions(texts: dict[str, str]) -> str:
    """A list of definitions in Markdown, which a phone shows better than a table. A text may be empty."""
    return "\n".join(f"{title}\n:   {text or '–'}\n" for title, text in texts.items())


def attacks() -> str:
    """Every attack, its idea and its source."""
    from lockkit.attack.registry import registry

    return definitions(
        {
            f"`{name}`{' (in `quick`)' if attack.in_quick else ''}": f"{attack.description} *{attack.reference}*"
            for name, attack in registry().items()
        }
    )


def families() -> str:
    """The families that can be locked."""
    from lockkit.models.families import FAMILIES

    return table(
        ["`model_type`", "class in transformers", "MLP"],
        [
            [f"`{family.model_type}`", f"`{family.model_class}`", "gated" if family.gated else "two layers"]
            for family in FAMILIES.values()
        ],
    )


def verbs() -> dict[str, list[str]]:
    """The names of the Python API by command, from lockkit's docstring."""
    rows = re.findall(r"^    (\w+) +(\w.*)$", lockkit.__doc__ or "", re.M)
    return {verb: names.split(", ") for verb, names in rows}


def api() -> str:
    """The Python API: one section per command."""
    parts = []
    for verb, names in verbs().items():
        parts.append(f"## {verb}")
        for name in names:
            found = getattr(lockkit, name)
            if isinstance(found, type) and issubclass(found, BaseModel):
                command = _command_of(verb, name)
                summary = (found.__doc__ or "").splitlines()[0]
                parts.append(
                    f"### {name}\n\n{summary} Its fields are the options of [`lockkit {command}`](cli.md#{command})."
                )
            else:
                parts.append(f"### {name}\n\n{documented('function', f'{found.__module__}.{found.__qualname__}')}")
    return "\n\n".join(parts)


def documented(kind: str, name: str) -> str:
    """What the docstring of a function or a class says, by Sphinx."""
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n```"


def _command_of(verb: str, name: str) -> str:
    """The command whose options are the fields of a config class."""
    return "verify" if name == "CheckConfig" else verb


def schema_models() -> dict[str, type[BaseModel]]:
    """The results that have a JSON schema, by the name of the schema."""
    from lockkit.attack.recipe import Recipe
    from lockkit.attack.record import Summary
    from lockkit.bench.run import BenchResult
    from lockkit.export.manifest import Manifest
    from lockkit.verify import VerifyResult

    models: list[type[BaseModel]] = [VerifyResult, BenchResult, Manifest, Summary, Recipe]
    return {model.model_fields["schema_version"].default.replace("/", "-"): model for model in models}


def schema_json(model: type[BaseModel]) -> str:
    """The JSON Schema of a result."""
    return json.dumps(model.model_json_schema(), indent=1)


def schema(name: str) -> str:
    """The fields of a result, and of the records in it; a link to its JSON Schema."""
    root = schema_models()[name].model_json_schema()
    parts = [f"As [JSON Schema](schemas/{name}.json).", _fields(root)]
    for title, record in root.get("$defs", {}).items():
        if record.get("properties"):
            parts.append(
                f"**{title}**: {' '.join(record.get('description', '').partition('Attributes:')[0].split())}\n\n{_fields(record)}"
            )
    return "\n\n".join(parts)


def _fields(record: dict[str, Any]) -> str:
    fields = record["properties"]
    # A meaning stands in the field's description, or in the docstring of its class.
    listed = dict(
        re.findall(r"^ +(\w+): (.+(?:\n {8}.+)*)", record.get("description", "").partition("Attributes:")[2], re.M)
    )
    listed["schema"] = listed.get("schema_version", "")
    meanings = {name: field.get("description") or listed.get(name, "") for name, field in fields.items()}
    if not any(meanings.values()):
        return table(["entry", "type"], [[f"`{name}`", _type(field)] for name, field in fields.items()])
    return definitions(
        {f"`{name}`: {_type(field)}": " ".join(meanings[name].split()) for name, field in fields.items()}
    )


def _type(field: dict[str, Any]) -> str:
    """The type of a field of a JSON Schema, in words."""
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"object of {_type(field['additionalProperties'])}"
    return field.get("type", "any")


def docstring(path: str) -> str:
    """The docstring of a file, without its first line."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[2]


def requests() -> str:
    """The fields of requests that the server supports, and those that it only accepts."""
    from lockkit.serve.protocol import ChatRequest, CompletionRequest

    fields: dict[str, dict[str, Any]] = {}
    places: dict[str, list[str]] = {}
    for place, model in (("completions", CompletionRequest), ("chat", ChatRequest)):
        for name, field in model.model_json_schema()["properties"].items():
            fields[name] = field
            places.setdefault(name, []).append(place)
    only = {name: field["enum"] for name, field in fields.items() if "enum" in field}
    supported = {
        f"`{name}`{'' if len(places[name]) == 2 else f' ({places[name][0]} only)'}": field.get("description")
        or _type(field)
        for name, field in fields.items()
        if name not in only
    }
    accepted = ", ".join(
        f"`{name}` ({' or '.join(json.dumps(value) for value in values if value is not None)})"
        for name, values in sorted(only.items())
    )
    return f"{definitions(supported)}\n\nAccepted only with a value that asks for nothing: {accepted}."


def glossary() -> str:
    """The words of reports and documentation."""
    from lockkit.report.glossary import TERMS

    return "\n".join(f"{term}\n:   {meaning}\n" for term, meaning in TERMS.items())


GENERATORS: dict[str, Callable[..., str]] = {
    "settings": settings,
    "commands": commands,
    "gates": gates,
    "attacks": attacks,
    "families": families,
    "api": api,
    "schema": schema,
    "docstring": docstring,
    "requests": requests,
    "documented": documented,
    "glossary": glossary,
}
