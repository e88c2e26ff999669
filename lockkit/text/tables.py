"""Text in rows: files of JSON, JSON lines, CSV, TSV, Parquet and Arrow, and datasets of the Hub. A row is a document.

The text of a row is its column `text`, or its chat messages, or the column that `--data-column` names. Of chat messages,
the contents are joined with a blank line between them, without roles and without a chat template.

JSON and CSV are read row by row by Python's own modules, which change no text. The package `datasets` reads the rest. It
infers a type for each column: of a CSV file, it makes `007` the number 7.0 and `null` no text, and of JSON, it makes a
date a `datetime`. It also refuses JSON lines whose later rows have another key.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lockkit.errors import UsageError, first_line
from lockkit.settings import shown
from lockkit.text.reading import kind_of, open_text

COLUMN_OPTION = "--data-column"
CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", *CHAT_COLUMNS)  # the first that has a value is taken
LONGEST_FIELD_CHARACTERS = 2**31 - 1  # of a CSV file
ROWS_AT_ONCE = 1_000  # of a Parquet file, in memory

Row = Mapping[str, Any]  # values by the names of the columns

# The type and description of the setting `data_column` in every config class.
DataColumn = Annotated[
    str | None,
    Field(
        min_length=1,
        description="Column with the text, in a file of rows (JSON, JSON lines, CSV, TSV, Parquet) or a Hub dataset. "
        "Default: `text`, or else chat messages.",
    ),
]


class NoTextColumn(UsageError):
    """A row has no column that can hold its text."""


def table_rows(path: Path, option: str, column: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place in words. A file that is one JSON object is its own place.

    Args:
        path: a file whose `kind_of` is in `TABLES`.
        option: the option that gave it, for errors.
        column: the wanted column; None for `TEXT_COLUMNS`. Other columns of Parquet and Arrow are not read.

    Raises:
        UsageError: the file cannot be read, or is not of its kind.
    """
    return TABLES[kind_of(path)](path, option, column)


def row_value(row: Row, where: str, column: str | None = None) -> tuple[str, Any]:
    """The column of a row that holds its text, and the value there.

    Args:
        row: its values.
        where: its place, for errors.
        column: the column; None for the first of `TEXT_COLUMNS` that has a value.

    Raises:
        NoTextColumn: the row has no such column.
    """
    names = [name for name in ([column] if column else TEXT_COLUMNS) if name in row]
    if not names:
        raise _no_column(where, list(row), column)
    name = next((name for name in names if row[name] is not None), names[0])
    return name, row[name]


def row_text(row: Row, where: str, column: str | None = None) -> str:
    """The text of a row, empty if there is none. Arguments are those of `row_value`.

    Raises:
        NoTextColumn: the row has no such column.
        UsageError: the value is neither text nor chat messages.
    """
    name, value = row_value(row, where, column)
    text = _text(value)
    if text is None:
        raise UsageError(f"{where}: column {name} is neither text nor chat messages: name another with {COLUMN_OPTION}")
    # JSON can hold half of a surrogate pair, which no encoding of Unicode has.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _no_column(where: str, columns: list[str], column: str | None) -> NoTextColumn:
    wanted = f"column {column}" if column else f"column {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}"
    found = ", ".join(shown(name) for name in columns[:20])
    return NoTextColumn(f"{where} has no {wanted}; its columns: {found or 'none'}: name one with {COLUMN_OPTION}")


def _text(value: Any) -> str | None:
    """A value as text. None if it is neither text, nor chat messages, nor missing."""
    if value is None or value != value or value == []:  # NaN stands for a missing value
        return ""
    if isinstance(value, str):
        return value
    turns = chat_turns(value)
    return None if turns is None else "\n\n".join(content for _, content in turns if content)


def chat_turns(value: Any) -> list[tuple[str, str]] | None:
    """Chat messages as pairs of role and content. None if `value` is not a list of messages.

    A message has `role` and `content`, or `from` and `value`. A content is text, None, or a list of parts, of which those
    with `text` count.
    """
    if isinstance(value, Mapping) and value and all(isinstance(items, list) for items in value.values()):
        # one list per key, as `datasets` gives a sequence of structures
        value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for message in value:
        keys = ("role", "content") if isinstance(message, Mapping) and "content" in message else ("from", "value")
        if not isinstance(message, Mapping) or keys[1] not in message:
            return None
        content = message[keys[1]]
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "\n\n".join(part for part in parts if isinstance(part, str))
        if content is not None and not isinstance(content, str):
            return None
        turns.append((str(message.get(keys[0])), content or ""))
    return turns


