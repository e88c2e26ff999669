"""Peak memory of a lock against the number of decoder layers, on models of random weights.

    python tools/measure_memory.py --layers 4 16 --hidden 512 --out tools/results/memory.json

Each lock runs in a separate process. Its `lockkit.json` records the memory that it needed beyond the interpreter and
the libraries. With `--offload disk`, layers are streamed, and memory must not grow with their number. `--offload none`
keeps all layers in memory in phase 2, for comparison.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lockkit.files import LOCK_RECORD, read_json, write_json
from lockkit.models.load import DEMO, TOKENIZER_FILES
from lockkit.version import git_hash, versions

OPTIONS = "--depth 8 --data stdlib --tokens 8192 --end-to-end-tokens 4096 --validation-tokens 1024 --device cpu"


def random_model(folder: Path, layers: int, hidden: int) -> None:
    """Write a Qwen3 of random weights with the bundled tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=hidden // 8, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (DEMO / name).is_file():
            (folder / name).write_bytes((DEMO / name).read_bytes())


def measure(layers: int, hidden: int, offload: str) -> dict:
    """Lock a model of `layers` layers; return the memory figures of its `lockkit.json`, in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "locked"
        random_model(model, layers, hidden)
        command = f"-m lockkit lock {model} {out} {OPTIONS} --offload {offload}"
        subprocess.run([sys.executable, *shlex.split(command)], check=True, capture_output=True)
        memory = read_json(out / LOCK_RECORD, "--out")["memory"]
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {
        "layers": layers,
        "offload": offload,
        "model_bytes": size,
        "beyond_idle_bytes": memory["peak_bytes"] - memory["idle_bytes"],
        "predicted_bytes": memory["predicted_bytes"],
    }


def main() -> None:
    """Lock all models, print the table, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--offload", nargs="+", default=["disk", "none"])
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    rows = [measure(layers, arguments.hidden, o) for o in arguments.offload for layers in arguments.layers]
    print("| offload | layers | weights, MB | peak beyond the libraries, MB | predicted, MB | over the smallest |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        first = next(other for other in rows if other["offload"] == row["offload"])
        row["growth"] = row["beyond_idle_bytes"] / first["beyond_idle_bytes"]
        figures = (row["model_bytes"], row["beyond_idle_bytes"], row["predicted_bytes"])
        megabytes = " | ".join(f"{figure / 1e6:,.0f}" for figure in figures)
        print(f"| {row['offload']} | {row['layers']} | {megabytes} | {row['growth']:.2f} |")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "schema": "lockkit-memory/1", "command": shlex.join(["python", *sys.argv]), "lock_options": OPTIONS,
            "git_hash": git_hash(), "versions": versions(), "rows": rows,
        }  # fmt: skip
        write_json(arguments.out, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
