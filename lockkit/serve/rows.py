"""The graph and its caches: many requests, one forward pass.

Each request has a row. The graphs' GroupQueryAttention takes a row's length from the sum of its
attention mask and lays its keys out from position 0 (see `export/session.py`), so rows of any
lengths can share a pass. Their caches are the rows of one buffer a layer, `[rows, kv_heads,
capacity, head_size]`, which onnxruntime reads as the past and writes as the present, in place: a
step copies nothing but the new keys and values. Rows in use are always the first ones, so that a
batch is a prefix of the buffer; a row that ends is filled with the last one.

Not onnxruntime-genai: its `Engine` batches continuously only graphs with PagedAttention, which its
builder writes for CUDA (fp16, bf16) and WebGPU alone, and for which onnxruntime has no CPU kernel.
Given one of our graphs, `Engine` 0.18 either fails (`dynamic_batching`: ENGINE_EXECUTION_FAILURE in
the first step) or forms static batches, which newcomers wait for, without seeds or stop strings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError
from lockkit.export.session import torch_type
from lockkit.serve.model import open_session

if TYPE_CHECKING:
    import torch

    from lockkit.export.session import ExportSession
    from lockkit.serve.model import ServedModel

PREFILL_TOKENS = 128  # of a prompt, in one pass; more would keep the other requests waiting


def open_rows(model: ServedModel, rows: int, capacity: int, provider: str, threads: int | None) -> SharedRows:
    """The fastest way to run this export that gives every row the answer it would get alone.

    Raises:
        UsageError: the graph cannot be loaded, or the caches do not fit into memory.
    """
    session = open_session(model, provider, threads)
    # Two tables of positions, chosen by the longest row of a batch; or attention with positions as
    # an input, which does not count a row's length.
    mixes_badly = (model.config.get("rope_parameters") or {}).get("rope_type") == "longrope"
    if mixes_badly or not session.counts_positions:
        return SeparateRows(session, rows)
    return SharedRows(session, rows, capacity)


class SharedRows:
    """Rows whose caches share one buffer.

    Args:
        session: the export; GroupQueryAttention only.
        rows: that can be in use, besides the one that prompts are computed in.
        capacity: tokens a row can hold.
    """

    def __init__(self, session: ExportSession, rows: int, capacity: int):
        import torch

        self._session, self.fused = session, session.fused
        self._staging = rows  # a prompt is computed in the last row and then moved
        try:
            self._caches = {
                name: torch.empty((rows + 1, heads, capacity, size), dtype=torch_type(kind), device=session.device)
                for name, (heads, size, kind) in session.cache_shapes().items()
            }
        except (RuntimeError, MemoryError) as error:
            raise UsageError(
                f"the caches of {rows} requests of {capacity} tokens do not fit into memory: lower --max-batch, "
                f"--max-prompt-tokens or --max-output-tokens"
            ) from error

    @property
    def cache_bytes(self) -> int:
        """What the caches take when every row is full; memory is used as rows fill."""
        return sum(cache.nbytes for cache in self._caches.values())

    def prefill(self, tokens: list[int], past: int) -> torch.Tensor:
        """Run the next tokens of a prompt, of which `past` have been run; logits `[vocab]` after the last."""
        return self._run([tokens], [past + len(tokens)], slice(self._staging, self._staging + 1))[0, -1]

    def admit(self, row: int, length: int) -> None:
        """Move the finished prompt of `length` tokens to `row`."""
        self.move(self._staging, row, length)

    def decode(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """Run one token for each of the first rows; `lengths` with it. Logits `[rows, vocab]`."""
        return self._run([[token] for token in tokens], lengths, slice(0, len(tokens)))[:, 0]

    def move(self, source: int, target: int, length: int) -> None:
        if source != target:
            for cache in self._caches.values():
                cache[target, :, :length] = cache[source, :, :length]

    def _run(self, tokens: list[list[int]], lengths: list[int], rows: slice) -> torch.Tensor:
        import numpy as np

        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        caches = {name: cache[rows] for name, cache in self._caches.items()}
        return self._session.step(np.array(tokens, np.int64), mask.astype(np.int64), caches)


class SeparateRows:
    """Rows with a cache of their own, run one after the other: no gain from batches, the same answers."""

    def __init__(self, session: ExportSession, rows: int):
        self._session, self.fused = session, session.fused
        self._caches: list[Any] = [None] * rows
        self._staging: Any = None
        self.cache_bytes = 0  # grows with the rows

    def prefill(self, tokens: list[int], past: int) -> torch.Tensor:
        if past == 0:
            self._staging = None
        logits, self._staging = self._forward(tokens, self._staging)
        return logits

    def admit(self, row: int, length: int) -> None:
        self._caches[row], self._staging = self._staging, None

    def decode(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        import torch

        parts = []
        for row, token in enumerate(tokens):
            logits, self._caches[row] = self._forward([token], self._caches[row])
            parts.append(logits)
        return torch.stack(parts)

    def move(self, source: int, target: int, length: int) -> None:
        self._caches[target] = self._caches[source]

    def _forward(self, tokens: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        import numpy as np
        import torch

        logits, cache = self._session.forward(np.array([tokens], np.int64), None, cache)
        return torch.from_numpy(logits[0, -1]), cache
