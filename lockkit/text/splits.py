"""Documents and their splits.

The hash of a document's name puts it into one of 100 buckets. A split is a range of buckets (`split_of`).

In a user's own text, the buckets of a held-out split can hold less than its share, or nothing if the text is short.
`with_splits` then moves documents from `distill` into that split, in an order that a hash determines.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# The upper bound of each split's range of the buckets 0 to 99. The bundled model was trained on `train`, and lockkit does
# not use that split. In a user's own text, it is part of `distill`.
SPLITS = {"train": 60, "distill": 77, "validate": 80, "evaluate": 90, "finetune": 100}
# The share of all text, in percent, of each split that nothing is trained or distilled on.
HELD_OUT_PERCENT = {
    split: upper - lower
    for (split, upper), lower in zip(SPLITS.items(), (0, *SPLITS.values()), strict=False)
    if split not in ("train", "distill")
}

# Shares are filled within this many characters at the start of a source. This limits how much of a Hub dataset is read
# before its first document is used. In the rest, after about 1,000 documents, buckets are close to their shares.
FILLED_CHARACTERS = 8_000_000


@dataclass(frozen=True)
class Document:
    """A piece of text with a name. The name determines its split."""

    name: str
    text: str


def content_document(text: str) -> Document:
    """A document named by a hash of its content. So it has the same split in every file, folder and format."""
    return Document("text:" + hashlib.sha256(text.encode()).hexdigest()[:16], text)


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
