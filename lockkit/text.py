"""Text for training, distillation, validation and evaluation.

Text is divided into documents. Every document belongs to exactly one split, the same in every command and on every
machine. So no text serves two purposes.

1. A source (`stdlib`, a text file, a folder, a Hub dataset) is read as an iterator of `Document(name, text)`.
2. The hash of its name puts each document into one of 100 buckets. A split is a range of buckets (`split_of`).
3. In a user's own text, the buckets of a held-out split can hold less than its share, or nothing if the text is short.
   `with_splits` then moves documents from `distill` into that split, in an order that a hash determines.
4. `read_rows` tokenizes the documents of each split and packs them into rows of equal length, with an end-of-text token
   between documents.
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

# The upper bound of each split's range of the buckets 0 to 99. The bundled model was trained on `train`, and lockkit does
# not use that split. In a user's own text, it is part of `distill`.
SPLITS = {"train": 60, "distill": 77, "validate": 80, "evaluate": 90, "finetune": 100}
# The share of all text, in percent, of each split that nothing is trained or distilled on.
HELD_OUT_PERCENT = {
    split: upper - lower
    for (split, upper), lower in zip(SPLITS.items(), (0, *SPLITS.values()), strict=False)
    if split not in ("train", "distill")
}

# A plain text file is cut into documents: paragraphs are joined until they have this length.
FILE_DOCUMENT_CHARACTERS = 4_000

# Shares are filled within this many characters at the start of a source. This limits how much of a Hub dataset is read
# before its first document is used. In the rest, after about 1,000 documents, buckets are close to their shares.
FILLED_CHARACTERS = 8_000_000

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}


@dataclass(frozen=True)
class Document:
    """A piece of text with a name. The name determines its split."""

    name: str
    text: str


@dataclass(frozen=True)
class Need:
    """The tokens that a caller wants from a split.

    Attributes:
        at_least: fewer tokens are refused.
        at_most: more tokens are not read.
        option: the option that lowers `at_least`; None if there is none.
        reason: an explanation of `at_least` for the error.
    """

    at_least: int
    at_most: int
    option: str | None = None
    reason: str = ""


def _hash(text: str) -> int:
    """The first 8 bytes of a SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(name: str) -> str:
    """The split of a document, by the hash of its name."""
    bucket = _hash(name) % 100
    return next(split for split, upper in SPLITS.items() if bucket < upper)


def fill_shares(
    sizes: Mapping[str, int], splits: Mapping[str, str], percent: Mapping[str, int], donor: str
) -> dict[str, str]:
    """Choose documents to move out of one split, so that each other split has its share of the characters.

    Each split takes names in the order of its own hash, until it has its share (rendezvous hashing, Thaler and
    Ravishankar 1998). The order of two names does not depend on other names. So when documents are added, few others
    change their split, and different sources move the same names first.

    Args:
        sizes: characters of each document, by name.
        splits: split of each document before.
        percent: the share of all characters that each split must have.
        donor: the split to move documents from. It keeps at least one.

    Returns:
        The new split of each document that moves, by name.
    """
    total, moved = sum(sizes.values()), {}
    left = {name for name in sizes if splits[name] == donor}
    for split, share in percent.items():
        missing = share * total - 100 * sum(size for name, size in sizes.items() if splits[name] == split)
        order = {name: (_hash(f"{split}: {name}"), name) for name in left}
        for name in sorted(left, key=order.__getitem__):
            if missing <= 0 or len(left) == 1:
                break
            missing -= 100 * sizes[name]
            moved[name] = split
            left.remove(name)
    return moved


