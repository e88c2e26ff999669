"""Several processes that compute one lock: `torchrun --nproc-per-node N -m lockkit lock ...`.

Phase 1 divides the rows of each forward pass and the layers to train among the workers. It does not exchange
gradients. Phase 2 divides the rows of each batch and sums the gradients. Without torchrun there is one worker, and all
functions here return at once.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lockkit.errors import DistillationError, LockkitError, UsageError, first_line
from lockkit.settings import shown

# Workers wait while another one trains its last layers. A worker that dies is detected at once, not by this timeout.
TIMEOUT = datetime.timedelta(hours=24)
START_TIMEOUT = datetime.timedelta(minutes=10)  # for all workers to start
# What torchrun sets for each worker.
_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Workers:
    """One of the workers of a lock: this process.

    Args:
        count: number of workers.
        rank: this worker's number among all, from 0.
        local_rank: its number among the workers on this machine.
    """

    def __init__(self, count: int = 1, rank: int = 0, local_rank: int = 0):
        self.count, self.rank, self.local_rank = count, rank, local_rank

    @classmethod
    def from_environment(cls) -> Workers:
        """The workers that torchrun started; a single worker without torchrun, or if WORLD_SIZE is 1.

        Raises:
            UsageError: the variables that torchrun sets are incomplete, or their values contradict each other.
        """
        given = {name: value for name in _TORCHRUN if (value := os.environ.get(name, "").strip())}
        remedy = f"start lockkit with torchrun, or unset {', '.join(given)}"
        if given.get("WORLD_SIZE", "1") == "1":
            return cls()
        if missing := [name for name in _TORCHRUN if name not in given]:
            raise UsageError(f"WORLD_SIZE={given['WORLD_SIZE']} is set, but not {', '.join(missing)}: {remedy}")
        try:
            count, rank, local_rank, port = (int(given[name]) for name in _TORCHRUN if name != "MASTER_ADDR")
        except ValueError:
            count = rank = local_rank = port = -1
        if not 0 <= local_rank <= rank < count or not 0 <= port < 2**16:
            values = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
            raise UsageError(f"the variables of torchrun contradict each other ({values}): {remedy}")
        return cls(count, rank, local_rank)

    @property
    def first(self) -> bool:
        """Whether this is the worker of rank 0."""
        return self.rank == 0

    def join(self, device: str) -> None:
        """Connect to the other workers, with gloo between CPUs and NCCL between GPUs.

        Raises:
            UsageError: they cannot be reached.
        """
        if self.count > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            try:
                store, rank, count = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
                store.set_timeout(TIMEOUT)
                dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
            except (RuntimeError, ValueError) as error:
                raise UsageError(
                    f"cannot connect to the other workers at {os.environ.get('MASTER_ADDR')}:"
                    f"{os.environ.get('MASTER_PORT')} ({first_line(error)}): start all of them with torchrun"
                ) from error

    def leave(self) -> None:
        """Disconnect from the other workers."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, text: str) -> list[str]:
        """The `text` of every worker, in order of rank.

        Raises:
            DistillationError: another worker stopped.
        """
        if self.count == 1:
            return [text]
        texts: list[str] = [""] * self.count
        with _report_lost_workers():
            dist.all_gather_object(texts, text)
        return texts

    def wait(self) -> None:
        """Wait until all workers have called this (a barrier).

        Raises:
            DistillationError: another worker stopped.
        """
        self.gather("")

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Sum tensors over all workers, in place. All workers get bit-identical results.

        Raises:
            DistillationError: another worker stopped.
        """
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _report_lost_workers():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stage that all workers run. If it fails on one worker, it fails on all, with the message of that one.

        Raises:
            LockkitError: raised in the stage by this worker, or by the first other worker that failed.
        """
        failure: LockkitError | None = None
        try:
            yield
        except LockkitError as error:
            failure = error
        others = self.gather(str(failure) if failure else "")
        if failure:
            raise failure
        for rank, message in enumerate(others):
            if message:
                raise LockkitError(f"worker {rank}: {message}")

    def require_same(self, what: dict[str, Any]) -> None:
        """Check that `what` (versions, recipe, data) is the same on all workers.

        Raises:
            LockkitError: a field differs. The message names it and both values.
        """
        import json

        mine = json.dumps(what, sort_keys=True, default=str)
        for rank, text in enumerate(self.gather(mine)):
            if text != mine:
                theirs = json.loads(text)
                ours = json.loads(mine)
                name = next(key for key in ours | theirs if ours.get(key) != theirs.get(key))
                raise LockkitError(
                    f"workers differ in '{name}': {ours.get(name)} on worker {self.rank}, {theirs.get(name)} on worker "
                    f"{rank}; start all with the same command and the same versions"
                )


@contextmanager
def _report_lost_workers() -> Iterator[None]:
    """Turn the errors of torch.distributed into a `DistillationError`."""
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL: connection closed by peer, ...
        raise DistillationError(
            "another worker stopped: see its own message; finished layers are kept, run the same command again to resume"
        ) from error
