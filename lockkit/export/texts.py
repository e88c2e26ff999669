"""Texts that grow token by token, for whoever generates text with an export.

The caches of a batch of texts have a fixed size, and each step writes into them in place (`rows.py`). So generation, the
benchmark and the server run the same step, and on a GPU all of them launch the same CUDA graph. Graphs that cannot do that
get new caches in every step (`ExportSession.forward`).
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from lockkit.export.rows import CacheRows, cache_rows
from lockkit.export.tensors import as_float32

if TYPE_CHECKING:
    from lockkit.export.session import Cache, ExportSession

_LEAST_TOKENS = 256  # in a cache; buffers of few sizes serve texts of all lengths


class TextSession:
    """An export that continues texts.

    Args:
        session: the export, with `last_only`.
    """

    def __init__(self, session: ExportSession):
        self._session = session
        # By rows and capacity: buffers of texts that have ended. Their CUDA graphs cannot be released, so they serve again.
        self._spare: dict[tuple[int, int], list[CacheRows]] = defaultdict(list)

    def begin(self, rows: int, tokens: int) -> Texts:
        """A new batch of `rows` texts of at most `tokens` tokens each.

        Raises:
            UsageError: that is longer than the model's context.
            MemoryError: their caches do not fit into the device's memory.
        """
        if not self._session.steps_in_place:
            return Texts(self._session, None)  # `forward` checks the length
        self._session.check_length(tokens)
        capacity = max(_LEAST_TOKENS, 1 << (tokens - 1).bit_length())
        context = self._session.config.get("max_position_embeddings")
        if context:
            capacity = min(capacity, context)
        spare = self._spare[rows, capacity]
        try:
            buffers = spare.pop()  # in one call, since other threads take from this list, too
        except IndexError:
            buffers = cache_rows(self._session, rows, capacity, staging=False)
        texts = Texts(self._session, buffers)
        weakref.finalize(texts, spare.append, buffers)
        return texts


class Texts:
    """A batch of texts of equal length, from `TextSession.begin`. One thread at a time uses it."""

    def __init__(self, session: ExportSession, buffers: CacheRows | None):
        self._session, self._buffers, self._length = session, buffers, 0
        self._cache: Cache | None = None

    def next_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Add tokens to the texts.

        Args:
            tokens: int64 `[rows, seq]`; one for each row after the first call.

        Returns:
            The logits after the last of them, float32 `[rows, vocab]`. Valid until the next call.

        Raises:
            LockkitError: the GPU failed.
        """
        if self._buffers is None:
            logits, self._cache = self._session.forward(tokens, None, self._cache)
            return logits[:, -1]
        self._length += tokens.shape[1]
        lengths = np.full(len(tokens), self._length, np.int64)
        return as_float32(self._buffers.run(tokens, lengths), self._session.logits_type)
