"""Devices: which one is chosen, and memory figures of one kind."""

from __future__ import annotations

import numpy
import pytest
import torch

from lockkit.devices import PeakMemory, available_bytes, choose_device
from lockkit.errors import UsageError
from lockkit.workers import Workers


def test_memory_before_and_after_the_work_are_of_one_kind():
    memory = PeakMemory("cpu")
    held = numpy.ones(300_000_000 // 8)
    assert memory.kind == "resident"
    grown = memory.peak_bytes() - memory.idle_bytes
    # What this process held at its peak before counts as idle.
    assert 0 <= grown <= 1.2 * held.nbytes
    assert memory.peak_bytes() >= held.nbytes


@pytest.mark.gpu
def test_memory_on_a_gpu_is_what_is_allocated_there():
    before = torch.empty(1_000_000, device="cuda")
    memory = PeakMemory("cuda")
    assert memory.kind == "allocated on the GPU"
    held = torch.empty(50_000_000, device="cuda")
    assert memory.idle_bytes >= before.nbytes
    assert memory.peak_bytes() - memory.idle_bytes == pytest.approx(held.nbytes, rel=0.05)


@pytest.mark.gpu
def test_each_worker_has_a_gpu_of_its_own_as_its_current_device():
    last = torch.cuda.device_count() - 1
    assert choose_device("auto", Workers(last + 1, last, last)) in ("cuda", f"cuda:{last}")
    assert torch.cuda.current_device() == last


def test_the_cpu_is_always_there_and_has_free_memory():
    assert choose_device("cpu") == "cpu"
    assert available_bytes(torch.device("cpu")) > 0


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:0:1", ""])
def test_a_device_that_is_not_there_is_refused_in_one_line(device):
    with pytest.raises(UsageError, match=r"--device .* is not available here") as refused:
        choose_device(device)
    assert len(str(refused.value).splitlines()) == 1
