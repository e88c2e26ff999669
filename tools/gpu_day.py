"""Everything that only a GPU can show, in one command without network: tests, speed, races and memory.

    python tools/gpu_day.py --out gpu-day              # make gpu
    python tools/gpu_day.py --bundle gpu-bundle        # make gpu-bundle, on a machine with network

The parts, in the order of their importance, are in `parts`. Each runs in processes of its own and has a time limit. A part
whose packages or programs are missing is "not here", so a machine with PyTorch alone measures what PyTorch can. The run
ends after `--minutes`; run it again to get what was not reached, since finished parts are kept.

1. The compilation of the fused operator, which the others use, and the tests marked `gpu`.
2. Decode and prefill of a locked export with the fused operator, of its bodies, and of the original's export, side by side,
   for Qwen3-0.6B and layers of Qwen3-8B (gpu_speed.py).
3. Speed of the lock's training (benchmark_lock.py).
4. Time and memory of the three ways to train through a lock (measure_asymmetry.py).
5. The operator alone under compute-sanitizer's racecheck.
6. The operator's kernels for many plans, beside the times that it chooses its plans by (gpu_plans.py).

The exports of the comparisons are made in other processes while the parts before them run (`Preparation`).

It writes `gpu-day.json` (schema lockkit-gpu-day/2) and `gpu-day.md`, tables with the machine's name. The bundle is the
committed repository and the packages that it needs, in one archive, cut into parts of at most 60 MB:

    cat part-* | tar x && pip install --no-index --no-deps wheels/*.whl && make gpu
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # lockkit need not be installed

from gpu_tables import markdown  # noqa: E402

from lockkit.errors import LockkitError, UsageError  # noqa: E402
from lockkit.files import write_json  # noqa: E402
from lockkit.version import git_hash, versions  # noqa: E402

SCHEMA = "lockkit-gpu-day/2"
PART_BYTES = 60_000_000
COMMIT = "COMMIT"  # a file of the bundle, which has no .git
PROCESSES = max(1, min(2, (os.cpu_count() or 1) // 4))  # that make exports at the same time; more would disturb times
LINES = 12  # of a part's output that are kept
AHEAD = 8  # exports that are made and not measured: each has 1 to 2 GB
TORCH = ("torch", "transformers", "accelerate", "safetensors", "pydantic", "psutil")
EXPORTING = (*TORCH, "onnx", "onnx_ir", "onnxruntime-gpu", "onnxruntime_genai")
# Shape, depth and precision, the most important first.
SPEEDS = [("0.6B", 32, "bf16"), ("8B", 32, "bf16"), ("0.6B", 32, "int4"), ("0.6B", 16, "bf16"), ("0.6B", 64, "bf16")]
SPEEDS += [
    case for case in itertools.product(("0.6B", "8B"), (32, 16, 64), ("fp16", "int4", "bf16")) if case not in SPEEDS
]


@dataclass(frozen=True)
class Planned:
    """A part of the run: its command, for at most `seconds`.

    Attributes:
        needs: Python modules, and packages with a hyphen in their names, without which the part is "not here".
        figures: a file of JSON, or of lines of JSON, that the command writes; its name may be a pattern.
        programs: without which the part is "not here", besides that of the command.
        prepare: a command for what the part's own command does first, which may run while other parts run.
    """

    name: str
    seconds: float
    command: Sequence[object]
    needs: Sequence[str] = ()
    figures: Path | None = None
    programs: Sequence[str] = ()
    prepare: Sequence[object] = ()

    def missing(self) -> list[str]:
        """The packages and programs that it needs and that are not here."""
        programs = [str(self.command[0]), *self.programs]
        return [name for name in self.needs if not _is_here(name)] + [p for p in programs if shutil.which(p) is None]


@dataclass
class Part:
    """What a part gave. `state`: done, failed, too slow, not here or not reached."""

    name: str
    state: str
    seconds: float = 0.0
    command: str = ""
    last_lines: list[str] = field(default_factory=list)
    figures: Any = None


def parts(work: Path, reduced: bool) -> list[Planned]:
    """All parts, the most important first. `work` is for exports and figures; `reduced` has tiny sizes."""
    python, tools = sys.executable, ROOT / "tools"

    def speed(shape: str, depth: int, precision: str) -> Planned:
        out = work / f"speed-{shape}-{depth}-{precision}.json"
        case = [python, tools / "gpu_speed.py", shape, depth, precision, "--work", work / "models"]
        command = [*case, "--out", out, *(["--no-operator"] if reduced else [])]
        name = f"speed {shape} depth {depth} {precision}"
        return Planned(name, 90, command, EXPORTING, out, prepare=[*case, "--prepare"])

    def training(shape: str) -> Planned:
        out, small = work / f"training-{shape}", ["--depth", 4, "--tokens", 64, "--rounds", 1, "--warm-up", 0]
        case = [python, tools / "measure_asymmetry.py", "--shape", shape, "--out", out]
        case += small if reduced else ["--depth", 32, "--rounds", 3]
        return Planned(f"training {shape}", 40, case, TORCH, out / "asymmetry-*.json")

    def lock(*more: object) -> Planned:
        out, small = work / f"lock{len(more)}.json", ["--shape", "demo", "--depth", 2, "--tokens", 32, "--rounds", 2]
        case = [python, tools / "benchmark_lock.py", "--out", out, *more]
        case += small if reduced else ["--shape", "qwen3-0.6b", "--rounds", 5]
        return Planned("lock, compiled" if more else "lock", 120 if more else 40, case, ("torch", "numpy"), out)

    def tests(exports: bool) -> Planned:
        files = {path: path.read_text("utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))}
        chosen = [path for path, text in files.items() if "mark.gpu" in text and ("export" in text) == exports]
        name, needs = ("tests", EXPORTING) if exports else ("tests of PyTorch", TORCH)
        return Planned(
            name, 90 if exports else 30, [python, "-m", "pytest", "-q", "-m", "gpu", *chosen], (*needs, "pytest")
        )

    chain = [python, tools / "gpu_speed.py", "tiny", 5, "fp16", "--work", work / "models", "--chain"]
    racecheck = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", 1, *chain]
    first, *others = [speed(*case) for case in ([("tiny", 5, "fp16")] if reduced else SPEEDS)]
    operator = [python, "-c", "from lockkit.kernel import build_kernel; build_kernel()"]
    # As lockkit.kernel.build, which cannot be imported without pydantic.
    compiler = [os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
    plans = work / "plans.jsonl"
    return [
        *([] if reduced else [Planned("operator", 45, operator, EXPORTING, programs=compiler)]),
        tests(True),
        first,
        *others[:1],
        tests(False),
        lock(),
        *[training(shape) for shape in (["tiny"] if reduced else ["qwen3-0.6b", "qwen3-8b"])],
        Planned("races", 40, racecheck, EXPORTING),
        Planned("plans", 40, [python, tools / "gpu_plans.py", "--out", plans], ("pydantic",), plans, compiler),
        *others[1:],
        *([] if reduced else [lock("--compile")]),
    ]


def run_part(part: Planned, end: float) -> Part:
    """Run a part's command until its limit or `end` (`time.monotonic`), and read the figures that it wrote."""
    words = [str(word) for word in part.command]
    found = Part(part.name, "not reached", command=_without_paths(shlex.join(words)))
    if missing := part.missing():
        found.state, found.last_lines = "not here", [f"missing: {', '.join(missing)}"]
        return found
    limit = min(part.seconds, end - time.monotonic())
    if limit < min(part.seconds, 10):
        return found
    start = time.monotonic()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        start_new_session=True, env=_environment(),
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        found.state = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started: they hold the GPU
        output, _ = process.communicate()
        found.state = "too slow"
    found.last_lines, found.seconds = _without_paths(output).splitlines()[-LINES:], round(time.monotonic() - start, 1)
    for path in part.figures.parent.glob(part.figures.name) if part.figures else ():
        found.figures = _figures(path)
    return found


