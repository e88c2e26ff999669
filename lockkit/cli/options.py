"""Turns a plain function into a Typer command, with one option for every field of a config class.

A setting is written once, as a pydantic field: its name, type, default and description make the option.
A command takes the class in one of two forms:

    def bench(export: ..., config: BenchConfig): ...     # the validated configuration
    def lock(model: ..., given: Given[LockConfig]): ...  # only the options on the command line, by field name, for a
                                                         # class that other sources (a recipe, a suite) also fill

All other parameters are declared as usual in Typer.

An option whose values are listed completes them in the shell.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.models import OptionInfo

from lockkit.settings import Config, expanded, is_list, option_of, refuse_unused, validated, without_none

_REPEATED = " May be repeated."


class Given(dict[str, Any], Generic[Config]):
    """The options of a config class that are on the command line: values by field name."""


def typer_command(command: Callable[..., None], common: Callable[..., None] | None = None) -> Callable[..., None]:
    """Wrap a command in a function whose signature Typer can read.

    The wrapper collects the options of a config class, builds the configuration and calls the command. It raises
    `UsageError`, which names the option, when a value is out of range.

    Args:
        command: the command.
        common: a function whose options every command has; called first.
    """
    hints = get_type_hints(command, include_extras=True)
    configs = {name: config for name, hint in hints.items() if (config := config_class_of(hint))}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in configs:
            parameters += _options(configs[name])
        elif name in hints:
            annotation = _with_metavar(hints[name])
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
    shared = _parameters_of(common) if common else []
    parameters += shared

    @functools.wraps(command)
    def run(**values: Any) -> None:
        if common:
            common(**{parameter.name: values.pop(parameter.name) for parameter in shared})
        # A shell expands `~` in most places, but not in `--out=~/folder` or in quotes.
        values = {
            name: Path(expanded(str(value))) if isinstance(value, Path) else value for name, value in values.items()
        }
        for name, config in configs.items():
            options = {field: values.pop(field) for field in config.model_fields}
            given: Given[Any] = Given({field: value for field, value in options.items() if value not in (None, [])})
            values[name] = given if get_origin(hints[name]) is Given else _configuration(config, given)
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _configuration(config_class: type[Config], given: Given[Any]) -> Config:
    """The configuration of a command whose options all count."""
    config = validated(config_class, given)
    refuse_unused(config, given)
    return config


def _parameters_of(function: Callable[..., None]) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
    ]


def config_class_of(hint: Any) -> type[BaseModel] | None:
    """The config class in the annotation of a command's parameter; None if there is none."""
    hint = get_args(hint)[0] if get_origin(hint) is Given else hint
    return hint if inspect.isclass(hint) and issubclass(hint, BaseModel) else None


def _options(config_class: type[BaseModel]) -> Iterator[inspect.Parameter]:
    """One parameter per field. Its default, None, means that the option is not on the command line."""
    for name, field in config_class.model_fields.items():
        option = typer.Option(
            option_of(config_class, name),
            help=_help(field),
            metavar=_metavar(field.annotation),
            autocompletion=_completion(field.annotation),
        )
        annotation: Any = Annotated[_value_type(field.annotation) | None, option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo) -> str:
    """The field's description, then its default unless that is None, False or an empty list."""
    text = f"{field.description}{_REPEATED if is_list(field.annotation) else ''}"
    default = None if field.is_required() else field.default
    if default in (None, []) or default is False:
        return text
    values = default if isinstance(default, list) else [default]
    return f"{text} [default: {', '.join(map(str, values))}]"


def _with_metavar(hint: Any) -> Any:
    """Give an option that a command declares itself the same metavar and help as those of a config class."""
    if get_origin(hint) is not Annotated:
        return hint
    annotation, info = get_args(hint)
    if isinstance(info, OptionInfo):
        info = copy.copy(info)
        info.metavar = info.metavar or _metavar(annotation)
        info.help = f"{info.help}{_REPEATED if is_list(annotation) else ''}"
    return Annotated[annotation, info]


def _value_type(annotation: Any) -> Any:
    """The type that Typer converts an argument to. pydantic, not Typer, checks the choices of a literal or an enum."""
    annotation = without_none(annotation)
    if get_origin(annotation) is Annotated:
        return _value_type(get_args(annotation)[0])
    if is_list(annotation):
        return types.GenericAlias(list, (_value_type(get_args(annotation)[0]),))
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0])
    return str if issubclass(annotation, enum.Enum) else annotation


def _choices(annotation: Any) -> list[str]:
    """The values that an option may have, if they are listed; else an empty list."""
    annotation = without_none(annotation)
    if is_list(annotation):
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return [str(choice.value) for choice in annotation]
    return []


def _completion(annotation: Any) -> Callable[[str], list[str]] | None:
    """A function that completes the beginning of a value for the shell; None where values are not listed."""
    choices = _choices(annotation)
    return (lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]) if choices else None


def _metavar(annotation: Any) -> str:
    """The placeholder of an option's value in the help: `<int>`, `<cpu|cuda>`."""
    annotation = without_none(annotation)
    if is_list(annotation):
        return _metavar(get_args(annotation)[0])
    return f"<{'|'.join(_choices(annotation)) or _value_type(annotation).__name__.lower()}>"
