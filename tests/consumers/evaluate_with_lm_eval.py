"""Run by a test in another environment: OUT (BACKEND MODEL_ARGS)...; prints JSON, one entry a backend.

Each is `lm-eval run` itself, on the task of examples/lm_eval, from the current folder.
"""

import importlib.util
import json
import sys
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

out, *pairs = sys.argv[1:]
found = {"lockkit": importlib.util.find_spec("lockkit") is not None}
for backend, arguments in zip(pairs[::2], pairs[1::2], strict=True):
    folder = Path(out) / backend
    sys.argv = ["lm-eval", "run", "--model", backend, "--model_args", arguments, "--tasks", "stdlib_members.yaml"]
    sys.argv += ["--device", "cpu", "--output_path", str(folder), "--log_samples"]
    cli_evaluate()
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_*.jsonl")
    found[backend] = {
        "accuracy": json.loads(results.read_text())["results"]["stdlib_members"]["acc,none"],
        # Of every choice of every question: its log-likelihood, and whether it is what greedy decoding gives.
        "choices": [choice for line in samples.open() for choice in json.loads(line)["filtered_resps"]],
    }
print(json.dumps(found))
