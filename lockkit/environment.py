"""Versions, devices and conflicting packages on this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lockkit.files import schema_record
from lockkit.targets import Provider, ProviderRow
from lockkit.version import git_hash, versions

SCHEMA = "lockkit-environment/1"

# What each extra adds, and a module of it; without the module, what the extra is for does not work.
EXTRAS = {
    "cpu": ("onnxruntime", "exports on the CPU (`gpu` instead for an NVIDIA GPU)"),
    "data": ("datasets", "Parquet, Arrow and Hub datasets"),
    "gguf": ("gguf", "`.gguf` models"),
    "sentencepiece": ("sentencepiece", "tokenizers without tokenizer.json"),
    "report": ("matplotlib", "lockkit report and bench --plot"),
    "attack": ("peft", "lockkit attack"),
    "serve": ("fastapi", "lockkit serve"),
    "sign": ("model_signing", "lockkit sign, verify --signature and card --bom"),
    "bench": ("xllamacpp", "bench --against FILE.gguf"),
}
# Packages that install the same Python module. Only the one installed last works, without any message.
CONFLICTING = {
    "onnxruntime": [
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-directml",
        "onnxruntime-openvino",
        "onnxruntime-training",
    ],
    "onnxruntime_genai": ["onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"],
}


@dataclass(frozen=True)
class Environment:
    """The environment for a bug report. It contains no paths and no user names.

    Attributes:
        schema_version: name and version of this format; `schema` in JSON.
        versions: of lockkit, Python and libraries, by name.
        git_hash: the commit that lockkit runs from, see `lockkit.version.git_hash`.
        system: operating system and processor architecture.
        cpu_count: logical processors.
        memory_bytes: total memory.
        torch_devices: one line per device of PyTorch.
        onnxruntime_providers: execution providers that start.
        operator: one line per processor on which the fused operator of `lockkit kernel` runs, or why it does not.
        missing: one line per extra of lockkit that is not installed, with what it is for.
        problems: one line per problem, with a remedy.
    """

    schema_version: str
    versions: dict[str, str]
    git_hash: str | None
    system: str
    cpu_count: int
    memory_bytes: int
    torch_devices: list[str]
    onnxruntime_providers: list[str]
    operator: list[str]
    missing: list[str]
    problems: list[str]

    def record(self) -> dict[str, Any]:
        """The environment as JSON values."""
        return schema_record(self)


def describe_environment(operator: Sequence[str] = ()) -> Environment:
    """The environment of this process.

    Args:
        operator: what is known of the fused operator, see `Environment`.
    """
    import psutil

    devices, cuda_in_torch = _torch_devices()
    providers, provider_problems = _onnxruntime_providers(cuda_in_torch)
    problems = [*_conflicting_packages(), *provider_problems]
    return Environment(
        schema_version=SCHEMA,
        versions=versions(),
        git_hash=git_hash(),
        system=f"{platform.system()} {platform.machine()}",
        cpu_count=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        torch_devices=devices,
        onnxruntime_providers=providers,
        operator=list(operator),
        missing=[
            f"pip install 'lockkit[{extra}]' for {purpose}"
            for extra, (module, purpose) in EXTRAS.items()
            if importlib.util.find_spec(module) is None
        ],
        problems=problems,
    )


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far, in bytes. It includes pages of mapped files that were read."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage may return the peak of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _torch_devices() -> tuple[list[str], bool]:
    try:
        import torch
    except ImportError as error:
        return [f"torch does not import: {error}"], False
    gpus = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    return [f"cpu, {torch.get_num_threads()} threads", *gpus], bool(gpus)


def _onnxruntime_providers(gpu_present: bool) -> tuple[list[str], list[str]]:
    """The execution providers that start, and one line per problem.

    onnxruntime lists the providers it was built with. Only a session shows whether one starts.
    """
    try:
        import onnxruntime
    except ImportError as error:
        return [], [f"onnxruntime does not import ({error}): pip install 'lockkit[cpu]' or 'lockkit[gpu]'"]
    found, problems = [], []
    for row in (provider.row for provider in Provider):
        on_gpu = row.torch_device != "cpu"
        if row.onnxruntime not in onnxruntime.get_available_providers():
            if gpu_present and on_gpu:
                problems.append(
                    f"PyTorch sees a GPU, but this onnxruntime has no {row.title}: pip install {row.package}"
                )
        elif _starts(onnxruntime, row):
            found.append(row.onnxruntime)
        elif gpu_present and on_gpu:
            problems.append(
                f"PyTorch sees a GPU, but onnxruntime's {row.title} provider does not start: it needs {row.needs}"
            )
        else:
            found.append(f"{row.onnxruntime} is built in, but does not start: it needs {row.needs}")
    return found, problems


def _starts(onnxruntime: ModuleType, row: ProviderRow) -> bool:
    """Whether a session with one node starts on a provider. onnxruntime's messages are suppressed."""
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[row.onnxruntime])
    except Exception:  # missing libraries, drivers and devices raise different errors
        return False
    finally:
        onnxruntime.set_default_logger_severity(2)
    return row.onnxruntime in session.get_providers()


def _conflicting_packages() -> list[str]:
    """One line per module that several installed packages provide."""
    problems = []
    for module, packages in CONFLICTING.items():
        installed = []
        for package in packages:
            try:
                installed.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                continue
        if len(installed) > 1:
            names = " ".join(entry.split()[0] for entry in installed)
            problems.append(
                f"{' and '.join(installed)} both provide the module {module} and shadow each other: "
                f"pip uninstall {names}, then install one of them"
            )
    return problems


def cpu_has_fast_bfloat16() -> bool:
    """Whether this processor computes products of matrices in bfloat16, not in float32 after a conversion."""
    names = ("avx512_bf16", "amx_bf16", "bf16")
    information = Path("/proc/cpuinfo")
    if information.is_file():  # Linux; PyTorch takes seconds to import
        lines = information.read_text().splitlines()
        flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
        return any(name in flags for name in names)
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in names)
