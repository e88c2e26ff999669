"""Text for distillation, as rows of token ids: to train on, to choose a state by, to measure.

The three come from different splits of the same source (lockkit/text.py), or, for `self`, are
sampled from the teacher with different seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lockkit.lock.config import LockConfig
from lockkit.models.load import load_model
from lockkit.text import Need, documents_by_split, read_rows, rows_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
            "train_sha256": rows_sha256(self.train),
            "validation_tokens": self.validation.numel(),
            "validation_sha256": rows_sha256(self.validation),
            "evaluation_tokens": self.evaluation.numel(),
            "evaluation_sha256": rows_sha256(self.evaluation),
        }


def effective_source(config: LockConfig, model: str) -> str:
    """The source of text for a lock of `model`, where `--data auto` is decided."""
    if config.data != "auto":
        return config.data
    return "stdlib" if model == "demo" else "self"


def load_data(
    config: LockConfig, source: str, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> DistillationData:
    """Read the text of all three sets.

    Raises:
        UsageError: there is too little text, or it cannot be read.
    """
    block, wanted = _sizes(config, model_config)
    option = "--tokens" if config.tokens >= config.end_to_end_tokens else "--end-to-end-tokens"
    held_out = max(block, config.validation_tokens)
    needs = {
        "distill": Need(
            max(block, math.ceil(wanted / MAX_PASSES)), wanted, option, f"{option} {wanted:,} in {MAX_PASSES} passes"
        ),
        "validate": Need(held_out, held_out, "--validation-tokens"),
        "evaluate": Need(held_out, held_out, "--validation-tokens"),
    }
    rows = read_rows(tokenizer, documents_by_split(source), block, needs, source)
    return DistillationData(source, rows["distill"], rows["validate"], rows["evaluate"])


def _sizes(config: LockConfig, model_config: PreTrainedConfig) -> tuple[int, int]:
    """Tokens in a row, and tokens to train on."""
    block = min(config.block_tokens, getattr(model_config, "max_position_embeddings", config.block_tokens))
    return block, max(config.tokens, config.end_to_end_tokens, block)


def sample_from_model(
    folder: Path,
    config: LockConfig,
    model_config: PreTrainedConfig,
    device: str,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """All three sets of rows, written by the model in `folder` itself.

    The model is in memory as a whole while it writes; a larger one needs text from `--data`.
    """
    block, wanted = _sizes(config, model_config)
    held_out = math.ceil(config.validation_tokens / block)
    sizes = {"train": math.ceil(wanted / block), "validation": held_out, "evaluation": held_out}
    model, _ = load_model(folder, torch.float32, device)
    return {
        # no two locks share a seed by accident
        name: sample_rows(model, block, rows, 3 * config.seed + number, progress)
        for number, (name, rows) in enumerate(sizes.items())
    }


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
