"""Everything that only a GPU can show, in one command without network: tests, speed, races and memory.

    python tools/gpu_day.py --out gpu-day              # make gpu
    python tools/gpu_day.py --bundle gpu-bundle        # make gpu-bundle, on a machine with network

The parts, in the order of their importance, are in `parts`. Each runs in processes of its own and has a time limit. A part
whose packages or programs are missing is "not here", so a machine with PyTorch alone measures what PyTorch can. The run
ends after `--minutes`; run it again to get what was not reached, since finished parts are kept.

1. The compilation of the fused operator, which the others use, and the tests marked `gpu`.
2. Decode and prefill of a locked export with the fused operator, of its bodies, and of the original's export, side by side,
   for Qwen3-0.6B and layers of Qwen3-8B (gpu_speed.py).
3. The operator alone under compute-sanitizer's racecheck.
4. Speed of the lock's training (benchmark_lock.py).
5. Time and memory of the three ways to train through a lock (measure_asymmetry.py).

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
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # lockkit need not be installed

from lockkit.errors import LockkitError, UsageError  # noqa: E402
from lockkit.files import write_json  # noqa: E402
from lockkit.version import git_hash, versions  # noqa: E402

SCHEMA = "lockkit-gpu-day/2"
PART_BYTES = 60_000_000
COMMIT = "COMMIT"  # a file of the bundle, which has no .git
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
        figures: a file of JSON that the command writes; its name may be a pattern.
    """

    name: str
    seconds: float
    command: Sequence[object]
    needs: Sequence[str] = ()
    figures: Path | None = None


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
        case = [python, tools / "gpu_speed.py", shape, depth, precision, "--work", work / "models", "--out", out]
        name = f"speed {shape} depth {depth} {precision}"
        return Planned(name, 90, [*case, *(["--no-operator"] if reduced else [])], EXPORTING, out)

    def training(shape: str) -> Planned:
        out, small = work / f"training-{shape}", ["--depth", 4, "--tokens", 64, "--rounds", 1, "--warm-up", 0]
        case = [python, tools / "measure_asymmetry.py", "--shape", shape, "--out", out]
        case += small if reduced else ["--depth", 32, "--rounds", 3]
        return Planned(f"training {shape}", 45, case, TORCH, out / "asymmetry-*.json")

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
            name, 60 if exports else 30, [python, "-m", "pytest", "-q", "-m", "gpu", *chosen], (*needs, "pytest")
        )

    chain = [python, tools / "gpu_speed.py", "tiny", 5, "fp16", "--work", work / "models", "--chain"]
    racecheck = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", 1, *chain]
    first, *others = [speed(*case) for case in ([("tiny", 5, "fp16")] if reduced else SPEEDS)]
    operator = [python, "-c", "from lockkit.kernel import build_kernel; build_kernel()"]
    return [
        *([] if reduced else [Planned("operator", 60, operator, EXPORTING)]),
        tests(True),
        first,
        *others[:1],
        tests(False),
        lock(),
        *[training(shape) for shape in (["tiny"] if reduced else ["qwen3-0.6b", "qwen3-8b"])],
        Planned("races", 40, racecheck, EXPORTING),
        *others[1:],
        *([] if reduced else [lock("--compile")]),
    ]


def run_part(part: Planned, end: float) -> Part:
    """Run a part's command until its limit or `end` (`time.monotonic`), and read the figures that it wrote."""
    words = [str(word) for word in part.command]
    found = Part(part.name, "not reached", command=_without_paths(shlex.join(words)))
    missing = [name for name in part.needs if not _is_here(name)]
    if missing or shutil.which(words[0]) is None:
        found.state, found.last_lines = "not here", [f"missing: {', '.join(missing) or words[0]}"]
        return found
    limit = min(part.seconds, end - time.monotonic())
    if limit < min(part.seconds, 10):
        return found
    start = time.monotonic()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        start_new_session=True, env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        found.state = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started: they hold the GPU
        output, _ = process.communicate()
        found.state = "too slow"
    found.last_lines, found.seconds = _without_paths(output).splitlines()[-5:], round(time.monotonic() - start, 1)
    for path in part.figures.parent.glob(part.figures.name) if part.figures else ():
        found.figures = json.loads(path.read_text())
    return found


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
        for planned in parts(Path(folder), reduced):
            part = done.get(planned.name) or run_part(planned, end)
            found.append(part)
            print(f"{part.name}: {part.state}, {part.seconds} s", flush=True)
            record["parts"] = [asdict(part) for part in found]
            write_json(out / "gpu-day.json", record)
            (out / "gpu-day.md").write_text(markdown(record), encoding="utf-8")
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


def markdown(record: dict[str, Any]) -> str:
    """The results as Markdown: the state of each part, then the figures of the finished ones."""
    found = record["parts"]
    lines = [f"# {record['machine']}", "", f"Commit {record['git_hash']}.", ""]
    lines += _table(("part", "state", "seconds", ""), ((p["name"], p["state"], p["seconds"], _why(p)) for p in found))
    by_kind = {kind: [p["figures"] for p in found if p["name"].startswith(kind) and p["figures"]] for kind in
               ("speed", "lock", "training")}  # fmt: skip
    speeds = [row for figures in by_kind["speed"] for row in figures["rows"]]
    if speeds:
        lines += [
            "",
            "Exports. `decode` and `prefill`: speed over that of the original's export; above 1, the locked one is",
        ]
        lines += [
            "faster. With 4 layers, the ratio is that of layers alone; that of the whole model is closer to 1.",
            "",
        ]
        lines += _table(tuple(speeds[0]), (row.values() for row in speeds))
    rows = [row for figures in by_kind["lock"] for row in figures["rows"]]
    if rows:
        lines += ["", "Speed of a lock's training, over that of a plain loop over layers:", ""]
        names = ("way", "speed_over_plain", "layer_tokens_per_second", "share_of_peak")
        lines += _table(names, ((_short(row[name]) for name in names) for row in rows))
    rows = [row for figures in by_kind["training"] for row in figures["rows"]]
    if rows:
        lines += ["", "Training through a lock, over the original under plain autograd:", ""]
        ratios = ("forward_seconds", "training_seconds", "saved_bytes", "peak_bytes")
        names = ("shape", "subject", "depth", "saver")
        lines += _table(
            (*names, *ratios),
            ([row[name] for name in names] + [_short(row["ratios"].get(name, "")) for name in ratios] for row in rows),
        )
    return "\n".join(lines) + "\n"


def _why(part: dict[str, Any]) -> str:
    """The last line of a part that is not done."""
    return part["last_lines"][-1].replace("|", "/") if part["state"] != "done" and part["last_lines"] else ""


def _table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    names = list(names)
    return [
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def _short(value: object) -> object:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else value
        if isinstance(value, str)
        else f"{value:,.0f}"
    )


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
