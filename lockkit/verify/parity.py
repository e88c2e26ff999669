"""The comparisons of a verification: a candidate (ONNX) with a reference (PyTorch).

1. `measure_text`: one pass over the held-out rows gives the perplexity of every model, the
   candidate's parity in prefill, and the lock's fidelity to the original.
2. `compare_cache_tokens`, `compare_cache_chunk`, `compare_padded`: the same logits by other
   ways, from a cache that is never empty. The reference is always asked without a cache and
   without padding, so that a fault in either cannot hide by being on both sides.
3. `compare_continuations`: what a user would see, greedy text.

Only one batch of logits a model is alive at a time.
"""

from __future__ import annotations

import torch

from lockkit.measure.metrics import LOGIT_FIGURES
from lockkit.measure.totals import Comparison, Outputs, TextFigures
from lockkit.progress import Progress
from lockkit.runners import Runner
from lockkit.verify.figures import Continuations, Parting

# Float32 logits of one batch: 64 M of them are 256 MB.
_BATCH_LOGITS = 64_000_000
_MAX_BATCH_ROWS = 8


def batch_rows(block_tokens: int, vocab_size: int) -> int:
    """Rows whose logits fit in memory together."""
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_LOGITS // (block_tokens * vocab_size)))


def measure_text(
    candidate: Runner,
    references: dict[str, Runner],
    compared_with: str,
    rows: torch.Tensor,
    batch: int,
    progress: Progress,
) -> tuple[TextFigures, Comparison]:
    """Over `rows`, `[rows, block]`: perplexities and fidelity, and the candidate's parity in prefill.

    `references` has `original`, `locked` or both; the candidate, `onnx`, is compared with `compared_with`.
    """
    pairs = [("original", "locked")] if len(references) == 2 else []
    figures, parity = TextFigures([*references, "onnx"], pairs), Comparison(LOGIT_FIGURES)
    progress.start("held-out text", len(rows))
    for ids in rows.split(batch):
        logits = {name: runner.logits(ids) for name, runner in (references | {"onnx": candidate}).items()}
        figures.add(ids, {name: Outputs(found) for name, found in logits.items()})
        parity.add(logits[compared_with], logits["onnx"])
        progress.advance(len(ids))
    progress.finish()
    return figures, parity


def compare_cache_tokens(reference: Runner, candidate: Runner, rows: torch.Tensor, steps: int) -> Comparison:
    """All but the last `steps` tokens of `rows`, `[rows, block]`, at once; then one by one."""
    result = Comparison(LOGIT_FIGURES)
    expected = reference.logits(rows)
    prefix = rows.shape[1] - steps
    _, cache = candidate.extend(rows[:, :prefix])
    for position in range(prefix, rows.shape[1]):
        logits, cache = candidate.extend(rows[:, position : position + 1], cache)
        result.add(expected[:, position], logits[:, 0])
    return result


def compare_cache_chunk(reference: Runner, candidate: Runner, rows: torch.Tensor) -> Comparison:
    """Half of each row, then the rest but one token in one chunk, then that token; row by row.

    One row at a time: onnxruntime's GroupQueryAttention takes a chunk after a cache for one row only.
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
    """One batch of the first `lengths` tokens of `rows`, `[rows, block]`, and one token more for each."""
    result = Comparison(LOGIT_FIGURES)
    shortened = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    next_ids = torch.stack([row[length] for row, length in zip(rows, lengths, strict=True)])
    pairs = zip(reference.unequal(shortened, next_ids), candidate.unequal(shortened, next_ids), strict=True)
    for expected, logits in pairs:
        result.add(expected, logits)
    return result


def greedy(runner: Runner, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Continue `prompts`, `[prompts, seq]`, with the cache; returns the new ids, `[prompts, new_tokens]`."""
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
    """Greedy continuations of `prompts`, `[prompts, seq]`, and where the two models part."""
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
