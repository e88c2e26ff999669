"""Run functions in a process that has the fake GPU, and read what they asked of it.

A test calls `FakeGPU.run(function, ...)`. The function runs in the other process, with the real onnxruntime on the fake
CUDA libraries (`build.py`), and reads the journal with `calls()`. Nothing is computed: results of kernels are whatever
was in memory. The process is shared by the tests of a file, since it takes seconds to start.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_cuda.build import DRIVER

_LAUNCHES = ("kernel", "product", "graph")


@dataclass(frozen=True)
class Call:
    """A call of the CUDA libraries.

    Attributes:
        kind: `kernel`, `product` (of cuBLAS), `graph`, `copy`, `fill`, `allocate`, `wait`, `capture`, `stream`, `event`,
            `module`, `capture mode`, `host function` or `other`.
        name: of the kernel or function, or from where to where is copied, such as "device to pageable".
        stream: its number; 0 is the default stream.
        captured: the call went into a graph that is being captured.
    """

    kind: str
    name: str
    stream: int
    captured: bool


def calls() -> list[Call]:
    """The calls since this function was called last, in the process with the fake GPU."""
    driver = ctypes.CDLL(DRIVER)
    driver.fake_cuda_take_journal.restype = ctypes.c_void_p
    driver.fake_cuda_release.argtypes = [ctypes.c_void_p]
    taken = driver.fake_cuda_take_journal()
    try:
        rows = [line.split("\t") for line in ctypes.string_at(taken).decode().splitlines()]
    finally:
        driver.fake_cuda_release(taken)
    return [Call(kind, name, int(stream), captured == "1") for kind, name, stream, captured in rows]


def launches(found: Iterable[Call]) -> int:
    """How often the CPU launches something: a kernel, a product of cuBLAS, or a graph. Launches that are captured count
    when their graph is launched."""
    return sum(call.kind in _LAUNCHES and not call.captured for call in found)


def kinds(found: Iterable[Call]) -> Counter[str]:
    """How many calls of each kind."""
    return Counter(call.kind for call in found)


class FakeGPU:
    """A process with the fake GPU. `folder` has the libraries of `build`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
        """Call a function of a module in the process, and return what it returns.

        Args:
            environment: variables that it gets besides. Those of the fake GPU are in `device.c`.

        Raises:
            AssertionError: the process died, for instance because the host read device memory.
        """
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, initializer=_load, initargs=(self.folder,))
        try:
            return self._pool.submit(_call, function, arguments, dict(environment or {})).result()
        except BrokenProcessPool:
            self.close()
            raise AssertionError(f"the process with the fake GPU died in {function.__name__}") from None

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _load(folder: Path) -> None:
    """Load the fake libraries. Libraries that are loaded later and need them get these, by their names."""
    for path in sorted(folder.glob("*.so.*"), key=lambda path: path.name != DRIVER):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], environment: Mapping[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    calls()  # what earlier tests left
    try:
        return function(*arguments)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        importlib.invalidate_caches()
