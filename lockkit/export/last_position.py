"""The graph that generates text: logits of the last token of each row only.

The builder's graph computes the logits of all positions. With a vocabulary of 262,144 tokens, those of a prompt of 512
tokens take 537 MB and much of the time, and text generation needs one position. So an export has two graphs, which share
the file of weights: `model_all_logits.onnx`, the builder's, for whoever scores text; and `model.onnx`, which selects one
position before the output head.

The builder's own option for this, `prune_lm_head`, takes the last column. In a row that is shorter than others, that is
padding. Here, the graph selects the last token of each row:

* GroupQueryAttention counts the ones in a row of the mask (see `session.py`), so the last token is at that count minus
  1. With a cache, new tokens are never padding, so it is in the last column.
  The number of new tokens is counted, too: a shape is on the CPU, and a copy of it to a GPU cannot be captured as part
  of a CUDA graph.
* MultiHeadAttention uses the mask itself, so the last token is at the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_HEAD = "/lm_head/"
_COUNT_OF_ONES = """
select (int64[batch, total] attention_mask, int64[batch, seq] input_ids, float[batch, seq, hidden] hidden)
    => (float[batch, one, hidden] selected) {
  one = Constant <value_ints = [1]> ()
  ones = ReduceSum <keepdims = 1> (attention_mask, one)
  shape = Shape (input_ids)
  marks = ConstantOfShape <value = int64[1] {1}> (shape)
  new = ReduceSum <keepdims = 1> (marks, one)
  end = Min (ones, new)
  last = Sub (end, one)
  index = Unsqueeze (last, one)
  selected = GatherND <batch_dims = 1> (hidden, index)
}"""
_PLACE_OF_LAST_ONE = """
select (int64[batch, total] attention_mask, int64[batch, seq] input_ids, float[batch, seq, hidden] hidden)
    => (float[batch, one, hidden] selected) {
  zero = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  one = Constant <value_ints = [1]> ()
  total = Shape <start = 1, end = 2> (attention_mask)
  new = Shape <start = 1, end = 2> (input_ids)
  past = Sub (total, new)
  length = Squeeze (total)
  places = Range (zero, length, step)
  marked = Mul (attention_mask, places)
  place = ReduceMax <keepdims = 1> (marked, one)
  column = Sub (place, past)
  last = Max (column, zero)
  index = Unsqueeze (last, one)
  selected = GatherND <batch_dims = 1> (hidden, index)
}"""


def keep_last_position(model: onnx.ModelProto) -> None:
    """Change `logits` from `[batch, seq, vocab]` to those of the last token of each row, `[batch, 1, vocab]`, in place.

    Args:
        model: a graph from `builders.py`. Its weights need not be loaded.
    """
    from onnx import parser

    graph = model.graph
    head = [node for node in graph.node if node.name.startswith(_HEAD)]
    hidden = next(node for node in head if node.op_type.startswith("MatMul")).input[0]
    has_positions = any(value.name == "position_ids" for value in graph.input)
    nodes = list(parser.parse_graph(_PLACE_OF_LAST_ONE if has_positions else _COUNT_OF_ONES).node)
    names = {name: f"{_HEAD}last_position/{name}" for node in nodes for name in node.output} | {"hidden": hidden}
    for node in nodes:
        node.name = f"{_HEAD}last_position/{node.op_type}/{node.output[0]}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    for node in head:
        node.input[:] = [names["selected"] if name == hidden else name for name in node.input]
    others = [node for node in graph.node if not node.name.startswith(_HEAD)]
    del graph.node[:]
    graph.node.extend([*others, *nodes, *head])
    written = {name for node in head for name in node.output}
    for value in [*graph.value_info, *graph.output]:
        if value.name in written:
            value.type.tensor_type.shape.dim[1].dim_value = 1
