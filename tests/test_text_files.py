"""Files of text as people have them: formats, compression, encodings, chat messages, and what goes wrong with them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lockkit.errors import UsageError
from lockkit.text import Document, documents_by_split, file_documents, require_columns

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Text that a reader which guesses types would change.
TEXTS = ["plain", "007", "1.50", "null", "NA", "2024-01-01T00:00:00", "two\nlines", 'a "quote", a comma;\ta tab', "☃ é"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}


def as_json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict], separator: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=4)
    return out.getvalue()


def as_arrow(rows: list[dict]) -> bytes:
    out, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


def as_arrow_file(rows: list[dict]) -> bytes:
    out, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(out, table.schema) as file:
        file.write_table(table, max_chunksize=4)
    return out.getvalue()


FORMATS = {
    ".jsonl": as_json_lines,
    ".jsonlines": as_json_lines,
    ".jl": as_json_lines,
    ".ndjson": as_json_lines,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".pretty.json": lambda rows: json.dumps(rows, indent=2).encode(),
    ".lines.json": as_json_lines,
    ".csv": as_csv,
    ".excel.csv": lambda rows: as_csv(rows, ";"),
    ".declared.csv": lambda rows: b"sep=;\r\n" + as_csv(rows, ";"),
    ".bars.csv": lambda rows: as_csv(rows, "|"),
    ".tsv": lambda rows: as_csv(rows, "\t"),
    ".parquet": as_parquet,
    ".arrow": as_arrow,
    ".file.arrow": as_arrow_file,
}


def texts(path: Path, column: str | None = None) -> list[str]:
    return [document.text for document in file_documents(path, column=column)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_rows_are_the_same_documents_in_every_format(tmp_path, suffix):
    rows = [{"id": number, "text": text} for number, text in enumerate([*TEXTS, None, "", "  "])]
    found = list(file_documents(write(tmp_path / f"rows{suffix}", FORMATS[suffix](rows))))
    assert [document.text for document in found] == TEXTS
    lines = write(tmp_path / "other.jsonl", as_json_lines([{"text": text} for text in TEXTS]))
    assert found == list(file_documents(lines))


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_files(tmp_path, compression):
    compress = COMPRESS[compression]
    assert texts(write(tmp_path / f"a.txt{compression}", compress(b"some text"))) == ["some text"]
    rows = as_json_lines([{"text": "one"}])
    two_parts = compress(rows) + compress(rows)  # as `cat a.gz b.gz` writes them
    assert texts(write(tmp_path / f"A.JSONL{compression.upper()}", two_parts)) == ["one", "one"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_a_byte_order_mark_is_dropped(tmp_path, encoding, suffix):
    content = {"txt": "snow ☃\r\n", "jsonl": '{"text": "snow ☃\\n"}\r\n', "csv": 'text\r\n"snow ☃\n"\r\n'}[suffix]
    assert texts(write(tmp_path / f"a.{suffix}", content.encode(encoding))) == ["snow ☃\n"]


def test_chat_messages_are_their_contents(tmp_path):
    openai = [
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image_url", "image_url": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "assistant", "content": "So."},
    ]
    sharegpt = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    rows = [{"messages": openai}, {"conversations": sharegpt}, {"messages": None, "text": "Why?\n\nSo."}]
    assert texts(write(tmp_path / "chat.jsonl", as_json_lines(rows))) == ["Why?\n\nSo."] * 3
    parquet = write(tmp_path / "chat.parquet", as_parquet([{"messages": openai[1:]}, {"messages": []}]))
    assert texts(parquet) == ["So."]
    lists = {"from": ["human", "gpt"], "value": ["Why?", "So."]}  # how `datasets` stores a sequence of structures
    assert texts(write(tmp_path / "lists.parquet", as_parquet([{"conversations": lists}]))) == ["Why?\n\nSo."]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_another_column_can_be_named(tmp_path, suffix):
    file = write(tmp_path / f"a{suffix}", FORMATS[suffix]([{"title": "t", "body": "words"}]))
    assert texts(file, "body") == ["words"]
    for column in (None, "text"):
        with pytest.raises(UsageError, match=r"has no column .*its columns: 'title', 'body': name one with --data-col"):
            texts(file, column)


def test_later_rows_may_have_other_keys(tmp_path):
    rows = [{"text": "x" * 1000} for _ in range(12_000)] + [{"meta": {"a": 1}, "text": "y"}, {"meta": "b", "text": "z"}]
    assert texts(write(tmp_path / "a.jsonl", as_json_lines(rows)))[-2:] == ["y", "z"]


def test_a_field_may_be_long_and_half_a_surrogate_pair_is_replaced(tmp_path):
    assert texts(write(tmp_path / "a.csv", as_csv([{"text": "x" * 300_000}]))) == ["x" * 300_000]
    assert texts(write(tmp_path / "a.jsonl", '{"text": "a\\ud83d b \\ud83d\\ude00"}')) == [
        "a\N{REPLACEMENT CHARACTER} b 😀"
    ]


def test_a_folder_of_mixed_files(tmp_path):
    write(tmp_path / "B.TXT", "upper case")
    write(tmp_path / "a.jsonl.gz", gzip.compress(as_json_lines([{"text": "a row"}]), mtime=0))
    write(tmp_path / "c.parquet", as_parquet([{"text": "another row"}]))
    write(tmp_path / "package.json", '{"name": "settings"}')
    write(tmp_path / "photo.png", b"\x89PNG\0")
    write(tmp_path / "._B.TXT", b"\0\5\x16\7")
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "description.txt", "hidden")
    assert sorted(texts(tmp_path)) == ["a row", "another row", "upper case"]
    write(tmp_path / "list.json", '[{"body": "a row"}]')
    with pytest.raises(UsageError, match=r"list\.json.*its columns: 'body'"):
        texts(tmp_path)


@pytest.mark.parametrize("content", ["[1, 2]", "[[1]]", "null", "3"])
def test_a_json_file_without_rows_is_left_out_of_a_folder(tmp_path, caplog, content):
    write(tmp_path / "a.txt", "words")
    write(tmp_path / "list.json", content)
    assert texts(tmp_path) == ["words"]
    assert len(caplog.records) == 1 and re.search(r"left out.*list\.json", caplog.text)
    with pytest.raises(UsageError, match="neither an object nor text"):
        texts(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", '"a;b;c;d","text"\n"1","x;y"\n', ["x;y"]),
        ("a.csv", "a,b,c|text\n1|x, y\n", ["x, y"]),
        ("a.tsv", 'text\tn\n"Yes" she said\t1\n', ['"Yes" she said']),
        ("a.tsv", 'n\ttext\n1\t"open\n', ['"open']),
        ("a.jsonl", '{"text": "", "messages": [{"role": "user", "content": "words"}]}', ["words"]),
        ("a.csv", 'text,messages\n,"[{""role"": ""user"", ""content"": ""words""}]"\n', ["words"]),
        ("a.jsonl", '{"messages": "[1] is a note"}', ["[1] is a note"]),
        ("a.jsonl", '{"messages": "[]"}\n{"text": "words"}', ["words"]),
        ("a.jsonl", '{"messages": [{"role": "assistant"}, {"role": "user", "content": "words"}]}', ["words"]),
        ("a.txt", '{"text": "a"} is how a row looks.\n', ['{"text": "a"} is how a row looks.\n']),
        ("a.txt", "The text, it says,\nis long.\n", ["The text, it says,\nis long.\n"]),
    ],
)
def test_text_is_found_where_people_put_it(tmp_path, name, content, found):
    assert texts(write(tmp_path / name, content)) == found


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, "words")
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.zip", zipped("a.txt"), "is a zip archive: unpack it"),
        ("a.txt", zipped("[Content_Types].xml"), "office program: save it as"),
        ("a.xlsx", zipped("xl/a.xml"), r"office program: save it as \.csv"),
        ("a.tar", tarred(), "is a tar archive"),
        ("a.tar.gz", gzip.compress(tarred(), mtime=0), "is a tar archive"),
        ("a.tgz", gzip.compress(tarred(), mtime=0), "is a gzip file"),
        ("a.pdf", b"%PDF-1.7\n", "is a PDF file"),
        ("a", gzip.compress(b"words", mtime=0), r"is a gzip file.*\.gz"),
        ("a", zstd.compress(b"words"), "is a Zstandard file"),
        ("a", bz2.compress(b"words"), "is a bzip2 file"),
        ("a", lzma.compress(b"words"), "is an xz file"),
        ("a", as_parquet([{"text": "words"}]), r"is a Parquet file.*\.parquet"),
        ("a.txt", as_arrow_file([{"text": "words"}]), "is an Arrow file"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        ("a.csv", zipped("a.csv"), "is a zip archive"),
        ("a.txt", b"\x89PNG\r\n", "is a picture, not text: change --data"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n', r"looks like JSON lines: give it a name that ends in \.jsonl"),
        ("a.data", '{"messages": [{"role": "user", "content": "a"}]}', "looks like JSON lines"),
        ("a.txt", '[\n {"text": "a"},\n {"text": "b"}\n]', r"looks like JSON: .*\.json"),
        ("a.txt", 'id,text\n1,"a"\n', r"looks like CSV: .*\.csv"),
        ("a.txt", "id\ttext\n1\ta\n", r"looks like TSV: .*\.tsv"),
        ("a.csv", "text\na\0b\n", "holds bytes of value 0"),
        ("a.jsonl", '{"text": "a\\u0000b"}', "holds bytes of value 0"),
        ("a.csv", "text,text\na,b\n", "has two columns text"),
        ("a.jsonl", '{"messages": "[{1}, {2}]"}', "begins like a list of chat messages"),
        ("a.jsonl", '{"text": "a"}\nnull\n', "line 2: null is neither an object nor text"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "column messages is neither"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, name, content, says):
    with pytest.raises(UsageError, match=says) as refused:
        texts(write(tmp_path / name, content))
    assert str(refused.value).startswith(str(tmp_path / name)) and "\n" not in str(refused.value)


def test_what_is_no_file_is_refused_and_a_pipe_of_the_shell_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero")):
        with pytest.raises(UsageError, match="is a device, socket or pipe, not a file: change --data"):
            documents_by_split(str(path)).__next__()
    reader, writer = os.pipe()
    os.write(writer, b"words")
    os.close(writer)
    assert texts(Path(f"/dev/fd/{reader}")) == ["words"]
    os.close(reader)


@pytest.mark.parametrize("name", ["d/nope.jsonl", "nope.TXT.gz", "./nope", "../a/b", "~nobody/a", "a/b/c", "here/nope"])
def test_a_misspelt_path_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UsageError, match=f"there is no file or folder {re.escape(name)}: change --task"):
        documents_by_split(name, "--task")


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    script = "from lockkit.text import documents\nlist(documents('owner/name', 'distill'))"
    environment = {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    with socket.create_server(("127.0.0.1", 0)) as closed:
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "no local file or folder, and the Hub did not deliver it" in done.stderr.splitlines()[-1]
    assert "Retry" not in done.stderr


def test_plain_text_has_no_columns(tmp_path):
    write(tmp_path / "a.txt", "words")
    for source in (tmp_path / "a.txt", tmp_path, "stdlib", "docs"):
        with pytest.raises(UsageError, match="is plain text, which has no columns: leave --data-column out"):
            require_columns(str(source), "body")
        require_columns(str(source), None)
    write(tmp_path / "b.jsonl", '{"body": "words"}')
    require_columns(str(tmp_path), "body")
    require_columns("owner/name", "body")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"a\0b", "not UTF-8 text"),
        ("a.csv", "text\na\n".encode("utf-16-le"), "not UTF-8 text"),
        ("a.csv", b"text\ncaf\xe9\n", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"te\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n3\n', "line 2: 3 is neither an object nor text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: column text is neither text nor chat messages"),
        ("a.jsonl", b'{"messages": ["a"]}\n', "column messages is neither"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.csv", b"", "holds no text"),
        ("a.csv", b"text,n\na, b,1\n", "line 2 has 3 fields and the header 2"),
        ("a.csv", b'text\n"a\nb\n', "not valid CSV"),
        ("a.txt.gz", b"no gzip", "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"words", mtime=0)[:-4], "cannot be decompressed"),
        ("a.txt.xz", b"no xz", "cannot be decompressed"),
        ("a.txt.zst", b"no zst", "cannot be decompressed"),
        ("a.txt.zst", zstd.compress(b"words " * 99_999)[:-4], "cannot be decompressed"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.parquet", as_parquet([{"text": 1}]), "row 1: column text is neither"),
        ("a [v1].parquet", as_parquet([{"body": "a"}]), "its columns: 'body'"),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(tmp_path, name, content, says):
    with pytest.raises(UsageError, match=says) as refused:
        texts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "datasets"), ("a.txt.zst", "backports.zstd")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    for module in (package, "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr("backports.zstd", raising=False)
    with pytest.raises(UsageError, match=rf"{name}, pip install 'lockkit\[data\]' .*{package}"):
        texts(write(tmp_path / name, b""))


def test_no_cache_is_left_and_nothing_is_downloaded(tmp_path):
    (tmp_path / "home").mkdir()
    write(tmp_path / "a.parquet", as_parquet([{"text": "words"}]))
    script = (
        "import socket, sys; from pathlib import Path; from lockkit.text import file_documents\n"
        "def refuse(*_): sys.exit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "print([document.text for document in file_documents(Path('a.parquet'))])"
    )
    environment = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("['words']\n", "")
    assert not list((tmp_path / "home").rglob("*")) and {p.name for p in tmp_path.iterdir()} == {"home", "a.parquet"}


def test_rows_are_divided_into_splits_as_passages_are(tmp_path):
    file = write(tmp_path / "a.jsonl", as_json_lines([{"text": f"row {number} " * 20} for number in range(300)]))
    found = list(documents_by_split(str(file)))
    assert all(isinstance(document, Document) for _, document in found) and len(found) == 300
    assert {split for split, _ in found} == {"distill", "validate", "evaluate", "finetune"}
