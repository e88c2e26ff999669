"""Speed of locked exports compared with exports of their originals, on models of random weights in Qwen3's shape.

    python tools/benchmark_export.py prepare --hidden-size 512 --out models-512
    python tools/benchmark_export.py measure models-512 --out tools/results/export-speed-512.json

`prepare` makes an original and its locked form, and exports both in each precision. The chains have depth 32 and
random weights, because speed does not depend on fidelity. With `--optimum PYTHON`, the original is also exported by
optimum; PYTHON is the interpreter of an environment with optimum (tests/consumers/requirements.txt).

`measure` runs `lockkit bench` for each precision, with and without the fused kernel. With `--no-kernel` it runs only
without, which needs no C++ compiler. The speed of the locked export is compared with that of the original exported by
lockkit, and with `--everything` also exported by optimum and in PyTorch eager.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from lockkit.files import write_json

OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", do_validation=False)
"""
PRECISIONS = ("fp32", "fp16", "int8", "int4")


def prepare(arguments: argparse.Namespace) -> None:
    """Make an original and a lock of random weights, and export both in every precision."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from lockkit.dlr import ChainConfig
    from lockkit.export import ExportConfig, export_model
    from lockkit.models.families import FAMILIES
    from lockkit.models.load import DEMO
    from lockkit.models.locked import locked_classes, locked_config
    from lockkit.models.save import copy_tokenizer

    torch.manual_seed(0)
    size, out = arguments.hidden_size, arguments.out
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 128,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    original = Qwen3ForCausalLM(config)
    chains = ChainConfig(arguments.depth, (1.5,) * arguments.layers, "silu")
    family = FAMILIES["qwen3"]
    locked = locked_classes(family)[1](locked_config(config, family, chains))
    locked.load_state_dict(original.state_dict(), strict=False)
    for name, model in (("original", original), ("locked", locked)):
        model.save_pretrained(out / name)
        copy_tokenizer(DEMO, out / name)
        for precision in arguments.precisions:
            export_model(str(out / name), out / f"{name}-{precision}", ExportConfig(precision=precision))
    if arguments.optimum:
        script = [arguments.optimum, "-c", OPTIMUM, out / "original", out / "original-optimum"]
        subprocess.run(script, check=True, capture_output=True)


def measure(arguments: argparse.Namespace) -> None:
    """Run `lockkit bench` for each precision; print the ratios and write them to `--out`."""
    from lockkit.bench import BenchConfig, Runtime, bench

    results, folder = {}, arguments.folder
    for precision in arguments.precisions:
        against = [str(folder / f"original-{precision}")]
        if precision == "fp32" and arguments.everything:
            against += [str(path) for path in (folder / "original-optimum", folder / "original") if path.is_dir()]
        for kernel in (True, False) if arguments.kernel else (False,):
            config = BenchConfig(
                runtimes=[Runtime.onnxruntime],
                batch_sizes=arguments.batch_sizes,
                prompt_lengths=arguments.prompt_lengths,
                new_tokens=arguments.new_tokens,
                rounds=arguments.rounds,
                threads=arguments.threads,
                kernel=kernel,
            )
            result = bench(folder / f"locked-{precision}", against, config)
            results[f"{precision}{', kernel' if kernel else ''}"] = result.model_dump(mode="json", by_alias=True)
            for ratio in result.ratios:
                print(f"{precision:5s} kernel={kernel!s:5s} {ratio.model_dump()}", flush=True)
    model = json.loads((folder / "locked" / "config.json").read_text())
    shape = {name: model[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    record = {
        "schema": "lockkit-export-speed/1",
        "command": f"python tools/benchmark_export.py {shlex.join(sys.argv[1:])}",
        "model": {**shape, "depth": model["dlr"]["depth"]},
        "results": results,
    }
    if arguments.out:
        write_json(arguments.out, record)


def main() -> None:
    """Parse the command line and run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare")
    command.set_defaults(run=prepare)
    command.add_argument("--hidden-size", type=int, default=512)
    command.add_argument("--layers", type=int, default=8)
    command.add_argument("--depth", type=int, default=32)
    command.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    command.add_argument("--optimum", type=Path, help="Python interpreter of an environment with optimum")
    command.add_argument("--out", type=Path, required=True, help="folder for the models and exports")
    command = commands.add_parser("measure")
    command.set_defaults(run=measure)
    command.add_argument("folder", type=Path, help="the folder that `prepare` wrote")
    command.add_argument("--precisions", nargs="+", default=["fp32"], choices=PRECISIONS)
    command.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    command.add_argument("--prompt-lengths", type=int, nargs="+", default=[512])
    command.add_argument("--new-tokens", type=int, default=32)
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--threads", type=int)
    command.add_argument("--no-kernel", dest="kernel", action="store_false", help="only without the fused kernel")
    command.add_argument(
        "--everything", action="store_true", help="in fp32, compare also with optimum's export and with PyTorch"
    )
    command.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
