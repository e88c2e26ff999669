"""Verify an export: from folders to a `VerifyResult`.

1. Open the export and compare its files with its manifest.
2. Find the references (`references.py`) and load them in float32.
3. Cut held-out text into rows, the same for every model. Refuse a reference with another vocabulary or tokenizer.
4. Measure (`parity.py`).
5. Compare the figures with the gates (`figures.py`).

Steps 1 to 4 use the export's graph with the logits of all positions (lockkit/export/last_position.py). Then the graph
that generates text takes its place, for its own parity and for the continuations.

In memory at the same time: each reference in float32, the export, and one batch of its logits.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lockkit.errors import UsageError
from lockkit.export.manifest import unlisted_files
from lockkit.export.session import ExportSession
from lockkit.files import EXPORT_MANIFEST, sha256_of_file
from lockkit.measure.records import MeasuredText
from lockkit.measure.totals import Comparison, TextFigures
from lockkit.models.load import load_model
from lockkit.models.weight_files import listed
from lockkit.progress import NoProgress, Progress
from lockkit.runners import OnnxRunner, Runner, TorchRunner
from lockkit.settings import option_of
from lockkit.targets import LOCK_GATES, Precision
from lockkit.verify import parity
from lockkit.verify.config import VerifyConfig
from lockkit.verify.figures import Measured, Mode, Parity, PerplexityFigures, judge
from lockkit.verify.references import References, find_references, held_out_rows
from lockkit.verify.result import VerifyResult
from lockkit.version import git_hash, versions

_MAX_STEPS = 64  # of one token, in the cache check


def verify_export(
    export: str | Path,
    references: list[str],
    config: VerifyConfig | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Compare an export with the PyTorch model it was made from, and with the original.

    Args:
        export: an export's folder.
        references: the original, the locked model, or both, in any order: `demo`, folders or Hub ids. The export of a
            locked model needs the locked model; the export of an original needs the original.
        config: the settings and gates.
        progress: reports the steps.

    Returns:
        All figures. Failed gates are in `failed_gates`; they raise no exception.

    Raises:
        UsageError: the export is damaged, a reference is missing or has another tokenizer, or there is too little text.
    """
    config = config or VerifyConfig()
    progress = progress or NoProgress()
    started = time.monotonic()
    progress.start("loading models and text", 1)
    given = find_references([str(reference) for reference in references])
    session = ExportSession(Path(export), provider=config.provider)
    manifest = session.manifest
    assert manifest is not None  # a session that checks its files has one
    compared = given.source_of(manifest)
    _require_both(given, config)
    limits = config.limits(_precision(manifest.precision))
    rows, text = held_out_rows(session, given, config)
    if text.block_tokens < config.block_tokens:
        progress.say(
            f"rows have {text.block_tokens} tokens, the model's context, not --block-tokens {config.block_tokens}"
        )
    if text.tokens < config.tokens // text.block_tokens * text.block_tokens:
        progress.say(f"{text.source} has only {text.tokens:,} held-out tokens, fewer than --tokens {config.tokens:,}")
    if unlisted := unlisted_files(session.folder, manifest):
        progress.say(f"not part of the export, and not read: {listed(unlisted)} in {export}")
    device = config.provider.reference_device
    runners = {
        name: TorchRunner(load_model(reference.folder, torch.float32, device)[0])
        for name, reference in given.all().items()
    }
    progress.finish()
    scored = score(OnnxRunner(session), runners, compared, rows, config, progress)
    provider, folder = session.provider, session.folder
    del session  # so that one graph is in memory at a time
    generating = ExportSession(folder, config.provider, check=False, last_only=True)
    measured = with_generation(scored, OnnxRunner(generating), runners[compared], rows, text, config, progress)
    outcomes = judge(limits, measured)
    return VerifyResult(
        passed=all(outcome.passed for outcome in outcomes),
        export=str(export),
        manifest_sha256=sha256_of_file(folder / EXPORT_MANIFEST),
        source_sha256=dict(manifest.source_sha256),
        precision=manifest.precision,
        provider=provider,
        original=given.original.name if given.original else None,
        locked=given.locked.name if given.locked else None,
        compared_with=compared,
        same_weights=given.all()[compared].has_weights(manifest.source_sha256),
        text=text,
        **vars(measured),
        gates=outcomes,
        config=config,
        versions=versions(),
        git_hash=git_hash(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
    )


def _require_both(given: References, config: VerifyConfig) -> None:
    """Check that the gates that need both references, and that a user set, have both.

    Raises:
        UsageError: one reference is missing.
    """
    off = {"max_lock_kl": (None, float("inf")), "min_lock_top1": (None, 0.0)}
    for name in LOCK_GATES:
        if getattr(config, name) not in off[name] and len(given.all()) < 2:
            raise UsageError(
                f"{option_of(VerifyConfig, name)} needs both models: give --reference twice, or leave it out"
            )


@dataclass(frozen=True)
class Scored:
    """What the graph with the logits of all positions has shown.

    Attributes:
        figures: on all rows of text.
        modes: the parity in each way of running the graph.
    """

    figures: TextFigures
    modes: dict[Mode, Comparison]


def score(
    onnx: OnnxRunner,
    references: Mapping[str, Runner],
    compared_with: str,
    rows: torch.Tensor,
    config: VerifyConfig,
    progress: Progress,
) -> Scored:
    """Measure what needs the logits of all positions.

    Args:
        onnx: the export.
        references: `original`, `locked` or both.
        compared_with: name of the reference for parity.
        rows: held-out token ids, `[rows, block]`.
        config: the settings.
        progress: reports the steps.
    """
    reference = references[compared_with]
    vocab_size = reference.begin(1, 1).next_logits(rows[:1, :1]).shape[-1]
    batch = parity.batch_rows(rows.shape[1], vocab_size)
    figures = parity.measure_text(onnx, references, compared_with, rows, batch, progress)
    some, random = _in_random_order(rows, config)
    checked = parity.rows_to_check(some, vocab_size)
    progress.start("cache and padding", 3)
    expected = reference.outputs(checked)
    modes: dict[Mode, Comparison] = {"prefill": figures.comparison[compared_with, "onnx"]}
    modes["cache_tokens"] = parity.compare_cache_tokens(expected, onnx, checked, min(checked.shape[1] // 2, _MAX_STEPS))
    progress.advance()
    modes["cache_chunk"] = parity.compare_cache_chunk(expected, onnx, checked)
    progress.advance()
    modes["padded_batch"] = parity.compare_padded(expected, onnx, checked, _unequal_lengths(checked, random))
    progress.finish()
    return Scored(figures, modes)


def with_generation(
    scored: Scored,
    onnx: OnnxRunner,
    reference: Runner,
    rows: torch.Tensor,
    text: MeasuredText,
    config: VerifyConfig,
    progress: Progress,
) -> Measured:
    """Measure the graph that generates text. Returns all figures.

    Args:
        scored: what the other graph has shown.
        onnx: the export, with the logits of the last position.
        reference: the model for parity.
        rows: held-out token ids, `[rows, block]`.
        text: their description.
        config: the settings.
        progress: reports the steps.
    """
    some, random = _in_random_order(rows, config)
    batch = parity.rows_of_last_positions(some)
    lengths = _unequal_lengths(batch, random)
    last = parity.compare_padded(reference.outputs(batch), onnx, batch, lengths, last_only=True)
    modes: dict[Mode, Comparison] = {**scored.modes, "last_position": last}
    continuations = None
    if config.prompts:
        prompts = some.repeat(-(-config.prompts // len(some)), 1)[: config.prompts, : max(1, rows.shape[1] // 4)]
        continuations = parity.compare_continuations(
            reference, onnx, prompts, config.new_tokens, config.tie_tolerance, progress
        )
    perplexity = scored.figures.perplexity
    values = {name: found.value for name, found in perplexity.items()}
    return Measured(
        parity=[Parity(mode=mode, tokens=found.tokens, **found.figures()) for mode, found in modes.items()],
        continuations=continuations,
        perplexity=PerplexityFigures.of(
            perplexity["onnx"].predictions, values["onnx"], values.get("original"), values.get("locked")
        ),
        fidelity=scored.figures.fidelity(text) if ("original", "locked") in scored.figures.comparison else None,
    )


def _unequal_lengths(rows: torch.Tensor, random: torch.Generator) -> list[int]:
    """Lengths for a padded batch of `rows`, `[rows, block]`. The longest and the shortest are always included."""
    block = rows.shape[1]
    lengths = torch.randint(1, block, (len(rows),), generator=random).tolist()
    lengths[0], lengths[-1] = block - 1, 1
    return lengths


def _in_random_order(rows: torch.Tensor, config: VerifyConfig) -> tuple[torch.Tensor, torch.Generator]:
    """The rows in the order that the seed gives, and the generator for further choices."""
    random = torch.Generator().manual_seed(config.seed)
    return rows[torch.randperm(len(rows), generator=random)], random


def _precision(name: str) -> Precision:
    """The precision called `name`. It has the default limits."""
    if name not in Precision.__members__:
        raise UsageError(f"no gates are known for precision '{name}': export with one of {', '.join(Precision)}")
    return Precision[name]
