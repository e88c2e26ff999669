"""From options to a configuration: one truth for defaults and ranges, the pydantic class."""

from __future__ import annotations

from typing import Any

from lockkit.settings import Config, validated


def config_from_options(config_class: type[Config], options: dict[str, Any]) -> Config:
    """Build a configuration; options that are None, or no field of it, are left out.

    Raises:
        UsageError: naming the option that is out of range.
    """
    given = {name: value for name, value in options.items() if name in config_class.model_fields and value is not None}
    return validated(config_class, given)
