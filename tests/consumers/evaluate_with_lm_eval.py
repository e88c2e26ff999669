"""Run `lm-eval` with several backends: OUT (BACKEND MODEL_ARGS)...; prints JSON with one entry per backend.

A test runs this in another environment. The current folder must be examples/lm_eval, which has the task.
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
        # For each choice of each question: its log-likelihood, and whether greedy decoding gives it.
        "choices": [choice for line in samples.open() for choice in json.loads(line)["filtered_resps"]],
    }
print(json.dumps(found))
