"""Compile gpu_plans.cpp and run it on this machine's GPU: times of the fused operator's kernels for many plans.

    python tools/gpu_plans.py --out plans.jsonl

The file gets a line of JSON for each plan, as soon as it is measured (see gpu_plans.cpp).
"""

from __future__ import annotations

import argparse
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

from lockkit.kernel.build import CUBINS, find_compiler

SOURCE = Path(__file__).with_name("gpu_plans.cpp")


def measure(compiler: str, out: Path) -> int:
    """Compile the program, let it write `out`, and return its exit code."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        kernels, program = Path(folder) / CUBINS.stem, Path(folder) / "gpu_plans"
        kernels.write_bytes(lzma.decompress(CUBINS.read_bytes()))
        flags = ["-std=c++17", "-O1", "-I", CUBINS.parent, f'-DLOCKKIT_CUBINS="{kernels}"']
        subprocess.run([compiler, *flags, SOURCE, "-ldl", "-o", program], check=True)
        with out.open("w", encoding="utf-8") as file:
            return subprocess.run([program], stdout=file, check=False).returncode


def main() -> int:
    """Read the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the lines of JSON")
    arguments = parser.parse_args()
    compiler = find_compiler()
    if compiler is None:
        print("gpu_plans: there is no C++ compiler: install one, or set CXX", file=sys.stderr)
        return 2
    return measure(compiler, arguments.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
