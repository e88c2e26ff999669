"""Config classes: the command-line option of each field, and validation whose errors name that option."""

from __future__ import annotations

import contextlib
import reprlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ValidationError

from lockkit.errors import UsageError

Config = TypeVar("Config", bound=BaseModel)

_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlevel = 100, 2


def _expanded(path: str) -> str:
    with contextlib.suppress(RuntimeError):  # there is no such user
        return str(Path(path).expanduser()) if path.startswith("~") else path
    return path


# A setting that can be a path. A leading `~` is the home folder, also where no shell replaces it, as in a recipe.
UserPath = Annotated[str, AfterValidator(_expanded)]


def shown(value: object) -> str:
    """A value from a user's file as one line of limited length, however large or nested the value is."""
    return _repr.repr(value)


def without_none(annotation: Any) -> Any:
    """The type of an optional setting without its None: `int | None` becomes `int`."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


def is_list(annotation: Any) -> bool:
    """Whether a setting holds several values. Its option may then be repeated."""
    return get_origin(without_none(annotation)) is list


def option_of(config_class: type[BaseModel], field: str) -> str:
    """The command-line option of a field.

    `end_to_end_tokens` becomes `--end-to-end-tokens`. A list takes one value per option, so its option is the
    singular: `batch_sizes` becomes `--batch-size`.
    """
    name = field.removesuffix("s") if is_list(config_class.model_fields[field].annotation) else field
    return "--" + name.replace("_", "-")


def validated(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from `values`, which maps field names to values.

    Raises:
        UsageError: a setting is unknown or out of range; the message names its option.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # Values may come from a recipe file, where YAML's aliases can make them huge. So the message is one line of
        # limited length, and pydantic's error, whose text repeats the values, is not kept as the cause.
        field = str(first["loc"][0]) if first["loc"] else ""
        if field in config_class.model_fields:
            where = option_of(config_class, field)
        else:
            where = f"{shown('.'.join(str(part) for part in first['loc']))} in --config"
        raise UsageError(f"{where}: {first['msg']}, not {shown(first['input'])}") from None
