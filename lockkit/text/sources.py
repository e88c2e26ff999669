"""The sources of text: built-in ones, a file, a folder, or a dataset of the Hugging Face Hub.

Three sources are on every machine with Python: `stdlib` (code: the sources of the standard library), `docs` (English: the
documentation of the language in `pydoc`) and `licences` (English: those of the installed packages).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import json
import logging
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lockkit.errors import UsageError, first_line
from lockkit.text.reading import kind_of, read_text, require_file
from lockkit.text.splits import Document, content_document, split_of, with_splits
from lockkit.text.tables import (
    COLUMN_OPTION,
    SEPARATORS,
    TABLES,
    TEXT_COLUMNS,
    NoRow,
    NoTextColumn,
    dataset_rows,
    import_datasets,
    row_text,
    separated,
    silent,
    table_rows,
)

log = logging.getLogger(__name__)

# A plain text file is cut into documents: paragraphs are joined until they have this length.
FILE_DOCUMENT_CHARACTERS = 4_000

PLAIN_TEXT = {".txt", ".md", ".rst", ".py", ".text"}  # in a folder; a single file may have any name
# Suffixes of a name that is no Hub dataset, although no such file exists.
FILE_SUFFIXES = PLAIN_TEXT | TABLES.keys() | {".zip", ".tar", ".tgz", ".7z", ".xlsx", ".docx", ".pdf", ".html", ".xml"}
HUB_SECONDS = 10  # to wait for the Hub's first answer


def stdlib_documents(*, tests: bool = False) -> Iterator[Document]:
    """Yield the source files of Python's standard library, one document per module.

    Tables of character encodings are left out, because they are data.

    Args:
        tests: include the modules of tests, which some distributions of Python do not have.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_test = any(part in ("test", "tests", "idle_test") for part in parts)
        if parts[0] in ("site-packages", "dist-packages", "encodings") or (is_test and not tests):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield Document(".".join(parts), text)


def docs_documents() -> Iterator[Document]:
    """Yield the chapters on the language in Python's own help (`pydoc`), one document each: English prose."""
    from pydoc_data.topics import topics

    yield from (Document(f"docs:{name}", topics[name]) for name in sorted(topics))


def licence_documents() -> Iterator[Document]:
    """Yield the passages of the licences of all installed packages, each licence once: legal English."""
    seen: set[str] = set()
    for package in sorted(importlib.metadata.distributions(), key=lambda package: package.metadata["Name"] or ""):
        for file in sorted(package.files or []):
            if not re.search("licen[cs]e|copying|notice", file.name, re.IGNORECASE) or file.suffix in (".py", ".pyc"):
                continue
            try:
                text = Path(str(file.locate())).read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text not in seen:
                seen.add(text)
                yield from _passages(text)


# All but `stdlib`, which has splits of its own.
BUILT_IN: Mapping[str, Callable[[], Iterator[Document]]] = {"docs": docs_documents, "licences": licence_documents}


def _passages(text: str) -> Iterator[Document]:
    """Cut `text` into documents of about `FILE_DOCUMENT_CHARACTERS`, named by a hash of their content.

    The text is cut after blank lines, within longer paragraphs after a line, and within longer lines anywhere. Only
    white space at the end is lost.
    """
    limit = FILE_DOCUMENT_CHARACTERS
    gathered = ""
    for paragraph in re.split(r"(?<=\n\n)", text):
        for line in [paragraph] if len(paragraph) <= limit else paragraph.splitlines(keepends=True):
            for start in range(0, len(line), limit):
                gathered += line[start : start + limit]
                if len(gathered) >= limit:
                    yield content_document(gathered)
                    gathered = ""
    if gathered.strip():
        yield content_document(gathered)


def file_documents(path: Path, option: str = "--data", column: str | None = None) -> Iterator[Document]:
    """Yield the documents of a file, or of all files with text in a folder.

    Files of rows (see tables.py) give one document per row; any other file is plain text. In a folder, hidden files and
    files of other kinds are left out, and so is a JSON file that is one object without a column of text, such as a file
    of settings, or that begins with a value that is neither an object nor text, such as a list of numbers.

    Args:
        path: the file or folder.
        option: the option that gave it, for errors.
        column: the column of rows; None for text or chat messages.

    Raises:
        UsageError: `path` is missing, unreadable, not UTF-8, holds no text, or is plain text in name and rows in fact.
    """
    if not path.is_dir():
        require_file(path, option)
    files = _files_in(path, option) if path.is_dir() else [path]
    empty = True
    for file in files:
        for document in _documents_of(file, option, column, in_folder=path.is_dir()):
            empty = False
            yield document
    if empty:
        raise UsageError(f"{path} holds no text: change {option}")


def require_columns(source: str, column: str | None, option: str = "--data") -> None:
    """Check that a text has columns, if one is named for it.

    Args:
        source: as in `documents_by_split`.
        column: the column that was named for this text; None if there is none.
        option: the option that gave the text, for the error.

    Raises:
        UsageError: it is built-in, or a file or folder of plain text.
    """
    path = Path(source)
    if source in ("stdlib", "self") or source in BUILT_IN:
        plain = True
    elif path.is_dir():
        plain = not any(kind_of(file) in TABLES for file in _files_in(path, option))
    else:
        plain = path.exists() and kind_of(path) not in TABLES
    if column and plain:
        raise UsageError(f"{source} is plain text, which has no columns: leave {COLUMN_OPTION} out, or change {option}")


