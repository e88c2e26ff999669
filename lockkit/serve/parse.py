"""The body of a request: bytes to a checked request, or one line that says what is wrong.

Python's JSON parser accepts a field that appears twice and half of a surrogate pair. These are refused here. NaN
and infinity are refused like other numbers that a field cannot have. A message never quotes a value, which may be a
part of a prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from lockkit.serve.protocol import ApiError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_Request = TypeVar("_Request", bound=BaseModel)
_NAME_CHARACTERS = 64  # of a field's name in a message
_JSON_TYPES = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
# Pydantic's class of error -> what is wrong, after the field's name. The fields in braces are pydantic's.
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a field that this server supports",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
    "literal_error": "must be {expected}: other values are not supported",
}


def parse_request(kind: type[_Request], body: bytes) -> _Request:
    """Parse and check the body of a request.

    Args:
        kind: the class of the request.
        body: its bytes.

    Raises:
        ApiError: the body is not JSON, or not such a request.
    """
    fields = _parse_json(body)
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body must be an object, not {_JSON_TYPES.get(type(fields), 'a number')}")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _path(first["loc"])
        raise ApiError(400, f"{param} {_words(first)}", param, first["type"]) from None


def _words(error: ErrorDetails) -> str:
    words = _WORDS.get(error["type"])
    if words is None:
        return error["msg"]
    limits = {name: _plain_number(value) for name, value in error.get("ctx", {}).items()}
    return words.format_map(limits)


def _plain_number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(place: tuple[int | str, ...]) -> str:
    """The place of a field, as a program would write it: `messages[0].role`."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step.isascii():
            path += f".{_cut(step)}"
        else:
            path += f"[{_cut(step)!r}]" if path else repr(_cut(step))
    return path.removeprefix(".")


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else name[:_NAME_CHARACTERS] + "..."


def _parse_json(body: bytes) -> Any:
    if not body.strip():
        raise _not_json("the body is empty: send a JSON object")
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise _not_json("the body is not JSON: it is not valid UTF-8") from None
    except UnicodeEncodeError:
        raise _not_json("the body has half of a surrogate pair, which is not a character") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"the body is not valid JSON: see line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _not_json("the body is nested too deeply") from None
    except ValueError:
        raise _not_json("the body has a number with too many digits") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _not_json(f"the body has the field {_cut(twice)!r} more than once")
    return fields


def _not_json(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
