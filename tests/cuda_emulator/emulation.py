"""Compute chains with the CUDA kernel on the emulator, from Python."""

from __future__ import annotations

import ctypes
import functools
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lockkit.dlr.net import DLRNet
from lockkit.kernel.build import SOURCE

HERE = Path(__file__).parent
KERNEL = SOURCE.parent / "cuda"
SOURCES = ("parts.cuh", "weights.cuh", "chain.cuh")
PROMPT_SOURCES = ("parts.cuh", "weights.cuh", "prompt.cuh")  # for a GPU or the emulator
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}  # in the order of `Activation` in args.h
RESULTS = {
    0: "done",
    1: "deadlock",
    2: "out of bounds",
    3: "misaligned",
    4: "misused",
    5: "inbox not cleared",
    -1: "no such kernel",
    -2: "no plan",
}
GUARD, GUARD_ROWS = 0x5A5A, 64  # around the output


class Request(ctypes.Structure):
    """`Request` in emulate.cpp."""

    _fields_ = [
        ("mutant", ctypes.c_char_p),
        *(
            (name, ctypes.c_int)
            for name in [
                "bfloat16",
                "bits",
                "block_size",
                "cluster",
                "team",
                "tokens",
                "hidden",
                "depth",
            ]
        ),
        ("gated", ctypes.c_int),
        ("bias", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("gain", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ["ranks", "tensors", "output_bias", "x", "y"]),
        ("prompt", ctypes.c_int * 3),
    ]


@dataclass(frozen=True)
class Case:
    """A chain, the tokens and how the kernel runs.

    Attributes:
        team: thread blocks that share a group of tokens.
        bits: of a weight. 8 and 4: quantised, with fp16 for everything else.
        block_size: quantised weights that share a scale.
        prompt: for the kernels for many tokens: rows of thread blocks of prompt_units and of prompt_stream, and rows of a
            pass. If it is not empty, `team` means nothing.
    """

    hidden: int
    ranks: tuple[int, ...]
    tokens: int
    team: int
    dtype: torch.dtype = torch.float16
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    output_bias: bool = False
    gain: float = 0.5
    bits: int = 16
    block_size: int = 32
    prompt: tuple[int, ...] = ()

    def chain(self) -> tuple[DLRNet, torch.Tensor]:
        """A random chain in fp32, and an input `[tokens, hidden]` in the case's own type. Quantised weights have the values
        that their integers stand for."""
        return _random_chain(self)[:2]

    def tensors(self) -> list[torch.Tensor]:
        """The weights and biases of the chain's blocks, in the order of the graph and in its types."""
        return _random_chain(self)[2]


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def _random_chain(case: Case) -> tuple[DLRNet, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    function = ACTIVATIONS[case.activation]
    net = DLRNet(case.hidden, case.ranks, function, case.gated, case.bias, case.output_bias, case.gain)
    if net.output_bias is not None:
        net.output_bias.normal_(std=0.1)
    tensors = []
    for block in net.blocks:
        for layer, gain in ((block.up_proj, 1.0), (block.gate_proj, 1.0), (block.down_proj, case.gain)):
            if layer is None:
                continue
            if case.bits == 16:
                tensors.append((layer.weight.T * gain).to(case.dtype))
            else:
                *form, values = _quantise(layer.weight * gain, case.bits, case.block_size)
                layer.weight.copy_(values / gain)
                tensors += form
            if layer.bias is not None:
                tensors.append(layer.bias.to(case.dtype))
    return net.eval(), torch.randn(case.tokens, case.hidden).to(case.dtype), [t.contiguous() for t in tensors]


def _quantise(weight: torch.Tensor, bits: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix `[n, k]` in the format of MatMulNBits.

    Returns:
        The integers `[n, blocks, block_size * bits / 8]` as bytes, low bits first, the scales `[n, blocks]` in fp16, and
        the values `[n, k]` that they stand for. Integers behind the end of a row are random.
    """
    (n, k), middle = weight.shape, 1 << (bits - 1)
    blocks = torch.nn.functional.pad(weight, (0, -k % block_size)).reshape(n, -1, block_size)
    scales = (blocks.abs().amax(2) / (middle - 0.5)).half()
    q = (blocks / scales[..., None].float()).round().clamp(-middle, middle - 1)
    values = (q * scales[..., None].float()).reshape(n, -1)[:, :k]
    q = (q + middle).to(torch.uint8).reshape(n, -1)
    q[:, k:] = torch.randint(1 << bits, (n, q.shape[1] - k))
    if bits == 4:
        q = q[:, ::2] | q[:, 1::2] << 4
    return q.reshape(n, scales.shape[1], -1), scales, values


def build(
    folder: Path, mutants: Path | None = None, optimise: str = "-O1", prompt_mutants: Path | None = None
) -> ctypes.CDLL:
    """Compile the emulated kernels, or mutants, into `folder`, or skip the test."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("the emulator needs a C++ compiler and x86-64")
    library = folder / "emulated.so"
    flags = [
        "-std=c++17",
        optimise,
        "-march=native",
        "-fPIC",
        "-shared",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
    ]
    # `device.h` of the tests stands in for the one of the kernel.
    (folder / "device.h").write_text('#include "emulator.h"\n')
    for name in {*SOURCES, *PROMPT_SOURCES}:
        shutil.copy(KERNEL / name, folder)
    tables = {"MUTANTS": mutants, "PROMPT_MUTANTS": prompt_mutants}
    definitions = [f'-D{name}="{table}"' for name, table in tables.items() if table]
    command = [compiler, *flags, *definitions, f"-I{folder}", f"-I{HERE}", f"-I{KERNEL}", HERE / "emulate.cpp"]
    subprocess.run([*command, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@torch.no_grad()
def emulate(
    library: ctypes.CDLL, case: Case, cluster: bool, seed: int = 1, mutant: str = ""
) -> tuple[str, torch.Tensor]:
    """Run a case on the emulator.

    Returns:
        "done" or what went wrong, and the output `[tokens, hidden]` in the case's own type.
    """
    net, x = case.chain()
    tensors = case.tensors()
    output_bias = None if net.output_bias is None else net.output_bias.to(case.dtype)
    pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    ranks = (ctypes.c_int * len(case.ranks))(*case.ranks)
    guarded = torch.full((case.tokens + 2 * GUARD_ROWS, case.hidden), GUARD, dtype=torch.int16)
    y = guarded[GUARD_ROWS:-GUARD_ROWS]
    request = Request(
        mutant.encode(), case.dtype == torch.bfloat16, case.bits, case.block_size, cluster, case.team,
        case.tokens, case.hidden, len(case.ranks), case.gated, case.bias,
        list(ACTIVATIONS).index(case.activation), seed,
        case.gain,
        ctypes.addressof(ranks), ctypes.addressof(pointers), output_bias.data_ptr() if output_bias is not None else None,
        x.data_ptr(), y.data_ptr(), (ctypes.c_int * 3)(*case.prompt),
    )  # fmt: skip
    result = RESULTS[library.emulate_chain(ctypes.byref(request))]
    if result == "done" and not (guarded[:GUARD_ROWS] == GUARD).all() & (guarded[-GUARD_ROWS:] == GUARD).all():
        result = "out of bounds"
    return result, y.view(case.dtype).clone()


@torch.no_grad()
def error(case: Case, y: torch.Tensor) -> float:
    """The relative error of an output against `DLRNet` in fp32: the norm of the difference over the norm. NaN is inf."""
    net, x = case.chain()
    want = net(x.float())
    found = ((y.float() - want).norm() / want.norm()).item()
    return found if found == found else float("inf")
