"""Recovering trainable PyTorch weights from a published ONNX export.

It shows that publishing ONNX alone does not hide the weights. Only the graph, its weights and `config.json` are read,
neither the manifest nor any PyTorch model.

1. Read the graph. Weights stay on disk until they are needed.
2. Read the shape of the chains, if there are any, from the names of weights. The gain of a layer is the divisor at the
   end of its chain.
3. Build an untrained model of that shape, in fp32.
4. For each of its weights, find the tensor in the graph and undo the changes of the builder
   (lockkit/export/builders.py): transposed matrices; q, k and v in one matrix; Gemma's and Nemotron's norms plus 1;
   the last matrix of a block times the gain; int8 or int4 with one scale per block
   (onnxruntime's operator MatMulNBits).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lockkit.dlr.net import ChainConfig
from lockkit.errors import UsageError
from lockkit.export.chains import expand_chains
from lockkit.files import read_json
from lockkit.models.families import FAMILIES, Family, activation_name

if TYPE_CHECKING:
    import onnx
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_FILE = "model.onnx"
# Families whose norms multiply by 1 plus their weight. The graph has the sum.
_NORMS_PLUS_ONE = ("gemma2", "gemma3_text", "nemotron")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def recover_onnx(export: Path | str) -> PreTrainedModel:
    """Rebuild the model of an export as an ordinary PyTorch model.

    Args:
        export: a folder that `lockkit export` wrote, of any precision, locked or not.

    Returns:
        A model of the original family, or its locked form, in fp32 and in evaluation mode. All weights
        require gradients. Quantised weights have the values that the graph computes with. Embeddings and
        output matrix are tied if the graph has one matrix for both.

    Raises:
        UsageError: the folder is not an export, or its graph does not have lockkit's layout.
    """
    import transformers

    folder = Path(export)
    raw = read_json(folder / "config.json", "EXPORT")
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise UsageError(
            f"{folder} is of type '{raw.get('model_type')}', which is not a family of lockkit: change EXPORT"
        )
    graph = _Graph(folder)
    config = getattr(transformers, family.config_class).from_pretrained(folder)
    config.tie_word_embeddings = not graph.has("model.embed_tokens.weight")
    model = _untrained(config, family, graph)
    state = {name: _find(name, model, family, graph) for name in model.state_dict()}
    for name, value in model.state_dict().items():
        if state[name].shape != value.shape:
            raise UsageError(
                f"{folder}: {name} is {list(state[name].shape)} in the graph and {list(value.shape)} by its "
                "config.json: change EXPORT"
            )
    model.load_state_dict(state)
    return model.eval()


class _Graph:
    """The weights of a graph, by name. Each is read when it is needed."""

    def __init__(self, folder: Path):
        import onnx

        self.folder = folder
        if not (folder / MODEL_FILE).is_file():
            raise UsageError(f"{folder} has no {MODEL_FILE}, so it is not an export: change EXPORT")
        try:
            model = onnx.load(folder / MODEL_FILE, load_external_data=False)
        except Exception as error:  # protobuf has its own classes of errors
            raise UsageError(f"{folder / MODEL_FILE} is not a readable graph: change EXPORT") from error
        nodes = expand_chains(model)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes = {node.output[0]: node for node in nodes}
        self.quantised = {node.input[1]: node for node in nodes if node.op_type == "MatMulNBits"}

    def has(self, name: str) -> bool:
        return name in self.weights

    def has_matrix(self, name: str) -> bool:
        return any(f"{name}.MatMul.weight{suffix}" in self.weights for suffix in ("", "_Q4", "_Q8"))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, converted to fp32."""
        if name not in self.weights:
            raise UsageError(f"{self.folder}: the graph has no {name}: change EXPORT to an export that lockkit wrote")
        return torch.from_numpy(self._array(self.weights[name]).astype(np.float32))

    def matrix(self, name: str) -> torch.Tensor:
        """The matrix of a product, `[out, in]` as in `nn.Linear`."""
        for suffix in ("_Q4", "_Q8"):
            if f"{name}.MatMul.weight{suffix}" in self.quantised:
                return self._dequantised(self.quantised[f"{name}.MatMul.weight{suffix}"])
        return self.tensor(f"{name}.MatMul.weight").T.contiguous()

    def gain(self, layer: int) -> float:
        """The divisor at the end of a chain. 0 if there is none, because then no block reads the stream."""
        division = self.nodes.get(f"/model/layers.{layer}/mlp/gain/Div/output_0")
        # The name has the exact value. The tensor is rounded to the precision of the graph.
        return float(division.input[1].rsplit("/", 1)[1]) if division is not None else 0.0

    def _array(self, tensor: onnx.TensorProto) -> np.ndarray:
        from onnx import numpy_helper

        try:
            return numpy_helper.to_array(tensor, str(self.folder))
        except Exception as error:
            raise UsageError(
                f"{self.folder}: the weight {tensor.name} cannot be read, because its data file is missing or incomplete: "
                "change EXPORT"
            ) from error

    def _dequantised(self, node: onnx.NodeProto) -> torch.Tensor:
        """`[out, in]` from MatMulNBits: uint8 `[out, blocks, bytes]`, low bits first; one scale per block."""
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        if settings.get("weight_prepacked"):
            raise UsageError(f"{self.folder}: {node.name} is packed for one kind of GPU: change EXPORT")
        rows, columns, bits = settings["N"], settings["K"], settings["bits"]
        packed = self._array(self.weights[node.input[1]]).reshape(rows, -1)
        values = _unpacked(packed, bits).reshape(rows, -1, settings["block_size"])
        scales = self._array(self.weights[node.input[2]]).astype(np.float32).reshape(rows, -1, 1)
        zero: np.ndarray | float = float(1 << (bits - 1))
        if len(node.input) > 3 and node.input[3]:
            zero = self._array(self.weights[node.input[3]]).reshape(rows, -1)
            zero = _unpacked(zero, bits) if zero.dtype == np.uint8 else zero
            zero = zero[:, : scales.shape[1], None].astype(np.float32)
        whole = ((values.astype(np.float32) - zero) * scales).reshape(rows, -1)
        return torch.from_numpy(np.ascontiguousarray(whole[:, :columns]))


