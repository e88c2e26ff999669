"""Several processes that make one lock: `torchrun --nproc-per-node N -m lockkit lock ...`.

Phase 1 shares out the rows of a forward pass and the layers to train, and needs no gradient
traffic; phase 2 shares out the rows of each batch and adds up gradients. Without torchrun
there is one worker, and everything here returns at once.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lockkit.errors import DistillationError, LockkitError

# Workers wait for each other while one trains its last layers; who dies is noticed at once.
LONGEST_WAIT = datetime.timedelta(hours=24)
_TORCHRUN = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


class Workers:
    """This process among the workers of one lock; the only one by default."""

    def __init__(self, count: int = 1, rank: int = 0, local_rank: int = 0):
        self.count, self.rank, self.local_rank = count, rank, local_rank

    @classmethod
    def from_environment(cls) -> Workers:
        """The workers that torchrun started."""
        count, rank, local_rank = (int(os.environ.get(n, d)) for n, d in _TORCHRUN)
        return cls(count, rank, local_rank) if "RANK" in os.environ else cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def join(self, device: str) -> None:
        """Meet the others; gloo on the CPU, NCCL between GPUs."""
        if self.count > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=LONGEST_WAIT)

    def leave(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, text: str) -> list[str]:
        """Every worker's `text`, in the order of ranks."""
        if self.count == 1:
            return [text]
        texts: list[str] = [""] * self.count
        with _lost_workers_named():
            dist.all_gather_object(texts, text)
        return texts

    def wait(self) -> None:
        """Return when all have come here."""
        self.gather("")

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Add up tensors over all workers, in place; every worker gets the same bits."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _lost_workers_named():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stage all workers go through; what fails on one fails on all, with that one's words.

        Raises:
            LockkitError: the stage's own, or the first other worker's that failed.
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

    def require_same(self, what: dict) -> None:
        """Refuse to go on unless every worker has the same `what` (versions, recipe, data).

        Raises:
            LockkitError: naming a field that differs, and both values.
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
def _lost_workers_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's: connection closed by peer, ...
        raise DistillationError(
            "another worker stopped: see its own message; finished layers are kept, run the same command again"
        ) from error
