"""The words of reports and of the documentation, in Markdown. docs/glossary.md and each page are made from this."""

from __future__ import annotations

import re

TERMS = {
    "Amplification": "Cost of the cheapest attack on the lock to a held-out loss, divided by that of the cheapest on the original. Above 1, the lock costs an attacker more.",
    "Attack invalid": "An attack that learns nothing on the original (its positive control). Its figures on the lock do not count.",
    "Block": "One step of a chain: a low-rank update of the stream.",
    "Chain": "The deep low-rank residual network that takes the place of an MLP. In code: `DLRNet`.",
    "Coupling": "How strongly the blocks depend on each other: size (rms) of the stream at the end of a chain over that of the chain's input.",
    "Cost to target": "What a run spent (tokens, operations, seconds, memory) until its held-out loss reached the target.",
    "Depth": "Number of blocks in each chain.",
    "Effective depth": "The fewest blocks per chain of a model that a closed-form unlock makes and that stays near the lock.",
    "Export": "A folder with the ONNX graph of a model and all that runtimes need.",
    "Gain": "The factor with which the stream enters a block's input.",
    "Gate": "A limit on a figure of `lockkit verify`. If it fails, the exit code is 1. (Also a part of an MLP: the gate projection.)",
    "KL divergence": "How far one model's predictions are from another's, in nats per token. 0 means equal.",
    "Lock, locked model": "A model whose MLPs are chains. The *original* is the model it was made from.",
    "NMSE": "Squared error over the variance of what is approximated. 0 is exact, 1 is as bad as the mean.",
    "Original": "The pretrained model. For one layer, its MLP is the *teacher*.",
    "Parity": "Whether the ONNX graph computes what the PyTorch model computes.",
    "Perplexity": "Exponential of the mean loss per token on a text. Lower is better.",
    "Probe": "A part of an audit that measures something and trains nothing.",
    "Rank": "Number of hidden units of a block. The ranks of a chain add up to the MLP's width.",
    "Recipe": "The settings of a lock, or of one run of an audit, as a file.",
    "Reversal": "A backward pass that recomputes the blocks' inputs instead of storing them.",
    "Split": "A share of the documents of a text. Every document belongs to exactly one.",
    "Stream": "What a chain adds up, block by block. Its last state is the output.",
    "Unlock": "An attack that turns a lock into a model that is meant to be cheaper to train, such as one of the original's architecture.",
}


def terms_in(text: str) -> dict[str, str]:
    """The terms that a text uses, with their meanings in plain text."""
    found = {}
    for name, meaning in TERMS.items():
        words = [re.escape(word) for word in name.lower().split(", ")]
        if re.search(rf"\b({'|'.join(words)})s?\b", text.lower()):
            found[name] = re.sub(r"[*`]", "", meaning)
    return found
