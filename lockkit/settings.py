"""Config classes: the command-line option of each field, and validation whose errors name that option."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin, runtime_checkable

from pydantic import AfterValidator, BaseModel, ValidationError

from lockkit.errors import UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails, InitErrorDetails

Config = TypeVar("Config", bound=BaseModel)

_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlevel = 100, 2


def expanded(path: str) -> str:
    """A path with the home folder in place of a leading `~`, unless there is no such user."""
    with contextlib.suppress(RuntimeError):  # there is no such user
        return str(Path(path).expanduser()) if path.startswith("~") else path
    return path


# A setting that can be a path. A leading `~` is the home folder, also where no shell replaces it, as in a recipe.
UserPath = Annotated[str, AfterValidator(expanded)]


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


def validated(
    config_class: type[Config], values: Mapping[str, Any], recipe: Path | None = None, from_recipe: Collection[str] = ()
) -> Config:
    """Build a configuration from `values`, which maps field names to values.

    Args:
        config_class: its class.
        values: the values.
        recipe: the file that gave some of them, for the error.
        from_recipe: the names of those.

    Raises:
        UsageError: a setting is unknown or out of range; the message names its option.
    """
    try:
        for name, value in values.items():
            if name in config_class.model_fields:
                _check_no_truth_value(config_class, name, value)
        return config_class(**values)
    except ValidationError as error:
        # Values may come from a recipe file, where YAML's aliases can make them huge. So the message is one line of
        # limited length, and pydantic's error, whose text repeats the values, is not kept as the cause.
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        origin = f" in {recipe}" if recipe and field in from_recipe else ""
        if field not in config_class.model_fields:
            close = difflib.get_close_matches(field, config_class.model_fields, 1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise UsageError(f"unknown setting {shown(field)}{origin or ' in the configuration'}{hint}") from None
        same = [other for other in error.errors() if other["loc"][:1] == first["loc"][:1]]
        raise UsageError(
            f"{option_of(config_class, field)}: {plain_words(same)}, not {shown(first['input'])}{origin}"
        ) from None


@runtime_checkable
class MayBeUnused(Protocol):
    """A configuration some of whose settings have no effect beside others."""

    def unused(self) -> Mapping[str, str]:
        """Why settings have no effect here, by field: the end of a sentence that names the option to change."""


def refuse_unused(config: BaseModel, given: Collection[str]) -> None:
    """Check that every setting in `given`, which a user gave, has an effect.

    Raises:
        UsageError: one has none; the message names its option and the reason.
    """
    reasons = config.unused() if isinstance(config, MayBeUnused) else {}
    for name, reason in reasons.items():
        if name in given:
            raise UsageError(f"{option_of(type(config), name)} has no effect {reason}")


def _check_no_truth_value(config_class: type[BaseModel], name: str, value: object) -> None:
    """Refuse YAML's `true`, `yes` and `on` where a number is expected: pydantic takes them for 1."""
    kind = without_none(config_class.model_fields[name].annotation)
    values = value if is_list(kind) and isinstance(value, list) else [value]
    kind = without_none(get_args(kind)[0]) if is_list(kind) else kind
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if kind in (int, float) and any(isinstance(one, bool) for one in values):
        details: list[InitErrorDetails] = [{"type": f"{kind.__name__}_type", "loc": (name,), "input": value}]
        raise ValidationError.from_exception_data(config_class.__name__, details)


# Kinds of values, by the beginning of pydantic's names for errors.
_KINDS = {
    "int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false", "string": "text",
    "list": "a list", "dict": "an object", "mapping": "an object", "model": "an object", "none": "null", "path": "a path",
}  # fmt: skip
_LIMITS = {
    "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}", "less_than_equal": "at most {le}",
    "less_than": "less than {lt}", "literal_error": "{expected}", "enum": "{expected}",
}  # fmt: skip
_OTHERS = {
    "too_short": "must have at least {min_length} value", "too_long": "must have at most {max_length} values",
    "string_too_short": "must have at least {min_length} characters", "extra_forbidden": "is unknown",
    "string_too_long": "must have at most {max_length} characters", "missing": "is missing", "value_error": "{error}",
}  # fmt: skip


def plain_words(errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with one value, such as `must be a whole number or text`.

    Args:
        errors: pydantic's errors of this value: one, or one for each type that it may have.
    """
    choices, others = [], []
    for error in errors:
        kind, context = error["type"], {name: _round(value) for name, value in error.get("ctx", {}).items()}
        if kind in _LIMITS:
            choices.append(_LIMITS[kind].format(**context))
        elif kind in _OTHERS:
            others.append(_OTHERS[kind].format(**context))
        elif kind.split("_")[0] in _KINDS and kind.endswith(
            ("_type", "_parsing", "_size", "_float", "_number", "_required")
        ):
            choices.append(_KINDS[kind.split("_")[0]])
        else:
            others.append(error["msg"].replace("Input should be", "must be"))
    *most, last = dict.fromkeys(choices) or [""]
    return f"must be {' or '.join(filter(None, [', '.join(most), last]))}" if choices else others[0]


def _round(limit: object) -> object:
    """A limit as a user writes it: 0, not 0.0."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit
