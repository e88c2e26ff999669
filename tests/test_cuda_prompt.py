"""The CUDA kernels for many tokens on the emulator against `DLRNet` in fp32, and mutants that must be caught."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_emulator.emulation import Case, build, emulate, error
from cuda_emulator.mutants import Mutant
from cuda_emulator.prompt_mutants import PROMPT_MUTANTS, write_prompt_mutants

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
BFLOAT = torch.bfloat16


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"))


def many(hidden: int, ranks: tuple[int, ...], tokens: int, units: int, stream: int, rows: int, **more) -> Case:
    """A case with thread blocks of `units` and `stream` rows, and passes of `rows` rows."""
    return Case(hidden, ranks, tokens, team=0, prompt=(units, stream, rows), **more)


CASES = [
    many(128, (40, 39), 65, 32, 64, 128),
    many(128, (96,) * 8, 200, 64, 64, 256, activation="gelu_pytorch_tanh", bias=True),
    many(200, (40, 39, 38), 70, 64, 64, 128, dtype=BFLOAT, bias=True, output_bias=True),
    many(200, (40, 39), 130, 128, 128, 256, gated=False, bias=True, activation="gelu"),
    many(640, (100, 99), 300, 128, 128, 384, dtype=BFLOAT),
    many(640, (200,), 150, 32, 128, 128, dtype=BFLOAT, activation="relu2"),  # two passes, one block
    many(640, (16, 7) * 2, 257, 128, 64, 256, gated=False, output_bias=True, activation="relu"),
    many(75, (20,) * 3, 70, 64, 128, 128),  # an odd number of channels
    many(128, (40, 39), 3, 32, 64, 128),  # fewer tokens than a tile
    many(128, (40, 39), 65, 32, 64, 128, bits=4),
    many(200, (70, 66), 130, 64, 64, 128, bits=4, block_size=16, bias=True, output_bias=True),
    many(640, (100, 99), 150, 128, 128, 256, bits=4, block_size=128, activation="gelu"),
    many(640, (100, 99), 150, 64, 128, 256, bits=4, block_size=64, gated=False, bias=True),
    many(200, (40, 39) * 2, 130, 128, 128, 256, bits=8),
    many(200, (40, 39), 100, 64, 64, 128, bits=8, block_size=16),
    many(640, (70, 69), 65, 32, 64, 128, bits=8, block_size=256, gated=False, bias=True, activation="relu2"),
]


def name(case: Case) -> str:
    kind = "gated" if case.gated else "two-layer"
    dtype = str(case.dtype).removeprefix("torch.") if case.bits == 16 else f"int{case.bits}_{case.block_size}"
    blocks = "-".join(map(str, case.prompt))
    return f"{case.hidden}x{len(case.ranks)}x{case.ranks[0]}-{case.tokens}-{dtype}-{case.activation}-{kind}-{blocks}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_kernels_compute_the_chain(case, kernels):
    done, y = emulate(kernels, case, cluster=False, seed=1)
    assert done == "done"
    found = error(case, y)
    print(f"relative error {found:.1e}")
    assert found < LIMITS[case.dtype]
    done, again = emulate(kernels, case, cluster=False, seed=2)
    assert done == "done"
    assert torch.equal(y.view(torch.int16), again.view(torch.int16))  # it does not depend on the schedule


MUTANT_CASES = {
    "Plain": [
        many(200, (40, 39), 70, 64, 64, 128, bias=True, output_bias=True),
        many(640, (100, 99, 98), 130, 64, 64, 256, gated=False, bias=True),
    ],
    "Int4": [many(200, (70, 69), 70, 64, 64, 128, bits=4, block_size=16)],
}


def caught(library: ctypes.CDLL, mutant: Mutant) -> str:
    """How a mutant is caught: what it does in the first case that shows it. Empty if it is not."""
    for case in MUTANT_CASES[mutant.format]:
        for seed in (1, 2, 3):
            result, y = emulate(library, case, False, seed, f"{mutant.name}.")
            if result == "done" and error(case, y) > LIMITS[case.dtype]:
                result = "wrong result"
            if result != "done":
                return f"{result} (hidden size {case.hidden}, schedule {seed})"
    return ""


def test_every_mutant_of_the_kernels_is_caught(tmp_path):
    library = build(tmp_path, prompt_mutants=write_prompt_mutants(tmp_path))
    results = {mutant: caught(library, mutant) for mutant in PROMPT_MUTANTS}
    for mutant, result in results.items():
        print(mutant.name, mutant.format, result or "not caught", sep=", ")
    assert {mutant.name for mutant, result in results.items() if not result} == {"original"}


@pytest.mark.parametrize(("bits", "block_size"), [(16, 32), (8, 32), (4, 16)])
def test_there_are_kernels_for_every_plan_and_their_memory_is_bounded(bits, block_size, kernels):
    most = 160 << 20  # with thread blocks that are filled up
    for multiprocessors in (132, 128, 20):
        for hidden in (128, 640, 2048, 5120):
            for rank, gated in ((16, 1), (384, 1), (2048, 0)):
                for tokens in (65, 512, 4096, 1 << 20):
                    shape = (hidden, rank, gated, bits, block_size, tokens, multiprocessors)
                    assert 0 < kernels.prompt_scratch_bytes(*shape) < most, shape


def test_few_tokens_of_a_large_model_are_enough_for_these_kernels(kernels):
    # On an H200: hidden size, rank, depth, tokens. Measured there: 157 us and 317, 634 and 793, 589 and 451, 787 and 367.
    for *sizes, prompt in (
        (1024, 96, 32, 64, 0),
        (4096, 192, 64, 64, 0),
        (4096, 384, 32, 64, 1),
        (4096, 768, 16, 64, 1),
        (4096, 768, 16, 1, 0),
        (1024, 96, 32, 300, 1),
    ):
        assert kernels.prefers_prompt_on_h200(*sizes) == prompt, sizes


def test_larger_prompts_use_larger_thread_blocks(kernels):
    # On an H100: hidden size, rank, tokens; rows of thread blocks for units.
    for hidden, rank, tokens, rows in ((1024, 96, 128, 32), (4096, 384, 512, 64), (4096, 384, 8192, 128)):
        assert kernels.prompt_units_rows(hidden, rank, tokens, 132) == rows
