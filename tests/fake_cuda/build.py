"""Build the fake CUDA libraries, for the onnxruntime that is installed.

1. Read which symbols onnxruntime's and onnxruntime-genai's CUDA libraries take from which library.
2. Compile `device.c` and `driver.c` as `libcuda.so.1`, `runtime.c` as `libcudart.so.N`, `blas.c` as `libcublas.so.N` and
   `libcublasLt.so.N`. A symbol that no source defines gets a function that is written to the journal and succeeds.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-rpath,$ORIGIN")
CUDA_LIBRARY = re.compile(r"lib(cuda|cudart|cublas|cublasLt|curand|cufft)\.so\.\d+")
DRIVER = "libcuda.so.1"
SOURCES = {"cuda": ("device.c", "driver.c"), "cudart": ("runtime.c",), "cublas": ("blas.c",), "cublasLt": ("blas.c",)}
# Generated functions, by a pattern of their names. The others do nothing.
BODIES = [
    (
        r"cublas.*(gemm|Gemm|geam|getr|scal|copy)|cublasLtMatrixTransform$",
        'return fake_launch("product", "{name}", *a);',
    ),
    (r".*(Create|Create_v2|CreateGenerator)$", "*a = fake_handle(); return 0;"),
    (r".*Status(Name|String)$", 'return (long)"fake";'),
    (r".*", 'fake_note("other", "{name}", NULL); return 0;'),
]


class CannotBuildError(Exception):
    """Why the fake libraries cannot be built here."""


def consumers() -> list[Path]:
    """The installed libraries that use CUDA.

    Raises:
        CannotBuildError: there are none.
    """
    found = []
    for module, pattern in (("onnxruntime", "capi/*_providers_cuda.so"), ("onnxruntime_genai", "*-cuda.so")):
        spec = importlib.util.find_spec(module)
        if spec and spec.origin:
            found += sorted(Path(spec.origin).parent.glob(pattern))
    if not any("providers_cuda" in path.name for path in found):
        raise CannotBuildError("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
    return found


def build(folder: Path) -> Path:
    """Compile the libraries into `folder`, and return it.

    Raises:
        CannotBuildError: there is no C compiler, or no onnxruntime with CUDA.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler or not shutil.which("readelf"):
        raise CannotBuildError("needs a C compiler and readelf")
    needed: dict[str, set[str]] = defaultdict(set)
    for library in consumers():
        for name, symbols in _needs(library).items():
            needed[name] |= symbols
    needed[DRIVER] |= set()
    for name in sorted(needed, key=lambda name: name != DRIVER):
        _compile(compiler, name, needed[name], folder)
    return folder


def _needs(library: Path) -> dict[str, set[str]]:
    """The symbols that `library` takes from each CUDA library."""
    run = ["readelf", "--wide", "--dynamic", "--dyn-syms", library]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    names = {match[0] for match in re.finditer(CUDA_LIBRARY, lines)}
    symbols: dict[str, set[str]] = {name: set() for name in names}
    for name, version in re.findall(r" UND (\w+)(?:@(\S+))?", lines):
        if version in symbols:
            symbols[version].add(name)
        elif re.fullmatch(r"cu[A-Z]\w+", name):  # the driver's symbols have no version
            symbols.setdefault(DRIVER, set()).add(name)
    return symbols


def _compile(compiler: str, name: str, symbols: set[str], folder: Path) -> None:
    short = name.split(".")[0].removeprefix("lib")
    generated, versions = folder / f"{short}.c", folder / f"{short}.map"
    lines = ['#include "fake.h"']
    for symbol in sorted(symbols):
        body = next(body for pattern, body in BODIES if re.fullmatch(pattern, symbol) or re.match(pattern, symbol))
        lines.append(f"EXPORT __attribute__((weak)) long {symbol}(Stream* a) {{ (void)a; {body.format(name=symbol)} }}")
    generated.write_text("\n".join(lines) + "\n")
    versions.write_text(f"{name if name != DRIVER else ''} {{ global: *; }};\n")
    sources = [HERE / name for name in SOURCES.get(short, ())]
    others = [] if name == DRIVER else [folder / DRIVER]
    run = [
        compiler, *FLAGS, f"-I{HERE}", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}",
        *sources, generated, *others, "-ldl", "-lpthread", "-o", folder / name,
    ]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuildError(f"cannot compile {name}: {done.stderr[-2000:]}")
