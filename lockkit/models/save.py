"""Write a locked checkpoint: an ordinary Hugging Face folder that loads without lockkit.

The weights are in files of at most `SHARD_BYTES`, as `save_pretrained` splits them. Names and shapes of all tensors are
known before, so that the head of each file is written first, and the tensors follow one after the other. Each is rounded
piece by piece, so no second copy of the table of embeddings is in memory.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lockkit.files import CARD, LOCK_RECORD, write_json
from lockkit.models.checkpoint import PIECE_VALUES
from lockkit.models.load import TOKENIZER_FILES, load_tokenizer
from lockkit.models.locked import AUTO_MAP, MODELING_FILE, locked_config, render_modeling_file

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer
    from transformers import PreTrainedConfig

    from lockkit.dlr.net import ChainConfig, DLRNet
    from lockkit.models.layered import StreamedModel

SHARD_BYTES = 5_000_000_000
# Names of dtypes in safetensors.
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    },
}


@dataclass(frozen=True)
class TensorHead:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def size_bytes(self) -> int:
        """Its size in the file."""
        return self.shape.numel() * self.dtype.itemsize


def save_locked_weights(
    stream: StreamedModel,
    chain: Callable[[int], DLRNet],
    folder: Path,
    chains: ChainConfig,
    dtype: torch.dtype,
) -> None:
    """Write weights, configuration, modelling file and tokenizer of a locked model, one layer at a time.

    Args:
        stream: the original. All its weights except the MLPs are copied, rounded to `dtype`.
        chain: returns the chain of a layer, in `dtype`, given the layer's index.
        folder: the folder to write to.
        chains: description of the chains, with their gains.
        dtype: of the weights.
    """
    write_shards(_heads(stream, chain, dtype), _locked_tensors(stream, chain), folder)
    _write_config(stream, folder, chains, dtype)
    (folder / MODELING_FILE).write_text(render_modeling_file(stream.family), encoding="utf-8")
    copy_tokenizer(stream.folder, folder)
    keep_tokenizer_class(stream.folder, folder)
    if (stream.folder / "generation_config.json").is_file():
        shutil.copyfile(stream.folder / "generation_config.json", folder / "generation_config.json")
    else:
        stream.model.generation_config.save_pretrained(folder)


def save_description(folder: Path, record: dict[str, Any], card: str) -> None:
    """Write `lockkit.json` (`record`) and the model card (`card`, Markdown) into a locked checkpoint."""
    write_json(folder / LOCK_RECORD, record)
    (folder / CARD).write_text(card, encoding="utf-8")


def _outside(stream: StreamedModel) -> dict[str, torch.Tensor]:
    """The tensors outside the decoder layers. A tied matrix (a head that is the embedding) is there once, first name."""
    outside = {id(value): (name, value) for name, value in reversed(stream.model.state_dict(keep_vars=True).items())}
    return {name: value for name, value in reversed(outside.values()) if ".layers." not in name}


def _heads(stream: StreamedModel, chain: Callable[[int], DLRNet], dtype: torch.dtype) -> list[TensorHead]:
    """Names and shapes of what `_locked_tensors` yields, in the same order. All chains have the same shapes."""
    found = list(_outside(stream).items())
    mlp = [(f"mlp.{name}", value.to("meta")) for name, value in chain(0).state_dict().items()]
    for index, layer in enumerate(stream.layers):
        own = [(name, value) for name, value in layer.state_dict().items() if not name.startswith("mlp.")]
        found += [(f"model.layers.{index}.{name}", value) for name, value in [*own, *mlp]]
    return [TensorHead(name, dtype if value.is_floating_point() else value.dtype, value.shape) for name, value in found]


def _locked_tensors(stream: StreamedModel, chain: Callable[[int], DLRNet]) -> Iterator[torch.Tensor]:
    """The locked model's tensors: first those outside the decoder layers, then layer by layer."""
    yield from _outside(stream).values()
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            for name, value in layer.state_dict().items():
                if not name.startswith("mlp."):
                    yield value
        yield from chain(index).state_dict().values()


def write_shards(heads: list[TensorHead], tensors: Iterable[torch.Tensor], folder: Path) -> None:
    """Write tensors into safetensors files of at most `SHARD_BYTES`, with an index if there are several files.

    Args:
        heads: names, dtypes and shapes of all tensors.
        tensors: the tensors, in the same order. Each is rounded to the dtype in its head, and written before the next
            is asked for.
        folder: that gets the files.

    Raises:
        ValueError: a tensor has not the shape in its head.
    """
    shards: list[list[TensorHead]] = [[]]
    for head in heads:
        if shards[-1] and sum(other.size_bytes for other in shards[-1]) + head.size_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(head)
    count, source = len(shards), iter(tensors)
    names = (
        [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    )
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_file_head(shard))
            for head in shard:
                for piece in _bytes(head, next(source)):
                    file.write(piece)
    if count > 1:
        weight_map = {head.name: name for name, shard in zip(names, shards, strict=True) for head in shard}
        total_bytes = sum(head.size_bytes for head in heads)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        )


def _file_head(shard: list[TensorHead]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, padded so that the tensors are aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for head in shard:
        end = offset + head.size_bytes
        entries[head.name] = {
            "dtype": _DTYPES[head.dtype], "shape": list(head.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(head: TensorHead, value: torch.Tensor) -> Iterator[Buffer]:
    if value.shape != head.shape:
        raise ValueError(f"{head.name} is {tuple(value.shape)}, not {tuple(head.shape)}")
    for piece in value.detach().reshape(-1).split(PIECE_VALUES):
        yield cast("Buffer", piece.to("cpu", head.dtype).view(torch.uint8).numpy())


def _write_config(stream: StreamedModel, folder: Path, chains: ChainConfig, dtype: torch.dtype) -> None:
    configuration: PreTrainedConfig = locked_config(stream.config, stream.family, chains)
    configuration.dtype = dtype
    configuration.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = AUTO_MAP
    config["architectures"] = ["DLRLockForCausalLM"]
    write_json(file, config | transformers_4_rope(config))


def transformers_4_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE settings under the names that transformers 4 reads. Without them it uses defaults, without a warning.

    transformers 5 has them in `rope_parameters`: one set, or one set per type of layer.
    """
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:
        local = parameters["sliding_attention"]["rope_theta"]
        return transformers_4_rope({"rope_parameters": parameters["full_attention"]}) | {"rope_local_base_freq": local}
    names = ("rope_theta", "partial_rotary_factor")
    found = {name: parameters[name] for name in names if name in parameters}
    if parameters.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in parameters.items() if key not in names}
        found["rope_scaling"]["type"] = parameters["rope_type"]
    return found


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files unchanged. Saving them with another version of transformers could change them."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def keep_tokenizer_class(source: Path, folder: Path) -> None:
    """Name the class of the original's tokenizer in the tokenizer of its locked model, unless it is named there.

    AutoTokenizer corrects the class that a tokenizer names, by the type of the model. It does not know locked types.
    Without any class, transformers 4 would need the code in the folder.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wanted = type(load_tokenizer(source)).__name__
    with contextlib.suppress(Exception):  # a class that cannot be loaded is not the wanted one
        found = type(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)).__name__
        if found == wanted and settings.get("tokenizer_class"):
            return
    # The name of the general class in transformers 4, which transformers 5 also knows.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast" if wanted == "TokenizersBackend" else wanted
    write_json(path, settings)
