"""Phase 1 for a whole model, with one or several workers.

Unless the recipe gives one coupling, a pilot (pilot.py) chooses that of each layer first. The first worker runs it.

The layers are divided into groups. A wave is one group per worker. For each wave:

1. Capture: every worker runs its share of the rows through the wave's layers, with one layer in memory at a time. The
   inputs of the MLPs go to tensors that all workers can read.
2. Train: every worker distils its own group (modulewise.py) and saves the chains.

Groups do not depend on the number of workers, so the resulting weights do not depend on it either. Layers that are
already in the work folder are run, but not trained again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lockkit.dlr.net import DLRNet
from lockkit.lock.config import RANDOM_COUPLING, LockConfig
from lockkit.lock.data import DistillationData
from lockkit.lock.memory import layers_together
from lockkit.lock.modulewise import LayerResult, LayerTask, distil_layers
from lockkit.lock.pilot import choose_couplings
from lockkit.lock.work import Work
from lockkit.models.activation_cache import ActivationCache
from lockkit.models.capture import LayerwiseCapture
from lockkit.models.families import mlp_weights
from lockkit.models.layered import StreamedModel
from lockkit.progress import Progress
from lockkit.workers import Workers


def distil_all_layers(
    stream: StreamedModel,
    empty_chain: Callable[[float], DLRNet],
    data: DistillationData,
    config: LockConfig,
    work: Work,
    workers: Workers,
    progress: Progress,
) -> list[LayerResult]:
    """Distil every MLP of a model and save the chains in the work folder.

    Args:
        stream: the original.
        empty_chain: returns an untrained chain, given its gain.
        data: token ids for training and validation.
        config: the recipe.
        work: the work folder. Layers that it has already are not distilled again.
        workers: share the work between them.
        progress: reports steps and losses.

    Returns:
        The result of each layer, in order.

    Raises:
        DistillationError: a layer diverged, or a worker stopped. Finished layers are kept.
        UsageError: the disk is full.
    """
    indices = list(range(len(stream)))
    size = layers_together(stream, config)
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    waves = [groups[start : start + workers.count] for start in range(0, len(groups), workers.count)]
    with workers.together():
        cache = ActivationCache(work.folder / "activations", int(config.cache_gigabytes * 1e9))
        if not all(work.has_layer(index) for index in indices):
            couplings = _couplings(stream, empty_chain, data, config, cache, work, workers, progress)
            _distil_waves(stream, empty_chain, couplings, waves, data, config, cache, work, workers, progress)
    records = [work.load_chain(work.layer_file(index), empty_chain)[1] for index in indices]
    return [LayerResult(**layer) for layer in records]


def _couplings(
    stream: StreamedModel,
    empty_chain: Callable[[float], DLRNet],
    data: DistillationData,
    config: LockConfig,
    cache: ActivationCache,
    work: Work,
    workers: Workers,
    progress: Progress,
) -> list[float]:
    """The coupling of each layer. The result of a pilot is kept in the work folder."""
    if config.init == "random" or config.coupling or config.gain:
        return [config.coupling or RANDOM_COUPLING] * len(stream)
    if workers.first and work.couplings() is None:
        work.save_couplings(choose_couplings(stream, empty_chain, data, config, cache, progress))
    workers.wait()
    found = work.couplings()
    assert found is not None, "the first worker has saved them"
    return found


def _distil_waves(
    stream: StreamedModel,
    empty_chain: Callable[[float], DLRNet],
    couplings: list[float],
    waves: list[list[list[int]]],
    data: DistillationData,
    config: LockConfig,
    cache: ActivationCache,
    work: Work,
    workers: Workers,
    progress: Progress,
) -> None:
    train_rows = data.train[: -(-config.tokens // data.train.shape[1])]
    parts = {"train": train_rows, "validation": data.validation}
    captures = {name: LayerwiseCapture(stream, rows, cache, name, workers) for name, rows in parts.items()}
    last = max(index for wave in waves for group in wave for index in group if not work.has_layer(index))
    for wave in waves:
        layers = [index for group in wave for index in group]
        if layers[0] > last:
            break
        wanted = [i for group in wave if not all(map(work.has_layer, group)) for i in group]
        with workers.together():
            inputs = _allocate(stream, parts, wanted, cache, workers)
            for index in layers:
                with stream.layer(index) as layer:
                    for name, capture in captures.items():
                        capture.advance(index, layer, inputs.get((name, index)))
        with workers.together():
            if workers.rank < len(wave):
                _distil_group(stream, empty_chain, couplings, wave[workers.rank], inputs, config, work, progress)
        del inputs
    for name in parts:
        cache.release(f"{name}-hidden-{workers.rank}")


def _allocate(
    stream: StreamedModel,
    parts: dict[str, torch.Tensor],
    layers: list[int],
    cache: ActivationCache,
    workers: Workers,
) -> dict[tuple[str, int], torch.Tensor]:
    """Allocate tensors for the MLP inputs of `layers`, `[rows, block, hidden]` each, shared between workers.

    Returns:
        The tensors by part (train, validation) and layer.
    """
    shared = workers.count > 1
    slots = [(part, index, number) for number, index in enumerate(layers) for part in parts]
    shapes = {part: (*rows.shape, stream.config.hidden_size) for part, rows in parts.items()}
    if workers.first:
        tensors = {(p, i): cache.allocate(f"{p}-inputs-{number}", shapes[p], shared) for p, i, number in slots}
    workers.wait()
    if not workers.first:
        tensors = {(p, i): cache.attach(f"{p}-inputs-{number}", shapes[p]) for p, i, number in slots}
    workers.wait()  # the next wave uses the same names again
    return tensors


def _distil_group(
    stream: StreamedModel,
    empty_chain: Callable[[float], DLRNet],
    couplings: list[float],
    group: list[int],
    inputs: dict[tuple[str, int], torch.Tensor],
    config: LockConfig,
    work: Work,
    progress: Progress,
) -> None:
    """Distil the layers of a group and save their chains. If one layer is missing, all of the group are distilled."""
    if all(work.has_layer(index) for index in group):
        return
    tasks = []
    for index in group:
        mlp = stream.read_layer(index).mlp
        train, validation = (inputs[part, index].flatten(0, 1) for part in ("train", "validation"))
        weights = mlp_weights(mlp, stream.family)
        tasks.append(LayerTask(index, mlp, weights, empty_chain, train, validation, couplings[index]))
    for chain, result in distil_layers(tasks, config, progress):
        work.save_chain(work.layer_file(result.layer), chain, result.record())
    for index in group:
        stream.drop_layer(index)
