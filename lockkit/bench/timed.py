"""Times a model: the prompt of a batch first, then one token per step, greedily.

Each model runs in a process of its own (`worker`). So its peak memory counts nothing else, and idle threads of one
runtime do not slow down another.
"""

from __future__ import annotations

import itertools
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lockkit.bench.config import BenchConfig, Runtime
from lockkit.bench.llama_cpp import LlamaCpp
from lockkit.environment import peak_resident_bytes
from lockkit.errors import LockkitError
from lockkit.files import read_json

if TYPE_CHECKING:
    import torch

    from lockkit.export.texts import Texts

Shape = tuple[int, int]  # rows in a batch, tokens in each row's prompt


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    load_seconds: float
    cuda_graphs: bool | None = None  # see `TimedModel`


@dataclass(frozen=True)
class Timing:
    """One prompt and its continuation."""

    first_token_seconds: float  # of the prompt and the first new token
    step_seconds: list[float]  # of each further token
    peak_memory_bytes: int  # resident memory of the process so far


class TimedModel(Protocol):
    """A causal language model in some runtime, loaded from `folder`.

    Args:
        kernel: the fused operator's library, for onnxruntime; None runs without it.

    """

    @property
    def cuda_graphs(self) -> bool | None:
        """Whether each step of an export is one CUDA graph; None for other models, and on the CPU."""

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None) -> None: ...

    def generate(self, ids: np.ndarray, new_tokens: int) -> list[float]:
        """Drop the cache, read `ids`, int64 `[batch, seq]`, and add `new_tokens` to each row, always the likeliest.

        Returns:
            For each new token, the clock (`time.perf_counter`) when all rows had it.
        """


class _Stepwise(ABC):
    """A model that a caller steps through the tokens."""

    cuda_graphs: bool | None = None

    @abstractmethod
    def prompt(self, ids: np.ndarray, new_tokens: int) -> None:
        """Drop the cache, read `ids` and choose the next token of each row."""

    @abstractmethod
    def step(self) -> None:
        """Choose one more token for each row."""

    def generate(self, ids: np.ndarray, new_tokens: int) -> list[float]:
        """See `TimedModel`."""
        self.prompt(ids, new_tokens)
        times = [time.perf_counter()]
        for _ in range(new_tokens - 1):
            self.step()
            times.append(time.perf_counter())
        return times


class _Onnxruntime(_Stepwise):
    """An export in plain onnxruntime, as `lockkit generate` and `lockkit serve` run it."""

    texts: Texts | None

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None) -> None:
        from lockkit.export.session import ExportSession
        from lockkit.export.texts import TextSession

        self.session = ExportSession(
            folder,
            config.provider,
            False,
            config.threads,
            kernel,
            last_only=True,
            cuda_graphs=not config.no_cuda_graphs,
        )
        if self.session.gpu is not None:
            self.cuda_graphs = self.session.captures
        self.sessions, self.texts = TextSession(self.session), None
        self.next_ids = np.empty((0, 1), np.int64)  # [batch, 1]

    def prompt(self, ids: np.ndarray, new_tokens: int) -> None:
        self.texts = None  # so that the next texts get its buffers
        self.texts = self.sessions.begin(len(ids), ids.shape[1] + new_tokens)
        self._run(self.texts, ids)

    def step(self) -> None:
        assert self.texts is not None  # set by `prompt`
        self._run(self.texts, self.next_ids)

    def _run(self, texts: Texts, ids: np.ndarray) -> None:
        self.next_ids = texts.next_logits(ids).argmax(-1)[:, None]


class _Genai(_Stepwise):
    """An export in onnxruntime-genai."""

    generator: Any  # onnxruntime_genai.Generator, a new one for each prompt

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None) -> None:
        import onnxruntime_genai as genai

        settings = genai.Config(str(folder))
        if config.threads:
            overlay = '{"model": {"decoder": {"session_options": {"intra_op_num_threads": %d}}}}'
            settings.overlay(overlay % config.threads)
        if config.provider.row.genai:
            # onnxruntime-genai does not report nodes that fell back to the CPU. Opening a session of our own does.
            _Onnxruntime(folder, config, None)
            name = config.provider.row.genai
            options = read_json(folder / "genai_config.json", "EXPORT")["model"]["decoder"]["session_options"]
            found = next((entry[name] for entry in options.get("provider_options", []) if name in entry), None)
            if found is None:
                settings.clear_providers()
                settings.append_provider(name)
            self.cuda_graphs = (found or {}).get("enable_cuda_graph") == "1" and not config.no_cuda_graphs
            if config.no_cuda_graphs:
                settings.set_provider_option(name, "enable_cuda_graph", "0")
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


class _Pytorch(_Stepwise):
    """A Hugging Face model in eager PyTorch: in float32 on the CPU, in the stored type on CUDA."""

    stored_type_on_cpu = False
    next_ids: torch.Tensor  # int64 [batch, 1]

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None) -> None:
        import torch

        from lockkit.devices import synchronise
        from lockkit.models.load import load_model

        if config.threads:
            torch.set_num_threads(config.threads)
        self.torch, self.synchronise = torch, synchronise
        self.device = config.provider.row.torch_device
        model, _ = load_model(folder, "auto" if self.stored_type_on_cpu or self.device != "cpu" else torch.float32)
        self.model = model.to(self.device)
        self.cache: Any = None  # transformers.Cache

    def prompt(self, ids: np.ndarray, new_tokens: int) -> None:
        self.cache = None
        self._run(self.torch.tensor(ids, device=self.device))

    def step(self) -> None:
        self._run(self.next_ids)

    def _run(self, ids: torch.Tensor) -> None:
        with self.torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.next_ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self.synchronise(self.model.device)


class _Pytorch16Bit(_Pytorch):
    """The same on the CPU, in the stored type."""

    stored_type_on_cpu = True


_RUNTIMES: dict[Runtime, type[TimedModel]] = {
    Runtime.onnxruntime: _Onnxruntime,
    Runtime.genai: _Genai,
    Runtime.pytorch: _Pytorch,
    Runtime.pytorch_16_bit: _Pytorch16Bit,
    Runtime.llama_cpp: LlamaCpp,
}


def worker(
    pipe: Connection[Ready | Timing | LockkitError, Shape | None],
    runtime: Runtime,
    folder: Path,
    config: BenchConfig,
    kernel: Path | None,
) -> None:
    """Run a model in this process, for the process at the other end of `pipe`.

    Sends `Ready`, then a `Timing` for each `Shape` received; None ends it. Sends a `LockkitError` in place of either
    if the model fails, and ends.
    """
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    try:
        start = time.perf_counter()
        model = _RUNTIMES[runtime](folder, config, kernel)
        pipe.send(Ready(time.perf_counter() - start, model.cuda_graphs))
        while (shape := pipe.recv()) is not None:
            pipe.send(_time(model, shape, config.new_tokens))
    except LockkitError as error:
        pipe.send(error)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        pipe.send(LockkitError(f"{folder} failed in {runtime.value} ({reason})"))


def _time(model: TimedModel, shape: Shape, new_tokens: int) -> Timing:
    ids = np.random.default_rng(0).integers(1, 1000, shape)
    start = time.perf_counter()
    times = model.generate(ids, new_tokens)
    steps = [after - before for before, after in itertools.pairwise(times)]
    return Timing(times[0] - start, steps, peak_resident_bytes())
