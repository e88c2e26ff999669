"""Exports on the real onnxruntime with its CUDA provider, on a fake GPU (`fake_cuda/`): placement and launches."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from fake_cuda import steps
from fake_cuda.fixtures import (  # noqa: F401
    cuda_exports,
    fake_gpu,
    fake_libraries,
    kernel_library,
    new_gpu,
    scratch_kernels,
)
from fake_cuda.gpu import launches

from lockkit.kernel import install_kernel

PRECISIONS = ["fp16", "bf16", "int4", "int8"]
LAUNCHES = 1.25  # most launches a step, relative to the original
CUDA = "CUDAExecutionProvider"


def test_the_host_cannot_read_device_memory(fake_gpu):  # noqa: F811
    with pytest.raises(AssertionError, match="died in use_without_a_copy"):
        fake_gpu.run(steps.use_without_a_copy)
    data, found = fake_gpu.run(steps.copy_there_and_back, bytes(range(200)))  # in a new process
    assert data == bytes(range(200))
    copies = [call.name for call in found if call.kind == "copy"]
    assert copies[:3] == ["pageable to device", "device to device", "device to pageable"]


def test_what_cuda_forbids_while_capturing_fails(fake_gpu):  # noqa: F811
    assert all(fake_gpu.run(steps.forbidden_while_capturing).values())


def test_the_cuda_provider_starts(fake_gpu):  # noqa: F811
    assert CUDA in fake_gpu.run(steps.provider_starts)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_work_is_on_the_gpu_and_chains_have_a_name_for_a_kernel(fake_gpu, cuda_exports, precision):  # noqa: F811
    folder = cuda_exports(True, precision)
    for last_only in (False, True):
        on_cpu = {
            name: n
            for (provider, name), n in fake_gpu.run(steps.placed, folder, None, last_only).items()
            if provider != CUDA
        }
        assert set(on_cpu) <= {"Gather", "Cast"} and sum(on_cpu.values()) <= 2  # of the shape of the mask
    functions = {function.name for function in onnx.load(folder / "model.onnx", load_external_data=False).functions}
    assert functions == {"DLRChainNBitsFloat" if precision.startswith("int") else "DLRChain"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_launches_a_step(fake_gpu, cuda_exports, kernel_library, precision):  # noqa: F811
    def launched(locked: bool, kernel: Path | None) -> int:
        return launches(fake_gpu.run(steps.decode_step, cuda_exports(locked, precision), kernel))

    original, body, fused = launched(False, None), launched(True, None), launched(True, kernel_library)
    print(f"{precision}: {original} launches a step, {body} of the locked model, {fused} with the kernel")
    assert body > 2 * original
    assert 0 < fused <= LAUNCHES * original
    placed = fake_gpu.run(steps.placed, cuda_exports(True, precision), kernel_library)
    assert {place for place, name in placed if name.startswith("DLRChain")} == {CUDA}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_genai_captures_a_graph_and_launches_it(fake_gpu, cuda_exports, precision):  # noqa: F811
    first, *later = fake_gpu.run(steps.genai_steps, cuda_exports(True, precision))
    assert sum(call.name == "begin" for call in [*first, *later[0]] if call.kind == "capture") == 1
    for found in later[1:]:
        assert sum(call.kind == "graph" for call in found) == 1
        assert launches(found) < 15  # the search for the next token is outside of the graph


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_CUDA_DEVICES": "0"}, "the CUDA driver has no usable GPU"),
        (
            {"FAKE_CUDA_FAIL": "cuInit=803"},
            "the CUDA driver has no usable GPU",
        ),  # a driver that does not fit the system
        ({"FAKE_CUDA_FAIL": "cudaSetDevice=35"}, "the driver is for CUDA 13.0"),  # too old for this onnxruntime
        ({"FAKE_CUDA_FAIL": "cudaMalloc=2"}, "of 8.0 GiB are free"),
    ],
)
def test_a_gpu_that_cannot_run_the_export_is_one_line(fake_gpu, cuda_exports, environment, message):  # noqa: F811
    folder = cuda_exports(True, "fp16")
    error = fake_gpu.run(steps.error_of, steps.open_session, folder, environment=environment)
    assert message in error and "--provider cpu" in error and "\n" not in error
    fake_gpu.run(steps.open_session, folder)  # the process goes on


def test_a_library_that_is_no_kernel_for_this_onnxruntime_is_one_line(fake_gpu, cuda_exports):  # noqa: F811
    library = next(fake_gpu.folder.glob("libcublas.so*"))
    error = fake_gpu.run(steps.error_of, steps.open_session, cuda_exports(True, "fp16"), library)
    assert f"cannot load the kernel {library}" in error and "run without the kernel" in error and "\n" not in error


@pytest.mark.parametrize(("architecture", "module"), [("80", "cubin 80"), ("103", "cubin 100"), ("130", "PTX 80")])
def test_every_gpu_from_8_0_on_gets_its_code(new_gpu, kernel_library, architecture, module):  # noqa: F811
    gpu = new_gpu(FAKE_CUDA_SM=architecture)
    if module.startswith("PTX"):
        _, problem, _ = gpu.run(steps.found_gpu, kernel_library, FAKE_CUDA_FAIL="cuModuleLoadData=222")
        assert problem == "cuModuleLoadData failed: CUDA_ERROR_222"  # the driver is too old for the PTX
    found, problem, calls = gpu.run(steps.found_gpu, kernel_library)
    assert not problem and [call.name for call in calls if call.kind == "module"] == [module]
    assert ("clusters of 0" in found) == (module != "cubin 100")


def test_an_operator_that_cannot_run_is_said_and_the_bodies_run(new_gpu, cuda_exports, kernel_library, tmp_path):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lockkit.kernel.install.build_kernel", lambda: kernel_library)
        folder = shutil.copytree(cuda_exports(True, "fp16"), tmp_path / "export")
        install_kernel(folder)
    gpu = new_gpu()
    problems = {
        "cuModuleLoadData=222": "cuModuleLoadData failed",  # a driver that is too old for the PTX
        "cuLaunchKernelEx=720": "cuLaunchKernelEx failed",  # not all thread blocks are resident
        "cuMemAlloc=2": "cuMemAlloc_v2 failed",
    }
    for failure, reason in problems.items():
        fused, (line,) = gpu.run(steps.opened_for_serving, folder, FAKE_CUDA_FAIL=failure)
        assert not fused and reason in line and "without the fused kernel, slower" in line and "\n" not in line
    assert gpu.run(steps.opened_for_serving, folder) == (True, [])
    small = new_gpu(FAKE_CUDA_ATTRIBUTES="97=32768")  # shared memory of a thread block
    fused, (line,) = small.run(steps.opened_for_serving, folder)
    assert not fused and "this GPU is too small for a chain of these sizes" in line


@pytest.mark.parametrize(
    ("threads", "sessions"), [((True, True), 1), ((True, True), 2), ((True, False), 2)],
    ids=["one session", "two sessions of one export", "two exports"],
)  # fmt: skip
def test_chains_that_run_at_once_share_no_memory(
    new_gpu, cuda_exports, kernel_library, scratch_kernels, threads, sessions  # noqa: F811
):  # fmt: skip
    folders = [cuda_exports(True, "fp16" if first else "bf16") for first in threads]
    gpu = new_gpu(FAKE_CUDA_SM="80", FAKE_CUDA_KERNELS=str(scratch_kernels))
    found = gpu.run(steps.in_threads, folders, kernel_library, sessions)
    used: dict[int, set[str]] = {}
    for call in found:
        if call.kind == "scratch":
            used.setdefault(call.stream, set()).add(call.name)
    assert len(used) == sessions and "(nil)" not in set().union(*used.values())
    assert sum(map(len, used.values())) == len(set().union(*used.values()))  # a stream runs its kernels in turn
    # In this mode, CUDA forbids all threads to allocate during a capture. So sessions take turns.
    assert [call.name for call in found if call.kind == "capture mode"] == ["global"] * len(folders)
