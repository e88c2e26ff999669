"""Size, fidelity, perplexity and speed of every precision of an export, for a locked model and its original.

    python tools/compare_precisions.py ./locked --original demo --kernel --out tools/results/precisions.json

Fidelity is measured by `lockkit verify`: KL divergence and top-1 agreement between the PyTorch model and its own
export (the worst of all ways of running it), and perplexity over that of the PyTorch original.

Speed is measured by `lockkit bench` in plain onnxruntime, over the original in fp32 and over the original in the
same precision, in turns within one run. With `--kernel`, the locked model is also run with the fused
operator.

The original is measured beside the locked model because the small matrices of a chain quantise
differently from the large ones of an MLP. A Markdown table is printed at the end.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from lockkit.bench import BenchConfig, Runtime, bench
from lockkit.export import ExportConfig, export_model
from lockkit.files import write_json
from lockkit.verify import VerifyConfig, verify_export
from lockkit.version import git_hash, versions

FORMATS = ["fp32", "fp16", "int8:16", "int8:32", "int8:128", "int4:16", "int4:32", "int4:64", "int4:128"]
HEADINGS = {
    "weights_bytes": "MB",
    "kl_to_pytorch": "KL",
    "top1_agreement": "same top token",
    "perplexity_over_original": "perplexity",
    "decode_over_fp32_original": "decode / fp32 original",
    "prefill_over_fp32_original": "prefill / fp32 original",
    "decode_over_original": "decode / original",
    "prefill_over_original": "prefill / original",
}


def export(model: str, folder: Path, format_name: str) -> Path:
    """Export `model` in a precision, or `precision:block size`, to `folder`."""
    precision, _, block_size = format_name.partition(":")
    config = {"precision": precision} | ({"block_size": int(block_size)} if block_size else {})
    return export_model(model, folder, ExportConfig(**config)).folder


def fidelity(folder: Path, references: list[str], tokens: int) -> dict:
    """Size of the weights in bytes, and fidelity. KL divergence is in nats per token."""
    result = verify_export(folder, references, VerifyConfig(data="stdlib", tokens=tokens, prompts=0))
    return {
        "weights_bytes": (folder / "model.onnx_data").stat().st_size,
        "kl_to_pytorch": max(row.kl_divergence for row in result.parity),
        "top1_agreement": min(row.top1_agreement for row in result.parity),
        "perplexity_over_original": result.perplexity.onnx_over_original,
    }


def speed(folder: Path, against: dict[str, Path], config: BenchConfig) -> dict:
    """Speed of an export in tokens per second, and its ratio to that of other exports.

    Args:
        against: folders of other exports, by their names in the result.
    """
    others = {name: other for name, other in against.items() if other != folder}
    result = bench(folder, list(dict.fromkeys(map(str, others.values()))), config)
    ratios = {ratio.against: ratio for ratio in result.ratios}
    mine = result.measurements[0]
    figures = {
        "decode_tokens_per_second": mine.decode_tokens_per_second,
        "prefill_tokens_per_second": mine.prefill_tokens_per_second,
    }
    for name, other in others.items():
        figures |= {
            f"decode_over_{name}": ratios[other.name].decode,
            f"prefill_over_{name}": ratios[other.name].prefill,
        }
    return figures


def rows_of(format_name: str, fp32_original: Path, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """The rows of one format: the locked model, with `--kernel` also with the fused operator, and the original."""
    locked, original = arguments.locked, arguments.original
    name = format_name.replace(":", "-")
    exports = {"locked": export(locked, folder / f"locked-{name}", format_name), "original": fp32_original}
    if format_name != "fp32":
        exports["original"] = export(original, folder / f"original-{name}", format_name)
    # The export of the locked model is compared with the original and with the locked model itself.
    references = {"locked": [original, locked], "original": [original]}
    quality = {model: fidelity(exports[model], references[model], arguments.tokens) for model in exports}
    rows = []
    for model, kernel in [("locked", False), *([("locked", True)] if arguments.kernel else []), ("original", False)]:
        config = BenchConfig(
            runtimes=[Runtime.onnxruntime],
            prompt_lengths=[arguments.prompt_length],
            new_tokens=arguments.new_tokens,
            rounds=arguments.rounds,
            threads=arguments.threads,
            kernel=kernel,
        )
        against = {"fp32_original": fp32_original, "original": exports["original"]}
        figures = speed(exports[model], against, config)
        rows.append({"format": format_name, "model": model, "kernel": kernel, **quality[model], **figures})
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table. Sizes are in MB of 10^6 bytes."""
    lines = [f"| | | {' | '.join(HEADINGS.values())} |", "|---" * (len(HEADINGS) + 2) + "|"]
    for row in rows:
        cells = [row["format"].replace(":", ", blocks of "), row["model"] + (", kernel" if row["kernel"] else "")]
        for key in HEADINGS:
            value = row.get(key)
            if value is None:
                cells.append("")
            elif key == "weights_bytes":
                cells.append(f"{value / 1e6:.1f}")
            elif key == "kl_to_pytorch":
                cells.append(f"{value:.1e}")
            elif key == "top1_agreement":
                cells.append(f"{value:.2%}")
            else:
                cells.append(f"{value:.4f}" if key == "perplexity_over_original" else f"{value:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all formats and print the table. The rows are written to `--out` after each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locked")
    parser.add_argument("--original", default="demo")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="a precision, or precision:block size")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens for fidelity and perplexity")
    parser.add_argument("--kernel", action="store_true", help="also run the locked model with the fused operator")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="threads of onnxruntime; by default it chooses")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        fp32_original = export(arguments.original, Path(folder) / "original-fp32", "fp32")
        for format_name in arguments.formats:
            rows += rows_of(format_name, fp32_original, Path(folder), arguments)
            if arguments.out:
                record = {
                    "schema": "lockkit-precisions/2",
                    "command": f"python tools/compare_precisions.py {shlex.join(sys.argv[1:])}",
                    "git_hash": git_hash(),
                    "versions": versions(),
                    "tokens": arguments.tokens,
                    "rows": rows,
                }
                write_json(arguments.out, record)
    print(table(rows))


if __name__ == "__main__":
    main()
