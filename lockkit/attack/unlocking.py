"""Unlocks in an audit: the positive control, and the unlocked models, which are saved once and then loaded.

The control: each unlock first runs on the original rewritten as a chain, whose blocks are independent of each other.
The model that it returns is compared with the original. The scale is the KL divergence between the original and the
original without its MLPs: the unlock must remove a given share of that divergence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from pydantic import BaseModel

from lockkit.attack.base import UnlockAttack, Unlocked
from lockkit.attack.cost import Cost
from lockkit.attack.rows import SCHEMA, finite, key_of
from lockkit.dlr.view import load_side_by_side
from lockkit.files import write_json
from lockkit.models.families import decoder_layers, mlp_weights
from lockkit.models.locked import locked_classes
from lockkit.models.save import copy_tokenizer, render_modeling_file
from lockkit.output_folders import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects

FOLDER, RECORD = "unlocked", "unlock.json"


def original_as_chain(subjects: Subjects) -> PreTrainedModel:
    """The original in the lock's architecture: its own units, divided among blocks that are independent (gain 0)."""
    original, config = subjects.frozen("original"), subjects.frozen("locked").config
    model = locked_classes(subjects.family)[1](config).to(subjects.device, torch.float32)
    rest = {key: value for key, value in original.state_dict().items() if ".mlp." not in key}
    model.load_state_dict(rest, strict=False)
    model.tie_weights()
    for layer, teacher in zip(decoder_layers(model), decoder_layers(original), strict=True):
        load_side_by_side(layer.mlp, mlp_weights(teacher.mlp, subjects.family))
        layer.mlp.gain = 0.0
    return model.requires_grad_(False).eval()


def control(attack: type[UnlockAttack], config: BaseModel, subjects: Subjects) -> dict[str, Any]:
    """Run the positive control of an unlock, on the original rewritten as a chain.

    Returns:
        Figures for its row. `control_passed`: whether the control passed. `control_kl`: KL(original || unlocked model).
        `kl_without_mlps`: KL(original || original without MLPs). `won_back`: the share of the second that the unlock
        removed. KL divergences are in nats per token.
    """
    unlocked = attack(config).unlock(original_as_chain(subjects), subjects)
    worst, left = subjects.kl_without_mlps, subjects.kl(unlocked.model, "original")
    share = 1 - left / worst if math.isfinite(worst) else math.nan
    return {
        "control_passed": share >= attack.control_share,
        "control_kl": left,
        "kl_without_mlps": worst,
        "won_back": share,
        "cost": unlocked.cost.record(),
    }


def unlock(
    attack: type[UnlockAttack], config: BaseModel, subjects: Subjects, out: Path
) -> tuple[Unlocked, dict[str, Any]]:
    """Unlock the lock, or load the unlocked model if an earlier run has saved it in `out`.

    Only one of several processes that need the same model builds it.

    Returns:
        The unlocked model, and its record. Figures that are not finite are None in the record.
    """
    from lockkit.models.load import load_model
    from lockkit.models.quiet import no_progress_bars

    key = key_of([SCHEMA, attack.name, config.model_dump(), subjects.identity()])
    folder = out / FOLDER / f"{attack.name}-{key[:12]}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / RECORD).is_file():
            made = attack(config).unlock(subjects.frozen("locked"), subjects)
            record = {
                "folder": str(folder.relative_to(out)),
                "blocks": made.blocks,
                "architecture": type(made.model).__name__,
                **subjects.quality(made.model).record(),
                "cost": made.cost.record(),
                "notes": made.notes,
            }
            with new_folder(folder, option="--out") as temporary:
                with no_progress_bars():
                    made.model.save_pretrained(temporary)
                copy_tokenizer(subjects.folders["original"], temporary)
                if made.blocks > 1:
                    file = temporary / "modeling_dlr_lock.py"
                    file.write_text(render_modeling_file(subjects.family), encoding="utf-8")
                write_json(temporary / RECORD, finite(record))
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    model, _ = load_model(folder, torch.float32, str(subjects.device))
    return Unlocked(model, record["blocks"], Cost(**record["cost"]), record["notes"]), record
