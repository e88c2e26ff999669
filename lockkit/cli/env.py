"""`lockkit env`: the facts that a bug report needs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lockkit.cli.console import console


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show versions, devices and conflicting packages.

    Each execution provider of onnxruntime is started, to show that it works.

    Examples:

    \b
        lockkit env
        lockkit env --json
    """
    from lockkit.environment import describe_environment

    found = describe_environment()
    if as_json:
        typer.echo(json.dumps(found.record(), indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("system", f"{found.system}, {found.cpu_count} cores, {found.memory_bytes / 2**30:.0f} GiB")
    table.add_row("versions", "\n".join(f"{name} {version}" for name, version in found.versions.items()))
    table.add_row("commit", found.git_hash or "not a checkout")
    table.add_row("torch", "\n".join(found.torch_devices))
    table.add_row("onnxruntime", "\n".join(found.onnxruntime_providers) or "none")
    table.add_row("problems", "\n".join(found.problems) or "none found")
    console.print(table)
