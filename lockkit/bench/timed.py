"""A model that can be timed: one prompt, then one token at a time, greedily.

Each runner lives in a process of its own (`worker`), so that its peak memory is its own and no
runtime's idle threads slow down another's.
"""

from __future__ import annotations

import itertools
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lockkit.bench.config import BenchConfig, Runtime
from lockkit.environment import peak_resident_bytes
from lockkit.errors import LockkitError


class Runner(Protocol):
    """A causal language model in some runtime."""

    def prompt(self, ids: np.ndarray, new_tokens: int) -> None:
        """Start anew: read `ids`, int64 `[batch, seq]`, and choose the next token of each row."""

    def step(self) -> None:
        """Choose one more token for each row."""


class OnnxruntimeRunner:
    """An export in plain onnxruntime, caches bound to the device."""

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None):
        from lockkit.export.session import ExportSession

        self.session = ExportSession(folder, config.provider, check=False, threads=config.threads, kernel=kernel)

    def prompt(self, ids: np.ndarray, new_tokens: int) -> None:
        self.cache = None
        self._run(ids)

    def step(self) -> None:
        self._run(self.next_ids)

    def _run(self, ids: np.ndarray) -> None:
        logits, self.cache = self.session.forward(ids, cache=self.cache)
        self.next_ids = logits[:, -1:].argmax(-1)


class GenaiRunner:
    """An export in onnxruntime-genai."""

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None):
        import onnxruntime_genai as genai

        settings = genai.Config(str(folder))
        if config.threads:
            overlay = '{"model": {"decoder": {"session_options": {"intra_op_num_threads": %d}}}}'
            settings.overlay(overlay % config.threads)
        if config.provider.row.genai:
            # onnxruntime-genai does not tell which nodes fell back to the CPU; a session of ours does.
            OnnxruntimeRunner(folder, config, None)
            settings.clear_providers()
            settings.append_provider(config.provider.row.genai)
        self.genai, self.model = genai, genai.Model(settings)

    def prompt(self, ids: np.ndarray, new_tokens: int) -> None:
        length = ids.shape[1] + new_tokens + 1
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=len(ids), max_length=length, min_length=length, do_sample=False)
        self.generator = self.genai.Generator(self.model, parameters)
        self.generator.append_tokens(ids.astype(np.int32))
        self.generator.generate_next_token()

    def step(self) -> None:
        self.generator.generate_next_token()


class PytorchRunner:
    """A Hugging Face model in PyTorch, eager, in fp32 on the CPU and as stored on CUDA."""

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None):
        import torch

        from lockkit.devices import synchronise
        from lockkit.models.load import load_model

        if config.threads:
            torch.set_num_threads(config.threads)
        self.torch, self.synchronise = torch, synchronise
        self.device = config.provider.row.torch_device
        model, _ = load_model(folder, torch.float32 if self.device == "cpu" else None)
        self.model = model.to(self.device)

    def prompt(self, ids: np.ndarray, new_tokens: int) -> None:
        self.cache = None
        self._run(self.torch.tensor(ids, device=self.device))

    def step(self) -> None:
        self._run(self.next_ids)

    def _run(self, ids: Any) -> None:
        with self.torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.next_ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self.synchronise(self.model.device)


RUNNERS = {Runtime.onnxruntime: OnnxruntimeRunner, Runtime.genai: GenaiRunner, Runtime.pytorch: PytorchRunner}


def worker(pipe: Connection, runtime: Runtime, folder: Path, config: BenchConfig, kernel: Path | None) -> None:
    """Load a model, then time one prompt and its continuation for every `(batch, length)` received; None ends."""
    import os

    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    try:
        start = time.perf_counter()
        runner = RUNNERS[runtime](folder, config, kernel)
        pipe.send({"load_seconds": time.perf_counter() - start})
        while (shape := pipe.recv()) is not None:
            pipe.send(_measure(runner, *shape, config.new_tokens))
    except LockkitError as error:
        pipe.send(error)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        pipe.send(LockkitError(f"{folder} failed in {runtime.value} ({reason})"))


def _measure(runner: Runner, batch: int, length: int, new_tokens: int) -> dict:
    ids = np.random.default_rng(0).integers(1, 1000, (batch, length))
    clock = time.perf_counter
    start = clock()
    runner.prompt(ids, new_tokens)
    times = [clock()]
    for _ in range(new_tokens - 1):
        runner.step()
        times.append(clock())
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {"first": times[0] - start, "steps": steps, "peak_memory_bytes": peak_resident_bytes()}
