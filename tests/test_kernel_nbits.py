"""The fused operator on int8 and int4 weights, against onnxruntime's own operators and against NumPy.

Each test builds the graph of one chain by hand, as the graph builder does. Three results are compared:

* `exact`: NumPy in float64, with the quantised weights and unrounded activations;
* `body`: the function's body. onnxruntime's MatMulNBits at accuracy level 4 rounds activations to 8 bits;
* `fused`: the operator, which rounds them the same way.

One block: body and operator read the same input and round it to the same values. The order of the fp32 sums differs,
which changes outputs by 2e-6 of the largest. Rarely, such a difference moves a unit across a rounding boundary, which
changes the outputs of its token by more. The tests allow this for one token in 20, or for one token.

Several blocks: such differences grow from block to block, until the two results differ as if they were rounded
independently. Their distance is then sqrt(2) times the distance of each from `exact`. The tests allow 1.5 times, and an
error of the operator 10 % above that of the body.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_export import exports, models, token_ids  # noqa: F401 (fixtures)
from test_kernel import kernel, operators  # noqa: F401 (fixture)

from lockkit.bench.config import BenchConfig
from lockkit.bench.run import bench
from lockkit.dlr import ChainConfig
from lockkit.errors import UsageError
from lockkit.export import ExportConfig, ExportSession, export_model
from lockkit.export.chains import name_chains
from lockkit.export.manifest import read_manifest, write_manifest
from lockkit.kernel import install_kernel
from lockkit.kernel.build import FLAGS, SOURCE

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
DTYPE = np.float64


class HandMade:
    """A chain of `depth` blocks of rank `rank` or `rank - 1`: its graph and its exact result."""

    def __init__(self, bits, size, hidden, rank, depth=1, gated=True, bias=False, gain=0.7):
        self.bits, self.size, self.hidden, self.gated, self.gain = bits, size, hidden, gated, gain
        self.random = np.random.default_rng(hidden + rank)
        self.nodes, self.constants, self.blocks = [], [], []
        stream, root = "", "x"
        for index in range(depth):
            name, width = f"/model/layers.0/mlp/blocks.{index}", rank - index % 2
            block = {}
            if stream:
                root = self.node("Add", f"{name}/input/Add", ["x", stream])
            up = self.linear(f"{name}/up_proj", root, hidden, width, bias, block, "up")
            if gated:
                gate = self.linear(f"{name}/gate_proj", root, hidden, width, bias, block, "gate")
                sigmoid = self.node("Sigmoid", f"{name}/act/Sigmoid", [gate])
                silu = self.node("Mul", f"{name}/act/Mul", [gate, sigmoid])
                units = self.node("Mul", f"{name}/Mul", [silu, up])
            else:
                units = self.node("Relu", f"{name}/act/Relu", [up])
            update = self.linear(f"{name}/down_proj", units, width, hidden, False, block, "down")
            stream = self.node("Add", f"{name}/output/Add", [stream, update]) if stream else update
            self.blocks.append(block)
        self.constants.append(numpy_helper.from_array(np.array(gain, np.float32), "gain"))
        output = self.node("Div", "/model/layers.0/mlp/gain/Div", [stream, "gain"])
        shape = ["rows", hidden]
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        self.model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        activation = "silu" if gated else "relu"
        name_chains(self.model, ChainConfig(depth, (1.0,), activation, gated, bias))

    def node(self, op, name, inputs, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [f"{name}/output_0"], name=name, **attributes))
        return f"{name}/output_0"

    def linear(self, name, root, k, n, bias, block, role):
        blocks = -(-k // self.size)
        q = self.random.integers(0, 1 << self.bits, (n, blocks, self.size), np.uint8)
        scales = self.random.uniform(0.5, 1.5, (n, blocks)).astype(np.float32) / (2**self.bits * k**0.5)
        packed = q if self.bits == 8 else q[..., ::2] | q[..., 1::2] << 4
        self.constants += [
            numpy_helper.from_array(packed, f"{name}.q"),
            numpy_helper.from_array(scales, f"{name}.scales"),
        ]
        settings = {"K": k, "N": n, "bits": self.bits, "block_size": self.size, "accuracy_level": 4}
        inputs = [root, f"{name}.q", f"{name}.scales"]
        output = self.node("MatMulNBits", f"{name}/MatMul", inputs, domain="com.microsoft", **settings)
        middle = 1 << (self.bits - 1)
        block[role] = ((q.astype(DTYPE) - middle) * scales[..., None].astype(DTYPE)).reshape(n, -1)[:, :k]
        block[f"{role} bias"] = np.zeros(n)
        if bias:
            values = self.random.normal(size=n).astype(np.float32)
            self.constants.append(numpy_helper.from_array(values, f"{name}.bias"))
            block[f"{role} bias"] = values.astype(DTYPE)
            output = self.node("Add", f"{name}/Add", [output, f"{name}.bias"])
        return output

    def exact(self, x):
        stream = np.zeros(x.shape)
        for block in self.blocks:
            t = x + stream
            up = t @ block["up"].T + block["up bias"]
            units = np.maximum(up, 0)
            if self.gated:
                gate = t @ block["gate"].T + block["gate bias"]
                units = gate / (1 + np.exp(-gate)) * up
            stream = stream + units @ block["down"].T
        return stream / self.gain

    def run(self, x, library=None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        if library:
            options.register_custom_ops_library(str(library))
        model = self.model.SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def rms(x):
    return float(np.sqrt(np.square(x).mean()))


def assert_as_exact_as_the_body(chain, library, rows, strict):
    x = chain.random.normal(size=(rows, chain.hidden)).astype(np.float32)
    exact, body, fused = chain.exact(x), chain.run(x), chain.run(x, library)
    assert fused.shape == exact.shape and np.isfinite(fused).all()
    noise, difference = rms(body - exact), rms(fused - body)
    print(f"body from exact {noise / rms(exact):.1e}, fused from exact {rms(fused - exact) / rms(exact):.1e}")
    print(f"fused from body {difference / rms(exact):.1e}")
    if strict:
        rounded_differently = np.abs(fused - body).max(1) > 2e-6 * np.abs(exact).max()
        assert rounded_differently.sum() <= max(1, rows // 20)
    # If this onnxruntime does not round activations, its body is closer to exact: use the size of the rounding error.
    noise = max(noise, rms(exact) / 127 / 12**0.5)
    assert rms(fused - exact) < 1.1 * noise and difference < 1.5 * noise


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize(("hidden", "rank"), [(128, 48), (200, 17), (64, 7)])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True), (False, False)])
def test_one_block_rounds_as_onnxruntime_does(bits, size, hidden, rank, gated, bias, kernel):  # noqa: F811
    chain = HandMade(bits, size, hidden, rank, gated=gated, bias=bias)
    for rows in (1, 5, 70):
        assert_as_exact_as_the_body(chain, kernel, rows, strict=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_deep_chain_is_as_exact_as_its_body(bits, kernel):  # noqa: F811
    chain = HandMade(bits, 32, 256, 24, depth=16)
    for rows in (1, 8, 300):
        assert_as_exact_as_the_body(chain, kernel, rows, strict=False)


@pytest.mark.parametrize("target", ["haswell", "x86-64", "skylake-avx512"])
def test_processors_without_byte_dot_products(target, tmp_path):
    """Other instructions compute the same integers. `x86-64` uses the portable code."""
    cpu_info = Path("/proc/cpuinfo")
    flags = cpu_info.read_text() if cpu_info.is_file() else ""
    needed = {"haswell": "avx2", "x86-64": "sse2", "skylake-avx512": "avx512vl"}[target]
    if f" {needed} " not in flags:
        pytest.skip(f"needs a processor with {needed}")
    library = tmp_path / "kernel.so"
    flags = [f"-march={target}" if flag == "-march=native" else flag for flag in FLAGS]
    subprocess.run(["c++", *flags, SOURCE, "-o", library], check=True)
    for bits in (8, 4):
        for rows in (1, 37):
            assert_as_exact_as_the_body(HandMade(bits, 32, 200, 17, bias=True), library, rows, strict=True)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_whole_export_gives_nearly_the_same_logits(precision, kernel, models, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    export_model(str(models("qwen3", True)), tmp_path / "onnx", ExportConfig(precision=precision))
    assert install_kernel(tmp_path / "onnx").is_file()
    plain, fused = ExportSession(tmp_path / "onnx"), ExportSession(tmp_path / "onnx", kernel=kernel)
    assert "DLRChainNBits" in operators(fused) and "DLRChainNBits" not in operators(plain)
    ids = token_ids(2, 12)
    assert rms(fused.forward(ids)[0] - plain.forward(ids)[0]) < 0.05 * rms(plain.forward(ids)[0])


def test_exports_of_earlier_versions_are_refused(kernel, models, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel.parents[1]))
    folder = tmp_path / "onnx"
    export_model(str(models("qwen3", True)), folder, ExportConfig(precision="int4"))
    install_kernel(folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for call in model.graph.node:
        if call.domain == "lockkit":
            kept = [attribute for attribute in call.attribute if attribute.name not in ("bits", "block_size")]
            del call.attribute[:]
            call.attribute.extend(kept)
    onnx.save(model, folder / "model.onnx")
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(UsageError, match=r"in the form that this version writes.*export again"):
        install_kernel(folder)
    with pytest.raises(UsageError, match="do without --kernel, or export again"):
        bench(folder, config=BenchConfig(kernel=True))
    pytest.importorskip("fastapi")
    from lockkit.serve.model import open_served_model, open_session

    assert not open_session(open_served_model(folder), "cpu", 1).fused
    assert caplog.messages[0].endswith("(this version does not know the form of its chains): export again")


def test_a_chain_with_mixed_quantisation_is_not_given_to_the_kernel(kernel):  # noqa: F811
    chain = HandMade(8, 32, 64, 16)
    call = next(node for node in chain.model.graph.node if node.domain == "lockkit")
    assert call.op_type == "DLRChainNBits"
    next(attribute for attribute in call.attribute if attribute.name == "bits").i = 3
    with pytest.raises(Exception, match="4 or 8 bits"):
        chain.run(np.zeros((1, 64), np.float32), kernel)
    other = onnx.NodeProto()
    other.CopyFrom(chain.nodes[0])
    next(attribute for attribute in other.attribute if attribute.name == "accuracy_level").i = 0
    from lockkit.export.chains import _quantisation

    assert _quantisation(chain.nodes) == {"bits": 8, "block_size": 32}
    assert _quantisation([*chain.nodes, other]) == {}


def test_weights_are_not_held_twice(kernel, exports):  # noqa: F811
    """The process releases the pages of the export's file that the chains were read from."""
    script = """
import sys
from lockkit.export import ExportSession
session = ExportSession(sys.argv[1], check=False, kernel=sys.argv[2])
resident_kb = 0
for line in open("/proc/self/smaps"):
    if "-" in line.split(" ")[0]:
        mine = "model.onnx_data" in line
    elif mine and line.startswith("Rss:"):
        resident_kb += int(line.split()[1])
print(resident_kb)
"""
    folder = exports("qwen3", True)
    command = [sys.executable, "-c", script, folder, kernel]
    resident_kb = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if resident_kb:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        sizes = {tensor.name: np.prod(tensor.dims) * 4 for tensor in model.graph.initializer}
        calls = [node for node in model.graph.node if node.op_type == "DLRChain"]
        chains = sum(sizes.get(name, 0) for call in calls for name in call.input)
        assert resident_kb * 1024 < sum(sizes.values()) - chains + 2**16
    with pytest.raises(UsageError):
        ExportSession(folder / "nothing", kernel=kernel)
