"""The sections of a report: one module of this package for each kind of result.

A module registers a function that turns a result into sections, by the `schema` of the result:

    @reports("lockkit-lock/2", place=1)
    def lock_sections(record: dict, path: Path) -> list[Section]: ...

To report on another kind of result, add a module. No other file changes. A function that is registered with
`@compares(schemas)` makes sections from all results of these schemas; they come first.
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
Compare = Callable[[list[tuple[dict, Path]]], list[Section]]
_comparisons: list[tuple[tuple[str, ...], Compare]] = []


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


def compares(*schemas: str) -> Callable[[Compare], Compare]:
    """Register a function that compares results, for reports with at least two results of these schemas."""

    def register(compare: Compare) -> Compare:
        _comparisons.append((schemas, compare))
        return compare

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
    known = builders()
    compared: list[Section] = []
    for schemas, compare in _comparisons:
        same = [(result, path) for result, path in results if result["schema"] in schemas]
        compared += compare(same) if len(same) > 1 else []
    built = [
        (build(result, path), path)
        for schema, build in known.items()
        for result, path in results
        if result["schema"] == schema
    ]
    heads = [(own[0], path) for own, path in built if own]
    for (head, _), title in zip(heads, told_apart([(head.title, path) for head, path in heads]), strict=True):
        head.title = title
    return compared + [section for own, _ in built for section in own]


def told_apart(names: list[tuple[str, Path]]) -> list[str]:
    """Names of results; where several are the same, each with the folder of its file, or with the file.

    Args:
        names: each with the file of its result.
    """
    told = []
    for name, path in names:
        same = [other for known, other in names if known == name]
        if len({other.parent for other in same}) == len(same):
            path, same = path.parent, [other.parent for other in same]
        told.append(name if len(same) == 1 else f"{name} ({_end(path, same)})")
    return told


def _end(path: Path, others: list[Path]) -> str:
    """The last parts of a path, as many as tell it apart from `others`: a page should not show where folders are."""
    for count in range(1, len(path.parts)):
        ends = ["/".join(other.parts[-count:]) for other in others]
        if len(set(ends)) == len(set(others)):
            return "/".join(path.parts[-count:])
    return str(path)
