"""The two texts of forget_bench.py, both from Python itself: A is kept, D is to be locked out.

* A: the modules of the standard library without docstrings and comments. So it is code, with hardly any English prose.
* D: English prose: the paragraphs of the modules' docstrings, and of the chapters on the language in `pydoc`.

Modules and chapters belong to splits by their names (lockkit/text). A is trained on in the split `train`, and measured in
`evaluate`. D is trained on in all splits but `evaluate`, where it is measured, and `finetune`, from which texts for a
prompt come.

No paragraph of D shares a run of 12 words with another part: modules of A that do are left out, and so are paragraphs of D
that share one with a paragraph of D before them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lockkit.text import SPLITS, Document, documents, documents_by_split, rows_sha256, token_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN_WORDS = 12
LEAST_WORDS = 12  # of a paragraph of prose
LETTERS = 0.75  # least share of letters and spaces in a paragraph of prose
PARTS = {"D": ("train", "distill", "validate"), "D held out": ("evaluate",), "D context": ("finetune",)}
DOCSTRING_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Texts:
    """The parts as token ids, `[rows, block]`, and counts for the report."""

    rows: dict[str, torch.Tensor]
    counts: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict:
        """Tokens and hashes of every part, and the counts, as JSON values."""
        found = {name: {"tokens": part.numel(), "sha256": rows_sha256(part)} for name, part in self.rows.items()}
        return {"parts": found, "counts": self.counts}


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `RUN_WORDS` words of a text. Words are letters and digits in lower case."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1)}


def code_and_prose(source: str) -> tuple[str, str]:
    """A module without docstrings and comments, and its docstrings.

    Raises:
        SyntaxError, ValueError: it is no Python.
    """
    tree = ast.parse(source)
    prose = []
    for node in ast.walk(tree):
        if isinstance(node, DOCSTRING_OWNERS) and ast.get_docstring(node):
            prose.append(ast.get_docstring(node) or "")
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n", "\n\n".join(prose)


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs that are prose: no examples of code, lists of names or tables."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        plain = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c == " " for c in plain)
        long_enough = len(re.findall(r"[A-Za-z]{2,}", plain)) >= LEAST_WORDS
        if long_enough and letters >= LETTERS * len(plain) and ">>>" not in plain:
            found.append(plain)
    return found


def stdlib_by_split() -> Iterator[tuple[str, Document]]:
    """Yield (split, module) for all modules of the standard library; those of tests in `train` only."""
    for split in SPLITS:
        yield from ((split, document) for document in documents("stdlib", split))


def disjoint(parts: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Leave out the paragraphs that share a run of words with one before, in the order of `parts`. Empty texts go."""
    taken: set[tuple[str, ...]] = set()
    found: dict[str, list[Document]] = {}
    for name, texts in parts.items():
        found[name] = []
        for document in texts:
            kept = []
            for paragraph in prose_paragraphs(document.text):
                own = runs(paragraph)
                if not own & taken:
                    kept.append(paragraph)
                    taken |= own
            if kept:
                found[name].append(Document(document.name, "\n\n".join(kept) + "\n"))
    return found


def gather(
    modules: Iterable[tuple[str, Document]], chapters: Iterable[tuple[str, Document]]
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Divide modules and chapters, both with their splits, into the parts of A and D.

    Returns:
        The documents of each part, and counts: how many there are, and how many modules were left out of A since they
        share a run of words with D.
    """
    prose: dict[str, list[Document]] = {name: [] for name in PARTS}
    part_of = {split: name for name, splits in PARTS.items() for split in splits}
    code: dict[str, list[Document]] = {"A": [], "A held out": []}
    for split, module in modules:
        if module.name.startswith("pydoc_data"):  # the chapters, as a module
            continue
        try:
            without, docstrings = code_and_prose(module.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        prose[part_of[split]].append(Document(f"docstrings:{module.name}", docstrings))
        if split in ("train", "evaluate"):
            code["A" if split == "train" else "A held out"].append(Document(module.name, without))
    for split, chapter in chapters:
        prose[part_of[split]].append(chapter)
    parts = disjoint(prose)
    of_d = set().union(*(runs(document.text) for texts in parts.values() for document in texts))
    counts = {f"documents of {name}": len(texts) for name, texts in parts.items()}
    for name, texts in code.items():
        parts[name] = [module for module in texts if not runs(module.text) & of_d]
        counts[f"documents of {name}"] = len(parts[name])
        counts[f"documents left out of {name}"] = len(texts) - len(parts[name])
    return parts, counts


def load_texts(tokenizer: PreTrainedTokenizerBase, block: int, most: dict[str, int], cache: Path) -> Texts:
    """The rows of all parts, from `cache` if it has them.

    Args:
        tokenizer: shared by all models.
        block: tokens in a row.
        most: most tokens of a part, by its name; parts that are not named are read whole.
        cache: file of the rows.
    """
    if cache.is_file():
        state = torch.load(cache, weights_only=True)
        return Texts(state["rows"], state["counts"])
    parts, counts = gather(stdlib_by_split(), documents_by_split("docs"))
    # Documents in the order of their names would give each part of A one corner of the library.
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name, texts in parts.items():
        order = torch.randperm(len(texts), generator=generator).tolist()
        rows[name] = token_blocks(tokenizer, (texts[index] for index in order), block, most.get(name))
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"rows": rows, "counts": counts}, cache)
    return Texts(rows, counts)
