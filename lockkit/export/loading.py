"""Load a graph into onnxruntime, and refuse what would run elsewhere or more slowly than it should.

1. The provider must be there and must start. On a GPU it gets the stream of `Gpu`.
2. The library of the fused operator is registered, if there is one.
3. Afterwards, no heavy operator may be on another provider: onnxruntime moves nodes to the CPU without a word.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError, first_line
from lockkit.export.manifest import Manifest
from lockkit.targets import Precision, Provider

if TYPE_CHECKING:
    from lockkit.export.cuda import Gpu

# Operators with most of the arithmetic. The others compute shapes, and onnxruntime runs those on the CPU.
HEAVY_OPERATORS = {
    *("MatMul", "MatMulNBits", "Gemm", "GroupQueryAttention", "MultiHeadAttention", "Attention"),
    *("DLRChain", "DLRChainNBits", "DLRChainNBitsFloat"),
}
_SIGNS_OF_THE_GPU = ("CUDA failure", "CUDA error", "Failed to allocate memory", "CUBLAS failure")  # in error messages
_SIGN_OF_THE_OPERATOR = "DLRChain: "


class CannotCaptureError(Exception):
    """onnxruntime refuses to capture this graph, because parts of it run on the CPU."""


def require_arithmetic(folder: Path, manifest: Manifest, provider: Provider) -> None:
    """Raise a UsageError if a provider cannot compute in the export's precision."""
    known = Precision.__members__.get(manifest.precision)
    if known is not None and provider not in known.row.arithmetic:
        raise UsageError(
            f"{folder} is in {manifest.precision} for {manifest.provider}, which {provider.row.title} cannot compute: "
            f"give --provider {manifest.provider}, or export again"
        )


def load_graph(
    path: Path, provider: Provider, threads: int | None, kernel: Path | None, gpu: Gpu | None, captures: bool
) -> Any:
    """An `onnxruntime.InferenceSession` in which `provider` runs all heavy operators.

    Raises:
        UsageError: see `ExportSession`.
        CannotCaptureError: with `captures`, the graph has nodes that cannot be captured.
    """
    import onnxruntime

    row, wanted = provider.row, provider.row.onnxruntime
    if wanted not in onnxruntime.get_available_providers():
        raise UsageError(f"this onnxruntime has no {wanted}: install {row.package} alone, or give --provider cpu")
    onnxruntime.set_default_logger_severity(4)  # errors are raised as exceptions
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if row.preload:
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    if threads:
        options.intra_op_num_threads = threads
    # Record which provider runs which node, to find nodes that onnxruntime silently assigned to the CPU.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings = dict(row.settings)
    if gpu is not None:
        settings |= {"user_compute_stream": str(gpu.stream), "enable_cuda_graph": str(int(captures))}
    options.add_session_config_entry("lockkit.provider", provider)  # which operators the kernel's library registers
    if kernel:
        try:
            options.register_custom_ops_library(str(kernel))
        except Exception as error:  # built for another onnxruntime or another processor, or no such library
            raise UsageError(
                f"onnxruntime cannot load the kernel {kernel} ({first_line(error)}): run without the kernel, "
                "or run lockkit kernel again"
            ) from error
    try:
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # it prints that it falls back to the CPU, which is refused below
            session = onnxruntime.InferenceSession(path, options, providers=[(wanted, settings)])
    except Exception as error:
        if captures and "graph capture" in str(error):
            raise CannotCaptureError from error
        if kernel and _SIGN_OF_THE_OPERATOR in str(error):
            raise UsageError(
                f"the fused operator cannot run {path} ({first_line(error)}): run without the kernel"
            ) from error
        if gpu is not None and is_of_the_gpu(error):
            raise UsageError(
                f"the GPU cannot run {path} ({first_line(error)}; {gpu.description()}): free its memory, update its "
                "driver, or give --provider cpu"
            ) from error
        raise UsageError(
            f"onnxruntime cannot load {path} ({first_line(error)}): export again, or change EXPORT"
        ) from error
    if session.get_providers()[0] != wanted:
        found = f"; {gpu.description()}" if gpu is not None else ""
        raise UsageError(f"onnxruntime could not start {wanted} (it needs {row.needs}{found}): give --provider cpu")
    elsewhere = sorted({op for name, op in placement(session) if name != wanted and op in HEAVY_OPERATORS})
    if elsewhere:
        remedy = "run without the kernel" if all(op.startswith("DLRChain") for op in elsewhere) else "export again"
        raise UsageError(f"onnxruntime has no {', '.join(elsewhere)} for {wanted} and would use the CPU: {remedy}")
    return session


def is_of_the_gpu(error: Exception) -> bool:
    """Whether onnxruntime reports an error of the GPU, such as full memory."""
    return any(sign in str(error) for sign in (*_SIGNS_OF_THE_GPU, _SIGN_OF_THE_OPERATOR))


def placement(session: Any) -> list[tuple[str, str]]:
    """The provider and the operator of every node that an `InferenceSession` runs. Functions are inlined."""
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
