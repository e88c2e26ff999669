"""Verify an export: from folders to a `VerifyResult`.

1. Open the export; its files are checked against its manifest.
2. Tell the references apart by their configurations (`references.py`), and load them in float32.
3. Cut held-out text into rows, the same for every model; refuse a reference of another
   vocabulary or tokenizer.
4. Measure (`parity.py`).
5. Hold the figures against the gates (`config.py`).

Memory: each reference in float32, the export, and one batch of logits of each.
"""

from __future__ import annotations

import datetime
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lockkit.errors import UsageError
from lockkit.export.session import ExportSession
from lockkit.files import EXPORT_MANIFEST, sha256_of_file
from lockkit.measure.metrics import Comparison
from lockkit.models.load import load_model
from lockkit.progress import NoProgress, Progress
from lockkit.runners import OnnxRunner, Runner, TorchRunner
from lockkit.text import rows_sha256
from lockkit.verify import parity
from lockkit.verify.config import DEFAULT_GATES, Gates, VerifyConfig
from lockkit.verify.references import SPLIT, Reference, held_out_rows, tell_apart
from lockkit.verify.result import (
    Continuations,
    Fidelity,
    GateOutcome,
    HeldOutText,
    Parity,
    PerplexityFigures,
    VerifyResult,
)
from lockkit.version import git_hash, versions

_CHECK_ROWS = 4  # rows for the cache and padding checks
_MAX_STEPS = 64  # single tokens in the cache check


@dataclass
class Measured:
    """All figures of a verification; the names are `VerifyResult`'s."""

    parity: list[Parity]
    continuations: Continuations | None
    perplexity: PerplexityFigures
    fidelity: Fidelity | None


