"""A quantised embedding table that is also the output head: one copy in the file and one in memory.

The builder stores the matrix in the shape that the product of the head needs, and reshapes it for the lookup. onnxruntime
computes the reshaped copy when it loads the graph, and keeps it. A tensor that reads the same bytes of the file in the
other shape needs no copy: onnxruntime maps the file, and a lookup reads a few rows of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def read_table_in_place(model: onnx.ModelProto) -> None:
    """Replace the reshaping of a quantised embedding table, if there is one, by a tensor over the same bytes, in place.

    Args:
        model: a graph from `builders.py`. Its weights are in a file and need not be loaded.
    """
    graph = model.graph
    lookup = next((node for node in graph.node if node.op_type == "GatherBlockQuantized"), None)
    if lookup is None:
        return
    reshape = next(node for node in graph.node if node.output[0] == lookup.input[0])
    table = graph.initializer.add()
    table.CopyFrom(next(tensor for tensor in graph.initializer if tensor.name == reshape.input[0]))
    rows, *others = table.dims  # [vocab, blocks, bytes of a block]
    table.name = "model.embed_tokens.weight_of_lm_head"
    table.dims[:] = [rows, others[0] * others[1]]
    lookup.input[0] = table.name
    graph.node.remove(reshape)
    shape = next(node for node in graph.node if node.output[0] == reshape.input[1])
    if not any(shape.output[0] in node.input for node in graph.node):
        graph.node.remove(shape)
