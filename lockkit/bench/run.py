"""Measures exports and models side by side.

1. List what runs: EXPORT in every requested runtime; each other export in the same runtimes; each Hugging Face
   model in PyTorch, on the CPU in float32 and in stored types of 16 bits; each GGUF file in llama.cpp.
2. Load each of these in a process of its own.
3. Run the rounds. In a round, all models run every batch size and prompt length in turn: the same prompt and the same
   number of new tokens, while the others wait. So a machine that slows down slows all of them. The first round is a
   warm-up and does not count.
4. Compute the ratios of EXPORT to each other model: the median, over the rounds, of the ratio within a round.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.bench.config import OF_EXPORTS, BenchConfig, Runtime
from lockkit.bench.llama_cpp import check_gguf, is_gguf, llama_cpp_version
from lockkit.bench.timed import Ready, Shape, Timing, worker
from lockkit.errors import LockkitError, UsageError
from lockkit.export.chains import has_kernel_form
from lockkit.export.manifest import ALL_LOGITS_FILE, MODEL_FILE
from lockkit.files import EXPORT_MANIFEST
from lockkit.models.weight_files import weight_files
from lockkit.progress import NoProgress, Progress
from lockkit.settings import expanded
from lockkit.targets import Provider
from lockkit.version import git_hash, versions

SCHEMA: Final = "lockkit-bench/1"
_STOP_SECONDS = 10  # that a process gets to end by itself


class Ratio(BaseModel):
    """Speed of EXPORT over that of another model. Above 1, EXPORT is faster."""

    runtime: str
    against: str
    batch_size: int
    prompt_length: int
    decode: float
    prefill: float  # until the first new token


class Measurement(BaseModel):
    """One model in one runtime at one batch size and prompt length: medians over the rounds."""

    model: str
    runtime: str
    batch_size: int
    prompt_length: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float
    step_seconds: dict[str, float]  # p50, p95, p99: percentiles over the tokens of all rounds


class Loaded(BaseModel):
    """One model in one runtime."""

    model: str
    runtime: str
    locked: bool | None = None  # None if lockkit did not export it
    precision: str | None = None
    kernel: bool = False  # whether the fused operator of `lockkit kernel` computes its chains
    size_bytes: int
    load_seconds: float
    peak_memory_bytes: int
    cuda_graphs: bool | None = None  # whether each step is one; None if no GPU runs it, or not in onnxruntime


class BenchResult(BaseModel):
    """The result of `bench`, and the schema of its JSON."""

    model_config = ConfigDict(populate_by_name=True)
    schema_version: Literal["lockkit-bench/1"] = Field(SCHEMA, alias="schema")
    ratios: list[Ratio]
    measurements: list[Measurement]
    models: list[Loaded]
    config: BenchConfig
    versions: dict[str, str]
    git_hash: str | None
    machine: dict[str, str | int]
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))  # in UTC


@dataclass(frozen=True)
class _Target:
    """A model and the runtime it is measured in."""

    folder: Path  # or the GGUF file
    name: str
    runtime: Runtime
    is_export: bool  # EXPORT itself, not one that it is compared with
    kernel: Path | None = None  # the library of the fused operator, if onnxruntime shall load it


@dataclass
class _Running:
    """A target that is loaded in a process of its own, and its timings."""

    target: _Target
    pipe: Connection[Shape | None, Ready | Timing | LockkitError]
    load_seconds: float = 0.0
    cuda_graphs: bool | None = None
    timings: dict[Shape, list[Timing]] = field(default_factory=dict)  # one per round

    def receive(self) -> Ready | Timing:
        """The next message of the process.

        Raises:
            LockkitError: the model failed, or the process died.
        """
        try:
            message = self.pipe.recv()
        except EOFError:
            target = self.target
            raise LockkitError(
                f"the process that ran {target.name} in {target.runtime.value} died: out of memory?"
            ) from None
        if isinstance(message, LockkitError):
            raise message
        return message

    def time(self, shape: Shape) -> Timing:
        """Run one prompt and its continuation."""
        with contextlib.suppress(BrokenPipeError):  # the process has died, which `receive` reports
            self.pipe.send(shape)
        timing = self.receive()
        assert isinstance(timing, Timing)
        return timing


def bench(
    export: Path,
    against: list[str] | None = None,
    config: BenchConfig | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure the speed of an export, alone or beside others.

    Args:
        export: a folder that `lockkit export` wrote.
        against: exports, folders with another program's `model.onnx`, Hugging Face models, or GGUF files.
        config: see `BenchConfig`.
        progress: told of the rounds.

    Raises:
        UsageError: `export` or one of `against` is not such a model, or the provider or the kernel is not available.
        LockkitError: a runtime failed.
    """
    config, progress, export = config or BenchConfig(), progress or NoProgress(), Path(export)
    targets = _targets(export, against or [], config)
    if config.kernel:
        targets = _with_kernel(targets, config.provider)
    shapes = [
        (batch, length)
        for batch in dict.fromkeys(config.batch_sizes)
        for length in dict.fromkeys(config.prompt_lengths)
    ]
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(_running(target, config)) for target in targets]
        progress.start("measuring", (config.rounds + 1) * len(shapes))
        for number in range(config.rounds + 1):
            for shape in shapes:
                for model in models:
                    timing = model.time(shape)
                    if number:  # not the warm-up
                        model.timings.setdefault(shape, []).append(timing)
                progress.advance()
        progress.finish()
    return _result(models, shapes, config)


