"""Validating settings, with errors that name the option to change."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lockkit.errors import UsageError

Config = TypeVar("Config", bound=BaseModel)


_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlevel = 100, 2


def shown(value: object) -> str:
    """A value from someone's file in one line of limited length, however large or nested it is."""
    return _repr.repr(value)


def option_of(field: str) -> str:
    """The command-line option of a field: `end_to_end_tokens` is `--end-to-end-tokens`."""
    return "--" + field.replace("_", "-")


def validated(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from values by field name.

    Raises:
        UsageError: naming the option that is unknown or out of range.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        # A recipe comes from a file: names and values are shown in one line, and not at any length. Nor is
        # pydantic's error kept, whose text repeats the values: YAML's aliases can make those endless.
        field = str(first["loc"][0]) if first["loc"] else ""
        if field not in config_class.model_fields:
            where = f"{shown(name)} in --config"
        elif name == field:
            where = option_of(field)
        else:  # one of a list: learning_rates is what --learning-rate, given several times, makes
            where = option_of(field).removesuffix("s")
        raise UsageError(f"{where}: {first['msg']}, not {shown(first['input'])}") from None
