"""The server, `lockkit generate`, `bench` and `verify` on a fake GPU: one stream, one graph launch a step, pinned copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_cuda import steps
from fake_cuda.fixtures import cuda_exports, fake_gpu, fake_libraries, kernel_library  # noqa: F401
from fake_cuda.gpu import launches

WORK = ("kernel", "product", "graph", "copy", "fill")


@pytest.mark.parametrize(("precision", "fused"), [("fp16", False), ("int4", False), ("fp16", True), ("int4", True)])
def test_a_step_is_one_graph_launch_on_one_stream(fake_gpu, cuda_exports, kernel_library, precision, fused):  # noqa: F811
    found = fake_gpu.run(steps.served_steps, cuda_exports(True, precision), kernel_library if fused else None)
    loading = found.pop("load")
    (stream,) = {call.stream for calls in found.values() for call in calls if call.kind in WORK}
    assert [call.name for call in loading if call.kind == "stream" and call.stream == stream] == ["non-blocking"]
    for name in ("first", "three"):  # of their sizes: run once, captured and launched
        assert [call.name for call in found[name] if call.kind == "capture"] == ["begin", "end"]
    for name in ("second", "three again", "one again"):
        assert launches(found[name]) == 1 and not any(call.kind == "kernel" for call in found[name])
        copies = [call.name for call in found[name] if call.kind == "copy"]
        assert copies == ["pinned to device", "pinned to device", "device to pinned"]
        assert found[name][-1].kind == "wait"  # logits are read after the last copy
    assert {call.name for call in found["move"]} == {"device to device"}


@pytest.mark.parametrize("sessions", [1, 2])
def test_nothing_of_another_thread_falls_into_a_capture(fake_gpu, cuda_exports, sessions):  # noqa: F811
    """Neither a copy, which would be lost, nor what CUDA forbids while a graph is captured."""
    folder = cuda_exports(True, "fp16")
    alone = fake_gpu.run(steps.captures_of_threads, folder, 1, 1)
    slow = {"FAKE_CUDA_CAPTURE_MS": "40"}
    found = fake_gpu.run(steps.captures_of_threads, folder, 3, sessions, environment=slow)
    assert len(alone) == 6 and len(found) == 3 * len(alone)
    for captured in found:
        assert captured in alone, [captured - of_one for of_one in alone]  # what is too much
        assert not any(kind == "wait" or "pinned" in name or "pageable" in name for kind, name in captured)


def test_without_graphs_a_step_launches_its_kernels(fake_gpu, cuda_exports):  # noqa: F811
    found = fake_gpu.run(steps.served_steps, cuda_exports(True, "fp16"), None, False)
    assert launches(found["second"]) > 30
    assert not any(call.kind in ("graph", "capture") for calls in found.values() for call in calls)


def test_moved_rows_have_the_bytes_of_their_source(fake_gpu, cuda_exports):  # noqa: F811
    before, after = fake_gpu.run(steps.move_rows, cuda_exports(True, "fp16"), 3, 1, 10)
    assert before.shape == (5, 2, 64, 32)
    expected = before.copy()
    expected[1, :, :10] = before[3, :, :10]
    np.testing.assert_array_equal(after, expected)


def test_a_server_answers_on_a_pytorch_without_cuda(fake_gpu, cuda_exports):  # noqa: F811
    assert not torch.cuda.is_available()
    text = fake_gpu.run(steps.served_tokens, cuda_exports(True, "bf16"), 3)
    assert [len(tokens) for tokens in text] == [5, 5, 5]  # prompts of 1, 2 and 3 tokens


def test_caches_that_do_not_fit_are_refused_in_one_line(fake_gpu, cuda_exports):  # noqa: F811
    message = fake_gpu.run(steps.error_of, steps.open_large_rows, cuda_exports(True, "fp16"))
    assert "do not fit into memory: lower --max-batch" in message and "\n" not in message


def test_bench_times_one_graph_launch_a_step(fake_gpu, cuda_exports):  # noqa: F811
    use, found = fake_gpu.run(steps.bench_steps, cuda_exports(True, "bf16"))
    assert [launches(calls) for calls in found] == [1, 1, 1] and use is True
    use, found = fake_gpu.run(steps.bench_steps, cuda_exports(True, "bf16"), 2, False)
    assert use is False
    for calls in found:
        assert launches(calls) > 30 and not any(call.kind == "graph" for call in calls)
    for wanted in (True, False):
        assert fake_gpu.run(steps.bench_of_genai, cuda_exports(True, "bf16"), wanted) is wanted


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_runs_the_step_of_the_server(fake_gpu, cuda_exports, rows):  # noqa: F811
    notes, found = fake_gpu.run(steps.generated_steps, cuda_exports(True, "bf16"), rows)
    assert notes == ["on Fake GPU, each step is one CUDA graph; chains run block by block"]
    assert [call.name for call in found["one, first"] if call.kind == "capture"] == ["begin", "end"]
    for step in ("one, second", "another, first", "another, second"):  # the second text has the buffers of the first
        assert launches(found[step]) == 1 and not any(call.kind in ("kernel", "allocate") for call in found[step])
        copies = [call.name for call in found[step] if call.kind == "copy"]
        assert copies == ["pinned to device", "pinned to device", "device to pinned"]
    assert "device to pageable" not in [call.name for call in found["one, prompt"]]


def test_generation_without_graphs(fake_gpu, cuda_exports):  # noqa: F811
    notes, found = fake_gpu.run(steps.generated_steps, cuda_exports(True, "fp16"), 1, False)
    assert "without CUDA graphs, as asked for" in notes[0]
    assert launches(found["one, second"]) > 30
    assert not any(call.kind in ("graph", "capture") for calls in found.values() for call in calls)


def test_the_command_says_what_runs_and_prints_the_text_alone(fake_gpu, cuda_exports):  # noqa: F811
    command = ("generate", cuda_exports(True, "fp16"), "--provider", "cuda", "--prompt", "x", "--max-new-tokens", 3)
    code, out, err = fake_gpu.run(steps.command, *command)
    assert code == 0 and "each step is one CUDA graph" in err and err.count("\n") == 1 and "Fake GPU" not in out
    code, _, err = fake_gpu.run(steps.command, *command, "--no-cuda-graphs")
    assert code == 0 and "without CUDA graphs" in err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_CUDA_DEVICES": "0"}, "the CUDA driver has no usable GPU (cuInit: "),
        ({"FAKE_CUDA_FAIL": "cuMemAlloc=2"}, "does not fit into memory: lower --max-new-tokens, or shorten --prompt"),
        ({"FAKE_CUDA_FAIL": "launch=700"}, "failed on the GPU"),
        ({"FAKE_CUDA_FAIL": "cuStreamSynchronize=700"}, "cuStreamSynchronize: CUDA_ERROR_700 (700)"),
    ],
)
def test_generation_that_fails_on_the_gpu_ends_with_one_line(fake_gpu, cuda_exports, environment, message):  # noqa: F811
    command = ("generate", cuda_exports(True, "fp16"), "--provider", "cuda", "--prompt", "x")
    code, _, err = fake_gpu.run(steps.command, *command, environment=environment)
    *notes, line = err.splitlines()
    assert code == 2 and line.startswith("lockkit: ") and message in line and len(notes) <= 1


def test_logits_of_all_positions_come_through_pinned_memory(fake_gpu, cuda_exports):  # noqa: F811
    found = fake_gpu.run(steps.all_logits, cuda_exports(True, "bf16"))
    copies = [call.name for call in found if call.kind == "copy"]
    assert "device to pinned" in copies and "device to pageable" not in copies


@pytest.mark.parametrize("kind", ["tensor(float16)", "tensor(bfloat16)"])
def test_numbers_are_read_from_the_device_in_chunks(fake_gpu, kind):  # noqa: F811
    bits, found = fake_gpu.run(steps.read_numbers, kind, (3, 5, 7), 64)  # 210 bytes
    dtype = torch.float16 if kind == "tensor(float16)" else torch.bfloat16
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