def _unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of 4 or 8 bits, `[rows, values]`, from bytes, `[rows, bytes]`; the low half of a byte comes first."""
    if bits == 8:
        return values
    if bits != 4:
        raise UsageError(f"weights of {bits} bits are not supported: change EXPORT")
    return np.stack([values & 15, values >> 4], axis=-1).reshape(len(values), -1)


def _untrained(config: PreTrainedConfig, family: Family, graph: _Graph) -> PreTrainedModel:
    import transformers

    from lockkit.models.locked import locked_classes, locked_config

    chains = _chains(config, graph)
    if chains is None:
        return getattr(transformers, family.model_class)._from_config(config, dtype=torch.float32)
    locked = locked_config(config, family, chains)
    locked.tie_word_embeddings = config.tie_word_embeddings
    return locked_classes(family)[1]._from_config(locked, dtype=torch.float32)


def _chains(config: PreTrainedConfig, graph: _Graph) -> ChainConfig | None:
    """The description of the chains, from the names of the graph's weights; None if the MLPs are ordinary ones."""
    block = "model.layers.0.mlp.blocks.{}"
    depth = 0
    while graph.has_matrix(f"{block.format(depth)}.up_proj"):
        depth += 1
    if depth == 0:
        return None
    first = block.format(0)
    return ChainConfig(
        depth=depth,
        gains=tuple(graph.gain(layer) for layer in range(config.num_hidden_layers)),
        activation=activation_name(config),
        gated=graph.has_matrix(f"{first}.gate_proj"),
        bias=graph.has(f"{first}.up_proj.Add.bias"),
        output_bias=graph.has("model.layers.0.mlp.output.Add.bias"),
    )


def _find(name: str, model: PreTrainedModel, family: Family, graph: _Graph) -> torch.Tensor:
    """The value of the PyTorch weight `name`, `[out, in]` for matrices."""
    offset = 1.0 if family.model_type in _NORMS_PLUS_ONE and name.endswith("weight") else 0.0
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        own = name == "model.embed_tokens.weight" and graph.has(name)
        return graph.tensor(name) if own else graph.matrix("lm_head")
    if name == "lm_head.bias":
        return graph.tensor("lm_head.Add.bias")
    match = _LAYER.fullmatch(name)
    if match is None:  # the norm after the last layer
        last = model.config.num_hidden_layers
        return graph.tensor(f"model.layers.{last}.final_norm_layernorm.{name.rsplit('.', 1)[1]}") - offset
    layer, rest = int(match[1]), match[2]
    if rest.startswith("self_attn."):
        return _attention_weight(f"model.layers.{layer}.attn", rest.removeprefix("self_attn."), model, graph, offset)
    if rest.startswith("mlp."):
        return _mlp_weight(f"model.layers.{layer}", rest, family, graph, layer)
    return graph.tensor(name) - offset


def _attention_weight(prefix: str, name: str, model: PreTrainedModel, graph: _Graph, offset: float) -> torch.Tensor:
    module, kind = name.rsplit(".", 1)
    if module in ("q_norm", "k_norm"):
        return graph.tensor(f"{prefix}.{module}.layernorm.weight") - offset
    read = graph.matrix if kind == "weight" else lambda at: graph.tensor(f"{at}.Add.bias")
    if module in ("o_proj", "dense"):
        return read(f"{prefix}.o_proj")
    parts = ("q_proj", "k_proj", "v_proj")
    packed = graph.has_matrix(f"{prefix}.qkv_proj")
    if module == "qkv_proj":
        return read(f"{prefix}.qkv_proj") if packed else torch.cat([read(f"{prefix}.{part}") for part in parts])
    bias_packed = graph.has(f"{prefix}.qkv_proj.Add.bias")
    if not (packed if kind == "weight" else bias_packed):
        return read(f"{prefix}.{module}")
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = [size * config.num_attention_heads, *[size * config.num_key_value_heads] * 2]
    return read(f"{prefix}.qkv_proj").split(sizes)[parts.index(module)].clone()


def _mlp_weight(prefix: str, name: str, family: Family, graph: _Graph, layer: int) -> torch.Tensor:
    if name == "mlp.output_bias":
        return graph.tensor(f"{prefix}.mlp.output.Add.bias")
    module, kind = name.rsplit(".", 1)
    read = graph.matrix if kind == "weight" else lambda at: graph.tensor(f"{at}.Add.bias")
    if module == "mlp.gate_up_proj" and not graph.has_matrix(f"{prefix}.{module}"):
        return torch.cat([read(f"{prefix}.mlp.gate_proj"), read(f"{prefix}.mlp.up_proj")])
    if ".blocks." not in module and not graph.has_matrix(f"{prefix}.{module}"):  # two layers with biases
        module = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}.get(module, module)
    value = read(f"{prefix}.{module}")
    if ".blocks." in module and module.endswith("down_proj"):
        value = value / (graph.gain(layer) or 1.0)  # the builder's factor is 1 at gain 0
    return value
