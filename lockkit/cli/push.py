"""`lockkit push`: a locked folder or an export to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import console
from lockkit.publish.config import PushConfig


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Locked folder or export.")],
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="Repository on the Hub: owner/name.")],
    config: PushConfig,
) -> None:
    """Upload FOLDER to REPOSITORY on the Hub.

    The files are checked first. Hidden and partial files stay here. The login is that of the Hub's
    own client: run `hf auth login` once, or set HF_TOKEN.

    Examples:

    \b
        lockkit push ./locked owner/my-model-locked --private
        lockkit push ./locked-onnx owner/my-model-onnx --dry-run
    """
    from lockkit.publish.push import push_folder

    result = push_folder(folder, repository, config)
    if config.dry_run:
        for name, size in result.files.items():
            console.print(f"{_size(size):>12}  {name}", soft_wrap=True)
    done = f"uploaded to {result.url}" if result.url else f"would be uploaded to {repository}"
    console.print(f"{len(result.files)} files, {result.size_bytes / 1e6:,.1f} MB: {done}", soft_wrap=True)
    for note in result.notes:
        console.print(note, soft_wrap=True)


def _size(number: int) -> str:
    """A size in bytes as people read it: `812 bytes`, `1.7 kB`, `3,201.5 MB`."""
    units = ((1e6, "MB"), (1e3, "kB"))
    return next((f"{number / unit:,.1f} {name}" for unit, name in units if number >= unit), f"{number} bytes")
