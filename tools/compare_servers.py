"""`lockkit serve` beside the server of llama.cpp under the same load: tokens per second and time to the first text.

    python tools/compare_servers.py locked-int4 original-q4_k_m.gguf --out tools/results/servers

1. Start both servers (llama.cpp's by the package xllamacpp), with the same number of threads and of requests computed
   at the same time. Neither keeps anything of a prompt for later requests.
2. Send each prompt once to each, one after the other. So both are warm, and the tokens of prompts and answers are counted.
3. In each round, and for each number of clients, load one server for `--seconds`, then the other. Every client sends one
   random prompt after the other, with greedy decoding, and reads the answer as a stream. Both servers get the same
   prompts and limits; an answer may end before its limit. Clients run in this process, on the same cores as the servers.
4. Write OUT.json, and OUT.md with a table: throughput over the rounds, the median over the rounds of its ratio in a round,
   and percentiles over the answers of all rounds.

The exit code is 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import statistics
import sys
from pathlib import Path

import psutil
from load_test import Asker, Stage, make_questions, run_stage, running, serve_command

from lockkit.bench.llama_cpp import check_gguf, llama_cpp_version
from lockkit.bench.run import processor
from lockkit.errors import counted
from lockkit.export.manifest import read_manifest
from lockkit.files import write_json
from lockkit.version import git_hash, versions

SCHEMA = "lockkit-servers-compared/1"
OURS, THEIRS = "lockkit serve", "llama.cpp"
LLAMA_CPP = """
import signal, sys
from pathlib import Path
from lockkit.bench.llama_cpp import start_server
rows, tokens, threads = map(int, sys.argv[2:])
server = start_server(Path(sys.argv[1]), rows, tokens, threads)
print(f"{server.listening_address}/v1", file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # llama.cpp's own handler ends its loop, not this process
signal.pause()
"""


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="folder that `lockkit export` wrote")
    parser.add_argument("gguf", type=Path, help="file that llama.cpp serves")
    parser.add_argument("--out", type=Path, help="the result: OUT.json and OUT.md")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="duration of a stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each server")
    parser.add_argument("--max-batch", type=int, default=16, help="requests that each server computes at the same time")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt and its answer in llama.cpp")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_gguf(arguments.gguf)
    record = _record(arguments, asyncio.run(_measure(arguments)))
    print(markdown(record))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out.with_suffix(".json"), record)
        arguments.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    sys.exit(any(row["errors"] for row in record["rows"]))


async def _measure(arguments: argparse.Namespace) -> dict:
    """Run all stages.

    Returns:
        "stages", by number of clients and server: one per round; "tokens", by server: those of one answer to each prompt.
    """
    at_once, threads = arguments.max_batch, arguments.threads
    llama_cpp = [sys.executable, "-c", LLAMA_CPP, arguments.gguf, at_once, arguments.context, threads]
    commands = {
        OURS: serve_command(arguments.export, "--threads", threads, "--max-batch", at_once),
        THEIRS: [str(part) for part in llama_cpp],
    }
    questions = make_questions(arguments.prompts, arguments.seed, stream=True)
    with running(commands[OURS]) as ours, running(commands[THEIRS]) as theirs:
        servers = {OURS: ours, THEIRS: theirs}
        name = arguments.export.resolve().name
        # llama.cpp closes a persistent connection after some requests, and one that is sent just then would fail.
        askers = {
            label: Asker(url, name, max(arguments.clients), persistent=False) for label, (url, _) in servers.items()
        }
        tokens = {}
        for label, asker in askers.items():
            answers = [(await asker.ask(question))[0] for question in questions]
            tokens[label] = {key: sum(answer[key] for answer in answers) for key in ("prompt_tokens", "tokens")}
        stages: dict[tuple[int, str], list[Stage]] = {}
        for number in range(arguments.rounds):
            for clients in arguments.clients:
                for label, asker in askers.items():
                    process = psutil.Process(servers[label][1].pid)
                    stage = await run_stage(asker, questions, None, clients, arguments.seconds, process)
                    stages.setdefault((clients, label), []).append(stage)
                    print(
                        f"round {number + 1}, {counted(clients, 'client')}, {label}: {_throughput(stage):,.1f} tokens/s "
                        + ", ".join(sorted(set(stage.errors))),
                        file=sys.stderr,
                    )
        for asker in askers.values():
            await asker.http.aclose()
    return {"stages": stages, "tokens": tokens}


def _throughput(stage: Stage) -> float:
    return stage.tokens / stage.seconds


def _record(arguments: argparse.Namespace, measured: dict) -> dict:
    manifest = read_manifest(arguments.export)
    rows = [
        _together(stages).record(warm_up=0) | {"server": label, "rounds": [round(_throughput(s), 1) for s in stages]}
        for (_, label), stages in measured["stages"].items()
    ]
    ratios = {
        clients: statistics.median(
            _throughput(ours) / _throughput(theirs)
            for ours, theirs in zip(
                measured["stages"][clients, OURS], measured["stages"][clients, THEIRS], strict=True
            )
        )
        for clients in arguments.clients
    }  # fmt: skip
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", f"tools/{Path(__file__).name}", *sys.argv[1:]]),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "git_hash": git_hash(),
        "versions": versions() | llama_cpp_version(),
        "export": {
            "name": arguments.export.resolve().name, "locked": manifest.locked, "precision": manifest.precision,
        },
        "gguf": arguments.gguf.name,
        "threads": arguments.threads,
        "prompts": arguments.prompts,
        "tokens_of_one_answer_to_each_prompt": measured["tokens"],
        "throughput_over_llama_cpp": {str(clients): round(ratio, 3) for clients, ratio in ratios.items()},
        "rows": rows,
    }  # fmt: skip


def _together(stages: list[Stage]) -> Stage:
    """The stages of all rounds as one."""
    whole = Stage(stages[0].clients)
    for stage in stages:
        for name in ("seconds", "requests", "errors", "tokens", "latencies", "first_texts", "memory_bytes"):
            setattr(whole, name, getattr(whole, name) + getattr(stage, name))
    return whole


def markdown(record: dict) -> str:
    """The record as a table."""
    export, machine = record["export"], record["machine"]
    state = "locked" if export["locked"] else "original"
    lines = [
        f"`{export['name']}` ({state}, {export['precision']}) in `{OURS}` and `{record['gguf']}` in the server of {THEIRS} "
        f"(xllamacpp {record['versions']['xllamacpp']}), {counted(record['threads'], 'thread')} each; {machine['processor']}, "
        f"{machine['cores']} cores, which the clients share; commit {record['git_hash']}.",
        "",
        "| clients | server | tokens/s | first text p50, ms | p99, ms | answers | tokens per answer | memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        first = row["first_text_seconds"] or {"p50": float("nan"), "p99": float("nan")}
        answers = row["requests"]
        lines.append(
            f"| {row['clients']} | {row['server']} | {row['tokens_per_second']:,.1f} | {first['p50'] * 1e3:,.0f} | "
            f"{first['p99'] * 1e3:,.0f} | {answers:,} | {row['tokens_per_second'] * row['seconds'] / max(answers, 1):.1f} | "
            f"{max(row['memory_bytes']) / 1e6:,.0f} |"
        )
    lines += ["", f"Throughput of {OURS} over that of {THEIRS}, median of the rounds:", ""]
    lines += [
        f"* {counted(int(clients), 'client')}: {ratio:.2f}"
        for clients, ratio in record["throughput_over_llama_cpp"].items()
    ]
    tokens = record["tokens_of_one_answer_to_each_prompt"]
    sums = (f"{label} {sums['prompt_tokens']:,} and {sums['tokens']:,}" for label, sums in tokens.items())
    lines += ["", f"Tokens of {record['prompts']} prompts and of one answer to each: {'; '.join(sums)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
