"""The lock, from a model to a finished locked checkpoint.

1. Load the original; refuse what cannot be locked; check the output folder.
2. Read or sample the text (lockkit/lock/data.py).
3. Phase 1, layer by layer (capture.py, modulewise.py).
4. Phase 2, all layers together (end_to_end.py).
5. Round to the dtype that is saved, remove the last traces of the teacher's rows, and measure
   what will really be published, on text that neither trained it nor chose its state.
6. Write the folder beside its final place, then rename it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lockkit.dlr.net import block_ranks
from lockkit.errors import DistillationError, UsageError
from lockkit.files import check_apart, check_output_folder, new_folder
from lockkit.lock.capture import LayerwiseCapture
from lockkit.lock.card import locked_model_card
from lockkit.lock.config import LockConfig
from lockkit.lock.data import DistillationData, effective_source, load_data
from lockkit.lock.end_to_end import Fidelity, MLPSwitch, distil_end_to_end, measure_fidelity
from lockkit.lock.initialise import scrub_teacher_rows
from lockkit.lock.modulewise import LayerResult, distil_layer
from lockkit.lock.record import lock_record, public_name
from lockkit.models.families import Family, activation_name, decoder_layers, mlp_weights, require_unlocked
from lockkit.models.load import load_config, load_model, load_tokenizer, resolve_model
from lockkit.models.locked import locked_classes, locked_config
from lockkit.models.save import save_locked
from lockkit.progress import NoProgress, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MIN_CAPTURE_ROWS = 4


@dataclass(frozen=True)
class LockResult:
    """A finished lock: where it is, and what `lockkit.json` says of it."""

    folder: Path
    record: dict


def lock_model(
    model: str,
    out: Path,
    config: LockConfig | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LockResult:
    """Lock a pretrained causal language model (arXiv 2605.10777) and save it to `out`.

    Args:
        model: `demo`, a local folder, or a Hub id.
        out: the folder to write; it appears only once it is complete.

    Raises:
        UsageError: the model, the text or the output folder cannot be used.
        UnsupportedModelError: the model is of a kind that cannot be locked.
        DistillationError: distillation diverged; nothing was written.
    """
    config, progress, started = config or LockConfig(), progress or NoProgress(), time.perf_counter()
    check_output_folder(out, overwrite)
    original = resolve_model(model)
    check_apart(out, original)
    raw_config = load_config(original, trust_remote_code)
    family = require_unlocked(raw_config)
    if config.depth > raw_config.intermediate_size:
        raise UsageError(
            f"--depth {config.depth} is larger than the MLP's width {raw_config.intermediate_size}: lower it"
        )
    tokenizer = load_tokenizer(original)
    stored_dtype = _stored_dtype(raw_config, config)
    device = choose_device(config.device)
    teacher, _ = load_model(original, torch.float32, device, trust_remote_code)
    teacher.requires_grad_(False)
    data = load_data(config, effective_source(config, model), teacher, tokenizer, progress)

    progress.say(_summary(raw_config, config, data))
    chains, layers = _distil_layers(teacher, family, data, config, progress)
    switch = MLPSwitch(teacher, chains)
    after_phase_1 = measure_fidelity(switch, data.evaluation)
    end_to_end = None
    if config.end_to_end_tokens >= config.batch_tokens:
        end_to_end = distil_end_to_end(switch, data.train, data.validation, config, progress)
    scrubbed = _round_and_scrub(switch, family, stored_dtype, config.seed)
    fidelity = measure_fidelity(switch, data.evaluation)
    _require_usable(fidelity)

    record = lock_record(
        model=public_name(model),
        original=original,
        family=family,
        config=config,
        data=data,
        layers=layers,
        after_phase_1=after_phase_1,
        end_to_end=end_to_end,
        fidelity=fidelity,
        scrubbed_rows=scrubbed,
        dtype=stored_dtype,
        seconds=time.perf_counter() - started,
    )
    with new_folder(out, overwrite) as folder:
        locked = assemble(switch, family, config, stored_dtype)
        save_locked(locked, family, folder, original, record, locked_model_card(record))
    return LockResult(out, record)


def _summary(raw_config: PreTrainedConfig, config: LockConfig, data: DistillationData) -> str:
    """What is about to be made, from how much text."""
    ranks = block_ranks(raw_config.intermediate_size, config.depth)
    rank = f"rank {ranks[0]}"
    if ranks[0] != ranks[-1]:
        rank = f"rank {ranks[-1]} or {ranks[0]}, since {config.depth} does not divide {raw_config.intermediate_size}"
    passes = config.tokens / data.train.numel()
    return (
        f"{raw_config.num_hidden_layers} layers, each a chain of {config.depth} blocks of {rank}; "
        f"text: {data.source}, {data.train.numel():,} tokens"
        + (f", read {passes:.1f} times" if passes > 1 else "")
        + f", and twice {data.validation.numel():,} held out"
    )


def _distil_layers(
    teacher: PreTrainedModel, family: Family, data: DistillationData, config: LockConfig, progress: Progress
) -> tuple[list, list[LayerResult]]:
    """Phase 1 for every layer, from the first to the last."""
    block = data.train.shape[1]
    train_rows = min(len(data.train), -(-config.tokens // block))
    batch_rows = max(MIN_CAPTURE_ROWS, 2048 // block)
    train = LayerwiseCapture(teacher, data.train[:train_rows], batch_rows)
    validation = LayerwiseCapture(teacher, data.validation, batch_rows)
    chains, results = [], []
    for index, layer in enumerate(decoder_layers(teacher)):
        weights = mlp_weights(layer.mlp, family)
        chain, result = distil_layer(
            index, layer.mlp, weights, train.next_layer(), validation.next_layer(), config, progress
        )
        chains.append(chain)
        results.append(result)
    return chains, results


@torch.no_grad()
def _round_and_scrub(switch: MLPSwitch, family: Family, dtype: torch.dtype, seed: int) -> int:
    """Round the chains to `dtype`, free them of the teacher's rows, and return them to float32."""
    scrubbed = 0
    for chain, teacher in zip(switch.chains, switch.teachers, strict=True):
        chain.to(dtype)
        scrubbed += scrub_teacher_rows(chain, mlp_weights(teacher, family), seed)
        chain.float()
    return scrubbed


