"""Sample text from a model, to distil on where no other text is given.

1. Each row starts with the tokens with which the tokenizer starts a text. Without any, it starts with the model's
   beginning-of-text token, or else with a random token.
2. Many rows are continued at once, token by token, at temperature 1, with the model's cache. A token that ends the text is
   not sampled.
3. A token is drawn in two steps, which give the same distribution: first one of the groups into which the vocabulary is
   divided, by the sum of its probabilities, then a token of that group. A single draw from 262,144 probabilities took
   longer than the model itself.

The tokens depend on the weights, on `config.json` and on the seed. transformers' `generate` would also apply the settings
in `generation_config.json` (beams, penalties, forced tokens, ...). So it is not used here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lockkit.devices import has_fast_bfloat16
from lockkit.errors import UsageError
from lockkit.lock.sizes import ROWS_AT_ONCE
from lockkit.measure.totals import chunks
from lockkit.models.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.progress import Progress

GROUP_TOKENS = 512  # tokens of the vocabulary in a group


def load_for_sampling(folder: Path, device: str) -> PreTrainedModel:
    """The model in `folder`: in bfloat16 if its weights have that dtype and the device is fast at it, else in float32."""
    model, _ = load_model(folder, "auto", device)
    return model if samples_in_bfloat16(model.dtype, model.device) else model.float()


def samples_in_bfloat16(stored: torch.dtype, device: torch.device) -> bool:
    """Whether a model whose weights have the dtype `stored` is sampled from in bfloat16."""
    return stored == torch.bfloat16 and has_fast_bfloat16(device)


@torch.no_grad()
def sample_rows(
    model: PreTrainedModel, block: int, rows: int, seed: int, progress: Progress, start: list[int] | None = None
) -> torch.Tensor:
    """Sample token ids, `[rows, block]`, from a model at temperature 1, without an end-of-text token.

    Args:
        model: a causal language model of transformers.
        block: tokens in a row.
        rows: number of rows.
        seed: of the draws.
        progress: counts tokens.
        start: token ids with which the tokenizer starts a text.

    Raises:
        UsageError: the model computes logits that are not finite.
    """
    vocab_size = model.config.vocab_size
    start = _with_embedding(start or [], vocab_size) or _with_embedding(model.config.bos_token_id, vocab_size)[:1]
    ends = _with_embedding(model.config.eos_token_id, vocab_size)
    generator = torch.Generator(model.device).manual_seed(seed)
    progress.start("sampling text from the model", rows * block)
    sampled = []
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - first)
        if start:
            ids = torch.tensor([start] * count, device=model.device)
        else:
            ids = torch.randint(0, vocab_size, (count, 1), device=model.device, generator=generator)
        sampled.append(_continued(model, ids[:, :block], block, ends, generator, progress).cpu())
    progress.finish(f"{rows * block:,} tokens")
    return torch.cat(sampled)


def _with_embedding(given: int | list[int] | None, vocab_size: int) -> list[int]:
    """Token ids of a configuration as a list. Those without an embedding are left out."""
    ids = given if isinstance(given, list) else [given]
    return [token for token in ids if token is not None and 0 <= token < vocab_size]


def _continued(
    model: PreTrainedModel,
    ids: torch.Tensor,
    block: int,
    ends: list[int],
    generator: torch.Generator,
    progress: Progress,
) -> torch.Tensor:
    """Continue rows of token ids, `[rows, start]`, to `[rows, block]`. The tokens `ends` are not sampled."""
    rows, cache = [ids], None
    progress.advance(ids.numel())
    for _ in range(block - ids.shape[1]):
        output = model(input_ids=rows[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        rows.append(draw(output.logits[:, -1], ends, generator))
        del output  # its logits, before the next step makes others
        progress.advance(len(ids))
    return torch.cat(rows, 1)


def draw(logits: torch.Tensor, never: list[int], generator: torch.Generator) -> torch.Tensor:
    """Draw one token for each row at temperature 1.

    Args:
        logits: `[rows, vocab]`.
        never: tokens that are not drawn.
        generator: of the draws, on the device of `logits`.

    Returns:
        Token ids, `[rows, 1]`.

    Raises:
        UsageError: the logits are not finite.
    """
    drawn, excluded = [], torch.tensor(never, dtype=torch.long, device=logits.device)
    for part in chunks(*logits.shape):
        probabilities = logits[part].to(torch.float32, copy=True).index_fill_(-1, excluded, -torch.inf).softmax(-1)
        probabilities = F.pad(probabilities, (0, -logits.shape[-1] % GROUP_TOKENS)).unflatten(-1, (-1, GROUP_TOKENS))
        sums = probabilities.sum(-1)
        if not sums.isfinite().all():
            raise UsageError("MODEL computes logits that are not finite, so it cannot write the text: change MODEL")
        group = torch.multinomial(sums, 1, generator=generator)
        within = probabilities.gather(1, group[..., None].expand(-1, -1, GROUP_TOKENS))[:, 0]
        drawn.append(group * GROUP_TOKENS + torch.multinomial(within, 1, generator=generator))
        del probabilities  # before those of the next rows
    return torch.cat(drawn)