def _targets(export: Path, against: list[str], config: BenchConfig) -> list[_Target]:
    from lockkit.export.manifest import check_manifest
    from lockkit.models.load import resolve_model

    check_manifest(export)
    runtimes = [runtime for runtime in dict.fromkeys(config.runtimes) if runtime in OF_EXPORTS]
    if not runtimes:
        raise UsageError("an export runs in onnxruntime or onnxruntime-genai: change --runtime")
    targets = [_Target(export, _name(export), runtime, True) for runtime in runtimes]
    for folder, other in {Path(expanded(other)): other for other in against}.items():
        if (folder / MODEL_FILE).is_file():
            known = [
                runtime
                for runtime in runtimes
                if runtime is not Runtime.genai or (folder / "genai_config.json").is_file()
            ]
            targets += [_Target(folder, _name(folder), runtime, False) for runtime in known or [Runtime.onnxruntime]]
        elif is_gguf(folder):
            check_gguf(folder)
            if config.provider is not Provider.cpu:
                raise UsageError(f"{other} is measured on the CPU: leave it out of --against, or leave out --provider")
            targets.append(_Target(folder, _name(folder), Runtime.llama_cpp, False))
        else:
            found = resolve_model(other)
            targets += [
                _Target(found, _name(folder), runtime, False) for runtime in _in_pytorch(found, config.provider)
            ]
    return targets


def _in_pytorch(folder: Path, provider: Provider) -> list[Runtime]:
    """In float32 and, on the CPU, also in the stored type if it has 16 bits: either may be the faster one."""
    from lockkit.models.checkpoint import stored_dtype
    from lockkit.models.load import load_config

    two = provider is Provider.cpu and stored_dtype(folder, load_config(folder)).itemsize == 2
    return [Runtime.pytorch, Runtime.pytorch_16_bit] if two else [Runtime.pytorch]


def _with_kernel(targets: list[_Target], provider: Provider) -> list[_Target]:
    """The targets, of which those with chains run with the fused operator where onnxruntime runs them.

    Raises:
        UsageError: none has chains that it computes, or it cannot be compiled.
    """
    from lockkit.kernel import build_kernel

    fits = [
        target.runtime is Runtime.onnxruntime and has_kernel_form(target.folder / MODEL_FILE, provider)
        for target in targets
    ]
    if not any(fits):
        raise UsageError(
            f"{' and '.join(dict.fromkeys(target.name for target in targets))} have no chains that the kernel computes: "
            "do without --kernel, or export again"
        )
    library = build_kernel()
    return [replace(target, kernel=library) if fit else target for target, fit in zip(targets, fits, strict=True)]


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name