def verify_export(
    export: str | Path,
    references: list[str],
    config: VerifyConfig | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Compare an export with the PyTorch model it was made from, and with the original.

    Args:
        export: an export's folder.
        references: the original, the locked model, or both, in any order; `demo`, folders or Hub
            ids. A locked export needs the locked model, an unlocked one the original.
        config: what to measure, and the gates.
        progress: told what is being done, see `lockkit.progress`.

    Returns:
        All figures; gates that failed are in `.failed_gates`, no exception is raised for them.

    Raises:
        UsageError: the export is damaged, a reference is missing or belongs to another
            tokenizer, or there is too little text.
    """
    config = config or VerifyConfig()
    progress = progress or NoProgress()
    started = time.monotonic()
    progress.start("loading models and text", 1)
    given = tell_apart([str(reference) for reference in references])
    session = ExportSession(Path(export), provider=config.provider)
    compared = given.made_from(session)
    rows, source = held_out_rows(session, given, config)
    runners = {name: _load(reference, config.provider) for name, reference in given.all().items()}
    progress.finish()
    measured = measure(OnnxRunner(session), runners, compared, rows, config, progress)
    outcomes = judge(gates_of(config, session.manifest.precision), measured)
    return VerifyResult(
        passed=all(outcome.passed for outcome in outcomes),
        export=str(export),
        manifest_sha256=sha256_of_file(session.folder / EXPORT_MANIFEST),
        precision=session.manifest.precision,
        provider=session.provider,
        original=given.original.name if given.original else None,
        locked=given.locked.name if given.locked else None,
        compared_with=compared,
        same_weights=given.all()[compared].has_weights(session.manifest.source_sha256),
        text=HeldOutText(
            source=source,
            split=SPLIT,
            rows=len(rows),
            block_tokens=rows.shape[1],
            token_sha256=rows_sha256(rows),
        ),
        **vars(measured),
        gates=outcomes,
        config=config,
        versions=versions(),
        git_hash=git_hash(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
    )


def measure(
    onnx: Runner,
    references: dict[str, Runner],
    compared_with: str,
    rows: torch.Tensor,
    config: VerifyConfig,
    progress: Progress,
) -> Measured:
    """All figures, over held-out `rows`, `[rows, block]`.

    `references` has `original`, `locked` or both; parity is with the one named `compared_with`.
    """
    block = rows.shape[1]
    reference = references[compared_with]
    vocab_size = reference.logits(rows[:1, :1]).shape[-1]
    batch = parity.batch_rows(block, vocab_size)
    figures = parity.measure_text(onnx, references, compared_with, rows, batch, progress)

    progress.start("cache and padding", 3)
    random = torch.Generator().manual_seed(config.seed)
    some = rows[torch.randperm(len(rows), generator=random)]
    checked = some[: min(_CHECK_ROWS, batch)] if len(some) > 1 else some.repeat(2, 1)
    lengths = torch.randint(1, block, (len(checked),), generator=random).tolist()
    lengths[0], lengths[-1] = block - 1, 1  # the longest and the shortest are always among them
    modes = {"prefill": figures.parity}
    modes["cache_tokens"] = parity.compare_cache_tokens(reference, onnx, checked, min(block // 2, _MAX_STEPS))
    progress.advance()
    modes["cache_chunk"] = parity.compare_cache_chunk(reference, onnx, checked)
    progress.advance()
    modes["padded_batch"] = parity.compare_padded(reference, onnx, checked, lengths)
    progress.finish()

    continuations = None
    if config.prompts:
        prompts = some.repeat(-(-config.prompts // len(some)), 1)[: config.prompts, : max(1, block // 4)]
        continuations = parity.compare_continuations(
            reference, onnx, prompts, config.new_tokens, config.tie_tolerance, batch, progress
        )
    return Measured(
        parity=[_parity(mode, comparison) for mode, comparison in modes.items()],
        continuations=continuations,
        perplexity=_perplexities(figures),
        fidelity=_fidelity(figures.fidelity),
    )


def gates_of(config: VerifyConfig, precision: str) -> Gates:
    """The limits for an export of `precision`."""
    if precision not in DEFAULT_GATES:
        raise UsageError(
            f"no gates are known for precision '{precision}': export with one of {', '.join(DEFAULT_GATES)}"
        )
    return config.gates(precision)


def judge(gates: Gates, measured: Measured) -> list[GateOutcome]:
    """Hold the figures against the limits; a figure that is not finite never passes."""
    outcomes = []

    def check(gate: str, figure: str, value: float, at_most: bool) -> None:
        limit = getattr(gates, gate)
        if limit is not None:
            kept = value <= limit if at_most else value >= limit
            passed = math.isfinite(value) and kept
            outcomes.append(GateOutcome(gate=gate, figure=figure, value=value, limit=limit, passed=passed))

    for mode in measured.parity:
        check("max_kl", mode.mode, mode.kl_divergence, at_most=True)
        check("min_top1", mode.mode, mode.top1_agreement, at_most=False)
    ratios = measured.perplexity
    if ratios.onnx_over_original is not None:
        check("max_perplexity_ratio", "onnx_over_original", ratios.onnx_over_original, at_most=True)
    else:
        check("max_perplexity_ratio", "onnx_over_locked", ratios.onnx_over_locked, at_most=True)
    if measured.continuations is not None:
        check("min_continuations", "identical_or_tied", measured.continuations.identical_or_tied, at_most=False)
    return outcomes


def _parity(mode: str, comparison: Comparison) -> Parity:
    return Parity(
        mode=mode,
        tokens=comparison.tokens,
        max_difference=comparison.max_difference,
        mean_difference=comparison.mean_difference,
        kl_divergence=comparison.kl_divergence,
        top1_agreement=comparison.top1_agreement,
    )


def _perplexities(figures: parity.TextFigures) -> PerplexityFigures:
    values = {name: perplexity.value for name, perplexity in figures.perplexity.items()}

    def ratio(above: str, below: str) -> float | None:
        return values[above] / values[below] if above in values and below in values else None

    return PerplexityFigures(
        predictions=figures.perplexity["onnx"].predictions,
        original=values.get("original"),
        locked=values.get("locked"),
        onnx=values["onnx"],
        locked_over_original=ratio("locked", "original"),
        onnx_over_original=ratio("onnx", "original"),
        onnx_over_locked=ratio("onnx", "locked"),
    )


def _fidelity(comparison: Comparison | None) -> Fidelity | None:
    if comparison is None:
        return None
    return Fidelity(
        tokens=comparison.tokens,
        kl_divergence=comparison.kl_divergence,
        top1_agreement=comparison.top1_agreement,
    )


def _load(reference: Reference, provider: str) -> TorchRunner:
    device = "cuda" if provider == "cuda" and torch.cuda.is_available() else "cpu"
    return TorchRunner(load_model(reference.folder, torch.float32, device)[0])
