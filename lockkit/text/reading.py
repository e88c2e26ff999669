"""Text in a file as characters: its encoding, its byte-order mark and its compression. Files of other kinds are named."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lockkit.errors import UsageError, first_line
from lockkit.files import GIT_LFS

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


# What a file is that is no text, by its first bytes, in words that follow its name, and what to do.
_NAMED_AS = "is {0} file, not text: give it a name that ends in {1}"
_OTHER_KINDS: dict[bytes, str] = {
    GIT_LFS[0]: GIT_LFS[1],
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it",
    b"Rar!\x1a\x07": "is a RAR archive: unpack it",
    b"%PDF-": "is a PDF file: save its text in a .txt file",
    b"{\\rtf": "is an RTF document: save its text in a .txt file",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "is a document of an office program: save it as .txt or .csv",
    b"\x1f\x8b": _NAMED_AS.format("a gzip", ".gz"),
    b"BZh91AY&SY": _NAMED_AS.format("a bzip2", ".bz2"),
    b"\xfd7zXZ\x00": _NAMED_AS.format("an xz", ".xz"),
    b"\x28\xb5\x2f\xfd": _NAMED_AS.format("a Zstandard", ".zst"),
    b"PAR1\x15": _NAMED_AS.format("a Parquet", ".parquet"),
    b"ARROW1\x00\x00": _NAMED_AS.format("an Arrow", ".arrow"),
    b"SQLite format 3\x00": "is an SQLite database: export its table as .csv",
    b"\x89PNG": "is a picture, not text",
    b"\xff\xd8\xff": "is a picture, not text",
    b"\x93NUMPY": "is a NumPy array, not text",
    b"\x89HDF": "is an HDF5 file, not text",
    b"\x7fELF": "is a program, not text",
    b"GGUF\x02\x00": "is a GGUF model, not text",
    b"GGUF\x03\x00": "is a GGUF model, not text",
}
_OFFICE = {".docx": ".txt", ".odt": ".txt", ".pptx": ".txt", ".xlsx": ".csv", ".ods": ".csv"}  # zip archives inside
_TAR_MARK = slice(257, 262)  # where a tar archive has the bytes `ustar`


def refuse_other_kind(path: Path, head: bytes, option: str) -> None:
    """Check that a file is not one of the kinds that hold no text, or that need another name.

    Args:
        path: the file. Its name tells office documents from other archives.
        head: its first bytes, 512 or more if it has so many.
        option: the option that gave it, for the error.

    Raises:
        UsageError: it is one. The message names the kind.
    """
    words = _other_kind(head, path)
    if words:
        raise UsageError(f"{path} {words}{', or' if ':' in words else ':'} change {option}")


def _other_kind(head: bytes, path: Path) -> str | None:
    if head[_TAR_MARK] == b"ustar":
        return "is a tar archive: unpack it"
    words = next((words for magic, words in _OTHER_KINDS.items() if head.startswith(magic)), None)
    save_as = _OFFICE.get(path.suffix.lower(), ".txt or .csv" if b"[Content_Types].xml" in head else None)
    if words and head.startswith(b"PK") and save_as:
        return f"is a document of an office program: save it as {save_as}"
    return words


def require_file(path: Path, option: str) -> None:
    """Check that a path can be read to its end: a file, or a pipe that the shell made (/dev/stdin, /dev/fd/63).

    Raises:
        UsageError: it is a device, a socket, a named pipe, or a folder.
    """
    with contextlib.suppress(OSError):  # opening it says why it cannot be read
        mode = path.stat().st_mode
        of_shell = str(path).startswith(("/dev/", "/proc/")) and stat.S_ISFIFO(mode)
        if not stat.S_ISREG(mode) and not of_shell:
            what = "folder" if stat.S_ISDIR(mode) else "device, socket or pipe"
            raise UsageError(f"{path} is a {what}, not a file: change {option}")


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
    require_no_zero(text, str(path), option)
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
        if encoding == "utf-8" and b"\0" in head[:4]:  # UTF-16 without a mark
            require_no_zero("\0", str(path), option)
        try:
            yield io.TextIOWrapper(stream, encoding, newline="")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not {_shown(encoding)} text: change {option}") from error


@contextlib.contextmanager
def _opened(path: Path, option: str) -> Iterator[io.BufferedReader]:
    require_file(path, option)
    decompress = _DECOMPRESS.get(path.suffix.lower())
    try:
        stream = decompress(path) if decompress else path.open("rb")
        with stream:
            refuse_other_kind(path, stream.peek(512), option)
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


def require_no_zero(text: str, name: str, option: str) -> None:
    """Check that a text has no character of value 0, which binary files and UTF-16 without its mark have.

    Raises:
        UsageError: it has. The message begins with `name`.
    """
    if "\0" in text:
        raise UsageError(f"{name} holds bytes of value 0, so it is not UTF-8 text: change {option}")
