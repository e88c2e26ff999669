"""The comparisons of a verification: a candidate (ONNX) with a reference (PyTorch).

1. `measure_text`: one pass over the held-out rows. It gives the perplexity of every model, the candidate's parity in
   prefill, and the fidelity of the locked model to the original.
2. `compare_cache_tokens`, `compare_cache_chunk`, `compare_padded`: the candidate computes the same logits from a cache
   or in a padded batch. The reference always runs without a cache and without padding, so a fault in either cannot be
   on both sides and cancel out. `compare_padded` also compares the graph that generates text.
3. `compare_continuations`: greedy text, as a user would see it.

In memory at a time: one batch of the candidate's logits, and a chunk of each reference's (`lockkit.measure.totals`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lockkit.measure.metrics import LOGIT_FIGURES
from lockkit.measure.totals import Comparison, Outputs, TextFigures, chunks
from lockkit.progress import Progress
from lockkit.runners import OnnxRunner, Runner
from lockkit.verify.figures import Continuations, Parting

# Logits of one batch: 256 MB in float32.
_BATCH_LOGITS = 64_000_000
# Logits of each reference in a chunk: 128 MB in float32. A head of 262,144 tokens computes 122 positions in 0.7 of the time
# that twice 61 take.
_CHUNK_LOGITS = 32_000_000
MAX_BATCH_ROWS = 8
_CHECK_ROWS = 4  # in the cache and padding checks
_LAST_ROWS = 24  # in the check of the last positions


def batch_rows(block_tokens: int, vocab_size: int) -> int:
    """The number of rows in a batch, limited by the memory of their logits."""
    return max(1, min(MAX_BATCH_ROWS, _BATCH_LOGITS // (block_tokens * vocab_size)))


def rows_to_check(rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The first of `rows`, `[rows, block]`, for the checks with a cache and padding: at least two, since one has no padding.

    Where the logits of two rows need too much memory, the rows are shortened.
    """
    count = min(_CHECK_ROWS, max(2, batch_rows(rows.shape[1], vocab_size)))
    several = rows if len(rows) > 1 else rows.repeat(2, 1)
    return several[:count, : max(8, _BATCH_LOGITS // (count * vocab_size))]


def rows_of_last_positions(rows: torch.Tensor) -> torch.Tensor:
    """The first of `rows`, `[rows, block]`, for the check of the last positions.

    Each gives two positions only, and the limits are for averages. So there are many rows; their logits are few.
    """
    return (rows if len(rows) > 1 else rows.repeat(2, 1))[:_LAST_ROWS]


def measure_text(
    candidate: Runner,
    references: Mapping[str, Runner],
    compared_with: str,
    rows: torch.Tensor,
    batch: int,
    progress: Progress,
) -> TextFigures:
    """Measure perplexities, fidelity, and the candidate's parity in prefill.

    Args:
        candidate: the export; it is called `onnx`.
        references: `original`, `locked` or both.
        compared_with: name of the reference for parity.
        rows: token ids, `[rows, block]`.
        batch: rows per forward pass.
        progress: counts rows.

    Returns:
        Perplexities, fidelity, and the parity in prefill, which is the comparison of `compared_with` and `onnx`.
    """
    parity = compared_with, "onnx"
    pairs = [parity, *([("original", "locked")] if len(references) == 2 else [])]
    figures = TextFigures([*references, "onnx"], pairs, {parity: LOGIT_FIGURES}, _CHUNK_LOGITS)
    progress.start("held-out text", len(rows))
    for ids in rows.split(batch):
        figures.add(ids, {name: runner.outputs(ids) for name, runner in {**references, "onnx": candidate}.items()})
        progress.advance(len(ids))
    progress.finish()
    return figures


def compare_cache_tokens(expected: Outputs, candidate: OnnxRunner, rows: torch.Tensor, steps: int) -> Comparison:
    """Compare the logits of the last `steps` tokens of `rows`, `[rows, block]`.

    The candidate runs the tokens before them in one call, then one token per call.

    Args:
        expected: the reference's outputs for `rows`.
        candidate: the export.
        rows: token ids.
        steps: at least 1.
    """
    result = Comparison(LOGIT_FIGURES)
    prefix = rows.shape[1] - steps
    _, cache = candidate.extend(rows[:, :prefix])
    for position in range(prefix, rows.shape[1]):
        logits, cache = candidate.extend(rows[:, position : position + 1], cache)
        _add(result, expected, expected.states[:, position], logits[:, 0])
    return result


def compare_cache_chunk(expected: Outputs, candidate: OnnxRunner, rows: torch.Tensor) -> Comparison:
    """Compare the logits of the second half of each row of `rows`, `[rows, block]`.

    The candidate runs the first half in one call, then all but the last token, then the last token. It runs one row at
    a time: with a cache, onnxruntime's GroupQueryAttention takes a chunk of tokens for a single row only. `expected`
    are the reference's outputs for `rows`.
    """
    result = Comparison(LOGIT_FIGURES)
    prefix = rows.shape[1] // 2
    for row, states in zip(rows[:, None], expected.states, strict=True):
        _, cache = candidate.extend(row[:, :prefix])
        chunk, cache = candidate.extend(row[:, prefix:-1], cache)
        _add(result, expected, states[prefix:-1], chunk[0])
        last, _ = candidate.extend(row[:, -1:], cache)
        _add(result, expected, states[-1:], last[0])
    return result


def compare_padded(
    expected: Outputs, candidate: OnnxRunner, rows: torch.Tensor, lengths: list[int], last_only: bool = False
) -> Comparison:
    """Compare the logits of rows of unequal lengths in one batch, and of one more token per row.

    Args:
        expected: the reference's outputs for `rows`. What comes after a position does not change its logits.
        candidate: runs the rows as a padded batch.
        rows: token ids, `[rows, block]`.
        lengths: tokens of each row in the first call, below `block`.
        last_only: the candidate has the logits of the last token in each call only.
    """
    result = Comparison(LOGIT_FIGURES)
    shortened = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    next_ids = torch.stack([row[length] for row, length in zip(rows, lengths, strict=True)])
    found = candidate.unequal(shortened, next_ids)
    for states, length, logits in zip(expected.states, lengths, found, strict=True):
        _add(result, expected, states[length - 1 if last_only else 0 : length + 1], logits)
    return result


def _add(result: Comparison, expected: Outputs, states: torch.Tensor, logits: torch.Tensor) -> None:
    """Add the candidate's logits, `[tokens, vocab]`, and the reference's, which its head computes from `states`."""
    for part in chunks(len(logits), logits.shape[-1]):
        result.add(expected.head(states[part]), logits[part])


def greedy(runner: Runner, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Continue `prompts`, `[prompts, seq]`, with a cache. Returns the new ids, `[prompts, new_tokens]`."""
    count, length = prompts.shape
    texts, ids, found = runner.begin(count, length + new_tokens), prompts, []
    for _ in range(new_tokens):
        ids = texts.next_logits(ids).argmax(dim=-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, dim=1)


def compare_continuations(
    reference: Runner,
    candidate: Runner,
    prompts: torch.Tensor,
    new_tokens: int,
    tie_tolerance: float,
    progress: Progress,
) -> Continuations:
    """Compare greedy continuations.

    Args:
        reference, candidate: the models.
        prompts: token ids, `[prompts, seq]`.
        new_tokens: tokens per continuation.
        tie_tolerance: largest gap between two logits that are a tie.
        progress: counts prompts.
    """
    partings = []
    progress.start("greedy continuations", len(prompts))
    for start in range(0, len(prompts), MAX_BATCH_ROWS):
        some = prompts[start : start + MAX_BATCH_ROWS]
        expected, found = greedy(reference, some, new_tokens), greedy(candidate, some, new_tokens)
        for i, prompt in enumerate(some):
            differing = (expected[i] != found[i]).nonzero()
            if len(differing):
                position = int(differing[0])
                before = torch.cat([prompt, expected[i, :position]])
                logits = reference.begin(1, len(before)).next_logits(before[None])[0]
                gap = (logits[expected[i, position]] - logits[found[i, position]]).item()
                partings.append(Parting(prompt=start + i, position=position, gap=gap, tied=abs(gap) <= tie_tolerance))
        progress.advance(len(some))
    progress.finish()
    ties = sum(parting.tied for parting in partings)
    return Continuations(
        prompts=len(prompts),
        prompt_tokens=prompts.shape[1],
        new_tokens=new_tokens,
        identical=1 - len(partings) / len(prompts),
        identical_or_tied=1 - (len(partings) - ties) / len(prompts),
        partings=partings,
    )
