"""Shared fixtures: tiny models that are made once, and the command line in this process. The Hub is off."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(__file__).parents[1] / ".cache" / "huggingface")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["COLUMNS"] = "80"

from dataclasses import dataclass

import pytest
import torch
from tiny import save_tiny

from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.settings import option_of

# Enough training to change every weight and couple the blocks, but too little for a faithful lock.
QUICK = {
    "depth": 5,
    "data": "stdlib",
    "tokens": 6_144,
    "end_to_end_tokens": 2_048,
    "block_tokens": 64,
    "batch_tokens": 512,
    "end_to_end_batch_tokens": 512,
    "validation_tokens": 512,
    "other_texts": ["none"],
    "device": "cpu",
}


def command_line(settings: Mapping[str, Any]) -> list[str]:
    """The settings of a lock as options of `lockkit lock`."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    unused = LockConfig(**settings).unused()  # the program refuses them
    values = ((n, v if isinstance(v, list) else [v]) for n, v in settings.items() if n not in unused)
    return [f"{option_of(LockConfig, name)}={one}" for name, several in values for one in several]


# Files whose tests take minutes. They start first, so that at the end no process waits for the other one.
LONG_FILES = {
    "test_other_environment", "test_examples", "test_resume", "test_memory", "test_lock", "test_audit", "test_workers",
    "test_compare_precisions", "test_compare_unlocks", "test_known_outcomes", "test_verify",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A function from a model type to the folder of a tiny original, made on first use."""
    made: dict[str, Path] = {}

    def original(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(model_type, tmp_path_factory.mktemp("original") / model_type)
        return made[model_type]

    return original


@pytest.fixture(scope="session")
def locks(originals, tmp_path_factory):
    """A function from a model type to the folder of its locked form, made on first use with `QUICK`."""
    made: dict[str, Path] = {}

    def lock(model_type: str) -> Path:
        if model_type not in made:
            out = tmp_path_factory.mktemp("locked") / model_type
            lock_model(str(originals(model_type)), out, LockConfig(**QUICK))
            made[model_type] = out
        return made[model_type]

    return lock


@dataclass
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd, monkeypatch):
    """Run `lockkit ARGS...` in this process; return exit code, standard output and error."""

    def run(*args: object) -> Outcome:
        from lockkit.cli.app import main

        monkeypatch.setattr("sys.argv", ["lockkit", *map(str, args)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
