"""Measuring exports and models side by side.

1. Say what runs: EXPORT in every runtime asked for; each of the others, an export in the same
   runtimes, a Hugging Face folder in PyTorch.
2. Load each in a process of its own; one uncounted round of every batch size and length.
3. Rounds: every model in turn reads the same prompt and makes the same number of tokens, while the
   others wait. A machine that slows down slows down all of them.
4. Ratios, EXPORT over each other: the median over the rounds of the ratio within the round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.bench.config import BenchConfig, Runtime
from lockkit.bench.timed import worker
from lockkit.errors import LockkitError, UsageError
from lockkit.export.chains import has_kernel_form
from lockkit.export.session import MODEL_FILE
from lockkit.files import EXPORT_MANIFEST
from lockkit.progress import NoProgress, Progress
from lockkit.version import git_hash, versions

SCHEMA = "lockkit-bench/1"


class Ratio(BaseModel):
    """EXPORT's speed over another's: above 1, EXPORT is faster."""

    runtime: str
    against: str
    batch_size: int
    prompt_length: int
    decode: float
    prefill: float  # the time to the first token


class Measurement(BaseModel):
    """One model in one runtime at one batch size and prompt length; medians of the rounds."""

    model: str
    runtime: str
    batch_size: int
    prompt_length: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float
    step_seconds: dict[str, float]  # percentiles over all rounds' tokens: p50, p95, p99


class Loaded(BaseModel):
    """One model in one runtime."""

    model: str
    runtime: str
    locked: bool | None = None  # None: not an export of lockkit's
    precision: str | None = None
    size_bytes: int
    load_seconds: float
    peak_memory_bytes: int


class BenchResult(BaseModel):
    """What `bench` found; the JSON is this class."""

    model_config = ConfigDict(populate_by_name=True)
    schema_version: Literal["lockkit-bench/1"] = Field(SCHEMA, alias="schema")
    ratios: list[Ratio]
    measurements: list[Measurement]
    models: list[Loaded]
    config: BenchConfig
    versions: dict[str, str]
    git_hash: str | None
    machine: dict[str, str | int]


@dataclass
class _Target:
    """A model in its process, and what it has answered: shape -> rounds."""

    folder: Path
    name: str
    runtime: Runtime
    first: bool  # EXPORT itself
    process: multiprocessing.Process | None = None
    pipe: Connection | None = None
    load_seconds: float = 0.0

    def ask(self, message: object) -> dict:
        self.pipe.send(message)
        return self.answer()

    def answer(self) -> dict:
        try:
            found = self.pipe.recv()
        except EOFError:
            raise LockkitError(
                f"the process that ran {self.name} in {self.runtime.value} died: out of memory?"
            ) from None
        if isinstance(found, Exception):
            raise found
        return found


def bench(
    export: Path,
    against: list[str] | None = None,
    config: BenchConfig | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Time an export, alone or beside others.

    Args:
        export: a folder that `lockkit export` wrote.
        against: exports, folders with another program's `model.onnx`, or Hugging Face models.
        config: see `BenchConfig`.
        progress: told of the rounds.

    Raises:
        UsageError: a model that is neither, or a provider that cannot be had.
        LockkitError: a runtime failed.
    """
    config, progress = config or BenchConfig(), progress or NoProgress()
    kernel = None
    if config.kernel:
        from lockkit.kernel import build_kernel

        kernel = build_kernel()
    targets = _targets(Path(export), against or [], config)
    if config.kernel and not has_kernel_form(Path(export) / MODEL_FILE):
        raise UsageError(f"{export} has no chains that the kernel computes: do without --kernel, or export again")
    shapes = [(batch, length) for batch in config.batch_sizes for length in config.prompt_lengths]
    rounds: dict[tuple[int, int, int], list[dict]] = {}  # target, batch, length
    try:
        for target in targets:
            _start(target, config, kernel if target.first else None)
        progress.start("measuring", (config.rounds + 1) * len(shapes))
        for number in range(config.rounds + 1):
            for shape in shapes:
                for index, target in enumerate(targets):
                    found = target.ask(shape)
                    if number:  # the first round warms up
                        rounds.setdefault((index, *shape), []).append(found)
                progress.advance()
        progress.finish()
    finally:
        for target in targets:
            _stop(target)
    return _result(targets, shapes, rounds, config)


