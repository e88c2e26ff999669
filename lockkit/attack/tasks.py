"""Fine-tuning tasks: what an attacker wants the model to learn, as rows of token ids with labels.

Two tasks are built in and need no network. Both are made from the source files of Python's standard library in the
split `finetune`, which no lock is distilled on (lockkit/text):

- `docstrings`: another domain. English prose: the docstrings of modules, classes and functions.
- `signatures`: another format. Given the line that defines a function, write its signature as JSON. Only the answer
  counts in the loss.

Any other name is a path or a Hub dataset (lockkit/text). Text is a language-modelling task on its split `finetune`. A
file of rows can have one conversation per row, {"messages": [{"role": ..., "content": ...}]}; only what the assistant
writes counts in the loss. A conversation is one example. If the chat template changes earlier turns (as some remove the
reasoning from all answers but the last), each answer is an example, with the turns before it as the prompt.

Documents are held out by a hash of their name. In a user's own task, at least a quarter of the text is held out (see
`fill_shares`). Documents whose content is also in the distillation text of the lock are excluded. Their number and the
hashes of the rows are in the result.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lockkit.attack.chats import rendered_examples
from lockkit.errors import UsageError, first_line
from lockkit.models.identity import public_name
from lockkit.text import Document, Need, documents, fill_shares, read_rows, rows_sha256, start_tokens
from lockkit.text.reading import kind_of, require_no_zero
from lockkit.text.tables import CHAT_COLUMNS, TABLES, Row, chat_turns, row_value, table_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = ("docstrings", "signatures")
IGNORED = -100  # label of a token that does not count in the loss
HELD_OUT_PERCENT = 25
TRAIN, HELD_OUT = "train", "held-out"  # the parts of a task
MIN_PROSE_CHARACTERS = 80
ROLES = {"human": "user", "gpt": "assistant"}  # other names of roles, in `conversations`


@dataclass(frozen=True)
class Rows:
    """Rows of tokens with labels.

    Attributes:
        ids: token ids, `[rows, block]`.
        labels: the same ids, or `IGNORED` for tokens that do not count in the loss, `[rows, block]`.
    """

    ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding included."""
        return self.ids.numel()

    def sha256(self) -> str:
        """SHA-256 of the ids and then the labels."""
        return rows_sha256(self.ids, self.labels)


@dataclass(frozen=True)
class Task:
    """A fine-tuning task.

    Attributes:
        name: public name.
        train: rows to train on.
        held_out: rows to measure on.
        documents: number of documents (or examples) that the rows are made from.
        left_out: number of documents excluded because they are in the distillation text.
    """

    name: str
    train: Rows
    held_out: Rows
    documents: int
    left_out: int

    def record(self) -> dict[str, Any]:
        """Name, counts and hashes as JSON values."""
        return {
            "name": self.name,
            "documents": self.documents,
            "left_out_as_distillation_text": self.left_out,
            "train_tokens": self.train.tokens,
            "train_sha256": self.train.sha256(),
            "held_out_tokens": self.held_out.tokens,
            "held_out_labels": int((self.held_out.labels != IGNORED).sum()),
            "held_out_sha256": self.held_out.sha256(),
        }


@dataclass(frozen=True)
class Example:
    """A prompt with its answer, or a conversation.

    Attributes:
        name: of its document.
        turns: each text, and whether it counts in the loss.
    """

    name: str
    turns: list[tuple[str, bool]]

    @property
    def text(self) -> str:
        """The text of all turns."""
        return "".join(text for text, _ in self.turns)


