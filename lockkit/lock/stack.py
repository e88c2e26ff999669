"""The chains of all layers with their optimisers, in memory or on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lockkit.dlr.net import DLRNet
from lockkit.lock.config import LockConfig
from lockkit.lock.meter import mlp_replaced
from lockkit.lock.optimiser import ScheduledAdam
from lockkit.lock.packed import PackedChains
from lockkit.models.layered import StreamedModel, return_free_memory

if TYPE_CHECKING:
    from lockkit.models.families import DecoderLayer

LayerFunction = Callable[..., torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # the state of Adam, per parameter


class PackedMLP(nn.Module):
    """One packed chain with the interface of an MLP.

    Args:
        chain: its initial weights.
        dtype: of the computation.
    """

    def __init__(self, chain: DLRNet, dtype: torch.dtype):
        super().__init__()
        self.packed = PackedChains([chain])
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The chain's output, `[..., hidden]`, for `x`, `[..., hidden]`."""
        return self.packed(x.flatten(0, -2).unsqueeze(0), dtype=self.dtype).view_as(x)


class ChainStack:
    """The chains of a model in training, with one optimiser per layer.

    Args:
        stream: the teacher. Its layers stay in memory unless `folder` is given.
        start: returns the chain of a layer before training, given the layer's index.
        config: the recipe.
        folder: for layers that are not in use; its contents are deleted. None keeps all layers in memory.
    """

    def __init__(
        self,
        stream: StreamedModel,
        start: Callable[[int], DLRNet],
        config: LockConfig,
        folder: Path | None = None,
    ):
        self.stream, self.start, self.config, self.folder = stream, start, config, folder
        self.learning_rate, self.steps = config.end_to_end_learning_rate or 0.0, 1
        self.held: dict[int, tuple[PackedMLP, ScheduledAdam]] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        stream.keep_layers = folder is None
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def chain(self, index: int) -> nn.Module:
        """The current chain of a layer, for a forward pass."""
        return self._take(index)[0]

    def unpacked(self, index: int) -> DLRNet:
        """The current chain of a layer as a `DLRNet`, the form that is published."""
        chain = self.start(index)
        self._take(index)[0].packed.unpack([chain])
        return chain

    @contextmanager
    def both(self, index: int) -> Iterator[tuple[LayerFunction, LayerFunction]]:
        """A decoder layer with its own MLP, and the same layer with its chain.

        Both are functions of hidden states, `[rows, block, hidden]`, and the layer's keyword arguments.
        """
        mlp = self.chain(index)
        with self.stream.layer(index) as layer:

            def student(hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
                with mlp_replaced(layer, mlp):
                    return layer(hidden, **arguments)

            yield layer, student

    @contextmanager
    def trained(self, index: int) -> Iterator[tuple[DecoderLayer, PackedMLP, ScheduledAdam]]:
        """A decoder layer that contains its chain, the chain, and its optimiser. Changes are kept after the `with` block."""
        mlp, optimiser = self._take(index)
        with self.stream.layer(index) as layer, mlp_replaced(layer, mlp):
            yield layer, mlp, optimiser
        if self.folder:
            _write(self._file(self.folder, index), mlp, optimiser)

    def keep_input(self, index: int, hidden: torch.Tensor) -> None:
        """Save the student's input of a layer, `[rows, block, hidden]`, for the backward pass."""
        if self.folder:
            save_file({"hidden": hidden}, self.folder / f"input-{index}")
        else:
            self.inputs[index] = hidden

    def take_input(self, index: int) -> torch.Tensor:
        """The input that `keep_input` saved for a layer, `[rows, block, hidden]`."""
        if self.folder:
            return load_file(self.folder / f"input-{index}", device=str(self.stream.device))["hidden"]
        return self.inputs.pop(index)

    def restart(self, learning_rate: float, steps: int) -> None:
        """Reset to the chains before training, with new optimisers for `steps` steps at this learning rate."""
        self.learning_rate, self.steps = learning_rate, steps
        self.reset()

    def reset(self) -> None:
        """Reset to the chains before training, with new optimisers."""
        self.held.clear()
        if self.folder:
            for file in self.folder.iterdir():
                file.unlink()

    def save(self, folder: Path, with_optimiser: bool = False) -> None:
        """Write the chain of every layer, and if asked its optimiser, into `folder`."""
        for index in range(len(self.stream)):
            mlp, optimiser = self._take(index)
            _write(self._file(folder, index), mlp, optimiser if with_optimiser else None)
            return_free_memory()

    def load(self, folder: Path, with_optimiser: bool = False) -> None:
        """Read the chain of every layer, and if asked its optimiser, from a `folder` that `save` wrote."""
        for index in range(len(self.stream)):
            mlp, optimiser = self._new(index)
            _read(self._file(folder, index), mlp, optimiser if with_optimiser else None)
            if self.folder:
                _write(self._file(self.folder, index), mlp, optimiser)
                return_free_memory()
            else:
                self.held[index] = mlp, optimiser

    def _take(self, index: int) -> tuple[PackedMLP, ScheduledAdam]:
        """The current chain of a layer and its optimiser, from memory or disk, or new."""
        if index in self.held:
            return self.held[index]
        mlp, optimiser = self._new(index)
        if self.folder is None:
            self.held[index] = mlp, optimiser
        elif self._file(self.folder, index).is_file():
            _read(self._file(self.folder, index), mlp, optimiser)
        return mlp, optimiser

    def _new(self, index: int) -> tuple[PackedMLP, ScheduledAdam]:
        mlp = PackedMLP(self.start(index), self.config.torch_compute_dtype).to(self.stream.device)
        return mlp, ScheduledAdam(mlp.parameters(), self.learning_rate, self.steps)

    @staticmethod
    def _file(folder: Path, index: int) -> Path:
        return folder / f"layer-{index:04}.safetensors"


def _write(file: Path, mlp: PackedMLP, optimiser: ScheduledAdam | None) -> None:
    tensors = {f"chain.{name}": value.contiguous() for name, value in mlp.state_dict().items()}
    if optimiser:
        for number, state in optimiser.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{moment}": state[moment] for moment in MOMENTS}
    save_file(tensors, file)


def _read(file: Path, mlp: PackedMLP, optimiser: ScheduledAdam | None) -> None:
    tensors = load_file(file, device=str(next(mlp.parameters()).device))
    mlp.load_state_dict({n.removeprefix("chain."): v for n, v in tensors.items() if n.startswith("chain.")})
    moments = {name: value for name, value in tensors.items() if name.startswith("optimiser.")}
    if optimiser and moments:
        state = optimiser.optimiser.state_dict()
        numbers = sorted({int(name.split(".")[1]) for name in moments})
        state["state"] = {n: {m: moments[f"optimiser.{n}.{m}"] for m in MOMENTS} for n in numbers}
        optimiser.optimiser.load_state_dict(state)
