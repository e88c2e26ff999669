"""Compile the CUDA kernel for all GPUs, into the file that the package contains. Needs nvcc; users do not.

    python tools/build_cubins.py    # writes lockkit/kernel/cuda/chain.fatbin.xz and chain.json

Run it after every change of the kernel. `chain.json` has the hash of the source, and the registers and spills of each
kernel, all of which a test checks.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "lockkit" / "kernel" / "cuda"
SOURCES = (
    "chain.cu",
    "chain.cuh",
    "prompt.cuh",
    "parts.cuh",
    "weights.cuh",
    "args.h",
    "prompt_args.h",
    "device.h",
    "variants.h",
)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PTX = 80  # newer GPUs than these compile this one when it is loaded
FLAGS = ("-std=c++17", "-O3")
SCHEMA = "lockkit-cubins/1"
Usage = dict[str, int | str]


def source_hash() -> str:
    """SHA-256 of everything that the kernels are compiled from."""
    key = hashlib.sha256(repr((FLAGS, ARCHITECTURES, PTX)).encode())
    for name in SOURCES:
        key.update(name.encode() + (FOLDER / name).read_bytes())
    return key.hexdigest()


def compile_one(architecture: int, folder: Path) -> tuple[Path, list[Usage]]:
    """Compile the kernels for one architecture into `folder`.

    Returns:
        The cubin, and for each kernel the registers of a thread, and the bytes of its stack and of spilled registers.
    """
    cubin = folder / f"{architecture}.cubin"
    flags = [*FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    return cubin, _read_usage(_run("nvcc", *flags, FOLDER / "chain.cu", "-o", cubin))


def compile_all(folder: Path) -> tuple[Path, list[Usage]]:
    """Compile the kernels for all architectures into one file in `folder`. Returns it, and what `compile_one` returns."""
    images, usage = [], []
    for architecture in ARCHITECTURES:
        cubin, rows = compile_one(architecture, folder)
        images.append(f"--image3=kind=elf,sm={architecture},file={cubin}")
        usage += rows
    images.append(f"--image3=kind=ptx,sm={PTX},file={compile_ptx(folder)}")
    fatbin = folder / "chain.fatbin"
    _run("fatbinary", "-64", "--compress=false", f"--create={fatbin}", *images)
    return fatbin, usage


def compile_ptx(folder: Path) -> Path:
    """Compile the kernels to PTX, in `folder`."""
    ptx = folder / f"{PTX}.ptx"
    _run("nvcc", *FLAGS, f"-arch=compute_{PTX}", "-ptx", FOLDER / "chain.cu", "-o", ptx)
    return ptx


def _run(*command: str | Path) -> str:
    """Run a tool of CUDA, and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def _read_usage(log: str) -> list[Usage]:
    """The figures in the messages of ptxas."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<architecture>\d+)\w*'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    names = ("architecture", "stack", "stores", "loads", "registers")
    return [{"kernel": m["kernel"]} | {name: int(m[name]) for name in names} for m in pattern.finditer(log)]


def write(fatbin: Path, usage: list[Usage]) -> None:
    """Write the package's files, given what `compile_all` returns."""
    content = fatbin.read_bytes()
    packed = lzma.compress(content, preset=9)
    (FOLDER / "chain.fatbin.xz").write_bytes(packed)
    record = {
        "schema": SCHEMA,
        "source_sha256": source_hash(),
        "file_sha256": hashlib.sha256(packed).hexdigest(),
        "nvcc": re.findall(r"release [\d.]+, V([\d.]+)", _run("nvcc", "--version"))[0],
        "architectures": list(ARCHITECTURES),
        "ptx": PTX,
    }
    head, rows = json.dumps(record, indent=2)[:-2], ",\n".join(f"    {json.dumps(row)}" for row in usage)
    (FOLDER / "chain.json").write_text(f'{head},\n  "kernels": [\n{rows}\n  ]\n}}\n')
    print(f"{len(usage)} kernels, {len(content):,} bytes, {len(packed):,} compressed")


def main() -> None:
    """Compile and write."""
    with tempfile.TemporaryDirectory() as folder:
        write(*compile_all(Path(folder)))


if __name__ == "__main__":
    main()
