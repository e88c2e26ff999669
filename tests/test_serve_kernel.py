"""`lockkit serve` with the fused operator: used if the export has it; a warning if it cannot be used."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("fastapi")

from serving import running_server
from test_export import exports, models  # noqa: F401 (fixtures)
from test_kernel import kernel  # noqa: F401 (fixture)

from lockkit.kernel import has_kernel, install_kernel
from lockkit.serve.batch import open_rows
from lockkit.serve.model import open_served_model

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")


@pytest.fixture
def installed(kernel, exports, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    folder = shutil.copytree(exports("qwen3", True), tmp_path / "export")
    assert not has_kernel(folder)
    install_kernel(folder)
    assert has_kernel(folder)
    return folder


def answer(server) -> str:
    settings = {"model": "export", "prompt": "def read_json(path):", "max_tokens": 20, "temperature": 0}
    return server.client().completions.create(**settings).choices[0].text


def test_an_export_with_the_kernel_is_served_with_it(installed, exports):  # noqa: F811
    with running_server(installed) as server:
        assert server.get("/health").json() == {"status": "ok", "fused_kernel": True}
        assert server.metric("lockkit_fused_kernel") == 1
        fused = answer(server)
    with running_server(exports("qwen3", True), "--name", "export") as server:
        assert server.get("/health").json() == {"status": "ok", "fused_kernel": False}
        assert server.metric("lockkit_fused_kernel") == 0
        assert answer(server) == fused


@pytest.mark.parametrize("trouble", ["not compiled here", "does not load"])
def test_without_its_kernel_it_is_served_with_a_warning(trouble, installed, tmp_path, monkeypatch, caplog):
    from lockkit.kernel import find_kernel

    library = find_kernel()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if trouble == "does not load":
        (tmp_path / "cache" / "lockkit").mkdir(parents=True)
        (tmp_path / "cache" / "lockkit" / library.name).write_bytes(b"no library")
    rows = open_rows(open_served_model(installed), 2, 64, "cpu", 1)
    assert not rows.fused
    (record,) = caplog.records
    assert f"run lockkit kernel {installed}" in record.getMessage() and "\n" not in record.getMessage()
    rows.prefill([1, 2, 3], 0)
