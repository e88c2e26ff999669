"""Generates text from an export with onnxruntime alone, without lockkit and transformers. Caches stay on the device.

    pip install onnxruntime tokenizers        # onnxruntime-gpu for --provider cuda
    python examples/serve_onnxruntime.py EXPORT --prompt "def read(path):"

On the CPU, a locked model is faster with the fused operator: `lockkit kernel` prints its path for --kernel.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def open_session(folder: Path, provider: str, kernel: str | None) -> onnxruntime.InferenceSession:
    """Load the graph; exit if onnxruntime would fall back to another execution provider."""
    options = onnxruntime.SessionOptions()
    if kernel:
        options.register_custom_ops_library(kernel)
    wanted = "CUDAExecutionProvider" if provider == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise SystemExit(f"onnxruntime could not start {wanted}")
    return session


def empty_cache(session: onnxruntime.InferenceSession) -> dict[str, onnxruntime.OrtValue]:
    """A cache of no tokens for each cache input of the graph."""
    cache = {}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            dtype = np.float16 if node.type == "tensor(float16)" else np.float32
            shape = (1, node.shape[1], 0, node.shape[3])  # [batch, heads, no tokens yet, head size]
            cache[node.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
    return cache


def generate(
    session: onnxruntime.InferenceSession, ids: list[int], new_tokens: int, stop: set[int], device: str
) -> Iterator[int]:
    """Continue `ids` greedily: yield up to `new_tokens` tokens, and end at a token in `stop`."""
    inputs = {node.name for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]
    cache, past, step = empty_cache(session), 0, ids
    for _ in range(new_tokens):
        feeds = {
            "input_ids": np.array([step], np.int64),
            "attention_mask": np.ones((1, past + len(step)), np.int64),
            "position_ids": np.arange(past, past + len(step), dtype=np.int64)[None],
        }
        binding = session.io_binding()
        for name in inputs & feeds.keys():
            binding.bind_cpu_input(name, feeds[name])
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)  # already on the device
        for name in outputs:
            binding.bind_output(name, "cpu" if name == "logits" else device)
        session.run_with_iobinding(binding)
        found = dict(zip(outputs, binding.get_outputs(), strict=True))
        token = int(found.pop("logits").numpy()[0, -1].argmax())
        cache = {name.replace("present.", "past_key_values."): value for name, value in found.items()}
        past, step = past + len(step), [token]
        if token in stop:
            return
        yield token


def main() -> None:
    """Print the continuation of a prompt while it is generated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder that `lockkit export` wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate at most (64)")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--kernel", help="library of the fused operator, whose path `lockkit kernel` prints")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.export / "tokenizer.json"))
    stop = json.loads((arguments.export / "genai_config.json").read_text())["model"]["eos_token_id"]
    stop = set(stop) if isinstance(stop, list) else {stop}
    session = open_session(arguments.export, arguments.provider, arguments.kernel)
    ids, shown = tokenizer.encode(arguments.prompt).ids, ""
    generated: list[int] = []
    for token in generate(session, ids, arguments.new_tokens, stop, arguments.provider):
        generated.append(token)
        text = tokenizer.decode(generated)
        if not text.endswith("\ufffd"):  # else a character is incomplete
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    main()
