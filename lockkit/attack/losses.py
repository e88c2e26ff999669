"""Losses of a model on a task: of a batch, and of held-out rows.

Held-out losses are measured in parts of bounded size, with logits only where a label counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lockkit.attack.savers import base_of
from lockkit.attack.tasks import IGNORED, Rows

EVALUATION_ROWS = 16
EVALUATION_LOGITS = 2**25  # in one forward pass: 128 MiB


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits, `[batch, seq, vocab]`, for `ids`, `[batch, seq]`. The model may return them in an output object."""
    out = model(input_ids=ids, use_cache=False)
    return out if isinstance(out, torch.Tensor) else out.logits


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss over the labels that count, in nats.

    Args:
        logits: `[batch, seq, vocab]`.
        labels: `[batch, seq]`; `IGNORED` for tokens that do not count.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Rows, device: torch.device) -> float:
    """Mean loss over all labels of `rows`, in nats per label."""
    was_training = model.training
    model.eval()
    total = count = 0.0
    part = _evaluation_rows(model, rows.ids.shape[1])
    for ids, labels in zip(rows.ids.split(part), rows.labels.split(part), strict=True):
        counted = int((labels[:, 1:] != IGNORED).sum())
        if counted:
            total += _loss_where_it_counts(model, ids.to(device), labels.to(device)).item() * counted
            count += counted
    model.train(was_training)
    return total / count


def _evaluation_rows(model: nn.Module, block: int) -> int:
    """Rows in one forward pass, so that their logits are at most `EVALUATION_LOGITS` numbers."""
    vocab = getattr(getattr(model, "config", None), "vocab_size", 1) or 1
    return max(1, min(EVALUATION_ROWS, EVALUATION_LOGITS // (vocab * block)))


def _loss_where_it_counts(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`task_loss`, with logits only at the positions whose labels count. They are picked before the model's head."""
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[:, :-1] = labels[:, 1:] != IGNORED
    find = getattr(base_of(model), "get_output_embeddings", None)
    head = find() if find else None
    if head is None:
        return task_loss(logits_of(model, ids), labels)
    # Hooks run in the order in which they were added, so one that an attack has put there sees all positions.
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0][counts][None], *args[1:]))
    try:
        logits = logits_of(model, ids)[0]
    finally:
        hook.remove()
    return F.cross_entropy(logits.float(), labels[:, 1:][counts[:, :-1]])
