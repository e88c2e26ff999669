"""Validating settings, with errors that name the option to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lockkit.errors import UsageError

Config = TypeVar("Config", bound=BaseModel)


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
        where = option_of(name) if name in config_class.model_fields else f"'{name}' in --config"
        raise UsageError(f"{where}: {first['msg']}, not {first['input']!r}") from error
