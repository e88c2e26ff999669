"""The operator for onnxruntime's CUDA provider: the real onnxruntime on a fake GPU, its kernel on the emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cuda_emulator import steps
from cuda_emulator.emulation import Case, build, error
from fake_cuda import steps as exported
from fake_cuda.fixtures import cuda_exports, fake_gpu, fake_libraries, new_gpu  # noqa: F401
from fake_cuda.gpu import kinds
from onnx import TensorProto, helper
from test_export import save_random_lock

from lockkit.export import ExportConfig, export_model
from lockkit.kernel import install_kernel
from lockkit.kernel.build import FLAGS, build_kernel

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
KINDS = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
GATED = Case(128, (20, 19, 19), 1, team=8, activation="gelu_pytorch_tanh")
INTEGERS = [
    Case(128, (20, 19, 19), 1, team=2, activation="gelu_pytorch_tanh", bits=4),
    Case(200, (40, 33), 1, team=4, gated=False, bias=True, output_bias=True, bits=8, block_size=64),
]
TWO_LAYERS = Case(
    72, (30, 29), 1, team=8, dtype=torch.bfloat16, activation="relu2", gated=False, bias=True, output_bias=True
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    build(folder)
    return folder / "emulated.so"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("lockkit.kernel.build.FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in FLAGS))
        return build_kernel()


@pytest.fixture
def emulated_gpu(new_gpu, emulated):  # noqa: F811
    """A function that starts a process with a fake GPU of an architecture, whose kernels run on the emulator."""
    return lambda architecture: new_gpu(FAKE_CUDA_SM=str(architecture), FAKE_CUDA_KERNELS=str(emulated))


def bits(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """A tensor in a type of 16 bits, as NumPy holds it."""
    array = tensor.detach().to(dtype).contiguous().view(torch.int16).numpy()
    return array.view(np.float16 if dtype == torch.float16 else np.uint16)


def model_of(case: Case) -> bytes:
    """A graph with one call of the operator, and the case's chain as its weights."""
    net, _ = case.chain()
    kind, names, initializers = KINDS[case.dtype], ["x"], []
    tensors = [*case.tensors(), torch.tensor(case.gain).to(case.dtype)]
    if net.output_bias is not None:
        tensors.append(net.output_bias.to(case.dtype))
    for tensor in tensors:
        names.append(f"w{len(names)}")
        of_bytes = tensor.dtype == torch.uint8
        raw = (tensor.numpy() if of_bytes else bits(tensor, case.dtype)).tobytes()
        what = TensorProto.UINT8 if of_bytes else kind
        initializers.append(helper.make_tensor(names[-1], what, list(tensor.shape), raw, raw=True))
    attributes = {"depth": len(case.ranks), "activation": case.activation}
    attributes |= {name: int(getattr(case, name)) for name in ("gated", "bias", "output_bias")}
    if case.bits < 16:
        attributes |= {"bits": case.bits, "block_size": case.block_size}
    operator = "DLRChain" if case.bits == 16 else "DLRChainNBitsFloat"
    node = helper.make_node(operator, names, ["y"], domain="lockkit", **attributes)
    x, y = (helper.make_tensor_value_info(name, kind, ["tokens", case.hidden]) for name in "xy")
    graph = helper.make_graph([node], "chain", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("lockkit", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", [GATED, TWO_LAYERS, *INTEGERS], ids=["gated", "two layers", "int4", "int8"])
def test_the_operator_computes_the_chain(case, architecture, emulated_gpu, library):
    cases = [Case(**{**vars(case), "tokens": tokens}) for tokens in (1, 11, 0, 300)]
    inputs = [bits(other.chain()[1], case.dtype) for other in cases]
    outputs, found = emulated_gpu(architecture).run(steps.compute, model_of(case), library, inputs, KINDS[case.dtype])
    for other, y in zip(cases, outputs, strict=True):
        if other.tokens:
            assert error(other, torch.from_numpy(y.view(np.int16)).view(case.dtype)) < LIMITS[case.dtype]
    kernels = [[call.name for call in run if call.kind == "kernel"] for run in found]
    print(kernels)
    # One kernel for a few tokens; for many, one that packs them, and two for each DLR block.
    assert [len(names) for names in kernels[1:]] == [1, 1, 0, 1 + 2 * len(case.ranks)]
    assert not kernels[0]
    form = {16: "Plain", 8: "Int8", 4: "Int4"}[case.bits]
    assert all(name.startswith("chain_") and f"_{form}_" in name for names in kernels[:-1] for name in names)
    assert {name.rpartition("_")[0] for name in kernels[-1][1:]} == {
        f"prompt_{what}_{'Half' if case.dtype == torch.float16 else 'BFloat16'}_{form}" for what in ("units", "stream")
    }
    assert architecture >= 90 or not any("CLUSTER" in name for names in kernels for name in names)


@pytest.mark.parametrize("bits_of_weights", [16, 4])
def test_weights_are_on_the_gpu_once(bits_of_weights, emulated_gpu, library):
    case = Case(256, (64,) * 4, 1, team=8, bits=bits_of_weights)
    x = bits(case.chain()[1], case.dtype)
    _, (load, *_) = emulated_gpu(90).run(steps.compute, model_of(case), library, [x], KINDS[case.dtype])
    # One copy of all weights of the chain; biases and the output bias would be another two.
    copies = [call for call in load if call.kind == "copy"]
    print(copies)
    assert len(copies) == 1


@pytest.mark.parametrize("tokens", [4, 100])
@pytest.mark.parametrize("case", [GATED, INTEGERS[0]], ids=["fp16", "int4"])
def test_a_cuda_graph_holds_the_operator(case, tokens, emulated_gpu, library):
    shape = (tokens, case.hidden)
    first, *later = emulated_gpu(80).run(steps.capture, model_of(case), library, shape, KINDS[case.dtype])
    assert any(call.kind == "kernel" for call in first)
    for step in later:
        assert kinds(call for call in step if not call.captured)["graph"] == 1
        assert not any(call.kind in ("kernel", "allocate") and not call.captured for call in step)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_CUDA_SM": "75"}, "compute capability 7.5"),
        ({"FAKE_CUDA_FAIL": "cuModuleLoadData=222"}, "cuModuleLoadData failed"),  # a driver too old for the PTX
        ({"FAKE_CUDA_FAIL": "cuMemAlloc=2"}, "cuMemAlloc_v2 failed"),
    ],
)
def test_what_prevents_the_operator_is_said(environment, message, emulated_gpu, library):
    found = emulated_gpu(80).run(steps.why_not, model_of(GATED), library, **environment)
    assert "DLRChain: " in found and message in found


