"""Each chain of a graph as one call of a function, so that a fused kernel can stand in for it.

An export's chains are hundreds of small nodes, and a runtime spends more time between them than in
them. ONNX lets a model carry functions of its own: a name, and a body of ordinary operators. A
runtime that knows an operator of that name calls it (`lockkit/kernel` has one for onnxruntime on
the CPU); every other runtime puts the body in the call's place.

1. The nodes of a chain are those named `/model/layers.N/mlp/...`, in the graph's order.
2. What they read from outside (the MLP's input, then the weights in the order of first use) becomes
   the function's inputs; what others read of them, its one output.
3. Names inside lose the layer's prefix, so that all chains of one shape share one function.

`DLRChain` and `DLRChainNBits`, of weights quantised by MatMulNBits, are the functions that the kernel knows.
Others run as their bodies: `DLRChainUncoupled`, of a chain with gain 0, and `DLRChainMixed`, of weights quantised in
any other way than all alike, without zero points, and for activations in 8 bits (the export for the CPU).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from lockkit.dlr.net import ChainConfig

DOMAIN = "lockkit"
PLAIN, QUANTISED, UNCOUPLED, MIXED = "DLRChain", "DLRChainNBits", "DLRChainUncoupled", "DLRChainMixed"
_LAYER = re.compile(r"(/?model[/.]layers\.\d+[/.]mlp)[/.]")


def name_chains(model: onnx.ModelProto, chains: ChainConfig) -> None:
    """Turn every chain of `model` into a call of a function, in place.

    Args:
        model: a graph from `builders.py`; its weights may be elsewhere.
        chains: what the chains have in common.
    """
    from onnx import helper

    graph, functions = model.graph, {}
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
        if name.split("_")[0] == QUANTISED:
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
    """The nodes of `model` with every chain's own nodes in its call's place, under their old names."""
    import onnx

    functions, nodes = {function.name: function for function in model.functions}, []
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
    """The function of a chain's nodes; the names that it reads, and the one that it writes."""
    import onnx
    from onnx import helper

    made = {value for node in nodes for value in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
    # Numbers that an activation needs go into the body; the last division's is the layer's gain.
    gain = next((node.input[1] for node in nodes if node.name.endswith("/mlp/gain/Div")), None)
    constants = {node.output[0]: node for node in model.graph.node if node.op_type == "Constant"}
    numbers = [name for name in read if name in constants and name != gain]
    inputs = [name for name in read if name not in numbers]
    output = nodes[-1].output[0]
    names = {name: _LAYER.sub("", name) for name in [*made, *read]} | {"": "", inputs[0]: "x", output: "y"}
    if gain:
        names[gain] = "gain"
    body = []
    for node in [*map(constants.__getitem__, numbers), *nodes]:
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
        name = QUANTISED if _quantisation(nodes) else MIXED
    used = {node.domain for node in nodes}
    imports = [opset for opset in model.opset_import if opset.domain in used]
    function = helper.make_function(DOMAIN, name, [names[i] for i in inputs], ["y"], body, imports)
    return function, inputs, output


def _quantisation(nodes: list[onnx.NodeProto]) -> dict[str, int]:
    """`bits` and `block_size` of a chain's products, or nothing where the kernel does not know their form."""
    products = [node for node in nodes if node.op_type in ("MatMul", "MatMulNBits")]
    settings = [{attribute.name: attribute.i for attribute in node.attribute} for node in products]
    forms = {(found.get("bits"), found.get("block_size"), found.get("accuracy_level")) for found in settings}
    (bits, block_size, accuracy), *others = forms
    if others or accuracy != 4 or any(len(node.input) != 3 for node in products):
        return {}
    return {"bits": bits, "block_size": block_size}


def has_kernel_form(path: Path) -> bool:
    """Whether the graph at `path` has chains that the kernel computes."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return False
    chains = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in (PLAIN, QUANTISED)]
    # Calls of `DLRChainNBits` had no attributes before the kernel knew it.
    older = any(node.op_type == QUANTISED and all(a.name != "bits" for a in node.attribute) for node in chains)
    return bool(chains) and not older
