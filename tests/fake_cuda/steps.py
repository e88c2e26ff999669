"""What tests do in the process with the fake GPU."""

from __future__ import annotations

import ctypes
import logging
import os
import runpy
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda.build import DRIVER
from fake_cuda.gpu import Call, calls


def use_without_a_copy() -> None:
    """Read device memory from the host."""
    address = ctypes.c_void_p()
    assert ctypes.CDLL(DRIVER).cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(64)) == 0
    ctypes.string_at(address, 8)


def copy_there_and_back(data: bytes) -> tuple[bytes, list[Call]]:
    """Copy `data` to the device, within it, and back."""
    driver = ctypes.CDLL(DRIVER)
    size, first, second = ctypes.c_size_t(len(data)), ctypes.c_void_p(), ctypes.c_void_p()
    back = ctypes.create_string_buffer(len(data))
    for address in (first, second):
        assert driver.cuMemAlloc_v2(ctypes.byref(address), size) == 0
    assert driver.cuMemcpyHtoD_v2(first, data, size) == 0
    assert driver.cuMemcpyDtoD_v2(second, first, size) == 0
    assert driver.cuMemcpyDtoH_v2(back, second, size) == 0
    assert driver.cuMemcpyDtoH_v2(back, second, ctypes.c_size_t(1 << 20)) != 0  # beyond the end of the block
    return back.raw, calls()


def forbidden_while_capturing() -> dict[str, int]:
    """The error codes of calls that CUDA forbids while a stream is captured."""
    driver, address, stream = ctypes.CDLL(DRIVER), ctypes.c_void_p(), ctypes.c_void_p()
    runtime = ctypes.CDLL(next(name for name in ("libcudart.so.13", "libcudart.so.12") if _loaded(name)))
    assert driver.cuStreamCreate(ctypes.byref(stream), 1) == 0
    assert runtime.cudaStreamBeginCapture(stream, 0) == 0
    codes = {
        "allocate": runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(64)),
        "wait": runtime.cudaStreamSynchronize(stream),
        "copy": runtime.cudaMemcpy(address, address, ctypes.c_size_t(0), 0),
    }
    assert runtime.cudaStreamEndCapture(stream, ctypes.byref(address)) == 0
    assert runtime.cudaStreamSynchronize(stream) == 0
    return codes


def _loaded(name: str) -> bool:
    return name in Path("/proc/self/maps").read_text()


def provider_starts() -> list[str]:
    """The providers that `lockkit env` reports."""
    from lockkit.environment import describe_environment

    return describe_environment().onnxruntime_providers


def placed(folder: Path, kernel: Path | None = None, last_only: bool = True) -> Counter[tuple[str, str]]:
    """How many nodes of an export run where: by provider and operator."""
    from lockkit.export.loading import placement
    from lockkit.export.session import ExportSession

    return Counter(placement(ExportSession(folder, "cuda", kernel=kernel, last_only=last_only)._session))


def decode_step(folder: Path, kernel: Path | None = None, batch: int = 1) -> list[Call]:
    """The calls of one decode step of `ExportSession.forward`, after a prompt and another step."""
    from lockkit.export.session import ExportSession

    session = ExportSession(folder, "cuda", kernel=kernel, last_only=True)
    _, cache = session.forward(np.ones((batch, 8), np.int64))
    _, cache = session.forward(np.ones((batch, 1), np.int64), None, cache)
    calls()
    session.forward(np.ones((batch, 1), np.int64), None, cache)
    return calls()


def open_session(folder: Path, kernel: Path | None = None) -> None:
    """Load an export, as `ExportSession` does for a server."""
    from lockkit.export.session import ExportSession

    ExportSession(folder, "cuda", kernel=kernel, last_only=True)


def error_of(function: Any, *arguments: Any) -> str:
    """The message of the LockkitError that a function raises."""
    from lockkit.errors import LockkitError

    try:
        function(*arguments)
    except LockkitError as error:
        return str(error)
    raise AssertionError(f"{function.__name__} raised no error")


def rows_of(folder: Path, rows: int, capacity: int, kernel: Path | None = None, cuda_graphs: bool = True) -> Any:
    """The session of an export and its `DeviceRows`."""
    from lockkit.export.rows import cache_rows
    from lockkit.export.session import ExportSession

    session = ExportSession(folder, "cuda", kernel=kernel, last_only=True, cuda_graphs=cuda_graphs)
    return session, cache_rows(session, rows, capacity)


def served_steps(folder: Path, kernel: Path | None = None, cuda_graphs: bool = True) -> dict[str, list[Call]]:
    """The calls of each part of serving: a prompt, a move, and steps of one, three and one row."""
    session, rows = rows_of(folder, 4, 64, kernel, cuda_graphs)
    found = {"load": calls()}

    def note(name: str) -> None:
        found[name] = calls()

    rows.run(np.ones((1, 6), np.int64), np.array([6]), rows.staging)
    note("prompt")
    rows.move(rows.staging, 0, 6)
    note("move")
    for name, batch in (("first", 1), ("second", 1), ("three", 3), ("three again", 3), ("one again", 1)):
        logits = rows.run(np.ones((batch, 1), np.int64), np.full(batch, 7), 0)
        assert logits.shape == (batch, session.logits_shape(1, 1)[-1])
        note(name)
    return found


