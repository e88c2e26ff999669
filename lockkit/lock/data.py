"""Text for distillation, as rows of token ids: to train on, to choose a state by, to measure.

The three come from different splits of the same source (lockkit/text.py), or, for `self`, are
sampled from the teacher with different seeds.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lockkit.errors import UsageError
from lockkit.lock.config import LockConfig
from lockkit.text import documents, token_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lockkit.progress import Progress

# Text is read again for as long as --tokens ask for more, but no more often than this.
MAX_PASSES = 16
SAMPLING_ROWS = 32


@dataclass(frozen=True)
class DistillationData:
    """Rows of token ids `[rows, block_tokens]`, and where they came from."""

    source: str
    train: torch.Tensor
    validation: torch.Tensor
    evaluation: torch.Tensor

    def record(self) -> dict:
        """What `lockkit.json` says of the data: sizes and hashes, no text."""
        return {
            "source": self.source,
            "splits": {"train": "distill", "validation": "validate", "evaluation": "evaluate"}
            if self.source != "self"
            else None,
            "block_tokens": self.train.shape[1],
            "train_tokens": self.train.numel(),
            "train_sha256": _sha256(self.train),
            "validation_tokens": self.validation.numel(),
            "validation_sha256": _sha256(self.validation),
            "evaluation_tokens": self.evaluation.numel(),
            "evaluation_sha256": _sha256(self.evaluation),
        }


def _sha256(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.to(torch.int32).numpy().tobytes()).hexdigest()


def effective_source(config: LockConfig, model: str) -> str:
    if config.data != "auto":
        return config.data
    return "stdlib" if model == "demo" else "self"


def load_data(
    config: LockConfig,
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> DistillationData:
    """Read or sample the text of all three sets.

    Raises:
        UsageError: there is too little text, or it cannot be read.
    """
    block = min(config.block_tokens, getattr(model.config, "max_position_embeddings", config.block_tokens))
    wanted = max(config.tokens, config.end_to_end_tokens, block)
    if source == "self":
        held_out = math.ceil(config.validation_tokens / block)
        sizes = (math.ceil(wanted / block), held_out, held_out)
        seeds = range(3 * config.seed, 3 * config.seed + 3)  # no two locks share one by accident
        sets = [sample_rows(model, block, rows, seed, progress) for rows, seed in zip(sizes, seeds, strict=True)]
        return DistillationData(source, *sets)
    train = token_blocks(tokenizer, documents(source, "distill"), block, wanted)
    if train.numel() * MAX_PASSES < wanted:
        raise UsageError(
            f"{source} has only {train.numel():,} tokens to distil on, --tokens {wanted:,} would repeat them more "
            f"than {MAX_PASSES} times: give more text with --data, or lower --tokens"
        )
    try:
        held_out = [
            token_blocks(tokenizer, documents(source, split), block, config.validation_tokens)
            for split in ("validate", "evaluate")
        ]
    except UsageError as error:
        raise UsageError(
            f"{source} is too short to hold text out of it (13 % of its passages are, by a hash): "
            "give more text with --data, or lower --block-tokens"
        ) from error
    return DistillationData(source, train, *held_out)


@torch.no_grad()
def sample_rows(model: PreTrainedModel, block: int, rows: int, seed: int, progress: Progress) -> torch.Tensor:
    """Sample `[rows, block]` token ids from the model itself at temperature 1.

    Each row starts with the beginning-of-text token, or, where the model has none, with a
    token drawn from the vocabulary.
    """
    device = model.device
    start = model.config.bos_token_id
    start = start[0] if isinstance(start, list) else start
    progress.start("sampling text from the model", rows)
    sampled = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, rows, SAMPLING_ROWS):
            count = min(SAMPLING_ROWS, rows - first)
            prompt = torch.randint(0, model.config.vocab_size, (count, 1), device=device)
            if start is not None:
                prompt[:] = start
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=block - 1,
                max_new_tokens=block - 1,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                pad_token_id=0,
            )
            sampled.append(out.cpu())
            progress.advance(count)
    progress.finish(f"{rows * block:,} tokens")
    return torch.cat(sampled)
