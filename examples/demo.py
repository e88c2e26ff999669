"""All steps on the bundled model, with the commands that a user would type.

    make demo            (or: python examples/demo.py [--folder demo-run] [--depth 32])

plan -> lock -> export (locked and original) -> verify -> generate. Then a table of the measured figures and a list
of the files. Every figure is read from the files that the commands wrote.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

PROMPT = 'def find_files(path, pattern):\n    """'
CONTENTS = {
    "locked/model.safetensors, config.json": "the locked weights; load them with transformers alone",
    "locked/modeling_dlr_lock.py": "the code of its MLPs; trust_remote_code runs no other code",
    "locked/lockkit.json, README.md": "recipe, seed, versions, data hashes, figures; a model card",
    "locked-onnx/model.onnx, model.onnx_data": "the inference graph and its weights, in fp32",
    "locked-onnx/genai_config.json, config.json": "the configuration files of onnxruntime-genai and optimum",
    "locked-onnx/lockkit_manifest.json": "the SHA-256 of every file of the export",
    "original-onnx/": "the export of the original model, for comparison",
    "verify.json": "all figures of the verification, schema lockkit-verify/1",
}
console = Console(markup=False, emoji=False, highlight=False)  # so that names of folders are printed unchanged


def run(*arguments: str) -> float:
    """Print and run one lockkit command; return its duration in seconds. Exit if it fails."""
    console.print(f"\n$ lockkit {shlex.join(arguments)}", style="bold", soft_wrap=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lockkit", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - started


def main() -> None:
    """Run all commands, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo-run"), help="folder to write (demo-run)")
    parser.add_argument("--depth", default="32", help="blocks in each chain (32)")
    parser.add_argument("--lock-options", default="", help="more options of `lockkit lock`, in one string")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    locked, locked_onnx, original_onnx = (
        str(args.folder / name) for name in ("locked", "locked-onnx", "original-onnx")
    )
    report = args.folder / "verify.json"

    started = time.perf_counter()
    run("plan", "demo")
    lock_options = ["--depth", args.depth, "--overwrite", *shlex.split(args.lock_options)]
    lock_seconds = run("lock", "demo", locked, *lock_options)
    run("export", locked, locked_onnx, "--precision", "fp32", "--overwrite")
    run("export", "demo", original_onnx, "--precision", "fp32", "--overwrite")
    run("verify", locked_onnx, "--reference", "demo", "--reference", locked, "--json", str(report))
    run("generate", "demo", locked_onnx, "--prompt", PROMPT, "--max-new-tokens", "64")
    summarise(args.folder, lock_seconds, time.perf_counter() - started)


def summarise(folder: Path, lock_seconds: float, seconds: float) -> None:
    """Print the figures of the lock and of the verification, and the list of files."""
    record = json.loads((folder / "locked" / "lockkit.json").read_text())
    figures = json.loads((folder / "verify.json").read_text())
    table = Table(title=f"\ndemo, locked at depth {record['dlr']['depth']} and exported", title_justify="left")
    text = figures["text"]
    tokens = text["rows"] * text["block_tokens"]
    table.add_column(f"on {tokens:,} tokens of {text['source']}, split '{text['split']}'")
    table.add_column("value", justify="right")
    for name, value in rows(record, figures):
        table.add_row(name, value)
    table.add_row("seconds for the lock / in total", f"{lock_seconds:.0f} / {seconds:.0f}")
    console.print(table)

    contents = Table(title=f"\ncontents of {folder}", title_justify="left", show_header=False)
    for name, meaning in CONTENTS.items():
        contents.add_row(name, meaning)
    console.print(contents)


def rows(record: dict, figures: dict) -> list[tuple[str, str]]:
    """The rows of the table, from `lockkit.json` and `verify.json`."""
    perplexity, lock, parity = figures["perplexity"], figures["fidelity"], figures["parity"]
    nmse = [layer["nmse"] for layer in record["layers"]]
    continuations = figures["continuations"]
    return [
        ("perplexity of the original, PyTorch", f"{perplexity['original']:.3f}"),
        ("perplexity of the locked model, PyTorch", f"{perplexity['locked']:.3f}"),
        ("perplexity of the locked model, ONNX", f"{perplexity['onnx']:.3f}"),
        ("locked over original", f"{perplexity['locked_over_original']:.4f}"),
        ("KL divergence, original to locked, per token", f"{lock['kl_divergence']:.5f}"),
        ("same top token, original and locked", f"{lock['top1_agreement']:.2%}"),
        ("NMSE of the layers after phase 1", f"{min(nmse):.5f} .. {max(nmse):.5f}"),
        ("highest KL divergence, PyTorch to ONNX, per token", f"{max(p['kl_divergence'] for p in parity):.1e}"),
        ("lowest share of same top token, PyTorch and ONNX", f"{min(p['top1_agreement'] for p in parity):.2%}"),
        ("same greedy continuations", f"{continuations['identical']:.0%} of {continuations['prompts']}"),
    ]


if __name__ == "__main__":
    main()
