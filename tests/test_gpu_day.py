"""`make gpu` without a GPU: every part's command at a tiny size, what is missing, limits, the table, and the bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from fake_cuda import steps
from fake_cuda.fixtures import fake_gpu, fake_libraries  # noqa: F401
from test_tools import TOOLS, run_tool  # noqa: F401

sys.path.insert(0, str(TOOLS))
import gpu_day


def record_of(parts: list[gpu_day.Part]) -> dict:
    fields = [{**vars(part)} for part in parts]
    return {"machine": "Fake GPU", "git_hash": "abc", "parts": fields}


def test_every_command_is_one_that_its_tool_understands(fake_gpu, run_tool, tmp_path):  # noqa: F811
    """The tools that need PyTorch alone run here, on the CPU; that for exports on the fake GPU."""
    parts, found = gpu_day.parts(tmp_path, reduced=True), []
    assert [part.name for part in parts] == [
        "tests",
        "speed tiny depth 5 fp16",
        "tests of PyTorch",
        "lock",
        "training tiny",
        "races",
        "plans",
    ]
    for part in (parts[1], *parts[3:5], parts[6]):
        _, tool, *arguments = part.command
        if part.name.startswith(("speed", "plans")):
            fake_gpu.run(steps.tool, tool, arguments, fake_gpu.folder)
        else:
            assert run_tool(Path(tool).stem, *arguments)[0] == 0
        (path,) = part.figures.parent.glob(part.figures.name)
        found.append(gpu_day.Part(part.name, "done", 1.0, figures=gpu_day._figures(path)))
    table = gpu_day.markdown(record_of(found))
    assert table.startswith("# Fake GPU\n")
    speeds = found[0].figures["rows"]
    assert [(row["way"], row["batch"], row["graphs"]) for row in speeds] == [("body", 1, True), ("body", 2, True)]
    for row in speeds:
        assert row["decode"] > 0 and f"| {row['decode']} | {row['prefill']} |" in table
    plans = found[-1].figures["rows"]
    chosen, *more = (row for row in plans if row["chosen"])
    sizes = " | ".join(str(chosen[name]) for name in ("hidden", "depth", "bits", "tokens"))
    plan = f"{chosen['mode']}, team {chosen['team']}, {chosen['rows']} rows"
    assert f"| {sizes} | {plan} | {chosen['expected_us']} | {chosen['measured_us']} | " in table
    assert len(plans) > len(more) > 10  # of many sizes, and more plans than those that are chosen
    assert "| plain loop | 1 |" in table and "| tiny | mlp | 4 | reversal |" in table


def test_the_commands_of_the_day_have_the_options_of_the_test(tmp_path):
    """A wrong option in a part that only a GPU reaches would be found too late."""
    tiny, full = (gpu_day.parts(tmp_path, reduced) for reduced in (True, False))
    known = {str(word) for part in tiny for word in (*part.command, *part.prepare) if str(word).startswith("-")}
    more = {str(word) for part in full for word in (*part.command, *part.prepare) if str(word).startswith("-")}
    assert more - known <= {"--compile", "-c"}
    assert len({part.name for part in full}) == len(full) == 18 + 9
    every = [part.name for part in full]
    assert every[:4] == ["operator", "tests", "speed 0.6B depth 32 bf16", "speed 8B depth 32 bf16"]
    assert sum(part.seconds for part in full[:9]) < 8.5 * 60  # those before the other speeds
    tests = {part.name: {Path(word).name for word in map(str, part.command)} for part in full if "tests" in part.name}
    assert {"test_gpu.py", "test_bench.py"} <= tests["tests"] and "test_devices.py" in tests["tests of PyTorch"]


def test_a_part_ends_at_its_limit_and_what_is_missing_is_said(tmp_path):
    def run(name: str, code: str, seconds: float = 20, left: float = 60, **more: object) -> gpu_day.Part:
        planned = gpu_day.Planned(name, seconds, [sys.executable, "-c", code], **more)
        return gpu_day.run_part(planned, time.monotonic() + left)

    out = tmp_path / "figures.json"
    good = run("good", f"print('yes'); open({str(out)!r}, 'w').write('[1]')", figures=tmp_path / "fig*.json")
    assert (good.state, good.figures, good.last_lines) == ("done", [1], ["yes"])
    assert run("bad", "import lockkit; 1 / 0").last_lines[-1] == "ZeroDivisionError: division by zero"
    # Its child would hold the output, and a GPU, for a minute.
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    slow = run("slow", child, seconds=1)
    assert slow.state == "too slow" and slow.seconds < 30
    missing = run("missing", "", needs=("os", "no_such_module", "pytest-xdist", "no-such-package"))
    assert (missing.state, missing.last_lines) == ("not here", ["missing: no_such_module, no-such-package"])
    assert "| missing | not here | 0.0 | missing: no_such_module, no-such-package |" in gpu_day.markdown(
        record_of([missing])
    )
    assert run("late", "", left=1).state == "not reached"
    planned = gpu_day.Planned("no program", 9, ["no-such-program"])
    assert gpu_day.run_part(planned, time.monotonic() + 60).last_lines == ["missing: no-such-program"]


def test_figures_of_a_part_that_was_ended_are_kept(monkeypatch, tmp_path):
    out = tmp_path / "lines.jsonl"
    code = (
        f"import time; print('{{\"a\": 1}}\\n{{\"a', end='', file=open({str(out)!r}, 'w'), flush=True); time.sleep(60)"
    )
    planned = gpu_day.Planned("ended", 5, [sys.executable, "-c", code], figures=out)
    found = gpu_day.run_part(planned, time.monotonic() + 60)
    assert (found.state, found.figures) == ("too slow", {"rows": [{"a": 1}]})
    monkeypatch.setenv("CXX", "no-such-compiler")
    (plans,) = (part for part in gpu_day.parts(tmp_path, reduced=False) if part.name == "plans")
    found = gpu_day.run_part(plans, time.monotonic() + 60)
    assert (found.state, found.last_lines) == ("not here", ["missing: no-such-compiler"])


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_exports_are_prepared_in_order_and_not_too_far_ahead(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_day, "PROCESSES", 1)
    monkeypatch.setattr(gpu_day, "AHEAD", 2)

    def planned(number: int, code: str = "") -> gpu_day.Planned:
        code = code or f"open({str(tmp_path / str(number))!r}, 'w')"
        return gpu_day.Planned(str(number), 9, [sys.executable], prepare=[sys.executable, "-c", code])

    def made() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    slow = planned(5, f"open({str(tmp_path / '5')!r}, 'w'); import time; time.sleep(60)")
    every = [*map(planned, range(5)), slow, gpu_day.Planned("without", 9, [sys.executable])]
    preparation = gpu_day.Preparation(every)
    try:
        wait_until(lambda: made() == ["0", "1"])
        time.sleep(0.5)
        assert made() == ["0", "1"]  # until one of them is used
        preparation.begin(every[6])
        preparation.begin(every[4])  # it does what is to be done itself
        preparation.begin(every[0])
        wait_until(lambda: made() == ["0", "1", "2"])
        preparation.begin(every[1])
        wait_until(lambda: made() == ["0", "1", "2", "3"])
        preparation.begin(every[2])
        wait_until(lambda: made() == ["0", "1", "2", "3", "5"])
    finally:
        before = time.monotonic()
        preparation.end()
    assert time.monotonic() - before < 20  # the slow one is ended


def test_processes_that_need_the_same_export_make_it_once(tmp_path):
    """Depths share the original. `lockkit export` refuses a folder that another process has made in the meantime."""
    tool, environment = TOOLS / "gpu_speed.py", os.environ | {"PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    command = ["fp16", "--work", str(tmp_path), "--prepare"]
    running = [
        subprocess.Popen([sys.executable, tool, "tiny", depth, *command], env=environment) for depth in ("4", "5", "5")
    ]
    assert [process.wait(300) for process in running] == [0, 0, 0]
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    models = {"tiny-original", "tiny-locked-4", "tiny-locked-5"}
    assert names == models | {f"{name}-fp16" for name in models}


def test_a_second_run_goes_on_where_the_first_ended(monkeypatch, tmp_path):
    runs = []

    def run_part(planned: gpu_day.Planned, end: float) -> gpu_day.Part:
        runs.append(planned.name)
        return gpu_day.Part(planned.name, "done" if len(runs) < 3 else "not reached")

    monkeypatch.setattr(gpu_day, "gpu_name", lambda: "Fake GPU")
    monkeypatch.setattr(gpu_day, "run_part", run_part)
    for _ in range(2):
        assert gpu_day.run_day(tmp_path / "day", 1, reduced=True) == 0
    names = [part.name for part in gpu_day.parts(tmp_path, reduced=True)]
    assert runs == [*names, *names[2:]]
    record = json.loads((tmp_path / "day" / "gpu-day.json").read_text())
    assert [part["state"] for part in record["parts"]] == ["done", "done", *["not reached"] * 5]
    assert sorted(path.name for path in (tmp_path / "day").iterdir()) == ["gpu-day.json", "gpu-day.md"]


def test_a_machine_without_a_gpu_is_refused_in_one_line(run_tool, tmp_path):  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, printed = run_tool("gpu_day", "--out", tmp_path / "day")
    assert code == 2 and not printed and not (tmp_path / "day").exists()


def test_the_bundle_is_the_repository_with_its_commit_in_parts(run_tool, tmp_path):  # noqa: F811
    code, printed = run_tool("gpu_day", "--bundle", tmp_path / "bundle", "--no-wheels")
    assert code == 0 and printed.startswith("1 parts")
    with tarfile.open(tmp_path / "bundle" / "part-000") as archive:
        assert {"Makefile", "COMMIT", "tools/gpu_day.py"} <= set(archive.getnames())
        assert archive.extractfile("COMMIT").read().decode().strip() == str(gpu_day.git_hash())
    code, _ = run_tool("gpu_day", "--bundle", tmp_path / "other", "--without", "torch,no-such-package")
    assert code == 2 and not list((tmp_path / "other").iterdir())
