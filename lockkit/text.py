"""Where text comes from: for training, distillation, validation and evaluation.

Text reaches lockkit as *documents*. Every document belongs to exactly one split, so that the same
text never serves two purposes, whatever command or machine asks for it:

1. A source (`stdlib`, a text file, a folder, a Hub dataset) becomes an iterator of `Document(name, text)`.
2. A hash of its name puts each document into one of 100 buckets; the buckets make up the splits (`split_of`).
3. In a user's own text, a held-out split can get less than its share from its buckets, or nothing if the
   text is short. `with_splits` then moves documents from `distill` into it, in an order fixed by a hash.
4. `read_rows` tokenizes the documents of each split and packs them into rows of equal length, with an
   end-of-text token between documents.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lockkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Upper bounds of hash buckets 0..99. `train` made the bundled model and is never used by
# lockkit itself; for text of the user's own, where nothing was trained, it joins `distill`.
SPLITS = {"train": 60, "distill": 77, "validate": 80, "evaluate": 90, "finetune": 100}
# Of all text, in percent: the buckets of each split that nothing is trained or distilled on.
HELD_OUT_PERCENT = {
    split: upper - lower
    for (split, upper), lower in zip(SPLITS.items(), (0, *SPLITS.values()), strict=False)
    if split not in ("train", "distill")
}

# A plain text file has no documents of its own: paragraphs are gathered until they are this long.
FILE_DOCUMENT_CHARACTERS = 4_000

# Shares are filled within the beginning of a source. It bounds what is read of a Hub dataset before the
# first document is used; in what follows, some 1,000 documents later, buckets are close to their shares.
FILLED_CHARACTERS = 8_000_000

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}


@dataclass(frozen=True)
class Document:
    """A named piece of text; the name decides its split."""

    name: str
    text: str


@dataclass(frozen=True)
class Need:
    """Tokens wanted of a split: up to `at_most` are read, fewer than `at_least` are refused.

    `option` is the option that lowers `at_least`, None if there is none; `reason` explains the number.
    """

    at_least: int
    at_most: int
    option: str | None = None
    reason: str = ""


def _hash(text: str) -> int:
    """The first 8 bytes of a SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(name: str) -> str:
    """Return the split that the hash of `name` puts a document into."""
    bucket = _hash(name) % 100
    return next(split for split, upper in SPLITS.items() if bucket < upper)


def fill_shares(
    sizes: Mapping[str, int], splits: Mapping[str, str], percent: Mapping[str, int], donor: str
) -> dict[str, str]:
    """Choose names to move out of one split, so that no other has less than its share of the characters.

    Each split takes names in the order of a hash of its own (rendezvous hashing, Thaler and Ravishankar
    1998), until its share is full. The order does not depend on the other names. So a name that is
    added moves few others, and different sources move the same names first.

    Args:
        sizes: the characters of each name.
        splits: the split of each name before.
        percent: of all characters, the share of each split to fill.
        donor: the split that gives; it keeps at least one name.

    Returns:
        The new split of each name that moves.
    """
    total, moved = sum(sizes.values()), {}
    left = {name for name in sizes if splits[name] == donor}
    for split, share in percent.items():
        missing = share * total - 100 * sum(size for name, size in sizes.items() if splits[name] == split)
        for name in sorted(left, key=lambda name, split=split: (_hash(f"{split}: {name}"), name)):
            if missing <= 0 or len(left) == 1:
                break
            missing -= 100 * sizes[name]
            moved[name] = split
            left.remove(name)
    return moved


def with_splits(found: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Yield the documents of a user's own text with their splits.

    The splits are those of `SPLITS`, with `train` as a part of `distill`. Within the first
    `FILLED_CHARACTERS`, each held-out split has at least its share of the characters, and, where
    `fill_shares` moved documents into it, less than one document more. Documents only move out of
    `distill`: what the hash holds out is held out in every source.
    """
    found = iter(found)
    head: list[Document] = []
    sizes: Counter[str] = Counter()
    characters = 0
    for document in found:
        head.append(document)
        sizes[document.name] += len(document.text)
        characters += len(document.text)
        if characters >= FILLED_CHARACTERS:
            break
    moved = fill_shares(sizes, {name: _own_split(name) for name in sizes}, HELD_OUT_PERCENT, "distill")
    for document in itertools.chain(head, found):
        yield moved.get(document.name) or _own_split(document.name), document


def _own_split(name: str) -> str:
    split = split_of(name)
    return "distill" if split == "train" else split


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


def file_documents(path: Path, option: str = "--data") -> Iterator[Document]:
    """Yield the documents of a text file, or of every text file in a folder.

    Raises:
        UsageError: `path` is missing, unreadable, not UTF-8, or holds no text. It names `option`.
    """
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in TEXT_SUFFIXES]
        if not files:
            raise UsageError(f"no text file ({', '.join(sorted(TEXT_SUFFIXES))}) in {path}: change {option}")
    else:
        files = [path]
    empty = True
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 text (byte {error.start}): change {option}") from error
        except OSError as error:
            raise UsageError(f"cannot read {file} ({error.strerror}): change {option}") from error
        for document in _passages(text):
            empty = False
            yield document
    if empty:
        raise UsageError(f"{path} holds no text: change {option}")


def hub_documents(name: str, option: str = "--data") -> Iterator[Document]:
    """Yield the `text` column of a Hugging Face dataset, `owner/name[:config]`, one document per row.

    Raises:
        UsageError: the package `datasets` is missing, or the dataset cannot be loaded. It names `option`.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{option} {name} is no local file or folder; to read it from the Hub, pip install 'lockkit[hub]'"
        ) from error
    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise UsageError(f"dataset {name} has no column 'text': change {option}")
            if row["text"].strip():
                yield _content_document(row["text"])
    except UsageError:
        raise
    except Exception as error:  # the Hub's client raises dozens of kinds, all of which mean that there is no text
        raise UsageError(f"cannot load dataset {name} from the Hub ({error}): change {option}") from error


