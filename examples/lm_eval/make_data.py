"""Writes stdlib_members.jsonl: which of four names belongs to this module of Python's standard library?

    python make_data.py

The right answer is from the module's `__all__`, the wrong ones are from the `__all__` of other modules. The file
contains names only, no source text. Another version of Python may have other names. So the file in the repository is
not regenerated, and scores stay comparable.
"""

import importlib
import json
import random
from pathlib import Path

MODULES = """
    argparse ast asyncio base64 bisect calendar codecs collections configparser contextlib copy csv dataclasses
    decimal difflib dis email enum fileinput filecmp fractions functools glob gzip hashlib heapq html http inspect
    io ipaddress json linecache locale logging mailbox mimetypes os pathlib pickle platform pprint queue random
    secrets shelve shlex shutil socket statistics string subprocess tarfile tempfile textwrap threading timeit
    tokenize traceback types typing unittest uuid warnings weakref zipfile
"""
QUESTIONS = 96
CHOICES = 4


def main() -> None:
    """Write the questions beside this file."""
    random.seed(0)
    members = {}
    names = MODULES.split()
    for name in names:
        public = getattr(importlib.import_module(name), "__all__", [])
        members[name] = sorted(member for member in public if not member.startswith("_"))
    modules = [name for name in names if len(members[name]) >= CHOICES]
    rows = []
    for number in range(QUESTIONS):
        module = modules[number % len(modules)]
        others = sorted({m for name in modules if name != module for m in members[name]} - set(members[module]))
        answer = number % CHOICES
        choices = random.sample(others, CHOICES - 1)
        choices.insert(answer, random.choice(members[module]))
        rows.append({"prompt": f"from {module} import", "choices": choices, "answer": answer})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(__file__).with_name("stdlib_members.jsonl").write_text(text)


if __name__ == "__main__":
    main()