def load_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_tokens: int,
    train_tokens: int,
    held_out_tokens: int,
    distilled_on: str | None,
    distilled_column: str | None = None,
    column: str | None = None,
) -> Task:
    """Build a task.

    Args:
        name: one of `BUILT_IN`, a file or folder of text, a file of conversations, or a Hub dataset.
        tokenizer: of the model.
        block_tokens: tokens in a row.
        train_tokens, held_out_tokens: wanted tokens of each part.
        distilled_on: source of the lock's distillation text, whose documents are excluded. None if it is unknown.
        distilled_column: the column of its rows; None for the default.
        column: the column of the task's rows; None for the default.

    Raises:
        UsageError: there is no such text, there is too little of it, or a line is not valid.
    """
    forbidden = _distillation_contents(distilled_on, distilled_column)
    if name == "signatures" or _is_chat(name, column):
        examples = list(signature_examples()) if name == "signatures" else chat_examples(Path(name), tokenizer, column)
        return _example_task(name, examples, tokenizer, block_tokens, train_tokens, held_out_tokens, forbidden)
    found = list(docstring_documents() if name == "docstrings" else documents(name, "finetune", "--task", column))
    kept = [document for document in found if _content(document.text) not in forbidden]
    parts = _parts(((document.name, len(document.text)) for document in kept), fill=name not in BUILT_IN)
    needs = {
        part: Need(block_tokens, max(tokens, block_tokens), "--block-tokens")
        for part, tokens in ((TRAIN, train_tokens), (HELD_OUT, held_out_tokens))
    }
    named = ((parts[document.name], document) for document in kept)
    rows = read_rows(tokenizer, named, block_tokens, needs, f"the split `finetune` of {name}", "--task")
    train, held_out = (_language_rows(rows[part]) for part in (TRAIN, HELD_OUT))
    return Task(public_name(name), train, held_out, len(kept), len(found) - len(kept))


def docstring_documents() -> Iterator[Document]:
    """Yield the docstrings of each module in the split `finetune`, joined to one document."""
    for document, tree in _parsed_modules():
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        prose = [text for text in found if text and len(text) >= MIN_PROSE_CHARACTERS]
        if prose:
            yield Document(document.name, "\n\n".join(prose) + "\n")


def signature_examples() -> Iterator[Example]:
    """Yield one example per function in the split `finetune`: its `def` line, and its signature as JSON."""
    for document, tree in _parsed_modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                line = f"def {node.name}({ast.unparse(node.args)}):"
                answer = json.dumps(_signature(node))
                yield Example(document.name, [(f"# Signature as JSON\n{line}\n", False), (answer + "\n", True)])


