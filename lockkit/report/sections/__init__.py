"""Sections of a report: one module of this package for each kind of result.

A module registers the function that makes its sections, by the `schema` of the results it is for:

    @reports("lockkit-lock/2", place=1)
    def lock_sections(record: dict, path: Path) -> list[Section]: ...

That file is all it takes to report on another kind of result.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from lockkit.report.page import Section

# From a result (a JSON object) and the file it was read from.
Build = Callable[[dict, Path], list[Section]]
_registered: dict[str, tuple[int, Build]] = {}


def reports(schema: str, place: int) -> Callable[[Build], Build]:
    """Register a function as the one that makes the sections of results whose `schema` this is.

    Args:
        place: position of this kind of result in a report, ascending.

    Raises:
        ValueError: the schema or the place is taken.
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
    """The sections of all results, each a JSON object and its file, by kind.

    Raises:
        UsageError: a file that belongs to a result is broken.
    """
    return [
        section
        for schema, build in builders().items()
        for result, path in results
        if result["schema"] == schema
        for section in build(result, path)
    ]