# --- JSON


def _json_rows(path: Path, option: str, column: str | None) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON file: one value per line, or one value in all lines. A list is several rows."""
    with open_text(path, option) as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        start = list(itertools.islice(lines, 2))
        try:
            json.loads(start[0][1] if start else "null")
        except (ValueError, RecursionError):
            start = [(start[0][0], "".join(line for _, line in itertools.chain(start, lines)))]
        alone = len(start) == 1
        for number, line in itertools.chain(start, lines):
            where = str(path) if alone else f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: not valid JSON ({first_line(error)}): change {option}") from error
            if isinstance(value, list):
                yield from ((f"{where}, item {item}", _json_row(row, where)) for item, row in enumerate(value, 1))
            else:
                yield where, _json_row(value, where)


def _json_row(value: Any, where: str) -> Row:
    """A JSON value as a row. A string is the text itself."""
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {shown(value)} is neither an object nor text: correct the file")
    return value


# --- CSV


def _csv_rows(path: Path, option: str, column: str | None) -> Iterator[tuple[str, Row]]:
    with open_text(path, option) as stream:
        header = next((line for line in stream if line.strip()), "")
        # Spreadsheets of some countries separate by semicolons.
        separator = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=header.count)
        csv.field_size_limit(LONGEST_FIELD_CHARACTERS)
        reader = csv.reader(itertools.chain([header], stream), delimiter=separator, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if len(values) > len(names):
                    raise UsageError(
                        f"{where} has {len(values)} fields and the header {len(names)}: put quotes around text, "
                        f"or change {option}"
                    )
                if values:
                    yield where, dict(itertools.zip_longest(names, values))
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.line_num}: not valid CSV ({error}): change {option}") from error


# --- Parquet, Arrow and the Hub


def import_datasets(what: str) -> Any:
    """The package `datasets`. `what` says what it has to read, for the error.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"to read {what}, pip install 'lockkit[data]' (it includes datasets)") from error
    return datasets


def _arrow_rows(path: Path, option: str, column: str | None) -> Iterator[tuple[str, Row]]:
    datasets = import_datasets(str(path))
    with tempfile.TemporaryDirectory() as cache, _silent(datasets):
        try:
            # Not `load_dataset`, which tells a server that it was called.
            if kind_of(path) == ".arrow":
                rows = datasets.IterableDataset.from_file(str(path))
            else:
                pattern = glob.escape(str(path.absolute()))
                rows = datasets.IterableDataset.from_parquet(pattern, cache_dir=cache, batch_size=ROWS_AT_ONCE)
            yield from dataset_rows(rows, str(path), column)
        except UsageError:
            raise
        except Exception as error:  # pyarrow and datasets raise errors of many classes
            raise UsageError(f"{path} cannot be read ({first_line(error)}): change {option}") from error


def dataset_rows(rows: Any, name: str, column: str | None) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a `datasets.IterableDataset`, each with its place in words.

    Args:
        rows: the dataset.
        name: its name, for errors.
        column: the wanted column; None for `TEXT_COLUMNS`. Other columns are not read.

    Raises:
        NoTextColumn: it has no such column.
    """
    if rows.column_names is not None:
        wanted = [each for each in ([column] if column else TEXT_COLUMNS) if each in rows.column_names]
        if not wanted:
            raise _no_column(name, rows.column_names, column)
        rows = rows.select_columns(wanted)
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row


@contextlib.contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Turn off messages of `datasets` inside the `with` block. Its errors are raised as well."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


_Reader = Callable[[Path, str, str | None], Iterator[tuple[str, Row]]]
TABLES: dict[str, _Reader] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_rows),
    **dict.fromkeys((".csv", ".tsv"), _csv_rows),
    **dict.fromkeys((".parquet", ".arrow"), _arrow_rows),
}
