"""Verify an export: from folders to a `VerifyResult`.

1. Open the export; its files are checked against its manifest.
2. Tell the references apart by their configurations (`references.py`), and load them in float32.
3. Cut held-out text into rows, the same for every model; refuse a reference of another
   vocabulary or tokenizer.
4. Measure (`parity.py`).
5. Hold the figures against the gates (`figures.py`).

Memory: each reference in float32, the export, and one batch of logits of each.
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import torch

from lockkit.errors import UsageError
from lockkit.export.session import ExportSession
from lockkit.files import EXPORT_MANIFEST, sha256_of_file
from lockkit.measure.records import MeasuredText
from lockkit.models.load import load_model
from lockkit.progress import NoProgress, Progress
from lockkit.runners import OnnxRunner, Runner, TorchRunner
from lockkit.targets import Precision
from lockkit.verify import parity
from lockkit.verify.config import VerifyConfig
from lockkit.verify.figures import Measured, Parity, PerplexityFigures, judge
from lockkit.verify.references import held_out_rows, tell_apart
from lockkit.verify.result import VerifyResult
from lockkit.version import git_hash, versions

_CHECK_ROWS = 4  # rows for the cache and padding checks
_MAX_STEPS = 64  # single tokens in the cache check


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
    limits = config.limits(_precision(session.manifest.precision))
    rows, text = held_out_rows(session, given, config)
    device = config.provider.reference_device
    runners = {
        name: TorchRunner(load_model(reference.folder, torch.float32, device)[0])
        for name, reference in given.all().items()
    }
    progress.finish()
    measured = measure(OnnxRunner(session), runners, compared, rows, text, config, progress)
    outcomes = judge(limits, measured)
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
        text=text,
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
    text: MeasuredText,
    config: VerifyConfig,
    progress: Progress,
) -> Measured:
    """All figures, over held-out `rows`, `[rows, block]`, which `text` describes.

    `references` has `original`, `locked` or both; parity is with the one named `compared_with`.
    """
    block = rows.shape[1]
    reference = references[compared_with]
    batch = parity.batch_rows(block, reference.logits(rows[:1, :1]).shape[-1])
    figures, prefill = parity.measure_text(onnx, references, compared_with, rows, batch, progress)

    progress.start("cache and padding", 3)
    random = torch.Generator().manual_seed(config.seed)
    some = rows[torch.randperm(len(rows), generator=random)]
    checked = some[: min(_CHECK_ROWS, batch)] if len(some) > 1 else some.repeat(2, 1)
    lengths = torch.randint(1, block, (len(checked),), generator=random).tolist()
    lengths[0], lengths[-1] = block - 1, 1  # the longest and the shortest are always among them
    modes = {"prefill": prefill}
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
    values = {name: found.value for name, found in figures.perplexity.items()}
    return Measured(
        parity=[
            Parity(mode=mode, tokens=comparison.tokens, **comparison.figures()) for mode, comparison in modes.items()
        ],
        continuations=continuations,
        perplexity=PerplexityFigures.of(
            figures.perplexity["onnx"].predictions, values["onnx"], values.get("original"), values.get("locked")
        ),
        fidelity=figures.fidelity(text) if figures.comparison else None,
    )


def _precision(name: str) -> Precision:
    """The precision of an export; its row has the default limits."""
    if name not in Precision.__members__:
        raise UsageError(f"no gates are known for precision '{name}': export with one of {', '.join(Precision)}")
    return Precision(name)
