"""The pilot: choose the coupling of every layer, so that all layers together spend a budget of KL divergence.

Two properties make one short measurement enough. The KL that the chains of all layers cause together is close to the sum
of what each causes alone. And that of one layer grows with the square of its coupling.

1. Go through the decoder layers once. At layer i, capture the inputs of its MLP, and start a chain at `PILOT_COUPLING`
   (modulewise.py, before training). Run the hidden states of a few held-out rows through the layer with its chain: this
   is variant i. Run the original, and the variants of the layers before, through the layer as it is.
2. Measure the KL of every variant's logits from the original's.
3. Every layer gets an equal share of the budget: its coupling is `PILOT_COUPLING` * sqrt(share / KL), at most
   `MAX_COUPLING`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lockkit.dlr.net import DLRNet
from lockkit.lock.config import LockConfig
from lockkit.lock.data import DistillationData
from lockkit.lock.meter import mlp_replaced
from lockkit.lock.modulewise import LayerTask, start_chain
from lockkit.lock.sizes import CAPTURED_TOKENS, MEASURED_TOKENS
from lockkit.measure.metrics import kl_divergence
from lockkit.measure.sizes import PIECE_LOGITS
from lockkit.measure.totals import chunks
from lockkit.models.activation_cache import ActivationCache
from lockkit.models.capture import LayerwiseCapture
from lockkit.models.families import mlp_weights
from lockkit.models.layered import StreamedModel
from lockkit.progress import Progress
from lockkit.workers import Workers

PILOT_COUPLING = 0.1
MAX_COUPLING = 1.0


def choose_couplings(
    stream: StreamedModel,
    empty_chain: Callable[[float], DLRNet],
    data: DistillationData,
    config: LockConfig,
    cache: ActivationCache,
    progress: Progress,
) -> list[float]:
    """The coupling of each layer at which all layers together spend `config.max_kl`.

    Args:
        stream: the original.
        empty_chain: returns an untrained chain, given its gain.
        data: chains are fitted on its training rows and measured on its validation rows.
        config: the recipe.
        cache: for the hidden states of the training rows.
        progress: counts layers.

    Raises:
        UsageError: a layer's MLP cannot be distilled, see `start_chain`.
    """
    progress.start("pilot, KL of each layer", 2 * len(stream))
    rows = _spread(data.train, CAPTURED_TOKENS)
    capture = LayerwiseCapture(stream, rows, cache, "pilot", Workers())
    inputs = cache.allocate("pilot-inputs", (*rows.shape, stream.config.hidden_size))
    original, arguments = stream.begin(_spread(data.validation, MEASURED_TOKENS))
    variants: list[torch.Tensor] = []
    for index in range(len(stream)):
        with stream.layer(index) as layer, torch.no_grad():
            capture.advance(index, layer, inputs)
            tokens = inputs.flatten(0, 1)
            weights = mlp_weights(layer.mlp, stream.family)
            task = LayerTask(index, layer.mlp, weights, empty_chain, tokens, tokens, PILOT_COUPLING)
            with mlp_replaced(layer, start_chain(task, config)):
                changed = layer(original, **arguments[index])
            variants = [layer(hidden, **arguments[index]) for hidden in variants] + [changed]
            original = layer(original, **arguments[index])
        progress.advance()
    for name in ("pilot-hidden-0", "pilot-inputs"):
        cache.release(name)
    share = config.max_kl / len(stream)
    couplings = [_coupling(kl, share) for kl in _divergences(stream, original, variants, progress)]
    progress.finish(f"couplings {min(couplings):.3f} to {max(couplings):.3f} for a KL of {config.max_kl:g}")
    return couplings


def _coupling(kl: float, share: float) -> float:
    return min(MAX_COUPLING, PILOT_COUPLING * math.sqrt(share / kl)) if kl > 0 else MAX_COUPLING


def _spread(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Rows of about this many tokens, evenly spread over all `rows`, `[rows, block]`."""
    count = max(1, min(len(rows), tokens // rows.shape[1]))
    return rows[torch.arange(count) * len(rows) // count]


@torch.no_grad()
def _divergences(
    stream: StreamedModel, original: torch.Tensor, variants: list[torch.Tensor], progress: Progress
) -> list[float]:
    """Mean KL from the original of each variant, in nats per token, given last hidden states, `[rows, block, hidden]`."""
    states, others = original.flatten(0, 1), [variant.flatten(0, 1) for variant in variants]
    vocab_size, found = stream.config.vocab_size, []
    for other in others:
        total = 0.0
        for part in chunks(len(states), vocab_size):
            own, changed = stream.head(states[part]), stream.head(other[part])
            for piece in chunks(len(own), vocab_size, PIECE_LOGITS):
                total += kl_divergence(own[piece], changed[piece]).sum().item()
        found.append(total / len(states))
        progress.advance()
    return found
