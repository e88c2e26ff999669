"""Writing a locked checkpoint: an ordinary Hugging Face folder that loads without lockkit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lockkit.files import LOCK_RECORD, write_json
from lockkit.models.load import TOKENIZER_FILES
from lockkit.models.locked import AUTO_MAP, MODELING_FILE, render_modeling_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.models.families import Family


def save_locked(model: PreTrainedModel, family: Family, folder: Path, original: Path, record: dict, card: str) -> None:
    """Write a locked model into `folder`.

    Besides weights and configuration: the self-contained modelling file, the original's
    tokenizer files byte for byte, `lockkit.json` (`record`) and a model card.
    """
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library writes them for the owner alone
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["auto_map"] = AUTO_MAP
    config["architectures"] = ["DLRLockForCausalLM"]
    write_json(config_file, config)
    (folder / MODELING_FILE).write_text(render_modeling_file(family), encoding="utf-8")
    copy_tokenizer(original, folder)
    if (original / "generation_config.json").is_file():
        shutil.copyfile(original / "generation_config.json", folder / "generation_config.json")
    write_json(folder / LOCK_RECORD, record)
    (folder / "README.md").write_text(card, encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are, so that a newer transformers cannot rewrite them."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