def _parsed_modules() -> Iterator[tuple[Document, ast.Module]]:
    """The modules of the standard library in the split `finetune`, parsed. Those that do not parse are skipped."""
    for document in documents("stdlib", "finetune"):
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        yield document, tree


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = dict(
        zip([a.arg for a in plain][len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True)
    )
    defaults |= {
        a.arg: value for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value is not None
    }
    return {
        "name": node.name,
        "arguments": [a.arg for a in [*plain, *arguments.kwonlyargs]],
        "defaults": {name: ast.unparse(value) for name, value in defaults.items()},
        "variadic": bool(arguments.vararg or arguments.kwarg),
    }


def _is_chat(name: str, column: str | None) -> bool:
    """Whether `name` is a file of rows with conversations: its first row has one."""
    path = Path(name)
    if name in BUILT_IN or kind_of(path) not in TABLES or not path.is_file():
        return False
    for where, row in table_rows(path, "--task", column):
        found, value = row_value(row, where, column)
        return found in CHAT_COLUMNS or not isinstance(value, str | None)
    return False


def chat_examples(path: Path, tokenizer: PreTrainedTokenizerBase, column: str | None = None) -> list[Example]:
    """Read conversations from a file of rows. The turns of the assistant count in the loss.

    Args:
        path: the file.
        tokenizer: its chat template renders the turns. Without a template, each turn gets a heading.
        column: the column with the conversations; None for the default.

    Raises:
        UsageError: the file cannot be read, or a row is not valid. The message names the row.
    """
    examples: list[Example] = []
    for where, row in table_rows(path, "--task", column):
        messages = _messages(row, where, column)
        name = "text:" + _content(json.dumps(messages))[:16]
        try:
            examples += [Example(name, turns) for turns in rendered_examples(messages, tokenizer)]
        except Exception as error:  # a template may raise any error
            raise UsageError(f"{where}: the chat template refuses it ({first_line(error)}): change --task") from error
    return examples


def _messages(row: Row, where: str, column: str | None) -> list[dict[str, str]]:
    """The turns in a row. `where` names the row in errors."""
    name, value = row_value(row, where, column)
    turns = chat_turns(value)
    if turns is None:
        raise UsageError(
            f'{where}: "{name}" is no list of turns with "role" and "content": correct it, or change --task'
        )
    for _, content in turns:
        require_no_zero(content, where, "--task")
    messages = [{"role": ROLES.get(role, role), "content": content} for role, content in turns]
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise UsageError(f"{where}: no turn of the assistant, so nothing to learn: correct it, or change --task")
    return messages


def _content(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _distillation_contents(source: str | None, column: str | None) -> set[str]:
    """Hashes of the content of all distillation documents. The same text may have another name in a task."""
    if source is None or source == "self":
        return set()
    return {_content(document.text) for document in documents(source, "distill", column=column)}


def _parts(characters: Iterable[tuple[str, int]], fill: bool) -> Mapping[str, str]:
    """The part of each document, by name. With `fill`, the held-out part has at least its share of the characters."""
    sizes: Counter[str] = Counter()
    for name, count in characters:
        sizes[name] += count
    parts = {name: HELD_OUT if _is_held_out(name) else TRAIN for name in sizes}
    return parts | fill_shares(sizes, parts, {HELD_OUT: HELD_OUT_PERCENT}, TRAIN) if fill else parts


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(f"held out: {name}".encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def _rows(ids: torch.Tensor, labels: torch.Tensor) -> Rows:
    labels[:, 0] = IGNORED  # the first token is not predicted
    return Rows(ids, labels)


def _language_rows(ids: torch.Tensor) -> Rows:
    return _rows(ids, ids.clone())


def _example_task(
    name: str,
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    block_tokens: int,
    train_tokens: int,
    held_out_tokens: int,
    forbidden: set[str],
) -> Task:
    kept = [e for e in examples if _content(e.text) not in forbidden]
    parts = _parts(((e.name, len(e.text)) for e in kept), fill=name not in BUILT_IN)
    train, held_out = (
        _example_rows([e for e in kept if parts[e.name] == part], tokenizer, block_tokens, tokens, f"{part} of {name}")
        for part, tokens in ((TRAIN, train_tokens), (HELD_OUT, held_out_tokens))
    )
    return Task(public_name(name), train, held_out, len(kept), len(examples) - len(kept))


def _example_rows(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, block: int, max_tokens: int, name: str
) -> Rows:
    """Pack whole examples into rows. The rest of a row is padding, which does not count in the loss.

    A row begins with the tokenizer's start tokens, and an end-of-text token follows each example, as in pretraining. An
    example that is longer than a row is cut.
    """
    start = start_tokens(tokenizer)
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    padding = separator[0] if separator else 0
    rows: list[tuple[list[int], list[int]]] = []
    ids: list[int] = []
    labels: list[int] = []
    # Ordered by a hash, so that neighbours in a file (methods of one class) are not in the same row.
    for example in sorted(examples, key=lambda e: _content(e.name + e.text)):
        new_ids, new_labels = _encode(example, tokenizer, separator)
        if new_ids[: len(start)] == start:  # chat templates have them, too
            new_ids, new_labels = new_ids[len(start) :], new_labels[len(start) :]
        new_ids, new_labels = new_ids[: block - len(start)], new_labels[: block - len(start)]
        if not any(label != IGNORED for label in new_labels):
            continue  # the prompt alone fills the row
        if len(ids) + len(new_ids) > block:
            rows.append((ids, labels))
            ids, labels = [], []
        if not ids:
            ids, labels = list(start), [IGNORED] * len(start)
        ids, labels = ids + new_ids, labels + new_labels
        if len(rows) * block >= max_tokens:
            break
    if ids and (len(rows) * block < max_tokens):
        rows.append((ids, labels))
    if not rows:
        raise UsageError(
            f"{name} has {len(examples)} example{'' if len(examples) == 1 else 's'}, and needs one whose answer begins within a row of {block} tokens: "
            "give more with --task, or raise --block-tokens"
        )
    filled = [(i + [padding] * (block - len(i)), label + [IGNORED] * (block - len(label))) for i, label in rows]
    return _rows(torch.tensor([i for i, _ in filled]), torch.tensor([label for _, label in filled]))


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, separator: list[int]) -> tuple[list[int], list[int]]:
    """The token ids and labels of an example, with `separator` after it."""
    ids: list[int] = []
    labels: list[int] = []
    learned = False
    for text, learned in example.turns:
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        labels += new if learned else [IGNORED] * len(new)
    return ids + separator, labels + (separator if learned else [IGNORED] * len(separator))
