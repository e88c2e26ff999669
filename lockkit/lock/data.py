"""The text of a lock as rows of token ids: for training, for choosing the best state, and for the final measurement.

The three sets come from different splits of one source (lockkit/text). With the source `self` they are sampled from
the teacher with different seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lockkit.lock.config import LockConfig
from lockkit.lock.sampling import load_for_sampling, sample_rows
from lockkit.text import (
    Need,
    documents_by_split,
    read_rows,
    require_columns,
    require_embedded,
    rows_sha256,
    start_tokens,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lockkit.progress import Progress

OTHER_OPTION = "--other-text"
OTHER_TOKENS = 4_096  # of each other text
MAX_PASSES = 16  # over the training text; less text than this needs is refused
SPLIT_OF_PART = {"train": "distill", "validation": "validate", "evaluation": "evaluate"}


@dataclass(frozen=True)
class DistillationData:
    """The text of a lock.

    Attributes:
        source: the source of the text, as given; `self` if it was sampled from the teacher.
        train: token ids to train on, `[rows, block_tokens]`.
        validation: held-out token ids that choose the best state, `[rows, block_tokens]`.
        evaluation: held-out token ids for the final measurement only, `[rows, block_tokens]`.
    """

    source: str
    train: torch.Tensor
    validation: torch.Tensor
    evaluation: torch.Tensor

    def split(self, part: str) -> str | None:
        """The split of one part, `train`, `validation` or `evaluation`. None if it was sampled from the teacher."""
        return None if self.source == "self" else SPLIT_OF_PART[part]

    def record(self) -> dict[str, Any]:
        """The entry on the data in `lockkit.json`: sizes and hashes, no text."""
        return {
            "source": self.source,
            "splits": None if self.source == "self" else dict(SPLIT_OF_PART),
            "block_tokens": self.train.shape[1],
            "train_tokens": self.train.numel(),
            "train_sha256": rows_sha256(self.train),
            "validation_tokens": self.validation.numel(),
            "validation_sha256": rows_sha256(self.validation),
            "evaluation_tokens": self.evaluation.numel(),
            "evaluation_sha256": rows_sha256(self.evaluation),
        }


def load_data(
    config: LockConfig, source: str, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> DistillationData:
    """Read the text of all three sets.

    Args:
        config: the recipe.
        source: a source of lockkit/text.
        model_config: configuration of the original; it limits the length of a row.
        tokenizer: of the original.

    Raises:
        UsageError: there is too little text, or it cannot be read.
    """
    block, wanted = _sizes(config, model_config)
    option = "--tokens" if config.tokens >= config.end_to_end_tokens else "--end-to-end-tokens"
    held_out = config.validation_tokens
    needs = {
        "distill": Need(
            max(block, math.ceil(wanted / MAX_PASSES)), wanted, option, f"{option} {wanted:,} in {MAX_PASSES} passes"
        ),
        "validate": Need(held_out, held_out, "--validation-tokens"),
        "evaluate": Need(held_out, held_out, "--validation-tokens"),
    }
    require_columns(source, config.data_column)
    found = documents_by_split(source, column=config.data_column)
    rows = read_rows(tokenizer, found, block, needs, source)
    for part in rows.values():
        require_embedded(tokenizer, part, model_config.vocab_size, source, "--data")
    return DistillationData(source, rows["distill"], rows["validate"], rows["evaluate"])


def other_rows(
    config: LockConfig, source: str, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Held-out rows of the texts that a lock is only measured on: `other_texts`, without the distillation text.

    Args:
        config: the recipe.
        source: of the distillation text.
        model_config: configuration of the original.
        tokenizer: of the original.

    Returns:
        Token ids, `[rows, block_tokens]`, by source.

    Raises:
        UsageError: a text that the recipe names itself is too short or cannot be read.
    """
    block, _ = _sizes(config, model_config)
    need = Need(block, max(block, min(OTHER_TOKENS, config.validation_tokens)))
    found = {}
    for name in config.other_texts:
        if name not in (source, "none"):
            documents = documents_by_split(name, OTHER_OPTION, config.data_column)
            rows = read_rows(tokenizer, documents, block, {"evaluate": need}, name, OTHER_OPTION)["evaluate"]
            require_embedded(tokenizer, rows, model_config.vocab_size, name, OTHER_OPTION)
            found[name] = rows
    return found


def sampled_data(
    folder: Path,
    config: LockConfig,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Sample all three sets of rows from the model in `folder` (sampling.py).

    The whole model is in memory. For a larger model, give text with `--data` instead.

    Returns:
        Token ids, `[rows, block]` each, by their names in `DistillationData`.
    """
    block, wanted = _sizes(config, model_config)
    held_out = math.ceil(config.validation_tokens / block)
    sizes = {"train": math.ceil(wanted / block), "validation": held_out, "evaluation": held_out}
    model = load_for_sampling(folder, device)
    start = start_tokens(tokenizer)
    return {
        # locks with different seeds use different seeds here, too
        name: sample_rows(model, block, rows, 3 * config.seed + number, progress, start)
        for number, (name, rows) in enumerate(sizes.items())
    }


def row_tokens(config: LockConfig, model_config: PreTrainedConfig) -> int:
    """The tokens in a row: as many as the recipe says, at most the model's context."""
    return min(config.block_tokens, getattr(model_config, "max_position_embeddings", config.block_tokens))


def _sizes(config: LockConfig, model_config: PreTrainedConfig) -> tuple[int, int]:
    """The tokens in a row, and the tokens to train on."""
    return row_tokens(config, model_config), max(config.tokens, config.end_to_end_tokens)
