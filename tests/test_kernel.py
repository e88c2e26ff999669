"""The fused operator against the same graph without it: every family, few and many tokens, fp32 and fp16.

test_kernel_nbits.py tests int8 and int4.
"""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from test_export import exports, models, save_random_lock, sizes, token_by_token, token_ids  # noqa: F401 (fixtures)

from lockkit.errors import UsageError
from lockkit.export import ExportConfig, ExportSession, check_manifest, export_model
from lockkit.kernel import build_kernel, find_kernel, install_kernel
from lockkit.models.families import FAMILIES

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
LENGTH = 300  # more than one tile of tokens


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert find_kernel() is None
        path = build_kernel()
        assert find_kernel() == path
    return path


def operators(session: ExportSession) -> set[str]:
    from lockkit.export.loading import placement

    return {operator for _, operator in placement(session._session)}


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Compare logits at nine tokens in ten: random networks amplify rounding errors at the rest."""
    errors = np.abs(got - want).max(-1) / np.abs(want).max()
    print(f"largest difference over largest logit: median {np.median(errors):.1e}, worst {errors.max():.1e}")
    assert np.quantile(errors, 0.9) < tolerance and errors.max() < 100 * tolerance


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_of_every_family_are_those_without_the_kernel(model_type, kernel, exports):  # noqa: F811
    folder, ids = exports(model_type, True), token_ids(2, 40)
    plain, fused = ExportSession(folder), ExportSession(folder, kernel=kernel)
    assert "DLRChain" in operators(fused) and "DLRChain" not in operators(plain)
    want = plain.forward(ids)[0]
    assert_close(fused.forward(ids)[0], want, 1e-5)
    assert_close(token_by_token(fused, ids, 13), want, 1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_do_not_depend_on_length_rows_or_threads(rows, threads, kernel, tmp_path_factory):
    # Hidden size and ranks are not multiples of the vector size; there are more threads than cores.
    folder = tmp_path_factory.mktemp("odd")
    save_random_lock("llama", folder / "model", hidden_size=200, head_dim=16, max_position_embeddings=512)
    export_model(str(folder / "model"), folder / "onnx")
    ids = token_ids(rows, LENGTH)
    plain, fused = (ExportSession(folder / "onnx", threads=threads, kernel=library) for library in (None, kernel))
    want, _ = plain.forward(ids)
    for length in (1, 2, 7, 9, 130, LENGTH):
        assert_close(fused.forward(ids[:, :length])[0], want[:, :length], 1e-5)
    assert_close(token_by_token(fused, ids, LENGTH - 20), want, 1e-5)


def test_fp16_keeps_its_weights_in_fp16_and_sums_in_fp32(kernel, models, exports, tmp_path):  # noqa: F811
    export_model(str(models("qwen3", True)), tmp_path / "fp16", ExportConfig(precision="fp16"))
    ids = token_ids(2, 40)
    exact = ExportSession(exports("qwen3", True)).forward(ids)[0]
    fused = ExportSession(tmp_path / "fp16", kernel=kernel)
    assert "DLRChain" in operators(fused)
    plain_error = np.abs(ExportSession(tmp_path / "fp16").forward(ids)[0] - exact).mean()
    assert np.abs(fused.forward(ids)[0] - exact).mean() < 1.2 * plain_error


def test_concurrent_calls_of_one_session_give_the_same_logits(kernel, exports):  # noqa: F811
    from concurrent.futures import ThreadPoolExecutor

    session, ids = ExportSession(exports("qwen3", True), kernel=kernel, threads=2), token_ids(1, 12)
    want = session.forward(ids)[0]
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: token_by_token(session, ids, 4), range(32)):
            assert_close(got, want, 1e-5)


def test_genai_loads_the_installed_kernel(kernel, exports, models, tmp_path, monkeypatch, cli):  # noqa: F811
    genai = pytest.importorskip("onnxruntime_genai")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    folder = shutil.copytree(exports("qwen3", True), tmp_path / "export")
    assert cli("kernel", folder).out.strip() == str(folder / "dlr_chain.so")
    check_manifest(folder)
    prompt, texts = token_ids(1, 24, seed=3).astype(np.int32), []
    for path in (exports("qwen3", True), folder):
        model = genai.Model(str(path))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=40, min_length=40, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        texts.append(list(generator.get_sequence(0)))
    assert texts[0] == texts[1]
    with pytest.raises(UsageError, match="no chains that the kernel computes"):
        install_kernel(exports("qwen3", False))


def test_a_missing_or_failing_compiler_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="no-such-compiler"):
        build_kernel()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UsageError, match=r"cannot compile the kernel \(exit 1\)"):
        build_kernel()
    assert not list((tmp_path / "lockkit").iterdir())


def test_an_unwritable_cache_folder_is_reported(tmp_path, monkeypatch, cli):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = cli("kernel")
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"cannot write the kernel to {tmp_path / 'file' / 'lockkit'} (" in done.err
    assert "set XDG_CACHE_HOME" in done.err


def test_a_loaded_library_is_replaced_and_unknown_files_stay_unlisted(kernel, exports, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    folder = shutil.copytree(exports("qwen3", True), tmp_path / "export")
    install_kernel(folder)
    (folder / "stray.json").write_text("{}")
    with (folder / "dlr_chain.so").open("rb") as running:
        install_kernel(folder)
        assert os.fstat(running.fileno()).st_nlink == 0
    assert "stray.json" not in check_manifest(folder).files
    assert not list(folder.glob(".kernel-*"))


def test_the_kernel_is_not_published_and_can_be_removed(kernel, exports, tmp_path, monkeypatch, cli):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    folder = shutil.copytree(exports("qwen3", True), tmp_path / "export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = cli("kernel", folder)
    assert "only on this type of processor" in done.err and "--remove" in done.err
    done = cli("push", folder, "owner/name", "--dry-run")
    assert (done.code, done.err.count("\n")) == (2, 1) and f"lockkit kernel {folder} --remove" in done.err
    assert cli("kernel", folder, "--remove").code == 0
    # The same bytes: a signature is valid again.
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert cli("push", folder, "owner/name", "--dry-run").code == 0
    for arguments in (["kernel", folder, "--remove"], ["kernel", "--remove"]):
        done = cli(*arguments)
        assert (done.code, done.err.count("\n")) == (2, 1) and "EXPORT" in done.err


def test_a_call_with_wrong_attributes_is_refused(kernel, exports, tmp_path):  # noqa: F811
    folder = shutil.copytree(exports("qwen3", True), tmp_path / "export")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    call = next(node for node in model.graph.node if node.op_type == "DLRChain")
    next(attribute for attribute in call.attribute if attribute.name == "depth").i = 4
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(UsageError, match="inputs do not match the attributes"):
        ExportSession(folder, check=False, kernel=kernel, last_only=True)


@torch.no_grad()
def test_an_uncoupled_chain_runs_without_the_kernel(kernel, tmp_path):
    from lockkit.models.load import load_model

    model_type = "llama"
    save_random_lock(model_type, tmp_path / "model", gains=[0.0, 1.5], **sizes(model_type))
    export_model(str(tmp_path / "model"), tmp_path / "onnx")
    session = ExportSession(tmp_path / "onnx", kernel=kernel)
    assert "DLRChain" in operators(session)
    ids = token_ids(2, 30)
    want = load_model(tmp_path / "model", dtype=torch.float32)[0](torch.tensor(ids)).logits.numpy()
    assert_close(session.forward(ids)[0], want, 1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_an_export_for_cuda_does_on_a_machine_without_a_gpu_is_said(kernel, models, tmp_path, monkeypatch, cli):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    export_model(str(models("qwen3", True)), tmp_path / "cuda", ExportConfig(precision="fp16", provider="cuda"))
    done = cli("kernel", tmp_path / "cuda")
    assert done.code == 0 and "GPU: no GPU here runs the operator" in done.err
    assert f"{tmp_path / 'cuda'}, an export for CUDA, uses it only on a machine with an NVIDIA GPU" in done.err


def test_bench_runs_every_export_with_chains_in_the_kernel(kernel, exports, tmp_path, monkeypatch, cli):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    original = shutil.copytree(exports("qwen3", False), tmp_path / "original")
    short = (
        "--kernel",
        *["--prompt-length", "8", "--new-tokens", "2", "--rounds", "1", "--threads", "1", "--runtime", "onnxruntime"],
    )
    done = cli("bench", original, *short)
    assert (done.code, done.err.count("\n")) == (2, 1) and "no chains that the kernel computes" in done.err
    done = cli("bench", original, "--against", exports("qwen3", True), *short, "--json", tmp_path / "bench.json")
    assert done.code == 0 and "with the fused operator: qwen3 in onnxruntime\n" in done.out
    found = json.loads((tmp_path / "bench.json").read_text())["models"]
    assert [(one["model"], one["kernel"]) for one in found] == [("original", False), ("qwen3", True)]
