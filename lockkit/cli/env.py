"""`lockkit env`: the facts that a bug report needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lockkit.cli.console import console
from lockkit.cli.json_file import check_json, json_option, write_figures

if TYPE_CHECKING:
    from lockkit.environment import Environment


def env(json: Annotated[Path | None, json_option("lockkit-environment/1")] = None) -> None:
    """Show versions, devices, what is missing and what conflicts.

    Each execution provider of onnxruntime is started, to show that it works.

    Examples:

    \b
        lockkit env
        lockkit env --json -
    """
    check_json(json)
    from lockkit.environment import describe_environment

    found = describe_environment(_operator())
    if write_figures(json, found.record()):
        _show(found)


def _operator() -> list[str]:
    """Where the fused operator runs on this machine."""
    from lockkit.kernel import find_kernel, kernel_on_gpu

    library = find_kernel()
    if library is None:
        return ["not compiled: lockkit kernel EXPORT compiles it"]
    gpu = kernel_on_gpu(library)
    return ["on the processor", f"on {gpu.found}" if gpu.found else f"not on a GPU: {gpu.problem}"]


def _show(found: Environment) -> None:
    from rich import box
    from rich.table import Table

    rows = {
        "system": [f"{found.system}, {found.cpu_count} cores, {found.memory_bytes / 2**30:.0f} GiB of memory"],
        "versions": [f"{name} {version}" for name, version in found.versions.items()],
        "commit": [found.git_hash or "not a checkout"],
        "PyTorch": found.torch_devices,
        "onnxruntime": found.onnxruntime_providers,
        "fused operator": found.operator,
        "missing": found.missing,
        "problems": found.problems,
    }
    table = Table(show_header=False, box=box.SIMPLE, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in rows.items():
        table.add_row(name, "\n".join(lines) or "none")
    console.print(table)