def move_rows(folder: Path, source: int, target: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One cache of four rows and a staging row, filled with random bits, before and after a move."""
    session, rows = rows_of(folder, 4, 64)
    buffer, (shape, _) = next(iter(rows._caches.values())), next(iter(rows._forms.values()))
    before, after = (session.gpu.pinned((5, *shape), "uint16") for _ in range(2))
    before[:] = np.random.default_rng(0).integers(0, 1 << 16, before.shape)
    session.gpu.upload(buffer, before)
    rows.move(source, target, length)
    session.gpu.download(after, buffer)
    return before.copy(), after.copy()


def served_tokens(folder: Path, jobs: int) -> list[list[int]]:
    """The tokens that the server's rows choose for several prompts, which start and end at different times."""

    from lockkit.serve.batch import open_rows
    from lockkit.serve.model import open_served_model

    rows = open_rows(open_served_model(folder), jobs, 64, "cuda", None)
    running: list[list[int]] = []
    for job in range(jobs):
        prompt = [3] * (job + 1)
        logits = rows.prefill(prompt, 0)
        assert logits.ndim == 1
        rows.admit(job, len(prompt))
        running.append([*prompt, int(logits.float().argmax())])
        tokens = [text[-1] for text in running]
        for text, row in zip(running, rows.decode(tokens, [len(text) for text in running]), strict=True):
            text.append(int(row.float().argmax()))
    return running


def open_large_rows(folder: Path) -> None:
    """Caches of 100,000 rows."""
    from lockkit.serve.batch import open_rows
    from lockkit.serve.model import open_served_model

    open_rows(open_served_model(folder), 100_000, 256, "cuda", None)


def genai_steps(folder: Path, new_tokens: int = 4) -> list[list[Call]]:
    """The calls of each token that onnxruntime-genai generates after a prompt of 8."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=64, min_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.ones((1, 8), np.int32))
    calls()
    found = []
    for _ in range(new_tokens):
        generator.generate_next_token()
        found.append(calls())
    return found


def bench_steps(folder: Path, batch: int = 2, cuda_graphs: bool = True) -> tuple[Any, list[list[Call]]]:
    """Whether `lockkit bench` says that steps are CUDA graphs, and the calls of each step that it times in onnxruntime, in a second round."""
    from lockkit.bench.config import BenchConfig
    from lockkit.bench.timed import _Onnxruntime

    model = _Onnxruntime(folder, BenchConfig(provider="cuda", no_cuda_graphs=not cuda_graphs), None)
    prompt, found = np.ones((batch, 8), np.int64), []
    model.generate(prompt, 4)
    model.prompt(prompt, 4)
    calls()
    for _ in range(3):
        model.step()
        found.append(calls())
    return model.cuda_graphs, found


def bench_of_genai(folder: Path, cuda_graphs: bool) -> Any:
    """Whether `lockkit bench` says that the steps of onnxruntime-genai are CUDA graphs."""
    from lockkit.bench.config import BenchConfig
    from lockkit.bench.timed import _Genai

    return _Genai(folder, BenchConfig(provider="cuda", no_cuda_graphs=not cuda_graphs), None).cuda_graphs


def found_gpu(library: Path) -> tuple[str, str, list[Call]]:
    """What the operator says of the GPU, why it cannot run there, and its calls."""
    from lockkit.kernel.gpu import kernel_on_gpu

    answer = kernel_on_gpu(library)
    return answer.found, answer.problem, calls()


def command(*arguments: object) -> tuple[int, str, str]:
    """Run `lockkit ARGUMENTS...` in this process: exit code, standard output and standard error."""
    from lockkit.cli.app import main

    code, saved = 0, (sys.argv, os.dup(1), os.dup(2))
    sys.argv = ["lockkit", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            sys.argv = saved[0]
            os.dup2(saved[1], 1), os.dup2(saved[2], 2)
            os.close(saved[1]), os.close(saved[2])
        out.seek(0), err.seek(0)
        return code, out.read().decode(), err.read().decode()


def generated_steps(folder: Path, rows: int = 1, cuda_graphs: bool = True) -> tuple[list[str], dict[str, list[Call]]]:
    """The notes for the user, and the calls of each part of generating two texts, one after the other."""
    import torch

    from lockkit.generate import open_model

    model = open_model(str(folder), "cuda", cuda_graphs=cuda_graphs)
    calls()
    found = {}
    for text in ("one", "another"):
        texts = model.runner.begin(rows, 40)
        for step, tokens in (("prompt", 8), ("first", 1), ("second", 1)):
            logits = texts.next_logits(torch.ones((rows, tokens), dtype=torch.int64))
            assert logits.dtype == torch.float32 and logits.shape == (rows, model.vocab_size)
            found[f"{text}, {step}"] = calls()
        del texts
    return model.notes, found


def all_logits(folder: Path) -> list[Call]:
    """The calls of a pass with the logits of all positions, as `lockkit verify` runs it."""
    from lockkit.export.session import ExportSession

    session = ExportSession(folder, "cuda")
    calls()
    logits, _ = session.forward(np.ones((2, 8), np.int64))
    assert logits.dtype == np.float32 and logits.shape == session.logits_shape(2, 8)
    return calls()


def read_numbers(kind: str, shape: tuple[int, ...], chunk_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Random bits of a number format on the device, and what `Gpu.read` gives for them."""
    from lockkit.export import cuda
    from lockkit.targets import element_type

    gpu, form = cuda.Gpu(), element_type(kind)
    bits = gpu.pinned(shape, form.numpy)
    bits[:] = np.random.default_rng(0).integers(0, 1 << 14, shape).astype("uint16").view(form.numpy)
    buffer = gpu.buffer(bits.nbytes)
    gpu.upload(buffer, bits)
    before, cuda._CHUNK_BYTES = cuda._CHUNK_BYTES, chunk_bytes
    try:
        return bits.copy(), gpu.read(buffer.address, shape, form)
    finally:
        cuda._CHUNK_BYTES = before


def opened_for_serving(folder: Path) -> tuple[bool, list[str]]:
    """Whether the server's session uses the fused operator, and what is logged."""
    from lockkit.kernel import opened
    from lockkit.serve.model import open_served_model, open_session

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("lockkit.serve.model").addHandler(handler)
    opened.find_kernel = lambda: folder / "dlr_chain.so"
    try:
        return open_session(open_served_model(folder), "cuda", None).fused, records
    finally:
        logging.getLogger("lockkit.serve.model").removeHandler(handler)


def in_threads(folders: list[Path], kernel: Path, sessions: int, steps: int = 6) -> list[Call]:
    """The calls of several threads, of which each generates a text with one of the sessions."""
    from lockkit.export.session import ExportSession
    from lockkit.export.texts import TextSession

    opened = [ExportSession(folder, "cuda", kernel=kernel, last_only=True) for folder in folders[:sessions]]
    shared = [TextSession(session) for session in opened]
    start, failed = threading.Barrier(len(folders)), []

    def work(number: int) -> None:
        try:
            start.wait()
            texts = shared[number % sessions].begin(1, 40)
            for tokens in [8, *[1] * steps]:
                texts.next_logits(np.ones((1, tokens), np.int64))
        except BaseException as error:
            failed.append(repr(error))

    calls()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return calls()


def captures_of_threads(folder: Path, threads: int, sessions: int) -> list[Counter[tuple[str, str]]]:
    """What is captured in each CUDA graph while several threads do what the server and `TextSession` do."""
    from lockkit.export.rows import cache_rows
    from lockkit.export.session import ExportSession
    from lockkit.export.texts import TextSession

    opened = [ExportSession(folder, "cuda", last_only=True) for _ in range(sessions)]
    shared = [TextSession(session) for session in opened]
    start, failed = threading.Barrier(threads), []

    def work(number: int) -> None:
        session = opened[number % sessions]
        try:
            start.wait()
            for batch in (1, 2, 3):  # each is captured again
                texts = shared[number % sessions].begin(batch, 40)
                time.sleep(0.02)  # so that prompts, too, meet captures of others
                for tokens in (8, 1, 1):
                    texts.next_logits(np.ones((batch, tokens), np.int64))
                rows = cache_rows(session, batch, 64)
                time.sleep(0.02)
                rows.run(np.ones((1, 6), np.int64), np.array([6]), rows.staging)
                rows.move(rows.staging, 0, 6)
                for _ in range(2):
                    rows.run(np.ones((batch, 1), np.int64), np.full(batch, 7))
                time.sleep(0.02)
                session.forward(np.ones((1, 8), np.int64))
        except BaseException as error:
            failed.append(repr(error))

    calls()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed, failed
    captures: list[Counter[tuple[str, str]]] = []
    for call in calls():
        if (call.kind, call.name) == ("capture", "begin"):
            captures.append(Counter())
        elif call.captured:
            captures[-1][call.kind, call.name] += 1
    return captures


def tool(path: Path, arguments: list[object], libraries: Path) -> None:
    """Run a script of `tools/`. The processes that it starts get the fake GPU, too."""
    before, sys.argv = sys.argv, [str(path), *map(str, arguments)]
    os.environ["LD_LIBRARY_PATH"] = str(libraries)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
    finally:
        sys.argv = before
        del os.environ["LD_LIBRARY_PATH"]
