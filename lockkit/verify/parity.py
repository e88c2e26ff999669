"""The comparisons of a verification: a candidate (ONNX) with a reference (PyTorch).

1. `measure_text`: one pass over the held-out rows. It gives the perplexity of every model, the candidate's parity in
   prefill, and the fidelity of the locked model to the original.
2. `compare_cache_tokens`, `compare_cache_chunk`, `compare_padded`: the candidate computes the same logits from a cache
   or in a padded batch. The reference always runs without a cache and without padding, so a fault in either cannot be
   on both sides and cancel out.
3. `compare_continuations`: greedy text, as a user would see it.

Only one batch of logits per model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lockkit.measure.metrics import LOGIT_FIGURES
from lockkit.measure.totals import Comparison, Outputs, TextFigures
from lockkit.progress import Progress
from lockkit.runners import Runner
from lockkit.verify.figures import Continuations, Parting

# Logits of one batch: 256 MB in float32.
_BATCH_LOGITS = 64_000_000
_MAX_BATCH_ROWS = 8


def batch_rows(block_tokens: int, vocab_size: int) -> int:
    """The number of rows in a batch, limited by the memory of their logits."""
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_LOGITS // (block_tokens * vocab_size)))


def measure_text(
    candidate: Runner,
    references: Mapping[str, Runner],
    compared_with: str,
    rows: torch.Tensor,
    batch: int,
    progress: Progress,
) -> tuple[TextFigures, Comparison]:
    """Measure perplexities, fidelity, and the candidate's parity in prefill.

    Args:
        candidate: the export; its perplexity is called `onnx`.
        references: `original`, `locked` or both.
        compared_with: name of the reference for parity.
        rows: token ids, `[rows, block]`.
        batch: rows per forward pass.
        progress: counts rows.

    Returns:
        Perplexities and fidelity, and the parity in prefill.
    """
    pairs = [("original", "locked")] if len(references) == 2 else []
    figures, parity = TextFigures([*references, "onnx"], pairs), Comparison(LOGIT_FIGURES)
    progress.start("held-out text", len(rows))
    for ids in rows.split(batch):
        logits = {name: runner.logits(ids) for name, runner in {**references, "onnx": candidate}.items()}
        figures.add(ids, {name: Outputs(found) for name, found in logits.items()})
        parity.add(logits[compared_with], logits["onnx"])
        progress.advance(len(ids))
    progress.finish()
    return figures, parity


def compare_cache_tokens(reference: Runner, candidate: Runner, rows: torch.Tensor, steps: int) -> Comparison:
    """Compare the logits of the last `steps` tokens of `rows`, `[rows, block]`.

    The candidate runs the tokens before them in one call, then one token per call.
    """
    result = Comparison(LOGIT_FIGURES)
    expected = reference.logits(rows)
    prefix = rows.shape[1] - steps
    _, cache = candidate.extend(rows[:, :prefix])
    for position in range(prefix, rows.shape[1]):
        logits, cache = candidate.extend(rows[:, position : position + 1], cache)
        result.add(expected[:, position], logits[:, 0])
    return result


def compare_cache_chunk(reference: Runner, candidate: Runner, rows: torch.Tensor) -> Comparison:
    """Compare the logits of the second half of each row of `rows`, `[rows, block]`.

    The candidate runs the first half in one call, then all but the last token, then the last token. It runs one row at
    a time: with a cache, onnxruntime's GroupQueryAttention takes a chunk of tokens for a single row only.
    """
    result = Comparison(LOGIT_FIGURES)
    prefix = rows.shape[1] // 2
    for row in rows[:, None]:
        expected = reference.logits(row)
        _, cache = candidate.extend(row[:, :prefix])
        chunk, cache = candidate.extend(row[:, prefix:-1], cache)
        last, _ = candidate.extend(row[:, -1:], cache)
        result.add(expected[:, prefix:], torch.cat([chunk, last], dim=1))
    return result


def compare_padded(reference: Runner, candidate: Runner, rows: torch.Tensor, lengths: list[int]) -> Comparison:
    """Compare the logits of rows of unequal lengths in one batch, and of one more token per row.

    Args:
        reference: runs the rows one by one.
        candidate: runs them as a padded batch.
        rows: token ids, `[rows, block]`.
        lengths: tokens of each row in the first call, below `block`.
    """
    result = Comparison(LOGIT_FIGURES)
    shortened = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    next_ids = torch.stack([row[length] for row, length in zip(rows, lengths, strict=True)])
    pairs = zip(reference.unequal(shortened, next_ids), candidate.unequal(shortened, next_ids), strict=True)
    for expected, logits in pairs:
        result.add(expected, logits)
    return result


def greedy(runner: Runner, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Continue `prompts`, `[prompts, seq]`, with a cache. Returns the new ids, `[prompts, new_tokens]`."""
    ids, cache, found = prompts, None, []
    for _ in range(new_tokens):
        logits, cache = runner.extend(ids, cache)
        ids = logits[:, -1:].argmax(dim=-1)
        found.append(ids)
    return torch.cat(found, dim=1)


def compare_continuations(
    reference: Runner,
    candidate: Runner,
    prompts: torch.Tensor,
    new_tokens: int,
    tie_tolerance: float,
    batch: int,
    progress: Progress,
) -> Continuations:
    """Compare greedy continuations.

    Args:
        reference, candidate: the models.
        prompts: token ids, `[prompts, seq]`.
        new_tokens: tokens per continuation.
        tie_tolerance: largest gap between two logits that are a tie.
        batch: prompts per forward pass.
        progress: counts prompts.
    """
    partings = []
    progress.start("greedy continuations", len(prompts))
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        expected, found = greedy(reference, some, new_tokens), greedy(candidate, some, new_tokens)
        for i, prompt in enumerate(some):
            differing = (expected[i] != found[i]).nonzero()
            if len(differing):
                position = int(differing[0])
                before = torch.cat([prompt, expected[i, :position]])
                logits = reference.logits(before[None])[0, -1]
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
