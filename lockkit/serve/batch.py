"""The graph and its KV caches: one forward pass for many requests.

Each request has a row. The graphs' GroupQueryAttention takes a row's length from the sum of its
attention mask and stores its keys from position 0 (see `export/session.py`). So rows of different
lengths can share a forward pass, with one buffer of caches for all rows (see `export/rows.py`, which
also holds what differs on a GPU). The rows in use are contiguous from 0, so that a batch is a prefix of
the buffer. When a row ends, the last row in use moves there.

This does not use onnxruntime-genai. Its `Engine` batches continuously only graphs with PagedAttention.
Its builder writes those for CUDA (fp16, bf16) and WebGPU only, and onnxruntime has no CPU kernel for
them. With one of lockkit's graphs, `Engine` 0.18 fails in the first step (`dynamic_batching`:
ENGINE_EXECUTION_FAILURE) or forms static batches: new requests wait until the batch ends, and there are
no seeds and no stop strings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lockkit.errors import LockkitError, UsageError
from lockkit.export.rows import cache_rows
from lockkit.serve.model import open_session

if TYPE_CHECKING:
    import torch

    from lockkit.export.session import ExportSession
    from lockkit.serve.model import ServedModel

PREFILL_TOKENS = 128  # prompt tokens in one forward pass; with more, the other requests would wait longer


class Rows(Protocol):
    """A graph and one KV cache per row.

    A prompt runs in a staging row, in one or several parts (`prefill`). `admit` then moves it to the
    next row that is not in use. `decode` runs one token for each row in use.

    Attributes:
        fused: chains run in the fused operator of `lockkit kernel`.
    """

    fused: bool

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches take when every row is full, in bytes. It is used as rows fill. 0 if it is not known."""

    def prefill(self, tokens: list[int], past: int) -> torch.Tensor:
        """Run the next tokens of a prompt, after `past` others; return the logits after the last one, `[vocab]`."""

    def admit(self, row: int, length: int) -> None:
        """Move a prompt of `length` tokens from the staging row to `row`."""

    def decode(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """Run one token for each of the first rows; return logits `[rows, vocab]`.

        `lengths` are the tokens in each row, including the new one.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Move the `length` tokens of row `source` to row `target`, which is overwritten."""


def open_rows(
    model: ServedModel, rows: int, capacity: int, provider: str, threads: int | None, cuda_graphs: bool = True
) -> Rows:
    """Load the graph: with shared caches if every row still gets the same answer as when it runs alone, else separate.

    Args:
        model: the export.
        rows: most rows in use at the same time.
        capacity: most tokens in a row.
        provider: execution provider, a name in `lockkit.targets.Provider`.
        threads: of one operator on the CPU; None for onnxruntime's choice.
        cuda_graphs: on a GPU, launch each step as one CUDA graph.

    Raises:
        UsageError: the graph cannot be loaded, or the caches do not fit into memory.
    """
    session = open_session(model, provider, threads, cuda_graphs)
    return SharedRows(session, rows, capacity) if session.steps_in_place else SeparateRows(session, rows)


class SharedRows:
    """Rows whose caches share buffers; see `Rows`.

    Args:
        session: the export, with GroupQueryAttention.
        rows: most rows in use at the same time, without the staging row.
        capacity: most tokens in a row.

    Raises:
        UsageError: the caches do not fit into memory.
    """

    def __init__(self, session: ExportSession, rows: int, capacity: int):
        self._session, self.fused = session, session.fused
        try:
            self._rows = cache_rows(session, rows, capacity)
        except (LockkitError, MemoryError) as error:
            raise UsageError(
                f"the caches of {rows} requests of {capacity} tokens do not fit into memory: lower --max-batch, "
                f"--max-prompt-tokens or --max-output-tokens"
            ) from error

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches take when every row is full."""
        return self._rows.nbytes

    def prefill(self, tokens: list[int], past: int) -> torch.Tensor:
        """See `Rows`."""
        return self._run([tokens], [past + len(tokens)], self._rows.staging)[0]

    def admit(self, row: int, length: int) -> None:
        """See `Rows`."""
        self.move(self._rows.staging, row, length)

    def decode(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """See `Rows`."""
        return self._run([[token] for token in tokens], lengths, 0)

    def move(self, source: int, target: int, length: int) -> None:
        """See `Rows`."""
        self._rows.move(source, target, length)

    def _run(self, tokens: list[list[int]], lengths: list[int], first: int) -> torch.Tensor:
        import numpy as np
        import torch

        logits = self._rows.run(np.array(tokens, np.int64), np.array(lengths, np.int64), first)
        kind = getattr(torch, self._session.logits_type.torch)
        # NumPy has no bfloat16: its bits come as integers.
        return torch.from_numpy(logits.view(np.int16)).view(kind) if kind.itemsize == 2 else torch.from_numpy(logits)


class SeparateRows:
    """Rows with separate caches; see `Rows`. They run one after the other, so batches are not faster.

    Args:
        session: the export.
        rows: most rows in use at the same time.
    """

    def __init__(self, session: ExportSession, rows: int):
        self._session, self.fused = session, session.fused
        self._caches: list[Any] = [None] * rows
        self._staging: Any = None
        self.cache_bytes = 0  # not known: caches grow with their rows

    def prefill(self, tokens: list[int], past: int) -> torch.Tensor:
        """See `Rows`."""
        if past == 0:
            self._staging = None
        logits, self._staging = self._forward(tokens, self._staging)
        return logits

    def admit(self, row: int, length: int) -> None:
        """See `Rows`."""
        self._caches[row], self._staging = self._staging, None

    def decode(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """See `Rows`."""
        import torch

        parts = []
        for row, token in enumerate(tokens):
            logits, self._caches[row] = self._forward([token], self._caches[row])
            parts.append(logits)
        return torch.stack(parts)

    def move(self, source: int, target: int, length: int) -> None:
        """See `Rows`."""
        self._caches[target] = self._caches[source]

    def _forward(self, tokens: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        import numpy as np
        import torch

        logits, cache = self._session.forward(np.array([tokens], np.int64), None, cache)
        return torch.from_numpy(logits[0, -1]), cache
