"""`lockkit.json`: what a lock was made from, how, and what it measured.

Schema `lockkit-lock/2`:

    schema, versions, git_hash, machine     what made it
    model, model_type, original_sha256      what was locked (a name, never a local path)
    dlr                                     depth and ranks of the chains
    recipe                                  every setting (lockkit/lock/config.py)
    data                                    source, sizes and sha256 of the token ids, no text
    layers                                  per layer: gain, nmse, tokens, learning rate it took, seconds
    after_phase_1, fidelity                 KL, top-1 agreement and perplexities, and the text they were
                                            measured on (lockkit/measure/records.py); `fidelity` is of
                                            the weights as saved
    end_to_end                              phase 2: steps, best step, KL, and the text that chose it
    scrubbed_rows                           rows that had to be freed from the teacher's bits
    memory                                  peak and predicted, and the process's size before the lock
    dtype, seconds, workers
"""

from __future__ import annotations

import platform

import torch

from lockkit.dlr.net import block_ranks
from lockkit.lock.config import LockConfig
from lockkit.lock.data import DistillationData
from lockkit.lock.end_to_end import EndToEndResult
from lockkit.lock.modulewise import LayerResult
from lockkit.measure.records import Fidelity
from lockkit.models.families import Family
from lockkit.models.identity import public_name
from lockkit.version import git_hash, versions

SCHEMA = "lockkit-lock/2"


def lock_record(
    *,
    model: str,
    original_sha256: str,
    intermediate_size: int,
    family: Family,
    config: LockConfig,
    data: DistillationData,
    layers: list[LayerResult],
    after_phase_1: Fidelity,
    end_to_end: EndToEndResult | None,
    fidelity: Fidelity,
    scrubbed_rows: int,
    dtype: torch.dtype,
    seconds: float,
    workers: int,
    memory: dict,
) -> dict:
    """Collect everything that belongs into `lockkit.json`."""
    ranks = block_ranks(intermediate_size, config.depth)
    source = public_name(data.source)
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "git_hash": git_hash(),
        "machine": {"processor": platform.machine(), "torch_threads": torch.get_num_threads()},
        "model": model,
        "model_type": family.model_type,
        "original_sha256": original_sha256,
        "dlr": {
            "depth": config.depth,
            "rank": max(ranks),
            "smallest_rank": min(ranks),
            "gains": [layer.gain for layer in layers],
        },
        "recipe": config.model_dump(exclude={"work"}) | {"data": source},
        "data": data.record() | {"source": source},
        "layers": [layer.record() for layer in layers],
        "after_phase_1": after_phase_1.record(),
        "end_to_end": end_to_end.record() if end_to_end else None,
        "fidelity": fidelity.record(),
        "scrubbed_rows": scrubbed_rows,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "workers": workers,
        "memory": memory,
    }
