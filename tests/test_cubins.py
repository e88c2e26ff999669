"""The compiled CUDA kernels in the package: they belong to the source, and keep everything in registers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from lockkit.kernel.build import CUBINS

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from build_cubins import ARCHITECTURES, FOLDER, compile_one, compile_ptx, source_hash

MAX_REGISTERS = 255  # that a thread can have
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@pytest.fixture
def record():
    return json.loads((FOLDER / "chain.json").read_text())


def test_the_packed_kernels_belong_to_this_source(record):
    assert record["source_sha256"] == source_hash(), "the kernel has changed: run tools/build_cubins.py"
    assert record["file_sha256"] == hashlib.sha256(CUBINS.read_bytes()).hexdigest()


def test_a_changed_source_has_another_hash(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "cuda")
    monkeypatch.setattr("build_cubins.FOLDER", tmp_path / "cuda")
    before = source_hash()
    with (tmp_path / "cuda" / "chain.cuh").open("a") as source:
        source.write("\n")
    assert source_hash() != before


def check_registers(rows) -> None:
    for row in rows:
        assert row["stack"] == row["stores"] == row["loads"] == 0, row
        assert row["registers"] <= MAX_REGISTERS, row


def test_no_kernel_spills_registers_on_any_architecture(record):
    check_registers(record["kernels"])
    found = {(row["architecture"], "CLUSTER" in row["kernel"]) for row in record["kernels"]}
    assert found == {
        (number, mode) for number in ARCHITECTURES for mode in ([False, True] if number >= 90 else [False])
    }


@needs_nvcc
def test_nvcc_still_compiles_what_is_packed(record, tmp_path):
    _, usage = compile_one(ARCHITECTURES[0], tmp_path)
    check_registers(usage)
    packed = {row["kernel"] for row in record["kernels"] if row["architecture"] == ARCHITECTURES[0]}
    assert {row["kernel"] for row in usage} == packed


@needs_nvcc
def test_no_load_from_shared_memory_takes_a_single_byte(tmp_path):
    loads = set(re.findall(r"\bld\.shared[\w.:]*", compile_ptx(tmp_path).read_text()))
    assert loads and not any(re.search(r"[.][usb]8$", load) for load in loads)
