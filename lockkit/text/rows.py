"""Documents as rows of token ids, for a model to read.

1. Each document becomes token ids: the tokens with which the tokenizer starts a text (`start_tokens`), those of the
   document, and the end-of-text token.
2. The documents follow each other in one long list of ids.
3. The list is cut into rows of equal length. A row that begins inside a document gets the start tokens, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockkit.errors import UsageError
from lockkit.text.splits import Document

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


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


def read_rows(
    tokenizer: PreTrainedTokenizerBase,
    found: Iterable[tuple[str, Document]],
    block_tokens: int,
    needs: Mapping[str, Need],
    name: str,
    option: str = "--data",
) -> dict[str, torch.Tensor]:
    """Pack the documents of several splits into rows of token ids without padding.

    Documents follow each other in the given order, with an end-of-text token after each. Every row and every document
    begins with the tokenizer's start tokens, if it has any. The last, incomplete row is dropped. Reading stops when
    every split has enough.

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
    start = start_tokens(tokenizer)
    ids: dict[str, list[int]] = {split: [] for split in needs}
    documents = 0
    for documents, (split, document) in enumerate(found, 1):  # noqa: B007
        if split in needs and len(ids[split]) < needs[split].at_most:
            ids[split] += _token_ids(tokenizer, document, start)
            if all(len(ids[other]) >= need.at_most for other, need in needs.items()):
                break
    _require_enough({split: len(found) for split, found in ids.items()}, needs, documents, name, option)
    return {split: _rows(ids[split], block_tokens, need.at_most, start) for split, need in needs.items()}


def _require_enough(has: Mapping[str, int], needs: Mapping[str, Need], documents: int, name: str, option: str) -> None:
    """Raise a UsageError if a split has fewer tokens than `at_least`. `documents` is the number of all documents."""
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
    raise UsageError(
        f"{name} is too short: {', '.join(figures)}; it has {_counted(documents)}, each in one split: {remedy}"
    )


def _counted(documents: int) -> str:
    return "1 document" if documents == 1 else f"{documents:,} documents (passages or rows)"


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
    start = start_tokens(tokenizer)
    ids: list[int] = []
    documents = 0
    for documents, document in enumerate(texts, 1):  # noqa: B007
        ids += _token_ids(tokenizer, document, start)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    if min(len(ids), max_tokens or len(ids)) < block_tokens:
        raise UsageError(
            f"the text has only {len(ids)} tokens in {_counted(documents)}, at least {block_tokens} are needed: "
            "change --data"
        )
    return _rows(ids, block_tokens, max_tokens, start)


def without_embedding(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], vocab_size: int) -> str | None:
    """Describe a token that the model cannot read, because its embeddings do not have the token's id.

    The tokenizer of a model has such tokens if they were added without resizing the embeddings.

    Args:
        tokenizer: of the model.
        ids: token ids of a text.
        vocab_size: number of the model's embeddings.

    Returns:
        The token and both numbers, in words. None if the model can read all tokens.
    """
    beyond = next((token for token in ids if token >= vocab_size), None)
    if beyond is None:
        return None
    return (
        f"the token {tokenizer.convert_ids_to_tokens(beyond)!r} has the id {beyond}, "
        f"and the model has only {vocab_size} embeddings"
    )


def require_embedded(
    tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor | list[int], vocab_size: int, name: str, option: str
) -> None:
    """Check that a model has an embedding for every token of a text.

    Args:
        tokenizer: of the model.
        ids: token ids of the text, of any shape.
        vocab_size: number of the model's embeddings.
        name: name of the text, for the error.
        option: the option that gives another text, for the error.

    Raises:
        UsageError: an id is not below `vocab_size`. The message names the token. It names MODEL if the tokenizer adds
            the token to every text.
    """
    flat = ids if isinstance(ids, list) else [int(ids.max())] if ids.numel() else []
    problem = without_embedding(tokenizer, flat, vocab_size)
    added = start_tokens(tokenizer) if problem else []
    added += [tokenizer.eos_token_id] if problem and tokenizer.eos_token_id is not None else []
    of_tokenizer = without_embedding(tokenizer, added, vocab_size)
    if of_tokenizer:
        which = (
            "eos_token" if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= vocab_size else "bos_token"
        )
        raise UsageError(
            f"the tokenizer adds its {which} to every text, and {of_tokenizer}: correct {which} in "
            "tokenizer_config.json, or change MODEL"
        )
    if problem:
        raise UsageError(f"{name} cannot be read: {problem}: change {option}, or resize the model's embeddings")


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that the tokenizer puts before every text, such as `<bos>`. Empty for many tokenizers.

    Many models that were trained with such a token predict badly without it.
    """
    text = "text"
    with_special = tokenizer(text)["input_ids"]
    without = tokenizer(text, add_special_tokens=False)["input_ids"]
    for position in range(len(with_special) - len(without) + 1):
        if with_special[position : position + len(without)] == without:
            return with_special[:position]
    return []


def _token_ids(tokenizer: PreTrainedTokenizerBase, document: Document, start: list[int]) -> list[int]:
    """The tokens of a document after the `start` tokens, followed by the end-of-text token if the tokenizer has one."""
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    return [*start, *ids] if tokenizer.eos_token_id is None else [*start, *ids, tokenizer.eos_token_id]


def _rows(ids: list[int], block_tokens: int, max_tokens: int | None, start: list[int]) -> torch.Tensor:
    """Cut a list of token ids into rows, `[rows, block_tokens]`, each of which begins with the `start` tokens."""
    import torch

    wanted = min(len(ids), max_tokens or len(ids)) // block_tokens
    rows, position = [], 0
    for _ in range(wanted):
        head = [] if ids[position : position + len(start)] == start else start
        end = position + block_tokens - len(head)
        rows.append(head + ids[position:end])
        position = end
    return torch.tensor(rows, dtype=torch.long).view(wanted, block_tokens)


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
