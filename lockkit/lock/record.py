"""`lockkit.json`: the origin, the recipe and the measurements of a lock.

Schema `lockkit-lock/2`:

    schema, versions, git_hash, machine     software and hardware that made the lock
    model, model_type, original_sha256      the original (a name, never a local path)
    weights_sha256                          one hash over the weight files of the lock, as audits name it
    licence                                 the original's licence, null if it names none, and names of its licence files
    dlr                                     depth, ranks and gains of the chains
    recipe                                  all settings (lockkit/lock/config.py)
    data                                    source, sizes and SHA-256 of the token ids, no text
    layers                                  per layer: gain, coupling, NMSE before and after training, tokens, learning
                                            rate, seconds
    after_phase_1, fidelity                 KL, top-1 agreement and perplexities, with the text that they were
                                            measured on (lockkit/measure/records.py); `fidelity` is that of the
                                            weights as saved
    other_texts                             the same as `fidelity`, on text of other kinds than the distillation text
    end_to_end                              phase 2: steps, best step, KL before and after, and the text that chose
                                            the best step; null if phase 2 was skipped
    scrubbed_rows                           rows that were perturbed because they were bit-identical to the teacher's
    memory                                  peak, prediction, and memory of the process before the lock, in bytes
    dtype, seconds, workers                 dtype of the weights, wall time, number of processes
    files                                   names of the files of the lock
"""

from __future__ import annotations

import platform
from typing import Any

import torch

from lockkit.dlr.shape import block_ranks
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
    weights_sha256: str,
    intermediate_size: int,
    family: Family,
    config: LockConfig,
    data: DistillationData,
    layers: list[LayerResult],
    after_phase_1: Fidelity,
    end_to_end: EndToEndResult | None,
    fidelity: Fidelity,
    other_texts: list[Fidelity],
    scrubbed_rows: int,
    dtype: torch.dtype,
    seconds: float,
    workers: int,
    memory: dict[str, Any],
    licence: dict[str, Any],
    files: list[str],
) -> dict[str, Any]:
    """The content of `lockkit.json`, as JSON values.

    Args:
        model: public name of the original.
        original_sha256: hash of its weights.
        weights_sha256: the same of the lock.
        intermediate_size: width of its MLPs.
        family: its family.
        config: the recipe.
        data: the text.
        layers: results of phase 1, in order.
        after_phase_1: fidelity of the chains after phase 1.
        end_to_end: result of phase 2; None if it was skipped.
        fidelity: of the weights as saved.
        other_texts: the same on text of other kinds.
        scrubbed_rows: rows perturbed because they were bit-identical to the teacher's.
        dtype: of the saved weights.
        seconds: wall time of the lock.
        workers: number of processes.
        memory: see `MemoryPrediction.record`.
        licence: see `Origin.record`.
        files: names of the files of the lock.
    """
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
        "weights_sha256": weights_sha256,
        "licence": licence,
        "dlr": {
            "depth": config.depth,
            "rank": max(ranks),
            "smallest_rank": min(ranks),
            "gains": [layer.gain for layer in layers],
        },
        "recipe": config.model_dump(exclude={"work"})
        | {"data": source, "other_texts": [public_name(name) for name in config.other_texts]},
        "data": data.record() | {"source": source},
        "layers": [layer.record() for layer in layers],
        "after_phase_1": after_phase_1.record(),
        "end_to_end": end_to_end.record() if end_to_end else None,
        "fidelity": fidelity.record(),
        "other_texts": [other.record() for other in other_texts],
        "scrubbed_rows": scrubbed_rows,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "workers": workers,
        "memory": memory,
        "files": files,
    }
