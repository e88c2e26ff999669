"""The sections of a report: one module of this package for each kind of result.

A module registers a function that turns a result into sections, by the `schema` of the result:

    @reports("lockkit-lock/2", place=1)
    def lock_sections(record: dict, path: Path) -> list[Section]: ...

To report on another kind of result, add a module. No other file changes.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from lockkit.report.page import Section

# Arguments: a result (a JSON object), and the file it was read from.
Build = Callable[[dict, Path], list[Section]]
_registered: dict[str, tuple[int, Build]] = {}


def reports(schema: str, place: int) -> Callable[[Build], Build]:
    """Register a function that makes the sections of one kind of result.

    Args:
        schema: the entry `schema` of these results.
        place: position of this kind of result in a report; lower places come first.

    Raises:
        ValueError: another module has registered the schema or the place.
    """

    def register(build: Build) -> Build:
        if schema in _registered or place in [taken for taken, _ in _registered.values()]:
            raise ValueError(f"another module reports on {schema}, or has place {place}")
        _registered[schema] = place, build
        return build

    return register


@functools.cache
def builders() -> dict[str, Build]:
    """All registered functions by schema, in the order of their places."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {schema: build for schema, (_, build) in sorted(_registered.items(), key=lambda item: item[1][0])}


def sections(results: list[tuple[dict, Path]]) -> list[Section]:
    """The sections of all results, grouped by kind.

    Args:
        results: JSON objects and their files.

    Raises:
        UsageError: another file that belongs to a result is broken.
    """
    return [
        section
        for schema, build in builders().items()
        for result, path in results
        if result["schema"] == schema
        for section in build(result, path)
    ]