def with_splits(found: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Yield the documents of a user's own text with their splits.

    The splits are those of `SPLITS`, with `train` as a part of `distill`. Within the first `FILLED_CHARACTERS`, each
    held-out split has at least its share of the characters. If `fill_shares` moved documents into a split, it exceeds
    its share by less than one document. Documents move out of `distill` only: a document that is held out by its hash
    is held out in every source.
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
                    yield _content_document(gathered)
                    gathered = ""
    if gathered.strip():
        yield _content_document(gathered)


def _content_document(text: str) -> Document:
    # The name depends on the content only, so a passage has the same split in every file and folder.
    return Document("text:" + hashlib.sha256(text.encode()).hexdigest()[:16], text)


def file_documents(path: Path, option: str = "--data") -> Iterator[Document]:
    """Yield the documents of a text file, or of all text files in a folder.

    Args:
        path: the file or folder.
        option: the option that gave it, for the error.

    Raises:
        UsageError: `path` is missing, unreadable, not UTF-8, or holds no text.
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
    """Yield the column `text` of a Hugging Face dataset, one document per row.

    Args:
        name: `owner/name`, or `owner/name:config`.
        option: the option that gave it, for the error.

    Raises:
        UsageError: the package `datasets` is missing, or the dataset cannot be loaded.
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
    except Exception as error:  # the Hub's client raises errors of many classes
        raise UsageError(f"cannot load dataset {name} from the Hub ({error}): change {option}") from error


def documents_by_split(source: str, option: str = "--data") -> Iterator[tuple[str, Document]]:
    """Yield (split, document) for all documents of `source`, in its order.

    Args:
        source: `stdlib` (without its tests), the path of a text file or folder, or the name of a Hub dataset.
        option: the option that gave it, for the error.

    Raises:
        UsageError: there is no such source, or it cannot be read.
    """
    if source == "stdlib":
        return ((split_of(document.name), document) for document in stdlib_documents())
    if source and Path(source).exists():
        return with_splits(file_documents(Path(source), option))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        raise UsageError(f"there is no file or folder {source}: change {option}")
    return with_splits(hub_documents(source, option))


def documents(source: str, split: str, option: str = "--data") -> Iterator[Document]:
    """Yield the documents of one split of `source` (see `documents_by_split`).

    The split `train` of `stdlib` includes modules of tests. The other splits do not, since not every distribution of
    Python has these modules. A user's own text has no split `train`.

    Raises:
        UsageError: there is no such source, or it cannot be read.
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
    """Pack the documents of several splits into rows of token ids without padding.

    Documents follow each other in the given order, with an end-of-text token after each. The last, incomplete row is
    dropped. Reading stops when every split has enough.

    Args:
        tokenizer: of the model.
        found: documents with their splits, as `documents_by_split` yields them. Other names of parts work as well.
        block_tokens: tokens in a row.
        needs: the tokens wanted from each split.
        name: name of the text, for the error.
        option: the option that gives more text, for the error.

    Returns:
        Token ids, `[rows, block_tokens]`, for each split in `needs`.

    Raises:
        UsageError: a split has too few tokens. The message says what each split has and needs.
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
    """Raise a UsageError if a split has fewer tokens than `at_least`."""
    short = [need for split, need in needs.items() if has[split] < need.at_least]
    if not short:
        return
    figures: list[str] = []
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
    """Pack documents into rows of token ids without padding, as `read_rows` does.

    Args:
        tokenizer: of the model.
        texts: the documents.
        block_tokens: tokens in a row.
        max_tokens: reading stops at this number; None reads everything.

    Returns:
        Token ids, `[rows, block_tokens]`.

    Raises:
        UsageError: the text does not fill one row.
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
    """The tokens of a document, followed by the end-of-text token if the tokenizer has one."""
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _rows(ids: list[int], block_tokens: int, max_tokens: int | None) -> torch.Tensor:
    import torch

    rows = min(len(ids), max_tokens or len(ids)) // block_tokens
    return torch.tensor(ids[: rows * block_tokens], dtype=torch.long).view(rows, block_tokens)


def rows_sha256(*rows: torch.Tensor) -> str:
    """SHA-256 of token ids, in hexadecimal.

    Args:
        rows: token ids, `[rows, block]`; several tensors are hashed one after the other. The bytes are those of
            little-endian int64 integers, row by row.
    """
    total = hashlib.sha256()
    for part in rows:
        total.update(part.cpu().numpy().astype("<i8").tobytes())
    return total.hexdigest()