def _environment() -> dict[str, str]:
    """The environment of a part's processes: this lockkit, and no network."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def _figures(path: Path) -> Any:
    """The figures in a file. Of lines, the last one may be incomplete."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return json.loads(text)
    return {"rows": [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]}


class Preparation:
    """Runs the `prepare` commands of parts in the background, a few at a time, in the order of the parts.

    A part that comes before its preparation has begun does that work itself. If it has begun, the part's command waits for
    it (`gpu_speed.py`).
    """

    def __init__(self, planned: Iterable[Planned]):
        self._room, self._lock, self._ended = threading.Semaphore(AHEAD), threading.Lock(), False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pool = ThreadPoolExecutor(PROCESSES)
        self._begun: dict[str, Future[None]] = {}
        for part in planned:
            if part.prepare and not part.missing():
                self._begun[part.name] = self._pool.submit(self._run, part.prepare)

    def _run(self, command: Sequence[object]) -> None:
        self._room.acquire()
        with self._lock:
            if self._ended:
                return
            process = subprocess.Popen(
                [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
                start_new_session=True, env=_environment() | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            self._processes.append(process)
        process.wait()  # if it fails, so does the part, which says why

    def begin(self, part: Planned) -> None:
        """The part begins, so do not prepare it any more."""
        if part.name in self._begun and not self._begun[part.name].cancel():
            self._room.release()

    def end(self) -> None:
        """End all processes."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        self._room.release(PROCESSES)  # for those that wait for it
        self._pool.shutdown(cancel_futures=True)


def _is_here(name: str) -> bool:
    """Whether a module or a package is installed."""
    if "-" not in name:
        return importlib.util.find_spec(name) is not None
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _without_paths(text: str) -> str:
    """A text without this machine's folders."""
    return text.replace(sys.executable, "python").replace(f"{ROOT}/", "")


def run_day(out: Path, minutes: float, reduced: bool) -> int:
    """Run all parts that are not finished yet; write the results after each. Returns 1 if a part failed.

    Raises:
        UsageError: there is no GPU.
    """
    machine, end, out = gpu_name(), time.monotonic() + 60 * minutes, out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = {"schema": SCHEMA, "machine": machine, "git_hash": commit(), "versions": versions()}
    done = _finished(out / "gpu-day.json", record)
    found: list[Part] = []
    with tempfile.TemporaryDirectory(dir=out, prefix="work-") as folder:
        every = parts(Path(folder), reduced)
        preparation = Preparation(planned for planned in every if planned.name not in done)
        try:
            for planned in every:
                preparation.begin(planned)
                part = done.get(planned.name) or run_part(planned, end)
                found.append(part)
                print(f"{part.name}: {part.state}, {part.seconds} s", flush=True)
                record["parts"] = [asdict(part) for part in found]
                write_json(out / "gpu-day.json", record)
                (out / "gpu-day.md").write_text(markdown(record), encoding="utf-8")
        finally:
            preparation.end()
    print(markdown(record))
    return int(any(part.state == "failed" for part in found))


def _finished(path: Path, record: dict[str, Any]) -> dict[str, Part]:
    """The finished parts of an earlier run, by name, if it was on the same machine with the same commit and libraries."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    if any(before.get(key) != value for key, value in record.items()):
        return {}
    return {part["name"]: Part(**part) for part in before["parts"] if part["state"] == "done"}


def gpu_name() -> str:
    """The name of the first GPU, from the CUDA driver, without any package.

    Raises:
        UsageError: there is no driver, or no GPU.
    """
    name, device = ctypes.create_string_buffer(256), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = (
            driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, 256, device)
        )
    except OSError:
        failed = "there is no libcuda.so.1"
    if failed:
        raise UsageError(f"this machine has no usable NVIDIA GPU ({failed}): run on one")
    return name.value.decode(errors="replace")


def commit() -> str | None:
    """The commit: of the checkout, or of the bundle."""
    packed = ROOT / COMMIT
    return git_hash() or (packed.read_text().strip() if packed.is_file() else None)


def bundle(out: Path, wheels: bool, without: Sequence[str]) -> None:
    """Pack the committed repository, its commit and packages into parts of one archive.

    Args:
        out: folder of the parts; those of an earlier bundle are removed.
        wheels: with packages, for this version of Python on this kind of machine.
        without: packages that the machine has already. The others are then those of constraints.txt, without what the
            left-out ones need.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("part-*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        archive, packages, note = Path(folder) / "bundle.tar", Path(folder) / "wheels", Path(folder) / COMMIT
        note.write_text(f"{git_hash()}\n")
        subprocess.run(["git", "archive", "--output", archive, "HEAD"], cwd=ROOT, check=True)
        if wheels:
            _download(packages, without)
        with tarfile.open(archive, "a") as tar:
            tar.add(note, COMMIT)
            if wheels:
                tar.add(packages, "wheels")
        with archive.open("rb") as source:
            for number in itertools.count():
                part = source.read(PART_BYTES)
                if not part:
                    break
                (out / f"part-{number:03d}").write_bytes(part)
    found = sorted(out.glob("part-*"))
    print(f"{len(found)} parts, {sum(part.stat().st_size for part in found) / 1e6:,.0f} MB, in {out}")


def _download(packages: Path, without: Sequence[str]) -> None:
    """Fetch wheels with pip."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", packages]
    constraints = ROOT / "constraints.txt"
    if not without:
        subprocess.run([*pip, "-c", constraints, f"{ROOT}[test]", "setuptools"], check=True)
        return
    lines = [line for line in constraints.read_text().splitlines() if "==" in line and not line.startswith("#")]
    names = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    if unknown := {name.lower().replace("_", "-") for name in without} - names:
        raise UsageError(f"constraints.txt has no {', '.join(sorted(unknown))}: change --without")
    wanted = [line for line in lines if line.partition("==")[0].lower().replace("_", "-") not in
              {name.lower().replace("_", "-") for name in without}]  # fmt: skip
    subprocess.run([*pip, "--no-deps", *wanted, "setuptools"], check=True)


def main() -> int:
    """Read the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu-day", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--reduced", action="store_true", help="tiny sizes, without the fused operator and --compile")
    parser.add_argument("--bundle", type=Path, help="write the bundle into this folder, and nothing else")
    parser.add_argument("--no-wheels", dest="wheels", action="store_false", help="a bundle without packages")
    parser.add_argument(
        "--without", default="", help="packages to leave out of the bundle, such as torch,onnxruntime-gpu"
    )
    arguments = parser.parse_args()
    try:
        if arguments.bundle:
            bundle(arguments.bundle, arguments.wheels, [name for name in arguments.without.split(",") if name])
            return 0
        return run_day(arguments.out, arguments.minutes, arguments.reduced)
    except LockkitError as error:
        print(f"gpu_day: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
