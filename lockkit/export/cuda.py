"""A GPU as a session uses it: one stream, and memory on the device, through the CUDA driver.

All work of a session goes to one stream, which onnxruntime gets as `user_compute_stream`. So a copy of cache rows is
never early: the stream runs it after the step before it and before the step after it. The driver's library has the same
name for every version of CUDA, and no part of PyTorch is needed, so this also works beside a PyTorch without CUDA.

The threads of a process take turns (`Gpu.turn`), for two reasons. onnxruntime captures CUDA graphs in CUDA's mode "global",
in which no other thread of the process may allocate or free memory of the device. And what another thread puts on the
stream that is being captured goes into the graph, and is not done. So every call of the driver takes the turn (`Gpu.call`).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from lockkit.errors import LockkitError, UsageError
from lockkit.export.tensors import as_float32
from lockkit.targets import ElementType

_LIBRARY = "nvcuda" if sys.platform == "win32" else "libcuda.so.1"
# Constants of cuda.h.
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_DEVICE = 2  # CU_MEMORYTYPE_DEVICE
_TURN = threading.RLock()
_CHUNK_BYTES = 16 << 20  # of pinned memory, for what a step does not have a buffer for


class _DriverError(LockkitError):
    """A function of the driver failed. `reason` is its name and the error's."""

    def __init__(self, reason: str):
        super().__init__(f"the CUDA driver reports an error ({reason}): try again, or give --provider cpu")
        self.reason = reason


class _Copy2D(ctypes.Structure):
    """`CUDA_MEMCPY2D` of cuda.h: `Height` rows of `WidthInBytes` bytes."""

    _fields_ = [
        (f"{side}{name}", kind)
        for side in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t),
            ("Y", ctypes.c_size_t),
            ("MemoryType", ctypes.c_int),
            ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_void_p),
            ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


class DeviceBuffer:
    """Memory on a GPU. It is freed with this object.

    Attributes:
        address: of its first byte, on the device.
        nbytes: its size.
    """

    def __init__(self, gpu: Gpu, nbytes: int):
        address = ctypes.c_void_p()
        gpu.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        self.address, self.nbytes = int(address.value or 0), nbytes
        weakref.finalize(self, gpu.free, "cuMemFree_v2", self.address)


class Gpu:
    """The first GPU of this machine, and a stream of its own.

    Attributes:
        stream: the stream's handle, as onnxruntime takes it.
        name: of the GPU.

    Raises:
        UsageError: there is no driver, or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise UsageError(f"this machine has no CUDA driver ({_LIBRARY}): give --provider cpu") from error
        device, self._context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self._check("cuInit", 0)
            self._check("cuDeviceGet", ctypes.byref(device), 0)
            self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
            self.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        except (_DriverError, MemoryError) as error:
            reason = getattr(error, "reason", error)
            raise UsageError(f"the CUDA driver has no usable GPU ({reason}): give --provider cpu") from error
        self.stream = int(stream.value or 0)
        name = ctypes.create_string_buffer(256)
        self._check("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode(errors="replace")
        self._chunk: np.ndarray | None = None  # pinned

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Keep the GPU from the other threads of this process. A thread that has the turn may take it again."""
        with _TURN:
            yield

    def buffer(self, nbytes: int) -> DeviceBuffer:
        """New memory on the device; its content is undefined.

        Raises:
            MemoryError: the device has not that much left.
        """
        return DeviceBuffer(self, nbytes)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """A new array in host memory that the device copies to and from without an intermediate buffer."""
        kind = np.dtype(dtype)
        nbytes = max(1, int(np.prod(shape)) * kind.itemsize)
        address = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), 0)
        memory: Any = (ctypes.c_char * nbytes).from_address(int(address.value or 0))
        weakref.finalize(memory, self.free, "cuMemFreeHost", int(address.value or 0))
        return np.frombuffer(memory, kind, int(np.prod(shape))).reshape(shape)

    def upload(self, buffer: DeviceBuffer, array: np.ndarray) -> None:
        """Copy a contiguous pinned array to the start of a buffer, in the stream's order."""
        stream = ctypes.c_void_p(self.stream)
        size, source = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_void_p(buffer.address), source, size, stream)

    def download(self, array: np.ndarray, buffer: DeviceBuffer) -> None:
        """Fill a contiguous pinned array from the start of a buffer, in the stream's order; then wait for the stream."""
        self._download(array, buffer.address)

    def _download(self, array: np.ndarray, address: int) -> None:
        stream = ctypes.c_void_p(self.stream)
        size, target = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(array.ctypes.data)
        with self.turn():  # so that it does not wait for other threads' work
            self.call("cuMemcpyDtoHAsync_v2", target, ctypes.c_void_p(address), size, stream)
            self.wait()

    def read(self, address: int, shape: tuple[int, ...], kind: ElementType) -> np.ndarray:
        """Numbers on the device as float32, in the stream's order. They pass through pinned memory in chunks.

        Args:
            address: of the first number.
            shape: of the result.
            kind: the format of the numbers on the device.
        """
        with self.turn():  # the chunk is shared
            if self._chunk is None:
                self._chunk = self.pinned((_CHUNK_BYTES,), "uint8")
            chunk = self._chunk.view(kind.numpy)
            numbers = np.empty(int(np.prod(shape)), np.float32)
            for start in range(0, len(numbers), len(chunk)):
                part = chunk[: len(numbers) - start]
                self._download(part, address + start * chunk.itemsize)
                numbers[start : start + len(part)] = as_float32(part, kind)
        return numbers.reshape(shape)

    def wait(self) -> None:
        """Wait until the stream has done all its work."""
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def copy(self, buffer: DeviceBuffer, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Copy `rows` rows of `width` bytes, `pitch` bytes apart, within a buffer, in the stream's order.

        Args:
            buffer: of both places.
            target, source: offsets in the buffer, in bytes. The places do not overlap.
        """
        form = _Copy2D(WidthInBytes=width, Height=rows)
        for side, offset in (("src", source), ("dst", target)):
            setattr(form, f"{side}MemoryType", _DEVICE)
            setattr(form, f"{side}Device", buffer.address + offset)
            setattr(form, f"{side}Pitch", pitch)
        self.call("cuMemcpy2DAsync_v2", ctypes.byref(form), ctypes.c_void_p(self.stream))

    def description(self) -> str:
        """The driver's version and the memory that is left, for messages."""
        version, free, total = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
        try:
            self._check("cuDriverGetVersion", ctypes.byref(version))
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        except (_DriverError, MemoryError):  # after an error of a kernel, every call fails
            return "the driver no longer answers"
        cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the driver is for CUDA {cuda}, {free.value / 2**30:.1f} of {total.value / 2**30:.1f} GiB are free"

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver in this thread, when no other thread has the turn.

        Raises:
            MemoryError: the device has no memory left.
            LockkitError: the driver reports another error.
        """
        with self.turn():
            self._check("cuCtxSetCurrent", self._context)
            self._check(name, *arguments)

    def free(self, name: str, address: int) -> None:
        """Free memory with the driver's function `name`. At the end of the process the driver may be gone already."""
        with self.turn():
            if self._driver.cuCtxSetCurrent(self._context) == 0:
                getattr(self._driver, name)(ctypes.c_void_p(address))

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise MemoryError("the GPU has no memory left")
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(text))
            reason = f"{name}: {(text.value or b'error').decode()} ({code})"
            raise _DriverError(reason)
