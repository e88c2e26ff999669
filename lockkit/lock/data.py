"""The text of a lock as rows of token ids: for training, for choosing the best state, and for the final measurement.

The three sets come from different splits of one source (lockkit/text). With the source `self` they are sampled from
the teacher with different seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lockkit.errors import UsageError
from lockkit.lock.config import LockConfig
from lockkit.models.load import load_model
from lockkit.text import Need, documents_by_split, read_rows, require_embedded, rows_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lockkit.progress import Progress

MAX_PASSES = 16  # over the training text; less text than this needs is refused
SAMPLING_ROWS = 32  # in a batch
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


def effective_source(config: LockConfig, model: str) -> str:
    """The source of the text for a lock of `model`, with `--data auto` resolved."""
    if config.data != "auto":
        return config.data
    return "stdlib" if model == "demo" else "self"


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
    held_out = max(block, config.validation_tokens)
    needs = {
        "distill": Need(
            max(block, math.ceil(wanted / MAX_PASSES)), wanted, option, f"{option} {wanted:,} in {MAX_PASSES} passes"
        ),
        "validate": Need(held_out, held_out, "--validation-tokens"),
        "evaluate": Need(held_out, held_out, "--validation-tokens"),
    }
    found = documents_by_split(source, column=config.data_column)
    rows = read_rows(tokenizer, found, block, needs, source)
    for part in rows.values():
        require_embedded(tokenizer, part, model_config.vocab_size, source, "--data")
    return DistillationData(source, rows["distill"], rows["validate"], rows["evaluate"])


def _sizes(config: LockConfig, model_config: PreTrainedConfig) -> tuple[int, int]:
    """The tokens in a row, and the tokens to train on."""
    block = min(config.block_tokens, getattr(model_config, "max_position_embeddings", config.block_tokens))
    return block, max(config.tokens, config.end_to_end_tokens, block)


def sample_from_model(
    folder: Path,
    config: LockConfig,
    model_config: PreTrainedConfig,
    device: str,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Sample all three sets of rows from the model in `folder`.

    The whole model is in memory. For a larger model, give text with `--data` instead.

    Returns:
        Token ids, `[rows, block]` each, by their names in `DistillationData`.
    """
    block, wanted = _sizes(config, model_config)
    held_out = math.ceil(config.validation_tokens / block)
    sizes = {"train": math.ceil(wanted / block), "validation": held_out, "evaluation": held_out}
    model, _ = load_model(folder, torch.float32, device)
    return {
        # locks with different seeds use different seeds here, too
        name: sample_rows(model, block, rows, 3 * config.seed + number, progress)
        for number, (name, rows) in enumerate(sizes.items())
    }


@torch.no_grad()
def sample_rows(model: PreTrainedModel, block: int, rows: int, seed: int, progress: Progress) -> torch.Tensor:
    """Sample token ids, `[rows, block]`, from a model at temperature 1, without an end-of-text token.

    Each row starts with the beginning-of-text token. If the model has none, it starts with a random token.

    The tokens depend on the weights, on `config.json` and on `seed`. transformers' `generate` would also apply the
    settings in `generation_config.json` (beams, penalties, forced tokens, ...). So it is not used here.
    """
    device, vocab_size = model.device, model.config.vocab_size
    start = next(iter(_token_ids(model.config.bos_token_id, vocab_size)), None)
    ends = _token_ids(model.config.eos_token_id, vocab_size)
    progress.start("sampling text from the model", rows)
    sampled = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, rows, SAMPLING_ROWS):
            count = min(SAMPLING_ROWS, rows - first)
            ids = torch.randint(0, vocab_size, (count, 1), device=device)
            if start is not None:
                ids[:] = start
            sampled.append(_continued(model, ids, block, ends).cpu())
            progress.advance(count)
    progress.finish(f"{rows * block:,} tokens")
    return torch.cat(sampled)


def _token_ids(given: int | list[int] | None, vocab_size: int) -> list[int]:
    """The entry of a configuration for special tokens as a list. Ids without an embedding are left out."""
    ids = given if isinstance(given, list) else [given]
    return [token for token in ids if token is not None and 0 <= token < vocab_size]


def _continued(model: PreTrainedModel, ids: torch.Tensor, block: int, ends: list[int]) -> torch.Tensor:
    """Continue rows of token ids, `[rows, 1]`, to `[rows, block]`. The tokens `ends` are not sampled."""
    rows, cache = [ids], None
    for _ in range(block - 1):
        output = model(input_ids=rows[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if not logits.isfinite().all():
            raise UsageError("MODEL computes logits that are not finite, so it cannot write the text: change MODEL")
        logits[:, ends] = -torch.inf
        rows.append(torch.multinomial(logits.softmax(-1), 1))
    return torch.cat(rows, 1)