def _files_in(folder: Path, option: str) -> list[Path]:
    def visible(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    kinds = PLAIN_TEXT | TABLES.keys()
    found = [path for path in sorted(folder.rglob("*")) if kind_of(path) in kinds and path.is_file() and visible(path)]
    if not found:
        raise UsageError(f"no text file ({', '.join(sorted(kinds))}) in {folder}: change {option}")
    return found


def _documents_of(file: Path, option: str, column: str | None, in_folder: bool) -> Iterator[Document]:
    if kind_of(file) not in TABLES:
        text = read_text(file, option)
        rows = _kind_of_rows(text, column)
        if rows:
            raise UsageError(f"{file} looks like {rows[0]}: give it a name that ends in {rows[1]}, or change {option}")
        yield from _passages(text)
        return
    found = table_rows(file, option, column)
    try:
        first = next(found, None)
    except NoRow as error:
        if not in_folder:
            raise
        log.warning("left out, as it holds no rows of text: %s", first_line(error).removesuffix(": correct the file"))
        return
    for where, row in itertools.chain([first] if first else [], found):
        try:
            text = row_text(row, where, column)
        except NoTextColumn:
            if in_folder and where == str(file):
                return
            raise
        if text.strip():
            yield content_document(text)


def _kind_of_rows(text: str, column: str | None) -> tuple[str, str] | None:
    """The format of rows that a plain text has, and the suffix of such files: JSON lines, JSON or CSV. None for prose."""
    wanted = {column} if column else set(TEXT_COLUMNS)
    lines = [line for line in itertools.islice(io.StringIO(text), 20) if line.strip()][:3]
    if not lines:
        return None
    if all(_is_row(line, wanted) for line in lines):
        return "JSON lines", ".jsonl"
    if re.match(r'\s*\[\s*\{\s*"', text) and _is_row(text, wanted):
        return "JSON", ".json"
    for separator in SEPARATORS:
        names = separated(lines[0], separator)
        if len(names) > 1 and wanted & set(names) and all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
            return ("TSV", ".tsv") if separator == "\t" else ("CSV", ".csv")
    return None


def _is_row(text: str, wanted: set[str]) -> bool:
    """Whether a text is a JSON object with one of the `wanted` keys, or a list of such objects."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        rows = value if isinstance(value, list) else [value]
        return bool(rows) and all(isinstance(row, dict) and bool(wanted & row.keys()) for row in rows)
    return False


def hub_documents(name: str, option: str = "--data", column: str | None = None) -> Iterator[Document]:
    """Yield the text of a Hugging Face dataset, one document per row.

    Args:
        name: `owner/name`, or `owner/name:config`.
        option: the option that gave it, for errors.
        column: the column with the text; None for text or chat messages.

    Raises:
        UsageError: the package `datasets` is missing, or the dataset cannot be loaded.
    """
    datasets = import_datasets(f"{name} from the Hub (it is no local file or folder)")
    repository, _, configuration = name.partition(":")
    try:
        _ask_hub(repository)
        with silent(datasets):
            rows = datasets.load_dataset(repository, configuration or None, split="train", streaming=True)
            for where, row in dataset_rows(rows, f"dataset {name}", column):
                text = row_text(row, where, column)
                if text.strip():
                    yield content_document(text)
    except UsageError:
        raise
    except Exception as error:  # the Hub's client raises errors of many classes
        raise UsageError(
            f"{option} {name} is no local file or folder, and the Hub did not deliver it ({first_line(error)}): "
            f"change {option}"
        ) from error


def _ask_hub(repository: str) -> None:
    """Ask the Hub for a dataset once, unless its client is offline: `datasets` repeats a failed request for long."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if not is_offline_mode():
        HfApi().dataset_info(repository, timeout=HUB_SECONDS)


def _is_path(name: str) -> bool:
    """Whether a name that is no built-in text can only be a path: it is no Hub dataset, or looks like a file."""
    path = Path(name)
    return (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name)
        or name.startswith((".", "~"))
        or kind_of(path) in FILE_SUFFIXES
        or ("/" in name and path.parent.exists())
    )


def documents_by_split(
    source: str, option: str = "--data", column: str | None = None
) -> Iterator[tuple[str, Document]]:
    """Yield (split, document) for all documents of `source`, in its order.

    Args:
        source: `stdlib` (without its tests), a name in `BUILT_IN`, the path of a file or folder, or the name of a Hub
            dataset.
        option: the option that gave it, for errors.
        column: the column of rows, see `file_documents`. Text without columns ignores it.

    Raises:
        UsageError: there is no such source, or it cannot be read.
    """
    if source == "stdlib":
        return ((split_of(document.name), document) for document in stdlib_documents())
    if source in BUILT_IN:
        return with_splits(BUILT_IN[source]())
    if source and Path(source).exists():
        return with_splits(file_documents(Path(source), option, column))
    if _is_path(source):
        raise UsageError(f"there is no file or folder {source}: change {option}")
    return with_splits(hub_documents(source, option, column))


def documents(source: str, split: str, option: str = "--data", column: str | None = None) -> Iterator[Document]:
    """Yield the documents of one split of `source` (see `documents_by_split`).

    The split `train` of `stdlib` includes modules of tests. The other splits do not, since not every distribution of
    Python has these modules. A user's own text has no split `train`.

    Raises:
        UsageError: there is no such source, or it cannot be read.
    """
    if (source, split) == ("stdlib", "train"):
        return (document for document in stdlib_documents(tests=True) if split_of(document.name) == split)
    return (document for found, document in documents_by_split(source, option, column) if found == split)
