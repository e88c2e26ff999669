"""Devices: choice, synchronisation, free memory and peak memory."""

from __future__ import annotations

import re

import psutil
import torch

from lockkit.environment import cpu_has_fast_bfloat16, peak_resident_bytes
from lockkit.errors import UsageError
from lockkit.workers import Workers


def choose_device(device: str, workers: Workers | None = None) -> str:
    """The device to use: `cpu`, `mps`, `cuda` or `cuda:N`.

    Args:
        device: one of these, or `auto` for the GPU if there is one.
        workers: with several workers on one machine, each gets its own GPU, which becomes its current device.

    Raises:
        UsageError: the device is not available.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and workers and workers.count > 1:
        device = f"cuda:{workers.local_rank}"
    try:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
            raise RuntimeError("no such kind of device")
        torch.empty(1, device=device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} is not available here: use cpu, or see `lockkit env`") from error
    return device


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its work, so that a clock measures it. No effect on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes: the GPU's, else the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device computes products of matrices in bfloat16, not in float32 after a conversion."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_fast_bfloat16()


class PeakMemory:
    """Measures the peak memory of this process on one device, in bytes.

    Attributes:
        kind: what is measured: tensors allocated on that GPU, or the resident memory of the process.
        idle_bytes: the peak when this object was created, before the work began.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self.kind = "allocated on the GPU" if self.device.type == "cuda" else "resident"
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.idle_bytes = self.peak_bytes()

    def peak_bytes(self) -> int:
        """The peak so far. On a GPU: since this object was created."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()
