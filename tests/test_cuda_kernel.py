"""The CUDA kernel on the emulator (tests/cuda_emulator/emulator.h) against `DLRNet` in fp32, and mutants that must be caught.

What the emulator cannot show is in its head. Only a GPU shows that.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from cuda_emulator.emulation import Case, build, emulate, error
from cuda_emulator.mutants import MUTANTS, Mutant, write_mutants

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
HALF, BFLOAT = torch.float16, torch.bfloat16


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"))


# Pairs of: hidden size, depth, rank, tokens, members, type, activation, family.
CASES = [
    Case(128, (96, 96), 1, team=8),
    Case(128, (130, 129), 17, team=3, dtype=BFLOAT, activation="gelu_pytorch_tanh"),
    Case(128, (7,) * 8, 40, team=4, activation="relu2", gated=False),
    Case(256, (24,) * 32, 2, team=16, dtype=BFLOAT),
    Case(256, (40,) * 9, 36, team=2, bias=True, output_bias=True, activation="gelu"),
    Case(256, (3,) * 128, 2, team=4, dtype=BFLOAT, activation="relu", gain=0.2),
    Case(640, (20, 19) * 8, 1, team=10, activation="gelu_pytorch_tanh"),
    Case(640, (33,) * 2, 33, team=5, dtype=BFLOAT, gated=False, bias=True, output_bias=True, activation="gelu"),
    Case(1024, (24,) * 16, 1, team=16, dtype=BFLOAT),
    Case(1024, (5,) * 32, 16, team=8, activation="silu"),
    Case(1024, (100, 99), 20, team=4, activation="silu"),
    Case(200, (18, 17), 3, team=6, dtype=BFLOAT, bias=True),  # channels fill no tile; in a cluster, a member has none
    # Quantised weights: with blocks below a word of the kernel's weights, and blocks that several members share.
    Case(128, (96, 95), 1, team=2, bits=4),
    Case(128, (7,) * 8, 40, team=4, activation="relu2", gated=False, bits=8, block_size=16),
    Case(256, (24,) * 32, 5, team=4, activation="gelu_pytorch_tanh", bits=4),
    Case(256, (3,) * 128, 2, team=4, activation="relu", gain=0.2, bits=8),
    Case(256, (40, 39) * 4, 36, team=2, bias=True, output_bias=True, activation="gelu", bits=4, block_size=16),
    Case(640, (100, 99), 17, team=5, bits=4, block_size=128),
    Case(640, (33, 34), 17, team=10, gated=False, bias=True, activation="gelu", bits=8, block_size=64),
    Case(640, (20, 19) * 8, 1, team=7, bits=8),
    Case(1024, (5,) * 32, 16, team=8, bits=4, block_size=256),
    Case(1024, (24,) * 16, 1, team=4, bits=8),
    Case(1024, (100, 99), 18, team=4, bits=4),
    Case(200, (18, 17), 3, team=6, bias=True, bits=8),
    Case(200, (70, 66), 3, team=5, bias=True, bits=4, block_size=64),
]


def name(case: Case) -> str:
    kind = "gated" if case.gated else "two-layer"
    dtype = str(case.dtype).removeprefix("torch.") if case.bits == 16 else f"int{case.bits}_{case.block_size}"
    return f"{case.hidden}x{len(case.ranks)}x{case.ranks[0]}-{case.tokens}-{dtype}-{case.activation}-{kind}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_kernel_computes_the_chain_in_both_modes(case, kernels):
    # The seeds differ: equal bits show that results depend neither on the mode nor on the schedule.
    done, clustered = emulate(kernels, case, cluster=True, seed=1)
    assert done == "done"
    found = error(case, clustered)
    print(f"relative error {found:.1e}")
    assert found < LIMITS[case.dtype]
    done, through_memory = emulate(kernels, case, cluster=False, seed=2)
    assert done == "done"
    assert torch.equal(clustered.view(torch.int16), through_memory.view(torch.int16))


MUTANT_CASES = {
    "Plain": [
        Case(200, (40,) * 6, 11, team=5, bias=True),
        Case(200, (260, 259), 3, team=3, bias=True, output_bias=True),
        Case(256, (40,) * 5, 20, team=4, bias=True),
    ],
    "Int4": [
        Case(200, (70, 69, 68), 3, team=3, bits=4, block_size=16),
        Case(200, (40,) * 2, 3, team=3, bits=4),
    ],
    "Int8": [Case(200, (40, 39, 38), 3, team=3, bits=8)],
}


def caught(library: ctypes.CDLL, mutant: Mutant, cluster: bool) -> str:
    """How a mutant is caught: what it does in the first case that shows it. Empty if it is not."""
    for case in MUTANT_CASES[mutant.format]:
        for seed in (1, 2, 3):
            result, y = emulate(library, case, cluster, seed, f"{mutant.name}.")
            if result == "done" and error(case, y) > LIMITS[case.dtype]:
                result = "wrong result"
            if result != "done":
                return f"{result} (hidden size {case.hidden}, schedule {seed})"
    return ""


def test_every_mutant_of_the_kernel_is_caught(tmp_path):
    library = build(tmp_path, write_mutants(tmp_path))
    results = {
        (mutant, mode): caught(library, mutant, mode == "CLUSTER") for mutant in MUTANTS for mode in mutant.modes
    }
    for (mutant, mode), result in results.items():
        print(mutant.name, mutant.format, mode, result or "not caught", sep=", ")
    assert {mutant.name for (mutant, _), result in results.items() if not result} == {"original"}


def test_a_launch_leaves_its_memory_clear_for_any_team(kernels):
    # `emulate` fails if it does not: the next launch would take old messages for its own.
    for team in (1, 2, 7):
        case = replace(CASES[0], team=team, tokens=3)
        result, y = emulate(kernels, case, cluster=False)
        assert result == "done" and error(case, y) < LIMITS[case.dtype]


@pytest.mark.parametrize(("bits", "block_size"), [(16, 32), (8, 32), (8, 16), (4, 32), (4, 16)])
def test_there_is_a_kernel_for_every_plan(bits, block_size, kernels):
    # The GPUs: an H100, an RTX 4090, a small one of compute capability 8.6.
    for gpu in ((132, 227 << 10, 16), (128, 99 << 10, 0), (20, 99 << 10, 0)):
        for hidden in (128, 640, 2048, 5120) if gpu[0] > 20 else (128, 640, 2048):
            for rank, gated in ((16, 1), (384, 1), (2048, 0)):
                for tokens in (1, 17, 512, 4096):
                    shape = (hidden, rank, gated, bits, block_size)
                    assert kernels.has_kernel(*shape, tokens, *gpu) == 1, (shape, tokens, gpu)