def _targets(export: Path, against: list[str], config: BenchConfig) -> list[_Target]:
    if not (export / EXPORT_MANIFEST).is_file():
        raise UsageError(f"{export} is not an export of lockkit's: change EXPORT")
    from lockkit.export.manifest import check_manifest
    from lockkit.models.load import resolve_model

    check_manifest(export)
    runtimes = [runtime for runtime in dict.fromkeys(config.runtimes) if runtime is not Runtime.pytorch]
    if not runtimes:
        raise UsageError("an export runs in onnxruntime or onnxruntime-genai: change --runtime")
    targets = [_Target(export, export.name, runtime, True) for runtime in runtimes]
    for other in against:
        folder = Path(other)
        if (folder / MODEL_FILE).is_file():
            known = [
                runtime
                for runtime in runtimes
                if runtime is not Runtime.genai or (folder / "genai_config.json").is_file()
            ]
            targets += [_Target(folder, folder.name, runtime, False) for runtime in known or [Runtime.onnxruntime]]
        else:
            targets.append(_Target(resolve_model(other), folder.name, Runtime.pytorch, False))
    return targets


def _start(target: _Target, config: BenchConfig, kernel: Path | None) -> None:
    context = multiprocessing.get_context("spawn")
    target.pipe, theirs = context.Pipe()
    arguments = (theirs, target.runtime, target.folder, config, kernel)
    target.process = context.Process(target=worker, args=arguments, daemon=True)
    target.process.start()
    theirs.close()
    target.load_seconds = target.answer()["load_seconds"]


def _stop(target: _Target) -> None:
    if target.process is None:
        return
    try:
        target.pipe.send(None)
        target.process.join(10)
    except OSError:
        pass  # it has died
    if target.process.is_alive():
        target.process.kill()


def _result(targets: list[_Target], shapes: list, rounds: dict, config: BenchConfig) -> BenchResult:
    ratios, measurements = [], []
    for shape in shapes:
        for index, target in enumerate(targets):
            measurements.append(_measurement(target, shape, rounds[index, *shape]))
            # Another export against EXPORT in the same runtime, anything else against EXPORT in each.
            for first, mine in enumerate(targets):
                alike = target.runtime is mine.runtime or not any(
                    other.first and other.runtime is target.runtime for other in targets
                )
                if mine.first and not target.first and alike:
                    ratios.append(_ratio(mine, target, shape, rounds[first, *shape], rounds[index, *shape]))
    return BenchResult(
        ratios=ratios,
        measurements=measurements,
        models=[_loaded(target, index, rounds) for index, target in enumerate(targets)],
        config=config,
        versions=versions(),
        git_hash=git_hash(),
        machine={"processor": _processor(), "cores": os.cpu_count() or 1, "provider": config.provider.value},
    )


def _ratio(mine: _Target, other: _Target, shape: tuple[int, int], mine_rounds: list, other_rounds: list) -> Ratio:
    pairs = list(zip(mine_rounds, other_rounds, strict=True))
    return Ratio(
        runtime=mine.runtime.value,
        against=other.name if other.runtime is mine.runtime else f"{other.name} ({other.runtime.value})",
        batch_size=shape[0],
        prompt_length=shape[1],
        decode=statistics.median(statistics.median(b["steps"]) / statistics.median(a["steps"]) for a, b in pairs),
        prefill=statistics.median(b["first"] / a["first"] for a, b in pairs),
    )


def _measurement(target: _Target, shape: tuple[int, int], rounds: list[dict]) -> Measurement:
    batch, length = shape
    first = statistics.median(found["first"] for found in rounds)
    steps = sorted(step for found in rounds for step in found["steps"])
    percentile = {f"p{p}": steps[min(len(steps) - 1, len(steps) * p // 100)] for p in (50, 95, 99)}
    return Measurement(
        model=target.name,
        runtime=target.runtime.value,
        batch_size=batch,
        prompt_length=length,
        prefill_tokens_per_second=batch * length / first,
        decode_tokens_per_second=batch / statistics.median(steps),
        time_to_first_token_seconds=first,
        step_seconds=percentile,
    )


def _loaded(target: _Target, index: int, rounds: dict) -> Loaded:
    manifest = target.folder / EXPORT_MANIFEST
    record = json.loads(manifest.read_text()) if manifest.is_file() else {}
    weights = [
        path for path in target.folder.iterdir() if path.suffix in (".safetensors", ".onnx") or "onnx" in path.name
    ]
    return Loaded(
        model=target.name,
        runtime=target.runtime.value,
        locked=record.get("locked"),
        precision=record.get("precision"),
        size_bytes=sum(path.stat().st_size for path in weights),
        load_seconds=target.load_seconds,
        peak_memory_bytes=max(
            f["peak_memory_bytes"] for key, found in rounds.items() if key[0] == index for f in found
        ),
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()
