"""Text in a file as characters: its encoding, its byte-order mark and its compression."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lockkit.errors import UsageError, first_line

# A file begins with a byte-order mark if its encoding is one of these. UTF-32 comes first: its mark begins as UTF-16's.
_MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
]


def _open_zstandard(path: Path) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UsageError(f"to read {path}, pip install 'lockkit[data]' (it includes backports.zstd)") from error
    return zstd.ZstdFile(path)


_DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstandard,
}


def kind_of(path: Path) -> str:
    """The suffix of a file in lower case, without that of a compression: `.jsonl` for `A.JSONL.gz`."""
    if path.suffix.lower() in _DECOMPRESS:
        path = path.with_suffix("")
    return path.suffix.lower()


def decoded(data: bytes, name: str, option: str) -> str:
    """Bytes of a text as characters. A byte-order mark chooses the encoding and is dropped; without one, it is UTF-8.

    Args:
        data: the whole text.
        name: name of the text, for the error.
        option: the option that gave it, for the error.

    Raises:
        UsageError: the bytes are not text in this encoding.
    """
    encoding = _encoding(data[:4])
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not {_shown(encoding)} text (byte {error.start}): change {option}") from error


def read_text(path: Path, option: str) -> str:
    """The text of a file, decompressed and decoded as by `decoded`. Every line ends in a line feed.

    Raises:
        UsageError: the file cannot be read, or is not text.
    """
    with _opened(path, option) as stream:
        text = decoded(stream.read(), str(path), option)
    if "\0" in text:
        raise _no_text(path, option)
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def open_text(path: Path, option: str) -> Iterator[TextIO]:
    """The characters of a file as a stream, as `read_text` gives them, but with the line ends of the file.

    Raises:
        UsageError: the file cannot be read, or is not text; also while the stream is read.
    """
    with _opened(path, option) as stream:
        head = stream.peek(4)
        encoding = _encoding(head)
        if encoding == "utf-8" and b"\0" in head:
            raise _no_text(path, option)
        try:
            yield io.TextIOWrapper(stream, encoding, newline="")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not {_shown(encoding)} text: change {option}") from error


@contextlib.contextmanager
def _opened(path: Path, option: str) -> Iterator[io.BufferedReader]:
    decompress = _DECOMPRESS.get(path.suffix.lower())
    try:
        stream = decompress(path) if decompress else path.open("rb")
        with stream:
            yield stream
    except Exception as error:
        if isinstance(error, EOFError | zlib.error | lzma.LZMAError) or type(error).__name__ == "ZstdError":
            raise UsageError(f"{path} cannot be decompressed ({first_line(error)}): change {option}") from error
        if isinstance(error, OSError):
            raise UsageError(f"cannot read {path} ({error.strerror or first_line(error)}): change {option}") from error
        raise


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def _shown(encoding: str) -> str:
    return encoding.removesuffix("-sig").upper()


def _no_text(path: Path, option: str) -> UsageError:
    return UsageError(f"{path} holds bytes of value 0, so it is not UTF-8 text: change {option}")