def chain_of(export: Path) -> onnx.ModelProto:
    """The first chain of an export as a model of its own, from `x` to `y` in fp16, with the chain's function."""
    model = onnx.load(export / "model.onnx")
    call = next(node for node in model.graph.node if node.domain == "lockkit")
    weights = [tensor for tensor in model.graph.initializer if tensor.name in call.input]
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.output[0] in call.input]
    call.input[0], call.output[0] = "x", "y"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["tokens", None]) for name in "xy")
    graph = helper.make_graph([*constants, call], "chain", [x], [y], weights)
    return helper.make_model(
        graph, functions=model.functions, opset_imports=model.opset_import, ir_version=model.ir_version
    )


@pytest.mark.parametrize(("precision", "block_size"), [("int4", 32), ("int8", 32), ("int4", 16)])
def test_the_operator_agrees_with_the_function_in_onnxruntime(precision, block_size, emulated_gpu, library, tmp_path):
    # Ranks of 20 and 19, which are below the block size of 32.
    locked = save_random_lock("qwen3", tmp_path / "locked", hidden_size=128, intermediate_size=96, head_dim=32)
    export_model(
        str(locked), tmp_path / "export", ExportConfig(precision=precision, provider="cuda", block_size=block_size)
    )
    model = chain_of(tmp_path / "export")
    x = np.random.default_rng(0).normal(scale=0.3, size=(19, 128)).astype(np.float16)
    body = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = body.run(None, {"x": x})
    (found,), (_, run) = emulated_gpu(80).run(
        steps.compute, model.SerializeToString(), library, [x], TensorProto.FLOAT16
    )
    assert [call.name for call in run if call.kind == "kernel"] == [f"chain_Half_I{precision[1:]}_GLOBAL"]
    want, found = want.astype(np.float32), found.view(np.float16).astype(np.float32)
    difference = np.linalg.norm(found - want) / np.linalg.norm(want)
    print(f"relative difference {difference:.1e}")
    assert np.isfinite(want).all() and difference < 2 * LIMITS[torch.float16]  # both are rounded to fp16 in every block


@pytest.mark.parametrize(("precision", "kernel"), [("fp16", "chain_Half_Plain_"), ("int4", "chain_Half_Int4_")])
def test_genai_captures_the_operator(precision, kernel, fake_gpu, cuda_exports, library, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lockkit.kernel.install.build_kernel", lambda: library)
    folder = shutil.copytree(cuda_exports(True, precision), tmp_path / "export")
    install_kernel(folder)
    first, *later = fake_gpu.run(exported.genai_steps, folder)
    names = [call.name for run in (first, later[0]) for call in run if call.kind == "kernel"]
    assert any(name.startswith(kernel) for name in names)
    for found in later[1:]:
        assert sum(call.kind == "graph" for call in found) == 1
