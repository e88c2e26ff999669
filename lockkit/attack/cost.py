"""The cost of an attack: operations, memory, time, tokens, steps.

All steps of a run have the same shape. So these figures are measured for one training step, after the optimiser
has allocated its state:

1. Floating-point operations, counted by `torch.utils.flop_counter` (matrix products, attention and
   eigenvalue solvers; elementwise operations are not counted, as is usual).
2. Peak bytes of live tensors, counted by observing every tensor that the step creates. Weights, gradients and
   optimiser state are included. Unlike resident memory, this figure does not depend on the allocator or
   on earlier work. CUDA's `max_memory_allocated` also includes the scratch memory of kernels.
3. Bytes that autograd saves for the backward pass, counted by `saved_tensors_hooks`.

Peak process memory (allocated and reserved on CUDA, otherwise resident) and seconds are measured over the
whole run. The first step is a warm-up and is not timed.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lockkit.devices import synchronise

RSS_INTERVAL_SECONDS = 0.01
# Operations of a dense symmetric eigenvalue problem with vectors, and of a singular value decomposition, in units of
# n^3 (Golub and Van Loan, "Matrix Computations", 8.3 and 5.2).
EIGH_FLOPS = 9
SVD_FLOPS = 22
Shape = torch.Size


@dataclass
class Cost:
    """The cost of some work. The sum of two costs adds what was spent and takes the larger of the peaks."""

    steps: int = 0
    tokens: int = 0  # tokens read, with or without a backward pass
    flops: float = 0.0
    seconds: float = 0.0
    peak_tensor_bytes: int = 0  # live tensors on the device of the training
    saved_bytes: int = 0  # saved by autograd for one backward pass
    peak_memory_bytes: int = 0  # on CUDA, allocated; otherwise growth of resident memory
    peak_reserved_bytes: int = 0  # CUDA only

    def __add__(self, other: Cost) -> Cost:
        add = ("steps", "tokens", "flops", "seconds")
        return Cost(
            **{
                field.name: (
                    getattr(self, field.name) + getattr(other, field.name)
                    if field.name in add
                    else max(getattr(self, field.name), getattr(other, field.name))
                )
                for field in fields(self)
            }
        )

    def record(self) -> dict:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class StepCost:
    """The figures of one training step, see the top of this file."""

    flops: float
    peak_tensor_bytes: int
    saved_bytes: int


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, with operators that attacks use and that it does not count by itself."""
    aten = torch.ops.aten

    # The counter passes shapes in place of tensors.
    def cpu_attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def cpu_attention_backward(
        grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    def eigh(matrix: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return EIGH_FLOPS * matrix[-1] ** 3

    def svd(matrix: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return SVD_FLOPS * matrix[-2] * matrix[-1] * min(matrix[-2:])

    mapping: dict[Any, Callable[..., int]] = {aten._linalg_eigh: eigh, aten._linalg_svd: svd}
    mapping |= {aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention}
    mapping |= {aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all live tensors on one device inside the block, and their peak.

    Args:
        device: the device.
        existing: tensors that exist before the block (parameters, optimiser state).
    """

    def __init__(self, device: torch.device, existing: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.device = device
        self.live: dict[int, int] = {}
        self.bytes = self.peak = 0
        for tensor in existing:
            self._note(tensor)

    def __torch_dispatch__(
        self, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._note(value)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.bytes -= self.live.pop(key, 0)


class SavedTensors:
    """Counts the bytes that autograd saves inside the block, each storage once, without the weights.

    Tensors that memory savers keep through their own hooks (checkpointing, offloading) are not counted, because
    autograd does not save them; `LiveTensors` counts them. Tensors that are saved during a backward pass, when a part of
    the forward pass runs again, are freed before it ends and are not counted either.

    Args:
        parameters: the weights.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.seen: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is reused
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and address not in self.weights and address not in self.seen:
            self.seen[address] = storage
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.seen.clear()


def measure_step(
    step: Callable[[], object],
    parameters: Iterable[torch.Tensor],
    device: torch.device,
    state: Iterable[torch.Tensor] = (),
) -> StepCost:
    """Run `step` three times and count operations, live tensors and saved tensors.

    Each run has only one counter, so that no counter sees tensors that another one keeps alive.

    Args:
        step: a training step. All calls must do the same work on tensors of the same sizes.
        parameters: the model's weights.
        device: the device of the training.
        state: further tensors that are alive between steps, such as the optimiser's state.
    """
    parameters = list(parameters)
    with flop_counter() as flops:
        step()
    live = LiveTensors(device, [*parameters, *state])
    with live:
        step()
    with SavedTensors(parameters) as saved:
        step()
    return StepCost(float(flops.get_total_flops()), live.peak, saved.bytes)


class ProcessMemory:
    """Peak memory inside the block, in bytes.

    Attributes:
        allocated: on CUDA, memory allocated by tensors; otherwise the growth of resident memory.
        reserved: on CUDA, memory reserved by the allocator; otherwise 0.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.allocated = self.reserved = 0

    def __enter__(self) -> ProcessMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            import psutil

            self._process = psutil.Process()
            self._start = self._process.memory_info().rss
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(RSS_INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        self.allocated = max(self.allocated, self._process.memory_info().rss - self._start)

    def __exit__(self, _type: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.allocated = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        else:
            self._ended.set()
            self._thread.join()
            self._look()


class Meter:
    """Measures the cost of work that does not consist of equal steps, such as a closed-form solve.

    The caller adds tokens and steps:

        with Meter(device) as meter: ...
        meter.cost.tokens += ...
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.cost = Cost()

    def __enter__(self) -> Meter:
        self._memory = ProcessMemory(self.device)
        self._flops = flop_counter()
        self._memory.__enter__()
        self._flops.__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        synchronise(self.device)
        self.cost.seconds += time.perf_counter() - self._started
        self._flops.__exit__(*error)
        self._memory.__exit__(*error)
        self.cost.flops += float(self._flops.get_total_flops())
        self.cost.peak_memory_bytes = self._memory.allocated
        self.cost.peak_reserved_bytes = self._memory.reserved
