"""Config classes: which option of the command line a field is, and validation whose errors name it."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lockkit.errors import UsageError

Config = TypeVar("Config", bound=BaseModel)


_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlevel = 100, 2


def shown(value: object) -> str:
    """A value from someone's file in one line of limited length, however large or nested it is."""
    return _repr.repr(value)


def without_none(annotation: Any) -> Any:
    """The type of a setting that may be left out: `int | None` is `int`."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


def is_list(annotation: Any) -> bool:
    """Whether a setting has several values; on the command line its option is repeated."""
    return get_origin(without_none(annotation)) is list


def option_of(config_class: type[BaseModel], field: str) -> str:
    """The command-line option of a field.

    `end_to_end_tokens` is `--end-to-end-tokens`. A list takes one value per option, so its option is the
    singular: `batch_sizes` is `--batch-size`.
    """
    name = field.removesuffix("s") if is_list(config_class.model_fields[field].annotation) else field
    return "--" + name.replace("_", "-")


def validated(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from values by field name.

    Raises:
        UsageError: naming the option that is unknown or out of range.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # A recipe comes from a file: names and values are shown in one line, and not at any length. Nor is
        # pydantic's error kept, whose text repeats the values: YAML's aliases can make those endless.
        field = str(first["loc"][0]) if first["loc"] else ""
        if field in config_class.model_fields:
            where = option_of(config_class, field)
        else:
            where = f"{shown('.'.join(str(part) for part in first['loc']))} in --config"
        raise UsageError(f"{where}: {first['msg']}, not {shown(first['input'])}") from None
