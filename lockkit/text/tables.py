"""Text in rows: files of JSON, JSON lines, CSV, TSV, Parquet and Arrow, and datasets of the Hub. A row is a document.

The text of a row is its column `text`, or its chat messages, or the column that `--data-column` names. Of chat messages,
the contents are joined with a blank line between them, without roles and without a chat template.

JSON and CSV are read row by row by Python's own modules, which change no text. The package `datasets` reads the rest. It
infers a type for each column: of a CSV file, it makes `007` the number 7.0 and `null` no text, and of JSON, it makes a
date a `datetime`. It also refuses JSON lines whose later rows have another key.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import glob
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lockkit.errors import UsageError, first_line
from lockkit.settings import shown
from lockkit.text.reading import kind_of, open_text, refuse_other_kind, require_file, require_no_zero

COLUMN_OPTION = "--data-column"
CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", *CHAT_COLUMNS)  # the first that is not empty is taken
SEPARATORS = ",;\t|"  # of a CSV file
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


class NoRow(UsageError):
    """A JSON value is neither an object nor text."""


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
    """The column of a row that holds its text, and the value there. Chat messages as a string of JSON are parsed.

    Args:
        row: its values.
        where: its place, for errors.
        column: the column; None for the first of `TEXT_COLUMNS` that is not empty.

    Raises:
        NoTextColumn: the row has no such column.
        UsageError: a string begins like a list of messages, and is none.
    """
    names = _wanted(list(row), where, column)
    name = next((name for name in names if row[name] not in (None, "", [])), names[0])
    value = row[name]
    if name != "text" and isinstance(value, str) and re.match(r"\s*\[\s*[{\]]", value):
        return name, _parsed_messages(value, f"{where}: column {name}", strict=name in CHAT_COLUMNS)
    return name, value


def _parsed_messages(value: str, where: str, strict: bool) -> Any:
    """A list of messages in a string, as JSON or as Python writes it. Without `strict`, other text stays as it is."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = parse(value)
            if found == [] or chat_turns(found) is not None:
                return found
    if strict:
        raise UsageError(f"{where} begins like a list of chat messages, and is not valid JSON of one: correct the file")
    return value


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
    require_no_zero(text, where, f"the file, or name another column with {COLUMN_OPTION}")
    # JSON can hold half of a surrogate pair, which no encoding of Unicode has.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _wanted(columns: list[str], where: str, column: str | None) -> list[str]:
    """Those of the `columns` that can hold the text: `column`, or without it `TEXT_COLUMNS`. One or more."""
    names = [name for name in ([column] if column else TEXT_COLUMNS) if name in columns]
    if not names:
        raise _no_column(where, columns, column)
    return names


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
    with `text` count. A message without content, such as a call of a tool, is empty, but not all of them may be.
    """
    if isinstance(value, Mapping) and value and all(isinstance(items, list) for items in value.values()):
        # one list per key, as `datasets` gives a sequence of structures
        value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        return None
    turns = []
    if not any(isinstance(message, Mapping) and message.keys() & {"content", "value"} for message in value):
        return None
    for message in value:
        if not isinstance(message, Mapping) or not message.keys() & {"role", "content", "from", "value"}:
            return None
        keys = (
            ("from", "value")
            if message.keys() & {"from", "value"} and "content" not in message
            else ("role", "content")
        )
        content = message.get(keys[1])
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
        as_json = json.dumps(value) if value is None or isinstance(value, bool) else shown(value)
        raise NoRow(f"{where}: {as_json} is neither an object nor text: correct the file")
    return value


# --- CSV


def _csv_rows(path: Path, option: str, column: str | None) -> Iterator[tuple[str, Row]]:
    """The rows of a CSV file. In a TSV file whose quotes are not those of CSV, they are part of the text."""
    if kind_of(path) != ".tsv":
        yield from _separated_rows(path, option, column, csv.QUOTE_MINIMAL)
        return
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
    try:
        for _ in _separated_rows(path, option, column, quoting):
            pass
    except _NotCsv:
        quoting = csv.QUOTE_NONE
    yield from _separated_rows(path, option, column, quoting)


class _NotCsv(UsageError):
    """A line breaks the rules of CSV."""


def _separated_rows(path: Path, option: str, column: str | None, quoting: Literal[0, 3]) -> Iterator[tuple[str, Row]]:
    with open_text(path, option) as stream:
        csv.field_size_limit(LONGEST_FIELD_CHARACTERS)
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        first, header = next(lines, (1, ""))
        separator = _declared_separator(header)
        if separator:
            first, header = next(lines, (1, ""))
        separator = separator or ("\t" if kind_of(path) == ".tsv" else _separator(header, column))
        rest = itertools.chain([header], stream)
        reader = csv.reader(rest, delimiter=separator, strict=True, quoting=quoting)
        try:
            names = [name.strip() for name in next(reader, [])]
            twice = [name for name in ([column] if column else TEXT_COLUMNS) if names.count(name) > 1]
            if twice:
                raise UsageError(f"{path} has two columns {twice[0]}: rename one, or change {option}")
            for values in reader:
                where = f"{path}, line {first - 1 + reader.line_num}"
                if len(values) > len(names):
                    raise _NotCsv(
                        f"{where} has {len(values)} fields and the header {len(names)}: put quotes around text, "
                        f"or change {option}"
                    )
                if values:
                    yield where, dict(itertools.zip_longest(names, values))
        except csv.Error as error:
            where = f"{path}, line {first - 1 + reader.line_num}"
            raise _NotCsv(f"{where}: not valid CSV ({error}): change {option}") from error


def _declared_separator(line: str) -> str | None:
    """The separator in a first line such as `sep=;`, which a spreadsheet program writes."""
    found = re.fullmatch(r'"?sep=(.)"?', line.strip("\r\n"), re.IGNORECASE)
    return found[1] if found else None


def separated(header: str, separator: str) -> list[str]:
    """The names of the columns in a header, if `separator` separates them."""
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
    except csv.Error:
        return []


def _separator(header: str, column: str | None) -> str:
    """The separator of a CSV file: one that gives a wanted column, and of those the one that gives most columns.

    Spreadsheets of some countries separate by semicolons.
    """
    names = {separator: separated(header, separator) for separator in SEPARATORS}
    wanted = {column} if column else set(TEXT_COLUMNS)
    return max(SEPARATORS, key=lambda separator: (bool(wanted & set(names[separator])), len(names[separator])))


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
    require_file(path, option)
    head = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(512)
    if not head.startswith((b"PAR1", b"ARROW1")):
        refuse_other_kind(path, head, option)
    datasets = import_datasets(str(path))
    with tempfile.TemporaryDirectory() as cache, silent(datasets):
        try:
            # Not `load_dataset`, which tells a server that it was called.
            if head.startswith(b"ARROW1"):
                yield from _arrow_file_rows(path, column)
                return
            if kind_of(path) == ".arrow" and not head.startswith(b"PAR1"):
                rows = datasets.IterableDataset.from_file(str(path))
            else:
                pattern = glob.escape(str(path.absolute()))
                rows = datasets.IterableDataset.from_parquet(pattern, cache_dir=cache, batch_size=ROWS_AT_ONCE)
            yield from dataset_rows(rows, str(path), column)
        except UsageError:
            raise
        except Exception as error:  # pyarrow and datasets raise errors of many classes
            raise UsageError(f"{path} cannot be read ({first_line(error)}): change {option}") from error


def _arrow_file_rows(path: Path, column: str | None) -> Iterator[tuple[str, Row]]:
    """The rows of Arrow's file format. `datasets` writes and reads its stream format only."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        file = pyarrow.ipc.open_file(source)
        wanted = _wanted(file.schema.names, str(path), column)
        batches = (file.get_batch(number).select(wanted).to_pylist() for number in range(file.num_record_batches))
        for number, row in enumerate(itertools.chain.from_iterable(batches), 1):
            yield f"{path}, row {number}", row


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
        rows = rows.select_columns(_wanted(rows.column_names, name, column))
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row


@contextlib.contextmanager
def silent(datasets: Any) -> Iterator[None]:
    """Turn off messages of `datasets` and the Hub's client inside the `with` block. Their errors are raised as well."""
    from huggingface_hub.utils import logging as hub_logging

    before = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before[0])
        hub_logging.set_verbosity(before[1])


_Reader = Callable[[Path, str, str | None], Iterator[tuple[str, Row]]]
TABLES: dict[str, _Reader] = {
    **dict.fromkeys((".json", ".jsonl", ".jsonlines", ".jl", ".ndjson"), _json_rows),
    **dict.fromkeys((".csv", ".tsv"), _csv_rows),
    **dict.fromkeys((".parquet", ".arrow"), _arrow_rows),
}
