"""Fixtures for tests on the fake GPU. They skip, with the reason, where it cannot be built."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda.build import CannotBuildError, build
from fake_cuda.gpu import FakeGPU


@pytest.fixture(scope="session")
def fake_libraries(tmp_path_factory) -> Path:
    """The folder of the fake CUDA libraries."""
    if torch.version.cuda:
        pytest.skip("this PyTorch has CUDA libraries of its own, which onnxruntime would use")
    try:
        return build(tmp_path_factory.mktemp("fake_cuda"))
    except CannotBuildError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def fake_gpu(fake_libraries) -> Iterator[FakeGPU]:
    """A process with the fake GPU, for the tests of one file."""
    gpu = FakeGPU(fake_libraries)
    yield gpu
    gpu.close()


@pytest.fixture
def new_gpu(fake_libraries) -> Iterator[Callable[..., FakeGPU]]:
    """A function that starts a process with a fake GPU of its own, with the given environment in every call."""
    started = []

    def start(**environment: str) -> FakeGPU:
        gpu = FakeGPU(fake_libraries)
        started.append(gpu)
        run = gpu.run
        gpu.run = lambda function, *arguments, **more: run(function, *arguments, environment=environment | more)
        return gpu

    yield start
    for gpu in started:
        gpu.close()


@pytest.fixture(scope="session")
def scratch_kernels(tmp_path_factory) -> Path:
    """The library of `scratch.cpp`, for FAKE_CUDA_KERNELS."""
    import lockkit.kernel

    here, out = Path(__file__).parent, tmp_path_factory.mktemp("scratch") / "scratch.so"
    headers = Path(lockkit.kernel.__file__).parent / "cuda"
    subprocess.run(
        ["c++", "-std=c++17", "-shared", "-fPIC", f"-I{headers}", here / "scratch.cpp", "-o", out], check=True
    )
    return out


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory) -> Path:
    """The library of `lockkit.kernel.build_kernel`, compiled without optimisation, which takes less time."""
    from lockkit.kernel import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))
        return build.build_kernel()


@pytest.fixture(scope="session")
def cuda_exports(tmp_path_factory):
    """A function from (locked or not, precision) to the folder of an export for CUDA: two layers, chains of 5 blocks.

    Ranks are multiples of 32, as those of models of real sizes are, so that quantised products need no padding.
    """
    from test_export import save_random_lock
    from tiny import save_tiny

    from lockkit.export import ExportConfig, export_model

    sizes = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}
    models: dict[bool, Path] = {}
    made: dict[tuple[bool, str], Path] = {}

    def export(locked: bool, precision: str) -> Path:
        if locked not in models:
            save = save_random_lock if locked else save_tiny
            models[locked] = save("qwen3", tmp_path_factory.mktemp("model") / "qwen3", **sizes)
        if (locked, precision) not in made:
            out = tmp_path_factory.mktemp("export") / f"{'locked' if locked else 'original'}-{precision}"
            export_model(str(models[locked]), out, ExportConfig(precision=precision, provider="cuda"))
            made[locked, precision] = out
        return made[locked, precision]

    return export
