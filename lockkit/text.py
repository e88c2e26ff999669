"""Where text comes from: for training, distillation, validation and evaluation.

Text reaches lockkit as *documents*, and every document belongs to exactly one
split, chosen by a hash of its name, so that the same text never serves two
purposes, whatever command, machine or day asks for it:

1. A source (`stdlib`, a text file, a folder, a Hub dataset) becomes an
   iterator of `Document(name, text)`.
2. `split_of(name)` puts each document into one of `SPLITS`.
3. `token_blocks` tokenizes the documents of one split and packs them into
   rows of equal length, with an end-of-text token between documents.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lockkit.errors import UsageError

if TYPE_CHECKING:
    import torch

# Upper bounds of hash buckets 0..99. `train` made the bundled model and is never used by
# lockkit itself; for text of the user's own, where nothing was trained, it joins `distill`.
SPLITS = {"train": 60, "distill": 77, "validate": 80, "evaluate": 90, "finetune": 100}

# A plain text file has no documents of its own: paragraphs are gathered until they are this long.
FILE_DOCUMENT_CHARACTERS = 4_000

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}


@dataclass(frozen=True)
class Document:
    """A named piece of text; the name alone decides its split."""

    name: str
    text: str


def split_of(name: str) -> str:
    """Return the split of the document called `name`."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return next(split for split, upper in SPLITS.items() if bucket < upper)


def stdlib_documents(*, tests: bool = False) -> Iterator[Document]:
    """Yield the sources of Python's standard library, one document a module.

    Tables of character encodings are left out: they are data, not language.
    `tests` adds `test.*`, which some distributions of Python leave out.
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


def _passages(text: str) -> Iterator[Document]:
    """Cut `text` into documents of about `FILE_DOCUMENT_CHARACTERS`, named by their own content.

    Cuts are made after blank lines; where a paragraph is longer, after a line; where a line is,
    anywhere. Nothing is lost but white space at the end.
    """
    limit = FILE_DOCUMENT_CHARACTERS
    gathered = ""
    for paragraph in re.split(r"(?<=\n\n)", text):
        for line in [paragraph] if len(paragraph) <= limit else paragraph.splitlines(keepends=True):
            for start in range(0, len(line), limit):
                gathered += line[start : start + limit]
                if len(gathered) >= limit:
                    yield _content_document(gathered)
                    gathered = ""
    if gathered.strip():
        yield _content_document(gathered)


def _content_document(text: str) -> Document:
    # Named by content alone: a passage has one split, whatever file or folder it is read from.
    return Document("text:" + hashlib.sha256(text.encode()).hexdigest()[:16], text)


def file_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a text file, or of every text file in a folder.

    Raises:
        UsageError: `path` is missing, unreadable, not UTF-8, or holds no text.
    """
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in TEXT_SUFFIXES]
        if not files:
            raise UsageError(f"no text file ({', '.join(sorted(TEXT_SUFFIXES))}) in {path}: change --data")
    else:
        files = [path]
    empty = True
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 text (byte {error.start}): change --data") from error
        except OSError as error:
            raise UsageError(f"cannot read {file} ({error.strerror}): change --data") from error
        for document in _passages(text):
            empty = False
            yield document
    if empty:
        raise UsageError(f"{path} holds no text: change --data")


def hub_documents(name: str) -> Iterator[Document]:
    """Yield the `text` column of a Hugging Face dataset, `owner/name[:config]`.

    Raises:
        UsageError: the package `datasets` is missing, or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"--data {name} is no local file or folder; to read it from the Hub, pip install 'lockkit[hub]'"
        ) from error
    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise UsageError(f"dataset {name} has no column 'text': change --data")
            if row["text"].strip():
                yield _content_document(row["text"])
    except UsageError:
        raise
    except Exception as error:  # the Hub's client raises dozens of kinds, all meaning "not to be had"
        raise UsageError(f"cannot load dataset {name} from the Hub ({error}): change --data") from error


def documents(source: str, split: str) -> Iterator[Document]:
    """Yield the documents of `source` that belong to `split`.

    `source` is `stdlib`, the path of a text file or folder, or the name of a Hub dataset.
    """
    if source == "stdlib":
        # Tests help a model to learn; they never measure one, since not every Python has them.
        found = stdlib_documents(tests=split == "train")
        wanted = {split}
    else:
        if not Path(source).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
            raise UsageError(f"there is no file or folder {source}: change --data")
        found = file_documents(Path(source)) if Path(source).exists() else hub_documents(source)
        wanted = {"train", "distill"} if split == "distill" else {split}
    return (document for document in found if split_of(document.name) in wanted)


def token_blocks(tokenizer, texts: Iterator[Document], block_tokens: int, max_tokens: int | None) -> torch.Tensor:
    """Pack documents into rows of token ids, `[rows, block_tokens]`, without padding.

    Documents follow each other with an end-of-text token between them, and are shuffled
    neither here nor later: the caller decides on an order. The last, incomplete row is
    dropped. Reading stops once `max_tokens` are there.

    Raises:
        UsageError: the text does not fill a single row.
    """
    import torch

    separator = tokenizer.eos_token_id
    ids: list[int] = []
    for document in texts:
        ids.extend(tokenizer(document.text, add_special_tokens=False)["input_ids"])
        if separator is not None:
            ids.append(separator)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    rows = (len(ids) if max_tokens is None else min(len(ids), max_tokens)) // block_tokens
    if rows == 0:
        raise UsageError(f"the text has only {len(ids)} tokens, at least {block_tokens} are needed: change --data")
    return torch.tensor(ids[: rows * block_tokens], dtype=torch.long).view(rows, block_tokens)
