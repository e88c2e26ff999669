"""Writing a locked checkpoint: an ordinary Hugging Face folder that loads without lockkit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lockkit.files import LOCK_RECORD, write_json
from lockkit.models.load import TOKENIZER_FILES, no_progress_bars
from lockkit.models.locked import AUTO_MAP, MODELING_FILE, render_modeling_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.models.families import Family


def save_locked(model: PreTrainedModel, family: Family, folder: Path, original: Path, record: dict, card: str) -> None:
    """Write a locked model into `folder`.

    Besides weights and configuration: the self-contained modelling file, the original's
    tokenizer files byte for byte, `lockkit.json` (`record`) and a model card.
    """
    with no_progress_bars():
        model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library writes them for the owner alone
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["auto_map"] = AUTO_MAP
    config["architectures"] = ["DLRLockForCausalLM"]
    config |= transformers_4_rope(config)
    write_json(config_file, config)
    (folder / MODELING_FILE).write_text(render_modeling_file(family), encoding="utf-8")
    copy_tokenizer(original, folder)
    if (original / "generation_config.json").is_file():
        shutil.copyfile(original / "generation_config.json", folder / "generation_config.json")
    write_json(folder / LOCK_RECORD, record)
    (folder / "README.md").write_text(card, encoding="utf-8")


def transformers_4_rope(config: dict) -> dict:
    """RoPE settings under the names transformers 4 reads; without them it takes its defaults, silently.

    transformers 5 keeps them in `rope_parameters`: one set, or one for each kind of layer.
    """
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:
        local = parameters["sliding_attention"]["rope_theta"]
        return transformers_4_rope({"rope_parameters": parameters["full_attention"]}) | {"rope_local_base_freq": local}
    names = ("rope_theta", "partial_rotary_factor")
    found = {name: parameters[name] for name in names if name in parameters}
    if parameters.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in parameters.items() if key not in names}
        found["rope_scaling"]["type"] = parameters["rope_type"]
    return found


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are, so that a newer transformers cannot rewrite them."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
