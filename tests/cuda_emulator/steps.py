"""What tests of the operator for CUDA do in the process with the fake GPU (`fake_cuda/`)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda.gpu import Call, calls

STEPS = 3


def session(model: bytes, library: Path, **settings: str) -> Any:
    """A session on the CUDA provider with the operator, or the message of its error."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("lockkit.provider", "cuda")
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=[("CUDAExecutionProvider", settings)])


def compute(
    model: bytes, library: Path, inputs: list[np.ndarray], kind: int
) -> tuple[list[np.ndarray], list[list[Call]]]:
    """Outputs for several inputs `[tokens, hidden]` of a number format of ONNX, as bits, and the calls of each run. The
    first list of calls is that of loading."""
    import onnxruntime

    calls()
    opened = session(model, library)
    outputs, found = [], [calls()]
    for bits in inputs:
        binding = opened.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind))
        y = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros_like(bits), kind)
        binding.bind_ortvalue_output("y", y)
        opened.run_with_iobinding(binding)
        binding.synchronize_outputs()
        outputs.append(np.frombuffer(ctypes.string_at(y.data_ptr(), bits.nbytes), bits.dtype).reshape(bits.shape))
        found.append(calls())
    return outputs, found


def capture(model: bytes, library: Path, shape: tuple[int, int], kind: int) -> list[list[Call]]:
    """The calls of each of STEPS runs with CUDA graphs."""
    import onnxruntime

    opened = session(model, library, enable_cuda_graph="1")
    place = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    values = [place(list(shape), np.float16, "cuda", 0) for _ in range(2)]
    binding = opened.io_binding()
    binding.bind_ortvalue_input("x", values[0])
    binding.bind_ortvalue_output("y", values[1])
    found = []
    for _ in range(STEPS):
        calls()
        opened.run_with_iobinding(binding)
        found.append(calls())
    return found


def why_not(model: bytes, library: Path) -> str:
    """The message of the error when the session is created, or when it computes one token. Empty: there is none."""
    try:
        opened = session(model, library)
        opened.run(None, {"x": np.zeros((1, opened.get_inputs()[0].shape[1]), np.float16)})
    except Exception as error:
        return str(error)
    return ""
