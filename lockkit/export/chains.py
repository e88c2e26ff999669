"""Make each chain of a graph one function call, so that a fused kernel can replace it.

A chain is hundreds of small nodes, and a runtime spends more time between them than in them. An ONNX model may define
functions: a name and a body of ordinary operators. A runtime that has an operator of that name calls it
(`lockkit/kernel` has one for onnxruntime on the CPU). Every other runtime inlines the body.

1. The nodes of a chain are those named `/model/layers.N/mlp/...`, in the order of the graph.
2. The tensors that they read from outside are the function's inputs: the MLP's input, then the weights in the order of
   first use. The tensor that other nodes read is its output.
3. Names in the body do not contain the layer's prefix, so that all chains of one shape share one function.

A function's name says what a kernel needs to compute it:

* `DLRChain`: weights as they are.
* `DLRChainNBits`: weights quantised by MatMulNBits, all with the same bits and block size and no zero points, and
  activations rounded to 8 bits (accuracy level 4, the export for the CPU).
* `DLRChainNBitsFloat`: the same, with activations as they are (the export for CUDA).
* `DLRChainUncoupled`, a chain with gain 0, and `DLRChainMixed`, weights quantised in another form, always run as their
  bodies.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lockkit.targets import BFLOAT16, FLOAT16, Provider

if TYPE_CHECKING:
    import onnx

    from lockkit.dlr.net import ChainConfig

DOMAIN = "lockkit"
PLAIN, QUANTISED, UNCOUPLED, MIXED = "DLRChain", "DLRChainNBits", "DLRChainUncoupled", "DLRChainMixed"
QUANTISED_WEIGHTS = "DLRChainNBitsFloat"
# Operators of the kernel by provider, and on a GPU also the types of their floats.
_OPERATORS: dict[str, set[str]] = {Provider.cpu: {PLAIN, QUANTISED}, Provider.cuda: {PLAIN, QUANTISED_WEIGHTS}}
_GPU_TYPES = {PLAIN: {FLOAT16.onnx, BFLOAT16.onnx}, QUANTISED_WEIGHTS: {FLOAT16.onnx}}
_LAYER = re.compile(r"(/?model[/.]layers\.\d+[/.]mlp)[/.]")


def name_chains(model: onnx.ModelProto, chains: ChainConfig) -> None:
    """Replace the nodes of every chain by a function call, in place.

    Args:
        model: a graph from `builders.py`. Its weights need not be loaded.
        chains: the settings shared by its chains.
    """
    from onnx import helper

    graph = model.graph
    functions: dict[bytes, onnx.FunctionProto] = {}
    layers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        match = _LAYER.match(node.name)
        if match:
            layers.setdefault(match[1], []).append(node)
    calls = {}
    for prefix, nodes in layers.items():
        function, inputs, output = _function(nodes, model)
        key = function.SerializeToString()
        if key not in functions:
            same = sum(other.name.split("_")[0] == function.name for other in functions.values())
            functions[key] = function
            function.name += f"_{same + 1}" if same else ""
        attributes = {
            "depth": chains.depth,
            "activation": chains.activation,
            **{name: int(getattr(chains, name)) for name in ("gated", "bias", "output_bias")},
        }
        name = functions[key].name
        if name.split("_")[0] in (QUANTISED, QUANTISED_WEIGHTS):
            attributes |= _quantisation(nodes)
        call = helper.make_node(name, inputs, [output], name=f"{prefix}/{name}", domain=DOMAIN, **attributes)
        calls[nodes[-1].name] = call
        functions[key].attribute[:] = attributes
    inside = {value for nodes in layers.values() for node in nodes for value in node.output}
    inside -= {value for call in calls.values() for value in call.output}
    kept = [calls.get(node.name, node) for node in graph.node if node.name in calls or not _LAYER.match(node.name)]
    del graph.node[:]
    graph.node.extend(kept)
    values = [value for value in graph.value_info if value.name not in inside]
    del graph.value_info[:]
    graph.value_info.extend(values)
    model.functions.extend(functions.values())
    if functions:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def expand_chains(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of `model`, with every call of a chain replaced by the chain's nodes under their original names."""
    import onnx

    functions = {function.name: function for function in model.functions}
    nodes: list[onnx.NodeProto] = []
    for call in model.graph.node:
        if call.domain != DOMAIN or call.op_type not in functions:
            nodes.append(call)
            continue
        function, prefix = functions[call.op_type], call.name.rsplit("/", 1)[0]
        names = dict(zip([*function.input, *function.output], [*call.input, *call.output], strict=True))
        for inner in function.node:
            node = onnx.NodeProto()
            node.CopyFrom(inner)
            node.name = f"{prefix}/{inner.name}"
            node.input[:] = [names.get(name, f"{prefix}/{name}" if name else "") for name in inner.input]
            node.output[:] = [names.get(name, f"{prefix}/{name}") for name in inner.output]
            nodes.append(node)
    return nodes


