"""Open an export for text generation, with the fused operator if `lockkit kernel` installed it in the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lockkit.errors import LockkitError, first_line
from lockkit.export.chains import has_kernel_form
from lockkit.export.manifest import MODEL_FILE
from lockkit.export.session import ExportSession
from lockkit.kernel.build import find_kernel
from lockkit.kernel.install import has_kernel
from lockkit.targets import provider_called

TRIED_TOKENS = 128  # in a prompt on a GPU; the operator has other kernels, and other needs, for one token and for many


def open_generating(
    folder: Path,
    provider: str,
    threads: int | None = None,
    cuda_graphs: bool = True,
    check: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> ExportSession:
    """Load the graph that generates text.

    If the operator is installed but cannot be used, the export is loaded without it. The answers are then the same, but
    slower.

    Args:
        folder: of the export.
        provider: execution provider, a name in `lockkit.targets.Provider`.
        threads: of one operator on the CPU; None for onnxruntime's choice.
        cuda_graphs: on a GPU, launch each step as one CUDA graph, if onnxruntime can capture it.
        check: compare every file with the manifest first.
        warn: told in one line why the operator is not used.

    Raises:
        UsageError: the folder is not an intact export, or the graph cannot be loaded.
    """

    def load(kernel: Path | None) -> ExportSession:
        return ExportSession(folder, provider, check, threads, kernel, last_only=True, cuda_graphs=cuda_graphs)

    if not (provider_called(provider).row.runs_kernel and has_kernel(folder)):
        return load(None)
    kernel, remedy = find_kernel(), f"run lockkit kernel {folder}"
    if not has_kernel_form(folder / MODEL_FILE, provider):
        reason, remedy = "this version does not know the form of its chains", "export again"
    elif not kernel:
        reason = "it has not been compiled for this machine and version"
    else:
        try:
            return _tried(load(kernel))
        except LockkitError as error:
            reason = first_line(error)
    warn(f"without the fused kernel, slower ({reason}): {remedy}")
    return load(None)


def _tried(session: ExportSession) -> ExportSession:
    """The session, if it uses the operator, and on a GPU, if the operator also runs: it may load and then fail, for
    instance where another program holds the memory.

    Raises:
        LockkitError: it does not.
    """
    import numpy as np

    if not session.fused:
        raise LockkitError("onnxruntime does not use it")
    context = session.config.get("max_position_embeddings") or TRIED_TOKENS
    for tokens in (1, min(TRIED_TOKENS, context)) if session.gpu is not None else ():
        session.forward(np.zeros((1, tokens), np.int64))
    return session
