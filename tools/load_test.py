"""Load test of `lockkit serve`: throughput, latency, memory, and correctness of every answer.

    lockkit lock demo locked && lockkit export locked locked-onnx
    python tools/load_test.py locked-onnx --out tools/results/serve-load-cpu.json

1. Start the server and send each prompt once, one after the other, to get the reference answers. Half
   of the prompts are streamed.
2. Run three stages: 1 client and 16 clients for `--seconds` each, 64 clients for `--long-seconds`. Every
   client sends one random prompt after the other, with greedy decoding. It compares the text, the finish reason and
   the token count with the reference. Clients run in this process, on the same cores as the server.
3. Sample the server's resident memory every second. In the last stage, the growth after the first `--warm-up` seconds
   is computed.

The exit code is 1 if an answer was wrong, an error occurred, memory grew by more than 5 %, or 16
clients had less than twice the throughput of one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx2
import psutil

from lockkit.export.manifest import read_manifest
from lockkit.files import write_json
from lockkit.version import git_hash, versions

SCHEMA = "lockkit-serve-load/1"


@dataclass(frozen=True)
class Question:
    """One request."""

    prompt: str
    max_tokens: int
    stream: bool


@dataclass
class Stage:
    """Measurements with one number of clients."""

    clients: int
    seconds: float = 0.0
    requests: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: int = 0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    first_texts: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)

    def record(self, warm_up: int) -> dict:
        """The figures of the stage as JSON values.

        Args:
            warm_up: number of samples of memory, one per second, before its growth is measured.
        """
        later = self.memory_bytes[warm_up:]
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "requests": self.requests,
            "errors": len(self.errors),
            "error_kinds": sorted(set(self.errors)),
            "wrong_answers": self.wrong,
            "requests_per_second": round(self.requests / self.seconds, 2),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "latency_seconds": _percentiles(self.latencies),
            "first_text_seconds": _percentiles(self.first_texts),
            "memory_bytes": self.memory_bytes,
            "memory_growth_after_warm_up": round(max(later) / later[0] - 1, 4) if later else None,
        }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {
        "p50": round(cuts[49], 4),
        "p90": round(cuts[89], 4),
        "p99": round(cuts[98], 4),
        "max": round(max(values), 4),
    }


def make_questions(count: int, seed: int, stream: bool = False) -> list[Question]:
    """Prompts of 1 to 12 lines: beginnings of functions of the standard library. 8 to 64 tokens are generated.

    Args:
        stream: stream every answer, not only those of every second question.
    """
    source, chance = inspect.getsource(textwrap) + inspect.getsource(argparse), random.Random(seed)
    starts = [match.start() for match in re.finditer(r"^ *def ", source, re.M)]
    questions = []
    for number, start in enumerate(chance.sample(starts, count)):
        lines = source[start:].splitlines(keepends=True)[: chance.randint(1, 12)]
        questions.append(Question("".join(lines), chance.randint(8, 64), stream=stream or number % 2 == 1))
    return questions


class Asker:
    """Sends requests over persistent connections, or each over a connection of its own."""

    def __init__(self, url: str, model: str, connections: int, persistent: bool = True):
        kept = connections if persistent else 0
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=kept)
        self.http = httpx2.AsyncClient(base_url=url, timeout=120, limits=limits)
        self.model = model

    async def ask(self, question: Question) -> tuple[dict, float | None]:
        """Send one request.

        Returns:
            The answer (text, finish reason, tokens, tokens of the prompt); for a streamed answer also the seconds until
            its first text.

        Raises:
            RuntimeError: the stream ended early.
        """
        body = {
            "model": self.model, "prompt": question.prompt, "max_tokens": question.max_tokens, "temperature": 0,
            "stream": question.stream,
        }  # fmt: skip
        if not question.stream:
            response = await self.http.post("/v1/completions", json=body)
            response.raise_for_status()
            answer = response.json()
            choice = answer["choices"][0]
            return _answer(choice["text"], choice["finish_reason"], answer["usage"]), None
        body["stream_options"] = {"include_usage": True}
        started, first, text, reason, usage, done = time.perf_counter(), None, "", None, {}, False
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    for choice in chunk["choices"]:
                        first = first or time.perf_counter() - started
                        text, reason = text + choice["text"], choice["finish_reason"] or reason
                    usage = chunk.get("usage") or usage
        if not done:
            raise RuntimeError("the stream ended early")
        return _answer(text, reason, usage), first


def _answer(text: str, reason: str | None, usage: dict) -> dict:
    counts = {"tokens": usage.get("completion_tokens"), "prompt_tokens": usage.get("prompt_tokens")}
    return {"text": text, "reason": reason, **counts}


async def run_stage(
    asker: Asker,
    questions: list[Question],
    expected: list[dict] | None,
    clients: int,
    seconds: float,
    server: psutil.Process,
) -> Stage:
    """Run one stage and compare every answer with `expected`, the reference answers in the order of `questions`.

    Without `expected`, no answer counts as wrong.
    """
    stage, started = Stage(clients), time.perf_counter()

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.perf_counter() - started < seconds:
            index, begun = chance.randrange(len(questions)), time.perf_counter()
            try:
                answer, first = await asker.ask(questions[index])
            except Exception as error:
                stage.errors.append(type(error).__name__)
                continue
            stage.latencies.append(time.perf_counter() - begun)
            stage.first_texts += [first] if first else []
            stage.requests += 1
            stage.tokens += answer["tokens"]
            stage.wrong += expected is not None and answer != expected[index]

    async def watch_memory() -> None:
        while True:
            stage.memory_bytes.append(server.memory_info().rss)
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch_memory())
    await asyncio.gather(*(client(number) for number in range(clients)))
    watcher.cancel()
    stage.seconds = time.perf_counter() - started
    return stage


async def measure(arguments: argparse.Namespace, url: str, server: psutil.Process) -> list[dict]:
    """Get the reference answers and run all stages; return their records."""
    asker = Asker(url, arguments.export.resolve().name, connections=64)
    questions = make_questions(arguments.prompts, arguments.seed)
    expected = [(await asker.ask(question))[0] for question in questions]
    stages = []
    for clients, seconds in ((1, arguments.seconds), (16, arguments.seconds), (64, arguments.long_seconds)):
        stage = (await run_stage(asker, questions, expected, clients, seconds, server)).record(arguments.warm_up)
        latency = stage["latency_seconds"]
        print(
            f"{clients:>3} clients: {stage['tokens_per_second']:>8,.0f} tokens/s, {stage['requests_per_second']:.1f} "
            f"requests/s, p50 {latency['p50']:.3f} s, p99 {latency['p99']:.3f} s, {stage['errors']} errors, "
            f"{stage['wrong_answers']} wrong of {stage['requests']}, memory "
            f"{stage['memory_bytes'][-1] / 1e6:.0f} MB ({stage['memory_growth_after_warm_up'] or 0:+.1%} after warm-up)",
            flush=True,
        )
        stages.append(stage)
    await asker.http.aclose()
    return stages


def serve_command(export: Path, *options: object) -> list[str]:
    """The command of `lockkit serve` on a free port."""
    return [sys.executable, "-m", "lockkit", "serve", str(export), "--port", "0", *map(str, options)]


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run a server, which ends with the block: its address, of which it writes ADDRESS/v1 to standard error, and itself."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        written = ""
        while not (url := re.search(r"http://\S+(?=/v1)", written)):  # warnings may come before the address
            if not (line := process.stderr.readline()):
                sys.exit(written)
            written += line
        yield url[0], process
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Start the server, run the three stages, and exit with 1 if a condition at the top of this file is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=20, help="duration of the stages with 1 and with 16 clients")
    parser.add_argument("--long-seconds", type=float, default=120, help="duration of the stage with 64 clients")
    parser.add_argument("--warm-up", type=int, default=20, help="seconds of the last stage in which memory may grow")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve-options", default="", help="further options of `lockkit serve`")
    arguments = parser.parse_args()
    command = serve_command(arguments.export, *shlex.split(arguments.serve_options))
    with running(command) as (url, process):
        stages = asyncio.run(measure(arguments, url, psutil.Process(process.pid)))
    speedup = stages[1]["tokens_per_second"] / stages[0]["tokens_per_second"]
    growth = stages[2]["memory_growth_after_warm_up"]
    passed = (
        not any(stage["errors"] or stage["wrong_answers"] for stage in stages)
        and speedup >= 2 and growth is not None and growth <= 0.05 and process.returncode == 0
    )  # fmt: skip
    print(f"16 clients over 1: {speedup:.2f}x; {'passed' if passed else 'FAILED'}")
    if arguments.out:
        manifest = read_manifest(arguments.export)
        write_json(
            arguments.out,
            {
                "schema": SCHEMA,
                "command": shlex.join(["python", f"tools/{Path(__file__).name}", *sys.argv[1:]]),
                "machine": {"device": platform.machine(), "cores": os.cpu_count()},
                "git_hash": git_hash(),
                "versions": versions(),
                "export": {"model_type": manifest.model_type, "depth": manifest.depth, "precision": manifest.precision},
                "questions": [asdict(question) | {"prompt": len(question.prompt)} for question in
                              make_questions(arguments.prompts, arguments.seed)],
                "throughput_16_over_1": round(speedup, 3),
                "stages": stages,
                "passed": passed,
            },
        )  # fmt: skip
    sys.exit(not passed)


if __name__ == "__main__":
    main()