def _function(nodes: list[onnx.NodeProto], model: onnx.ModelProto) -> tuple[onnx.FunctionProto, list[str], str]:
    """Make a function of a chain's nodes.

    Returns:
        The function, the names of its inputs in the graph, and the name of its output in the graph.
    """
    import onnx
    from onnx import helper

    written = {value for node in nodes for value in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in written)
    # Constants of an activation function go into the body. The gain of the last division is an input: layers differ.
    gain = next((node.input[1] for node in nodes if node.name.endswith("/mlp/gain/Div")), None)
    constants = {node.output[0]: node for node in model.graph.node if node.op_type == "Constant"}
    inlined = [name for name in read if name in constants and name != gain]
    inputs = [name for name in read if name not in inlined]
    output = nodes[-1].output[0]
    names = {name: _LAYER.sub("", name) for name in [*written, *read]} | {"": "", inputs[0]: "x", output: "y"}
    if gain:
        names[gain] = "gain"
    body = []
    for node in [*map(constants.__getitem__, inlined), *nodes]:
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.name = _LAYER.sub("", node.name)
        inner.input[:] = [names[name] for name in node.input]
        inner.output[:] = [names[name] for name in node.output]
        body.append(inner)
    name = PLAIN
    if not gain:
        name = UNCOUPLED
    elif any(node.op_type == "MatMulNBits" for node in nodes):
        name = (QUANTISED if _rounds_activations(nodes) else QUANTISED_WEIGHTS) if _quantisation(nodes) else MIXED
    used = {node.domain for node in nodes}
    imports = [opset for opset in model.opset_import if opset.domain in used]
    function = helper.make_function(DOMAIN, name, [names[i] for i in inputs], ["y"], body, imports)
    return function, inputs, output


def _quantisation(nodes: list[onnx.NodeProto]) -> dict[str, int]:
    """`bits` and `block_size` of a chain's products; empty if no kernel knows their form."""
    products = [node for node in nodes if node.op_type in ("MatMul", "MatMulNBits")]
    settings = [{attribute.name: attribute.i for attribute in node.attribute} for node in products]
    forms = {(found.get("bits"), found.get("block_size"), found.get("accuracy_level")) for found in settings}
    (bits, block_size, _), *others = forms
    if others or bits is None or block_size is None or any(len(node.input) != 3 for node in products):
        return {}
    return {"bits": bits, "block_size": block_size}


def _rounds_activations(nodes: list[onnx.NodeProto]) -> bool:
    """Whether the products of a quantised chain may round their activations to 8 bits."""
    product = next(node for node in nodes if node.op_type == "MatMulNBits")
    return any(attribute.name == "accuracy_level" and attribute.i == 4 for attribute in product.attribute)


def has_kernel_form(path: Path, provider: str = Provider.cpu) -> bool:
    """Whether the kernel can compute the chains of the graph at `path`. False for a file that is not a graph.

    Args:
        path: the graph.
        provider: that runs it.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return False
    operators = _OPERATORS[provider]
    chains = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in operators]
    # In exports of earlier versions, which the kernel does not know, calls of `DLRChainNBits` have no `bits`.
    older = any(node.op_type == QUANTISED and all(a.name != "bits" for a in node.attribute) for node in chains)
    has_type = provider == Provider.cpu or all(_is_for_gpus(node, model) for node in chains)
    return bool(chains) and not older and has_type


def _is_for_gpus(call: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether the call of a chain has a type that the kernel computes on a GPU."""
    first_floats = call.input[1 if call.op_type == PLAIN else 2]  # the scales of a quantised weight follow its integers
    types = {weight.name: weight.data_type for weight in model.graph.initializer}
    return types.get(first_floats) in _GPU_TYPES[call.op_type]
