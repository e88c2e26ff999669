"""Compile the kernel, once per version of its source and type of processor.

The library contains the kernels for GPUs too. They are compiled before, by `tools/build_cubins.py`: here only a C++
compiler is needed.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.files import cache_folder

SOURCE = Path(__file__).with_name("dlr_chain.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
CUBINS = SOURCE.parent / "cuda" / "chain.fatbin.xz"  # the kernels for GPUs, for all of them
COMPILERS = ("c++", "g++", "clang++")


def find_kernel() -> Path | None:
    """The library that `build_kernel` compiled for this machine, or None if it has not run yet."""
    path = _library()
    return path if path.is_file() else None


def find_compiler() -> str | None:
    """The path of the C++ compiler: of CXX if it is set, else the first of `COMPILERS` that is installed."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, COMPILERS)), None)


def build_kernel() -> Path:
    """Compile the kernel unless it is compiled already, and return the path of the library.

    The library goes to `$XDG_CACHE_HOME/lockkit`, by default `~/.cache/lockkit`.

    Raises:
        UsageError: there is no compiler, the compiler fails, or the folder cannot be written.
    """
    path = _library()
    if path.is_file():
        return path
    compiler = find_compiler()
    if compiler is None or os.name != "posix":
        wanted = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise UsageError(
            f"the kernel needs a C++ compiler ({wanted}) on Linux or macOS: install one, "
            "set CXX, or run without the kernel"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled = Path(folder) / path.name
            cubins = Path(folder) / CUBINS.stem
            cubins.write_bytes(lzma.decompress(CUBINS.read_bytes()))
            _compile(compiler, compiled, cubins)
            compiled.replace(path)  # atomic, so that no process loads an incomplete library
    except OSError as error:
        raise UsageError(
            f"cannot write the kernel to {path.parent} ({error.strerror}): set XDG_CACHE_HOME to another folder"
        ) from error
    return path


def _compile(compiler: str, library: Path, cubins: Path) -> None:
    command: list[str | Path] = [compiler, *FLAGS, f'-DLOCKKIT_CUBINS="{cubins}"', SOURCE, "-o", library, "-ldl"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode or not library.is_file():
        lines = run.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), " ".join(lines)[-200:]) or f"exit {run.returncode}"
        raise UsageError(f"{compiler} cannot compile the kernel ({reason}): set CXX, or run without the kernel")


def _library() -> Path:
    """Where the library for this source and this processor is, or will be."""
    # Machines with different processors may share a home folder.
    key = hashlib.sha256("\0".join([*FLAGS, platform.machine(), _processor()]).encode())
    for source in sorted([SOURCE, CUBINS, *SOURCE.parent.glob("*.h"), *CUBINS.parent.glob("*.h")]):
        key.update(source.read_bytes())
    return cache_folder() / f"dlr_chain-{key.hexdigest()[:16]}.so"


def _processor() -> str:
    """The processor's instruction sets, where the system lists them; else its name."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
