"""Times a GGUF file in llama.cpp, by the package xllamacpp, which has the server of llama.cpp ready built.

The server runs inside the process that times it, and a request reaches it without HTTP. The first token is timed when it
arrives here, as in the other runtimes, and each further token by the server itself, which goes on while a token is on
its way.

* The prompt is given as token ids, so nothing is added to it. No prompt and no part of one is kept for the next.
* All rows of a batch are one request. They are read as one batch, and each step adds one token to every row.
* The highest logit chooses, as in the other runtimes, and one letter has a higher logit than all others. So every token
  is text of its own (the server holds back the first bytes of a character), and no row ends early.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lockkit.bench.config import BenchConfig
from lockkit.errors import LockkitError, UsageError
from lockkit.models.gguf import MAGIC

if TYPE_CHECKING:
    import numpy as np

_ERRORS_ONLY = 1  # a verbosity of llama.cpp
_GREEDY = {"samplers": ["top_k"], "top_k": 1, "logit_bias": [["a", 1e6]], "ignore_eos": True}
_STREAMED = {"stream": True, "timings_per_token": True}
_CONTEXT_TOO_SHORT = "exceed_context_size_error"


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix.lower() == ".gguf"


def check_gguf(file: Path) -> None:
    """Check what can be known of a GGUF file before it is loaded.

    Raises:
        UsageError: there is no such file, it is not a GGUF file, or xllamacpp is not installed.
    """
    if not file.is_file():
        raise UsageError(f"there is no file {file}: change --against")
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise UsageError(f"{file} is not a GGUF file: change --against")
    if importlib.util.find_spec("xllamacpp") is None:
        raise UsageError(f"{file} runs in llama.cpp, which needs xllamacpp: pip install 'lockkit[bench]'")


def llama_cpp_version() -> dict[str, str]:
    """The version of xllamacpp, by its name."""
    return {"xllamacpp": importlib.metadata.version("xllamacpp")}


def start_server(file: Path, rows: int, tokens: int, threads: int | None, at_once: int = 2048) -> Any:
    """Load a GGUF file into a server of llama.cpp, on the CPU. The server ends with the object.

    It also listens on a free port of this machine (`listening_address`), without a limit on requests.

    Args:
        rows: requests that it computes at the same time.
        tokens: prompt and answer together, of each row.
        threads: CPU threads; None is llama.cpp's default.
        at_once: tokens, of all rows, that it reads before the next step of the rows that are further on.

    Raises:
        UsageError: llama.cpp cannot read the file.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_parallel, settings.n_ctx, settings.n_batch = rows, rows * tokens, at_once
    for part in (settings.cpuparams, settings.cpuparams_batch):
        part.n_threads = threads or part.n_threads
    settings.n_gpu_layers, settings.fit_params = 0, False
    # Nothing of a prompt is kept, and no work is done to keep it.
    settings.cache_prompt = settings.cache_idle_slots = False
    settings.cache_ram_mib = settings.n_ctx_checkpoints = 0
    settings.verbosity = _ERRORS_ONLY
    with tempfile.TemporaryFile() as log, _standard_error_in(log):
        try:
            return xllamacpp.Server(settings)
        except RuntimeError as error:
            log.seek(0)
            reason = _reason(log.read().decode(errors="replace")) or str(error)
            raise UsageError(f"llama.cpp cannot read {file} ({reason}): change --against") from error


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    cuda_graphs: None = None

    def __init__(self, folder: Path, config: BenchConfig, kernel: Path | None) -> None:
        rows, tokens = max(config.batch_sizes), max(config.prompt_lengths) + config.new_tokens
        self.file = folder
        self.server = start_server(folder, rows, tokens, config.threads, at_once=rows * tokens)

    def generate(self, ids: np.ndarray, new_tokens: int) -> list[float]:
        """See `TimedModel`.

        Raises:
            UsageError: the prompt and the new tokens are longer than the model's context.
            LockkitError: llama.cpp failed.
        """
        first = 0.0  # when the last row's first token arrived
        steps: list[list[float]] = [[] for _ in ids]  # milliseconds from a row's first token to each of its tokens
        ended, errors = set(), []  # the rows that ended; what went wrong

        def receive(event: dict[str, Any] | None) -> bool:
            nonlocal first
            now = time.perf_counter()
            if event and "error" in event:
                errors.append(event["error"])
            elif event and event["choices"][0]["finish_reason"]:
                ended.add(event["choices"][0]["index"])
            elif event:
                row = steps[event["choices"][0]["index"]]
                first = first if row else now
                row.append(event["timings"]["predicted_ms"])
            return False  # more, please

        request = {"prompt": ids.tolist(), "n_predict": new_tokens, "cache_prompt": False}
        with Path(os.devnull).open("wb") as nothing, _standard_error_in(nothing):  # errors are received, too
            self.server.handle_completions(request | _STREAMED | _GREEDY, receive)
        if any(error.get("type") != _CONTEXT_TOO_SHORT for error in errors) or not (errors or len(ended) == len(ids)):
            reason = errors[0].get("message") if errors else "it broke off"
            raise LockkitError(f"{self.file} failed in llama.cpp ({reason})")
        if any(len(row) != new_tokens for row in steps):
            needed = ids.shape[1] + new_tokens
            raise UsageError(
                f"{self.file} does not have a context of {needed} tokens: change --prompt-length or --new-tokens"
            )
        later = list(zip(*steps, strict=True))[1:]
        return [first, *(first + max(step) / 1e3 for step in later)]


def _reason(log: str) -> str | None:
    """The first error in a log of llama.cpp, without its time and its place."""
    found = re.search(r"^[\d.]+ E +[^:\n]*: +(?:error loading model: )?(.+)$", log, re.M)
    return found[1].strip()[:300] if found else None


@contextlib.contextmanager
def _standard_error_in(file: IO[bytes]) -> Iterator[None]:
    """What this process writes to its standard error, in Python or not, goes to a file instead."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
