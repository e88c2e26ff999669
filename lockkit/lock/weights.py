"""Check the weights of the original before any work: they must be finite, and not too large to distil."""

from __future__ import annotations

import torch

from lockkit.errors import UsageError
from lockkit.models.layered import StreamedModel

LARGEST_WEIGHT = torch.finfo(torch.float16).max  # models that were trained can be stored in half precision


def require_finite(stream: StreamedModel, model: str, dtype: torch.dtype) -> None:
    """Check that all weights are finite, also in the dtype of the locked checkpoint, and at most `LARGEST_WEIGHT`.

    Larger ones overflow in the squares of a loss, or in its gradients. Reads every layer once.

    Args:
        stream: the original.
        model: its name, for the error.
        dtype: of the locked checkpoint.

    Raises:
        UsageError: a weight is not finite or too large. The message names its tensor.
    """
    for name, value in stream.model.named_parameters():
        if not value.is_meta:
            _require_finite(name, value, model, dtype)
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            for name, value in layer.named_parameters():
                _require_finite(f"model.layers.{index}.{name}", value, model, dtype)


def _require_finite(name: str, value: torch.Tensor, model: str, dtype: torch.dtype) -> None:
    largest = torch.stack(value.aminmax()).abs().max()  # without a copy of the tensor; NaN if any value is
    if not largest.isfinite():
        raise UsageError(f"the tensor {name} of {model} has values that are not finite: change MODEL")
    if not largest.to(dtype).isfinite():
        shown = str(dtype).removeprefix("torch.")
        raise UsageError(f"the tensor {name} of {model} has values too large for {shown}: change --dtype")
    if largest > LARGEST_WEIGHT:
        raise UsageError(
            f"the tensor {name} of {model} has values up to {largest.item():.2g}, which are too large to distil (at most "
            f"{LARGEST_WEIGHT:.0f}): change MODEL"
        )
