"""One comparison on a GPU: a locked export with the fused operator, its bodies, and the original's export, side by side.

    python tools/gpu_speed.py 0.6B 32 bf16 --work /tmp/exports --out speed.json
    python tools/gpu_speed.py 0.6B 32 bf16 --work /tmp/exports --prepare  # steps 1 and 2 alone, before
    python tools/gpu_speed.py tiny 5 fp16 --work /tmp/exports --chain     # the operator alone, for compute-sanitizer

1. Make both models. Their weights repeat a million random numbers: speed does not depend on them, and this takes seconds.
2. Export both for CUDA. What is in `--work` already is used again, and what another process is making there is waited for.
   The locked export is removed at the end.
3. Copy the locked export with another name for its chains, which the operator does not know.
4. `lockkit bench` measures the three in turns, at batch 1, 16 and 64 with prompts of 512 tokens, in CUDA graphs.

`0.6B` is a whole Qwen3-0.6B, with its vocabulary and output head. `8B` has 4 of the 36 layers of Qwen3-8B and a small
vocabulary, so its ratio is that of layers alone: that of the whole model is closer to 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import LockkitError
from lockkit.export.manifest import MODEL_FILE
from lockkit.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The processes of a benchmark import this file again, so heavy libraries are imported where they are used.


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: hidden size, width of an MLP, heads, key and value heads, size of a head."""

    hidden: int
    width: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocabulary: int
    batches: tuple[int, ...] = (1, 16, 64)
    prompt: int = 512
    rounds: int = 3
    new_tokens: int = 16


SHAPES = {
    "0.6B": Shape(1024, 3072, 16, 8, 128, 28, 151_936),
    "8B": Shape(4096, 12288, 32, 8, 128, 4, 4096),
    "tiny": Shape(128, 320, 4, 2, 32, 2, 4096, (1, 2), 16, 1, 3),
}


