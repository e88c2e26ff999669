"""KV caches of several rows in one buffer, and steps of the graph that run on them in place.

Each cache input has one buffer for all rows, `[rows, kv_heads, capacity, head_size]`. onnxruntime reads it as the past
and writes the new keys and values into it, so a step copies no cache. A batch is a contiguous range of rows. The last row
is for prompts that are read in parts. Only for graphs with `ExportSession.steps_in_place`.

On a GPU, a step of one token for each row is captured as a CUDA graph, and then launched as a whole (`DeviceRows`):

1. Inputs and logits have fixed buffers on the device, and the mask is as wide as the capacity, since a graph runs on the
   same addresses and shapes every time.
2. onnxruntime captures one graph for each size of a batch, when that size first occurs. Sizes are rounded up to powers of
   two. The rows that this adds are not in use; they get one token each.
3. Prompts are not captured: their lengths differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lockkit.export.tensors import Tensor
from lockkit.targets import INT64, ElementType, element_type

if TYPE_CHECKING:
    from lockkit.export.cuda import Gpu
    from lockkit.export.session import ExportSession


class CacheRows(Protocol):
    """Rows with KV caches on the device of a session.

    Attributes:
        staging: number of a further row, for prompts that are read in parts, if it was asked for.
        nbytes: memory of the caches.
    """

    staging: int
    nbytes: int

    def run(self, tokens: np.ndarray, lengths: np.ndarray, first: int = 0) -> np.ndarray:
        """Run the next tokens of the rows from `first` on, and write their keys and values into the caches.

        Args:
            tokens: int64 `[batch, seq]`. If there is a past and `seq` is not 1, `batch` must be 1.
            lengths: int64 `[batch]`, tokens in each row, with the new ones.
            first: number of the first row.

        Returns:
            Logits of the last column of tokens, or, from a graph that selects it, of each row's last token:
            `[batch, vocab]`, in the graph's own type. Valid until the next call.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""


def cache_rows(session: ExportSession, rows: int, capacity: int, staging: bool = True) -> CacheRows:
    """Caches for `rows` rows of at most `capacity` tokens, and with `staging` one row more.

    Raises:
        MemoryError: they do not fit into the device's memory.
    """
    if session.gpu is None:
        return HostRows(session, rows, capacity, staging)
    return DeviceRows(session, session.gpu, rows, capacity, staging)


class HostRows:
    """Rows in the host's memory; see `CacheRows`."""

    def __init__(self, session: ExportSession, rows: int, capacity: int, staging: bool):
        self._session, self.staging = session, rows
        shapes = session.cache_shapes()
        self._kinds = {name: element_type(kind) for name, (_, _, kind) in shapes.items()}
        self._caches = {
            name: np.empty((rows + staging, heads, capacity, size), self._kinds[name].numpy)
            for name, (heads, size, _) in shapes.items()
        }
        self.nbytes = sum(cache.nbytes for cache in self._caches.values())

    def run(self, tokens: np.ndarray, lengths: np.ndarray, first: int = 0) -> np.ndarray:
        """See `CacheRows`."""
        (batch, seq), tokens = tokens.shape, np.ascontiguousarray(tokens)
        mask = _mask(lengths, lengths.max())
        caches = {
            name: Tensor.of(cache[first : first + batch], self._kinds[name]) for name, cache in self._caches.items()
        }
        logits = np.empty(self._session.logits_shape(batch, seq), self._session.logits_type.numpy)
        binding = self._session.bind(
            Tensor.of(tokens, INT64), Tensor.of(mask, INT64), caches, Tensor.of(logits, self._session.logits_type)
        )
        self._session.run_bound(binding)
        return logits[:, -1]

    def move(self, source: int, target: int, length: int) -> None:
        """See `CacheRows`."""
        if source != target:
            for cache in self._caches.values():
                cache[target, :, :length] = cache[source, :, :length]