@contextlib.contextmanager
def _running(target: _Target, config: BenchConfig) -> Iterator[_Running]:
    """Load a target in a new process, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    arguments = (theirs, target.runtime, target.folder, config, target.kernel)
    process = context.Process(target=worker, args=arguments, daemon=True)
    process.start()
    theirs.close()
    model = _Running(target, pipe)
    try:
        ready = model.receive()
        assert isinstance(ready, Ready)
        model.load_seconds, model.cuda_graphs = ready.load_seconds, ready.cuda_graphs
        yield model
    finally:
        with contextlib.suppress(OSError):  # the process has died
            pipe.send(None)
            process.join(_STOP_SECONDS)
        if process.is_alive():
            process.kill()


def _result(models: list[_Running], shapes: list[Shape], config: BenchConfig) -> BenchResult:
    own = [model for model in models if model.target.is_export]
    with_llama_cpp = any(model.target.runtime is Runtime.llama_cpp for model in models)
    runtimes = [model.target.runtime for model in own]
    ratios = []
    for shape in shapes:
        for model in models:
            if model.target.is_export:
                continue
            # Another export is compared with EXPORT in the same runtime; any other model with EXPORT in each.
            same = model.target.runtime in runtimes
            ratios += [
                _ratio(mine, model, shape) for mine in own if not same or mine.target.runtime is model.target.runtime
            ]
    return BenchResult(
        ratios=ratios,
        measurements=[_measurement(model, shape) for shape in shapes for model in models],
        models=[_loaded(model) for model in models],
        config=config,
        versions=versions() | (llama_cpp_version() if with_llama_cpp else {}),
        git_hash=git_hash(),
        machine={"processor": processor(), "cores": os.cpu_count() or 1, "provider": config.provider.value},
    )


def _ratio(mine: _Running, other: _Running, shape: Shape) -> Ratio:
    name, runtime = other.target.name, other.target.runtime
    pairs = list(zip(mine.timings[shape], other.timings[shape], strict=True))
    return Ratio(
        runtime=mine.target.runtime.value,
        against=name if runtime is mine.target.runtime else f"{name} ({runtime.value})",
        batch_size=shape[0],
        prompt_length=shape[1],
        decode=statistics.median(
            statistics.median(b.step_seconds) / statistics.median(a.step_seconds) for a, b in pairs
        ),
        prefill=statistics.median(b.first_token_seconds / a.first_token_seconds for a, b in pairs),
    )


def _measurement(model: _Running, shape: Shape) -> Measurement:
    (batch, length), timings = shape, model.timings[shape]
    first = statistics.median(timing.first_token_seconds for timing in timings)
    steps = sorted(step for timing in timings for step in timing.step_seconds)
    percentile = {f"p{p}": steps[min(len(steps) - 1, len(steps) * p // 100)] for p in (50, 95, 99)}
    return Measurement(
        model=model.target.name,
        runtime=model.target.runtime.value,
        batch_size=batch,
        prompt_length=length,
        prefill_tokens_per_second=batch * length / first,
        decode_tokens_per_second=batch / percentile["p50"],
        time_to_first_token_seconds=first,
        step_seconds=percentile,
    )


def _loaded(model: _Running) -> Loaded:
    from lockkit.kernel import has_kernel

    folder = model.target.folder
    manifest = folder / EXPORT_MANIFEST
    record = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    return Loaded(
        model=model.target.name,
        runtime=model.target.runtime.value,
        locked=record.get("locked"),
        precision=record.get("precision"),
        kernel=model.target.kernel is not None or (model.target.runtime is Runtime.genai and has_kernel(folder)),
        size_bytes=sum(path.stat().st_size for path in _weights(model.target, list(record.get("files", [])))),
        load_seconds=model.load_seconds,
        peak_memory_bytes=max(timing.peak_memory_bytes for timings in model.timings.values() for timing in timings),
        cuda_graphs=model.cuda_graphs,
    )


def _weights(target: _Target, exported: list[str]) -> list[Path]:
    """The files with a model's weights. `exported` are the names in the manifest, if it has one."""
    if target.runtime is Runtime.llama_cpp:
        return [target.folder]
    if target.runtime in (Runtime.pytorch, Runtime.pytorch_16_bit):
        return weight_files(target.folder)
    files = [target.folder / name for name in exported] or target.folder.iterdir()
    return [path for path in files if "onnx" in path.name and path.name != ALL_LOGITS_FILE]  # nothing times that one


def processor() -> str:
    """The name of this machine's processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()