def assemble(switch: MLPSwitch, family: Family, config: LockConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the locked model around the chains, in `dtype`; the original's MLPs stay behind."""
    teacher, shape = switch.model, mlp_weights(switch.teachers[0], family).shape
    dlr = {
        "depth": config.depth,
        "gains": [chain.gain for chain in switch.chains],
        "activation": activation_name(teacher.config),
        "gated": shape.gated,
        "bias": shape.bias,
        "output_bias": shape.output_bias,
    }
    configuration = locked_config(teacher.config, family, dlr)
    configuration.dtype = dtype
    switch.use_chains()
    with torch.device("meta"):
        locked = locked_classes(family)[1](configuration)
    locked.load_state_dict(teacher.state_dict(), strict=True, assign=True)
    locked.tie_weights()
    locked.generation_config = teacher.generation_config
    return locked.to(dtype).eval()


def choose_device(device: str) -> str:
    """Resolve `auto`, and refuse a device that is not there.

    Raises:
        UsageError: no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
            raise RuntimeError("no such kind of device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} is not available here: use cpu, or see `lockkit env`") from error
    return device


def _stored_dtype(raw_config: PreTrainedConfig, config: LockConfig) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored = getattr(raw_config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else getattr(torch, stored) if stored else torch.float32


def _require_usable(fidelity: Fidelity) -> None:
    if not fidelity.kl_divergence < float("inf"):
        raise DistillationError(
            f"the locked model's held-out KL divergence is {fidelity.kl_divergence}: lower --learning-rate or --coupling, "
            "or save with --dtype float32"
        )