class DeviceRows:
    """Rows on a GPU; see `CacheRows`. All work and all copies are on the session's stream.

    Other threads use the stream, too. So each call of `run` is one turn of the GPU, with all its copies.
    """

    def __init__(self, session: ExportSession, gpu: Gpu, rows: int, capacity: int, staging: bool):
        self._session, self._gpu, self.staging, self._capacity = session, gpu, rows, capacity
        self._forms = {
            name: ((heads, capacity, size), element_type(kind))
            for name, (heads, size, kind) in session.cache_shapes().items()
        }
        self._caches = {
            name: gpu.buffer((rows + staging) * _row_bytes(shape, kind)) for name, (shape, kind) in self._forms.items()
        }
        self.nbytes = sum(cache.nbytes for cache in self._caches.values())
        vocabulary, kind = session.logits_shape(1, 1)[-1], session.logits_type
        self._host_ids = gpu.pinned((rows, 1), INT64.numpy)
        self._host_mask = gpu.pinned((rows, capacity), INT64.numpy)
        self._host_logits = gpu.pinned((rows, 1, vocabulary), kind.numpy)
        self._ids, self._mask, self._logits = (
            gpu.buffer(array.nbytes) for array in (self._host_ids, self._host_mask, self._host_logits)
        )
        self._steps: dict[int, tuple[Any, int]] = {}  # by the size of the batch: a binding and the number of its graph

    def run(self, tokens: np.ndarray, lengths: np.ndarray, first: int = 0) -> np.ndarray:
        """See `CacheRows`."""
        with self._gpu.turn():
            if tokens.shape[1] == 1 and first == 0:
                return self._step(tokens, lengths)
            return self._prompt(tokens, lengths, first)

    def _prompt(self, tokens: np.ndarray, lengths: np.ndarray, first: int) -> np.ndarray:
        """Any tokens, as their lengths differ from call to call."""
        batch, seq = tokens.shape
        tokens = np.ascontiguousarray(tokens)
        mask = _mask(lengths, lengths.max())
        kind, shape = self._session.logits_type, self._session.logits_shape(batch, seq)
        logits = self._host_logits[:batch] if shape[1] == 1 else np.empty(shape, kind.numpy)
        binding = self._session.bind(
            Tensor.of(tokens, INT64), Tensor.of(mask, INT64), self._cache_tensors(first, batch), Tensor.of(logits, kind)
        )
        self._session.run_bound(binding)
        return logits[:, -1]

    def _step(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """One token for each of the first rows, as one graph."""
        batch = len(tokens)
        size = min(1 << (batch - 1).bit_length(), self.staging)
        self._host_ids[:batch], self._host_ids[batch:size] = tokens, 0
        self._host_mask[:size] = 0
        self._host_mask[batch:size, 0] = 1
        self._host_mask[:batch] = _mask(lengths, self._capacity)
        self._gpu.upload(self._ids, self._host_ids[:size])
        self._gpu.upload(self._mask, self._host_mask[:size])
        if size not in self._steps:
            kind = self._session.logits_type
            place = self._session.device
            binding = self._session.bind(
                Tensor(place, self._ids.address, (size, 1), INT64),
                Tensor(place, self._mask.address, (size, self._capacity), INT64),
                self._cache_tensors(0, size),
                Tensor(place, self._logits.address, (size, *self._host_logits.shape[1:]), kind),
            )
            self._steps[size] = binding, self._session.new_graph()
        self._session.run_bound(*self._steps[size])
        self._gpu.download(self._host_logits[:batch], self._logits)
        return self._host_logits[:batch, 0]

    def _cache_tensors(self, first: int, batch: int) -> dict[str, Tensor]:
        return {
            name: Tensor(
                self._session.device,
                self._caches[name].address + first * _row_bytes(shape, kind),
                (batch, *shape),
                kind,
            )
            for name, (shape, kind) in self._forms.items()
        }

    def move(self, source: int, target: int, length: int) -> None:
        """See `CacheRows`. A row is `[kv_heads, capacity, head_size]`, of which the first `length` tokens are copied."""
        if source == target:
            return
        for name, ((heads, capacity, size), kind) in self._forms.items():
            token = size * np.dtype(kind.numpy).itemsize
            row = heads * capacity * token
            self._gpu.copy(self._caches[name], target * row, source * row, capacity * token, length * token, heads)


def _mask(lengths: np.ndarray, width: int) -> np.ndarray:
    """The attention mask of rows with these lengths, int64 `[batch, width]`."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def _row_bytes(shape: tuple[int, ...], kind: ElementType) -> int:
    return int(np.prod(shape)) * np.dtype(kind.numpy).itemsize
