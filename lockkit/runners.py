"""One interface to a language model, for PyTorch and for an ONNX export.

Token ids are int64 tensors, `[batch, seq]`. Logits are float32 tensors on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lockkit.export.texts import Texts as ExportTexts
from lockkit.export.texts import TextSession
from lockkit.measure.totals import Outputs
from lockkit.models.layered import LayeredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.export.session import ExportSession


class Runner(Protocol):
    """A causal language model."""

    def outputs(self, ids: torch.Tensor) -> Outputs:
        """The outputs at all positions of token ids, `[batch, seq]`, without a cache."""

    def begin(self, rows: int, tokens: int) -> Texts:
        """A batch of `rows` texts of at most `tokens` tokens each.

        Raises:
            MemoryError: their caches do not fit into the device's memory.
        """


class Texts(Protocol):
    """A batch of texts of equal length that grow together."""

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Add token ids, `[rows, seq]`; after the first call, one for each row. Returns the logits after the last of them,
        `[rows, vocab]`, which are valid until the next call."""


class TorchRunner:
    """A PyTorch model.

    Args:
        model: on any device.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.device = next(model.parameters()).device
        self._layered = LayeredModel(model, self.device)

    @torch.inference_mode()
    def outputs(self, ids: torch.Tensor) -> Outputs:
        """Hidden states, `[batch, seq, hidden]`, and the head. So the logits of all positions are never in memory."""
        return Outputs(self._layered.hidden(ids), self._head)

    @torch.inference_mode()
    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._layered.head(hidden).float().cpu()

    def begin(self, rows: int, tokens: int) -> Texts:
        return _TorchTexts(self.model, self.device)


class _TorchTexts:
    """Texts of a PyTorch model. Its cache grows with them."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self._model, self._device, self._cache = model, device, None

    @torch.inference_mode()
    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids.to(self._device), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        return output.logits[:, -1].float().cpu()


class OnnxRunner:
    """An ONNX export in onnxruntime.

    Args:
        session: the export. With `last_only`, all logits are those of last tokens, so there are no `outputs`.
    """

    def __init__(self, session: ExportSession):
        self.session, self._texts = session, TextSession(session)

    def outputs(self, ids: torch.Tensor) -> Outputs:
        return Outputs(self.extend(ids)[0])

    def extend(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits, `[batch, seq, vocab]`, of token ids, `[batch, seq]`, that follow those in `cache`; and the new cache.

        None is an empty cache. Use each cache once.
        """
        logits, cache = self.session.forward(ids.numpy(), None, cache)
        return torch.from_numpy(logits), cache

    def begin(self, rows: int, tokens: int) -> Texts:
        return _OnnxTexts(self._texts.begin(rows, tokens))

    def unequal(self, rows: list[torch.Tensor], next_ids: torch.Tensor) -> list[torch.Tensor]:
        """Logits of rows of unequal lengths and of one more token per row. The rows run as one batch, padded on the right.

        Args:
            rows: token ids, `[seq]` each.
            next_ids: the token after each row, `[rows]`.

        Returns:
            `[seq + 1, vocab]` for each row, without padding. With `last_only`, those of its last two tokens, `[2, vocab]`.
        """
        lengths = np.array([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).numpy()
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        logits, cache = self.session.forward(ids, mask, None)
        # The padding stays masked, and the next token comes after it: [batch, past + 1].
        mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        last, _ = self.session.forward(next_ids[:, None].numpy(), mask, cache)
        return [torch.from_numpy(np.concatenate([logits[i, :length], last[i]])) for i, length in enumerate(lengths)]


class _OnnxTexts:
    """Texts of an export."""

    def __init__(self, texts: ExportTexts):
        self._texts = texts

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._texts.next_logits(ids.numpy()))
