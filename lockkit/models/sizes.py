"""The sizes of a model, read from its files without PyTorch and transformers, whose imports take seconds.

1. `config.json` must name a supported family and plain sizes.
2. The heads of the weight files must have exactly the tensors of such a model: all layers the same, the MLPs and the
   embeddings of the sizes in `config.json`, and nothing unknown beside them.

Where anything else is found, transformers has to decide whether the folder is a model, and what its sizes are.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockkit.dlr.shape import MLPShape
from lockkit.errors import UsageError
from lockkit.files import read_json
from lockkit.models.config_checks import checked_generation_config
from lockkit.models.families import FAMILIES, Family
from lockkit.models.weight_files import ignored_files, weight_files

TOKENS_IN_A_BATCH = 2048  # of a capture of activations (capture.py)
BYTES_OF_DTYPE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu2")
_OUTSIDE = re.compile(r"model\.(embed_tokens|norm|final_layernorm)\.(weight|bias)|lm_head\.(weight|bias)")
_HEAD = "lm_head.weight"
_TIED = ("gemma2", "gemma3_text")  # families whose head is the table of embeddings unless config.json says otherwise
_DECIDES = ("quantization_config", "auto_map", "transformers_weights", "dlr")  # in config.json, for transformers

# Entries of generation_config.json whose values checked_generation_config checks, or that have no meaning for one.
_GENERATION = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "max_length", "max_new_tokens", "transformers_version", "_from_model_config"),
    *("output_attentions", "output_hidden_states", "use_cache"),
}
_ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelSizes:
    """The sizes on which the cost of a lock depends.

    Attributes:
        model_type: the family's name.
        shape: of the MLPs.
        layers: number of decoder layers.
        vocab_size: number of logits per token.
        parameters: of the whole model; a matrix that stands twice counts once.
        layer_parameters: of one decoder layer.
        cache_values: numbers in the cache of keys and values, per token.
        dtype: of the weights, by its name in PyTorch.
    """

    model_type: str
    shape: MLPShape
    layers: int
    vocab_size: int
    parameters: int
    layer_parameters: int
    cache_values: int
    dtype: str


def sizes_in_files(folder: Path) -> ModelSizes | None:
    """The sizes of the model in a folder. None where only transformers can tell, also whether it is a model at all."""
    with contextlib.suppress(UsageError, OSError, ValueError, KeyError, TypeError, AttributeError):
        raw = read_json(folder / "config.json", "MODEL")
        family = FAMILIES.get(raw["model_type"])
        if family is None or any(raw.get(name) for name in _DECIDES) or ignored_files(folder):
            return None
        generation = checked_generation_config(folder) or {}
        if not generation.keys() <= _GENERATION or not _plain_rope(raw):
            return None
        return _sizes(raw, family, _stored(folder))
    return None


def _stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and sizes of each tensor, from the heads of the files: a length of 8 bytes, then JSON."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(folder):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size - 8 - length
            if size < 0:
                raise ValueError("cut off")
            head = json.loads(opened.read(length))
        head.pop("__metadata__", None)
        if max(tensor["data_offsets"][1] for tensor in head.values()) != size or found.keys() & head.keys():
            raise ValueError("cut off, or a tensor stands twice")
        found |= {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in head.items()}
    return found


def _sizes(raw: dict[str, Any], family: Family, stored: dict[str, tuple[str, tuple[int, ...]]]) -> ModelSizes | None:
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    if not all(value is None or (type(value) is int and value > 0) for value in (kv_heads, head_dim)):
        return None
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    if not all(type(raw[name]) is int and raw[name] > 0 for name in names):
        return None
    hidden, width, layers, vocab, heads = (raw[name] for name in names)
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    pad, activation = raw.get("pad_token_id"), raw.get("hidden_activation") or raw.get("hidden_act")
    if dtype not in BYTES_OF_DTYPE or activation not in _ACTIVATIONS or not (pad is None or 0 <= pad < vocab):
        return None
    if (head_dim is None and hidden % heads) or heads % (kv_heads or heads):
        return None
    outside, of_layers = _divided({name: shape for name, (_, shape) in stored.items()})
    layer = of_layers.get(0, {})
    shape = _mlp(layer, family, hidden, width)
    tied = raw.get("tie_word_embeddings", family.model_type in _TIED)
    fits = (
        all(kind in _STORED for kind, _ in stored.values())
        and sorted(of_layers) == list(range(layers))
        and all(other == layer for other in of_layers.values())
        and all(map(_OUTSIDE.fullmatch, outside))
        and any("norm.weight" in name for name in outside)
        and outside.get("model.embed_tokens.weight") == (vocab, hidden)
        and ((tied is True and _HEAD not in outside) or (tied is False and outside.get(_HEAD) == (vocab, hidden)))
    )
    if not fits or shape is None:
        return None
    keys = layer.get("self_attn.k_proj.weight")
    kv_values = keys[0] if keys else (kv_heads or heads) * (hidden // heads)
    layer_parameters = sum(map(math.prod, layer.values()))
    return ModelSizes(
        model_type=family.model_type,
        shape=shape,
        layers=layers,
        vocab_size=vocab,
        parameters=sum(map(math.prod, outside.values())) + layers * layer_parameters,
        layer_parameters=layer_parameters,
        cache_values=2 * layers * kv_values,
        dtype=dtype,
    )


def _plain_rope(raw: dict[str, Any]) -> bool:
    """Whether the rotary embeddings are of a kind that transformers has."""
    found = [raw.get("rope_scaling"), raw.get("rope_parameters")]
    entries = [entry for entry in found if entry is not None]
    entries += [inner for entry in entries for inner in entry.values() if isinstance(inner, dict)]
    kinds = [entry.get("rope_type", entry.get("type", "default")) for entry in entries]
    return all(kind in _ROPES for kind in kinds)


def _divided(tensors: Shapes) -> tuple[Shapes, dict[int, Shapes]]:
    """The tensors outside the decoder layers, and those of each layer by their names in it."""
    outside: Shapes = {}
    layers: dict[int, Shapes] = {}
    for name, sizes in tensors.items():
        if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            layers.setdefault(int(found[1]), {})[found[2]] = sizes
        else:
            outside[name] = sizes
    return outside, layers


def _mlp(layer: Shapes, family: Family, hidden: int, width: int) -> MLPShape | None:
    """The shape of the MLP in a layer; None if its matrices are not those of the family in these sizes."""
    expected = {f"mlp.{family.down}.weight": (hidden, width)}
    if family.packed_gate_up:
        up = family.packed_gate_up
        expected[f"mlp.{up}.weight"] = (2 * width, hidden)
    else:
        up = family.up
        expected |= {f"mlp.{name}.weight": (width, hidden) for name in (up, family.gate) if name}
    attention = any(name.startswith("self_attn.") for name in layer)
    matrices = {name for name in layer if name.startswith("mlp.") and name.endswith(".weight")}
    if not attention or matrices != expected.keys() or any(layer[name] != sizes for name, sizes in expected.items()):
        return None
    return MLPShape(hidden, width, family.gated, f"mlp.{up}.bias" in layer, f"mlp.{family.down}.bias" in layer)
