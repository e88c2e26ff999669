"""Size, fidelity and perplexity of every precision of an export, for a locked model and its original.

    python tools/compare_precisions.py ./locked --original demo --out tools/results/precisions.json

Perplexity and KL are `lockkit verify`'s: KL from the PyTorch model to its own export, the worst of
the ways of running it; perplexity over that of the PyTorch original. The locked model and the original
stand side by side, since a chain's small matrices quantise differently from an MLP's large ones.
Speed is `lockkit bench`'s business (tools/benchmark_export.py).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from lockkit.export import ExportConfig, export_model
from lockkit.files import write_json
from lockkit.verify import VerifyConfig, verify_export
from lockkit.version import git_hash, versions

FORMATS = [
    ("fp32", 32),
    ("fp16", 32),
    *(("int8", size) for size in (16, 32, 128)),
    *(("int4", size) for size in (16, 32, 64, 128)),
]


def measure(model: str, original: str, precision: str, block_size: int, tokens: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = ExportConfig(precision=precision, block_size=block_size)
        export = export_model(model, Path(folder) / "onnx", config)
        # Only the locked model has two references: what it was made from, and itself.
        references = list(dict.fromkeys([original, model]))
        result = verify_export(export.folder, references, VerifyConfig(data="stdlib", tokens=tokens, prompts=0))
        weights = (export.folder / "model.onnx_data").stat().st_size
    return {
        "precision": precision,
        "block_size": block_size if config.precision.quantised else None,
        "weights_bytes": weights,
        "kl_to_pytorch": max(row.kl_divergence for row in result.parity),
        "perplexity_over_original": result.perplexity.onnx_over_original,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locked")
    parser.add_argument("--original", default="demo")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, model in (("locked", arguments.locked), ("original", arguments.original)):
        for precision, block_size in FORMATS:
            row = {"model": name, **measure(model, arguments.original, precision, block_size, arguments.tokens)}
            rows.append(row)
            print(row, flush=True)
            if arguments.out:
                record = {
                    "schema": "lockkit-precisions/1",
                    "command": f"python tools/compare_precisions.py {shlex.join(sys.argv[1:])}",
                    "git_hash": git_hash(),
                    "versions": versions(),
                    "tokens": arguments.tokens,
                    "rows": rows,
                }
                write_json(arguments.out, record)


if __name__ == "__main__":
    main()