class Models:
    """Models and exports of one shape in a folder, made when they are asked for. `depth` None is the original.

    Several processes may use the folder: each model and each export is made by one of them, and the others wait.
    """

    def __init__(self, shape: str, work: Path):
        self.name, self.shape, self.work = shape, SHAPES[shape], work

    def exported(self, depth: int | None, precision: str) -> Path:
        """The folder of an export for CUDA."""
        from lockkit.export import ExportConfig, export_model

        with self._alone(f"{self.name}-{self._kind(depth)}-{precision}") as folder:
            if not folder.exists():
                export_model(str(self._saved(depth)), folder, ExportConfig(precision=precision, provider="cuda"))
        return folder

    def _saved(self, depth: int | None) -> Path:
        from lockkit.models.load import DEMO
        from lockkit.models.save import copy_tokenizer

        with self._alone(f"{self.name}-{self._kind(depth)}") as folder:
            if not folder.exists():
                unfinished = folder.with_name(f"{folder.name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                self._model(depth).save_pretrained(unfinished)
                copy_tokenizer(DEMO, unfinished)
                unfinished.rename(folder)
        return folder

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[Path]:
        """The folder `name`, when no other process makes it. A process that ends lets the next one go on."""
        from filelock import FileLock

        with FileLock(self.work / f".{name}.lock"):
            yield self.work / name

    @staticmethod
    def _kind(depth: int | None) -> str:
        return "original" if depth is None else f"locked-{depth}"

    def _model(self, depth: int | None) -> PreTrainedModel:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from lockkit.dlr import ChainConfig
        from lockkit.models.families import FAMILIES
        from lockkit.models.locked import locked_classes, locked_config

        shape = self.shape
        config: PreTrainedConfig = Qwen3Config(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.width,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
            pad_token_id=0, dtype=torch.bfloat16,
        )  # fmt: skip
        build: Callable[[PreTrainedConfig], PreTrainedModel] = Qwen3ForCausalLM
        if depth is not None:
            family, chains = FAMILIES["qwen3"], ChainConfig(depth, (1.5,) * shape.layers, "silu")
            build, config = locked_classes(family)[1], locked_config(config, family, chains)
        with torch.device("meta"):
            model = build(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.tie_weights()
        numbers = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
        for parameter in model.parameters():
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(numbers)):
                flat[start : start + len(numbers)] = numbers[: len(flat) - start]
            if parameter.ndim == 1:
                parameter.data.fill_(1.0)
        return model


def prepare(shape: str, depth: int, precision: str, work: Path) -> None:
    """Make what `measure` needs, and let other processes go first."""
    os.nice(10)
    models = Models(shape, work)
    for each in (depth, None):
        models.exported(each, precision)


def measure(shape: str, depth: int, precision: str, work: Path, operator: bool) -> list[dict[str, Any]]:
    """Rows of speeds relative to the original: one for each batch, with the fused operator and without."""
    from lockkit.bench import BenchConfig, Runtime, bench
    from lockkit.export.chains import has_kernel_form

    models = Models(shape, work)
    locked, original = models.exported(depth, precision), models.exported(None, precision)
    sizes = SHAPES[shape]
    operator = operator and has_kernel_form(locked / MODEL_FILE, "cuda")
    config = BenchConfig(
        runtimes=[Runtime.onnxruntime], provider="cuda", batch_sizes=list(sizes.batches), rounds=sizes.rounds,
        prompt_lengths=[sizes.prompt], new_tokens=sizes.new_tokens, kernel=operator,
    )  # fmt: skip
    body = _body(locked, work / "body") if operator else None
    try:
        result = bench(locked, [str(original), *([str(body)] if body else [])], config)
    finally:
        for folder in filter(None, (locked, body)):
            shutil.rmtree(folder)
    uses = {model.model: model for model in result.models}
    rows = []
    for batch in sizes.batches:
        found = {ratio.against: ratio for ratio in result.ratios if ratio.batch_size == batch}
        own = found[original.name]
        ways = {"fused" if operator else "body": (locked.name, own.decode, own.prefill)}
        if operator:  # of the bodies over the original, by way of the operator
            other = found["body"]
            ways["body"] = ("body", own.decode / other.decode, own.prefill / other.prefill)
        for way, (name, decode, prefill) in ways.items():
            speed = next(m for m in result.measurements if (m.model, m.batch_size) == (name, batch))
            rows.append(
                {
                    "shape": shape,
                    "layers": sizes.layers,
                    "depth": depth,
                    "precision": precision,
                    "way": way,
                    "batch": batch,
                    "decode": round(decode, 3),
                    "prefill": round(prefill, 3),
                    "decode_tokens_per_second": round(speed.decode_tokens_per_second, 1),
                    "prefill_tokens_per_second": round(speed.prefill_tokens_per_second, 1),
                    "graphs": uses[name].cuda_graphs,
                }
            )
    return rows


def _body(locked: Path, folder: Path) -> Path:
    """A copy of an export whose chains run as their bodies: they have a name that the fused operator does not."""
    import onnx

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in locked.iterdir():
        if path.suffix != ".onnx":
            os.link(path, folder / path.name)
    model = onnx.load(locked / MODEL_FILE, load_external_data=False)
    for function in model.functions:
        function.name = f"Body{function.name}"
    for node in model.graph.node:
        if node.op_type.startswith("DLRChain"):
            node.op_type = f"Body{node.op_type}"
    onnx.save(model, folder / MODEL_FILE)
    return folder


def run_chain(shape: str, depth: int, precision: str, work: Path) -> None:
    """Run the fused operator alone for one token and for 70: no kernel of onnxruntime or cuBLAS, which are not ours."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import helper

    from lockkit.kernel import build_kernel

    model = onnx.load(Models(shape, work).exported(depth, precision) / MODEL_FILE)
    node = next(node for node in model.graph.node if node.op_type.startswith("DLRChain"))
    weights = [tensor for tensor in model.graph.initializer if tensor.name in node.input[1:]]
    kind = onnx.TensorProto.BFLOAT16 if precision == "bf16" else onnx.TensorProto.FLOAT16
    hidden = SHAPES[shape].hidden
    ends = [helper.make_tensor_value_info(name, kind, ["tokens", hidden]) for name in (node.input[0], node.output[0])]
    constants = [other for other in model.graph.node if set(other.output) & set(node.input[1:])]  # the gain
    graph = helper.make_graph([*constants, node], "chain", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid(each.domain, each.version) for each in model.opset_import]
    alone = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("lockkit.provider", "cuda")
    options.register_custom_ops_library(str(build_kernel()))
    session = onnxruntime.InferenceSession(alone, options, providers=["CUDAExecutionProvider"])
    make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    for tokens in (1, 70):
        x = make(np.full((tokens, hidden), 0x1234, np.uint16), kind)
        binding = session.io_binding()
        binding.bind_ortvalue_input(node.input[0], x)
        binding.bind_output(node.output[0], "cuda")
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()


def main() -> int:
    """Read the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("depth", type=int)
    parser.add_argument("precision", choices=["fp16", "bf16", "int4", "int8"])
    parser.add_argument("--work", type=Path, required=True, help="folder of models and exports, several GB")
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    parser.add_argument("--prepare", action="store_true", help="make the exports, and measure nothing")
    parser.add_argument("--chain", action="store_true", help="run the fused operator alone, and measure nothing")
    parser.add_argument("--no-operator", dest="operator", action="store_false", help="measure without it")
    arguments = parser.parse_args()
    case = arguments.shape, arguments.depth, arguments.precision, arguments.work
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.chain:
            run_chain(*case)
        elif arguments.prepare:
            prepare(*case)
        else:
            rows = measure(*case, arguments.operator)
            print("\n".join(map(str, rows)))
            if arguments.out:
                write_json(arguments.out, {"schema": "lockkit-gpu-speed/1", "rows": rows})
    except LockkitError as error:
        print(f"gpu_speed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