def documents_by_split(source: str, option: str = "--data") -> Iterator[tuple[str, Document]]:
    """Yield the documents of `source` with their splits, in the source's order.

    `source` is `stdlib` (without its tests), the path of a text file or folder, or the name of a Hub dataset.

    Raises:
        UsageError: there is no such source, or it cannot be read. It names `option`.
    """
    if source == "stdlib":
        return ((split_of(document.name), document) for document in stdlib_documents())
    if Path(source).exists():
        return with_splits(file_documents(Path(source), option))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        raise UsageError(f"there is no file or folder {source}: change {option}")
    return with_splits(hub_documents(source, option))


def documents(source: str, split: str, option: str = "--data") -> Iterator[Document]:
    """Yield the documents of `source` that belong to `split`, see `documents_by_split`.

    The split `train` of `stdlib` has tests too: they help a model to learn, but never measure one,
    since not every Python has them. A user's own text has no split `train`.
    """
    if (source, split) == ("stdlib", "train"):
        return (document for document in stdlib_documents(tests=True) if split_of(document.name) == split)
    return (document for found, document in documents_by_split(source, option) if found == split)


def read_rows(
    tokenizer: PreTrainedTokenizerBase,
    found: Iterable[tuple[str, Document]],
    block_tokens: int,
    needs: Mapping[str, Need],
    name: str,
    option: str = "--data",
) -> dict[str, torch.Tensor]:
    """Pack documents into rows of token ids without padding, `[rows, block_tokens]` for each key of `needs`.

    Documents follow each other in the order in which they come, with an end-of-text token between
    them. The last, incomplete row is dropped. Reading stops once nothing is needed any more.

    Args:
        found: documents with their splits (`documents_by_split`), or with other names for parts of a text.
        needs: the tokens of each split.
        name: what the text is called in an error, and `option` what gives more of it.

    Raises:
        UsageError: a split has too few tokens. It says what each split has and needs.
    """
    ids: dict[str, list[int]] = {split: [] for split in needs}
    for split, document in found:
        if split in needs and len(ids[split]) < needs[split].at_most:
            ids[split] += _token_ids(tokenizer, document)
            if all(len(ids[other]) >= need.at_most for other, need in needs.items()):
                break
    _require_enough({split: len(found) for split, found in ids.items()}, needs, name, option)
    return {split: _rows(ids[split], block_tokens, need.at_most) for split, need in needs.items()}


def _require_enough(has: Mapping[str, int], needs: Mapping[str, Need], name: str, option: str) -> None:
    short = [need for split, need in needs.items() if has[split] < need.at_least]
    if not short:
        return
    figures = []
    for split, need in needs.items():
        count = f"{need.at_most:,} or more" if has[split] >= need.at_most else f"{has[split]:,}"
        unit = "" if figures else " tokens"
        reason = f" ({need.reason})" if need.reason else ""
        figures.append(f"{split} has {count}{unit} and needs {need.at_least:,}{reason}")
    lower = list(dict.fromkeys(need.option for need in short if need.option))
    remedy = f"give more text with {option}" + (f", or lower {' and '.join(lower)}" if lower else "")
    raise UsageError(f"{name} is too short: {', '.join(figures)}: {remedy}")


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[Document], block_tokens: int, max_tokens: int | None
) -> torch.Tensor:
    """Pack documents into rows of token ids without padding, `[rows, block_tokens]`, as `read_rows` does.

    Reading stops once `max_tokens` are there; None reads everything.

    Raises:
        UsageError: the text does not fill a single row.
    """
    ids: list[int] = []
    for document in texts:
        ids += _token_ids(tokenizer, document)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    if min(len(ids), max_tokens or len(ids)) < block_tokens:
        raise UsageError(f"the text has only {len(ids)} tokens, at least {block_tokens} are needed: change --data")
    return _rows(ids, block_tokens, max_tokens)


def _token_ids(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """The tokens of a document, with the end-of-text token if the tokenizer has one."""
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _rows(ids: list[int], block_tokens: int, max_tokens: int | None) -> torch.Tensor:
    import torch

    rows = min(len(ids), max_tokens or len(ids)) // block_tokens
    return torch.tensor(ids[: rows * block_tokens], dtype=torch.long).view(rows, block_tokens)


def rows_sha256(*rows: torch.Tensor) -> str:
    """SHA-256 of token ids, `[rows, block]`: row by row, each id as a little-endian int64.

    Several tensors are hashed one after the other.
    """
    total = hashlib.sha256()
    for part in rows:
        total.update(part.cpu().numpy().astype("<i8").tobytes())
    return total.hexdigest()
