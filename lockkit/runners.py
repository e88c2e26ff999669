"""One interface to a language model, for PyTorch and for an ONNX export.

Token ids are int64 tensors, `[batch, seq]`. Logits are float32 tensors on the CPU, `[batch, seq, vocab]`. A cache is what
the runner returned; None starts an empty one. Use each cache once, because PyTorch changes it in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.export.session import ExportSession


class Runner(Protocol):
    """A causal language model that computes logits."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, `[batch, seq, vocab]`, of token ids, `[batch, seq]`, without a cache."""

    def extend(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits, `[batch, seq, vocab]`, of token ids, `[batch, seq]`, that follow those in `cache`; and the new cache."""

    def unequal(self, rows: list[torch.Tensor], next_ids: torch.Tensor) -> list[torch.Tensor]:
        """Logits of rows of unequal lengths, and of one more token per row.

        Args:
            rows: token ids, `[seq]` each.
            next_ids: the token after each row, `[rows]`.

        Returns:
            `[seq + 1, vocab]` for each row, without padding.
        """


class TorchRunner:
    """A PyTorch model. Rows of unequal lengths run one by one without padding, as the reference for padded batches.

    Args:
        model: on any device.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids.to(self.device), use_cache=False).logits.float().cpu()

    @torch.inference_mode()
    def extend(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        output = self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True)
        return output.logits.float().cpu(), output.past_key_values

    def unequal(self, rows: list[torch.Tensor], next_ids: torch.Tensor) -> list[torch.Tensor]:
        longer = [torch.cat([row, token[None]]) for row, token in zip(rows, next_ids, strict=True)]
        return [self.logits(row[None])[0] for row in longer]


class OnnxRunner:
    """An ONNX export in onnxruntime. Rows of unequal lengths run as one batch, padded on the right.

    Args:
        session: the export.
    """

    def __init__(self, session: ExportSession):
        self.session = session

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.extend(ids)[0]

    def extend(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        logits, cache = self.session.forward(ids.numpy(), None, cache)
        return torch.from_numpy(logits), cache

    def unequal(self, rows: list[torch.Tensor], next_ids: torch.Tensor) -> list[torch.Tensor]:
        lengths = np.array([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).numpy()
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        logits, cache = self.session.forward(ids, mask, None)
        # The padding stays masked, and the next token comes after it: [batch, past + 1].
        mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        last, _ = self.session.forward(next_ids[:, None].numpy(), mask, cache)
        return [torch.from_numpy(np.concatenate([logits[i, :length], last[i]])) for i, length in enumerate(lengths)]
