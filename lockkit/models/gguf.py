"""Models in a GGUF file, the format of llama.cpp, read by transformers' own loader.

1. The file is identified by the SHA-256 of its content.
2. transformers reads it and dequantises the weights.
3. The result is written once, as an ordinary model folder, into a cache folder. Every command then reads that folder.

Most GGUF files are quantised. Dequantising gives the values that the file stores, in float32, not those of the model
that the file was made from. So the folder is larger than the file, and as accurate as the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lockkit.errors import UsageError, counted, first_line
from lockkit.files import CACHE_VARIABLE, cache_folder, readable_disk_errors, sha256_of_file
from lockkit.models.quiet import errors_only, no_progress_bars
from lockkit.models.weight_files import listed
from lockkit.output_folders import new_folder

MAGIC = b"GGUF"
log = logging.getLogger(__name__)


def folder_of_gguf(file: Path, option: str = "MODEL") -> Path:
    """The model folder with the content of a GGUF file. It is written on the first call.

    The folder is below `$XDG_CACHE_HOME/lockkit`, by default `~/.cache/lockkit`.

    Raises:
        UsageError: the file is not a GGUF file, is broken or incomplete, has an architecture that transformers does not read, or the
            cache folder cannot be written. The message names `option`.
    """
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise UsageError(f"{file} is not a GGUF file: change {option}")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"{file} needs the package gguf: pip install 'lockkit[gguf]'")
    folder = cache_folder() / "gguf" / f"{file.stem}-{sha256_of_file(file)[:16]}"
    if not folder.is_dir():
        with _alone(folder, file):
            if not folder.is_dir():  # another process has written it in the meantime
                log.warning("%s: its weights are dequantised to float32 and kept in %s", file.name, folder)
                with new_folder(folder, option=CACHE_VARIABLE) as temporary:
                    _convert(file, temporary, option)
    return folder


@contextlib.contextmanager
def _alone(folder: Path, file: Path) -> Iterator[None]:
    """Keep other processes from converting a file at the same time: they wait, and say so."""
    with readable_disk_errors(folder, CACHE_VARIABLE):
        locks = cache_folder() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process dequantises %s: waiting for it", file.name)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert(file: Path, folder: Path, option: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(file.resolve().parent), file.resolve().name
    try:
        stored_layers = _stored_layers(file)
        with no_progress_bars(), errors_only():  # one line names what is missing, instead of a table
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=name,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # named below
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"{file} cannot be read ({_reason(error)}): change {option}") from error
    layers = model.config.num_hidden_layers
    if stored_layers != layers:
        raise UsageError(
            f"block_count is {layers} in {file}, but it has the tensors of {counted(stored_layers, 'layer')}: change "
            f"{option}"
        )
    if missing := sorted(info["missing_keys"]):
        raise UsageError(f"{file} lacks {counted(len(missing), 'tensor')} ({listed(missing)}): change {option}")
    if wrong := sorted(info["mismatched_keys"]):
        tensor, stored, expected = wrong[0]
        raise UsageError(
            f"the sizes of {tensor} in {file} are {list(stored)}, and its metadata says {list(expected)}: change {option}"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stored_layers(file: Path) -> int:
    """The number of decoder layers of which a GGUF file has tensors."""
    from gguf import GGUFReader

    found = [re.match(r"blk\.(\d+)\.", tensor.name) for tensor in GGUFReader(file).tensors]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _reason(error: Exception) -> str:
    return f"its metadata has no {error}" if isinstance(error, KeyError) else first_line(error)
