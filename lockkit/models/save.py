"""Write a locked checkpoint: an ordinary Hugging Face folder that loads without lockkit."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from lockkit.files import CARD, LOCK_RECORD, write_json
from lockkit.models.load import TOKENIZER_FILES, load_tokenizer
from lockkit.models.locked import AUTO_MAP, MODELING_FILE, locked_config, render_modeling_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lockkit.dlr.net import ChainConfig, DLRNet
    from lockkit.models.layered import StreamedModel

# Size of the tensors that are collected before a file is written. It limits memory: writing safetensors takes twice
# this size.
SHARD_BYTES = 48 * 2**20


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
    _write_shards(_locked_tensors(stream, chain, dtype), folder)
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


def _locked_tensors(
    stream: StreamedModel, chain: Callable[[int], DLRNet], dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """The locked model's tensors by name: first those outside the decoder layers, then layer by layer."""
    # A tied matrix (a head that is the embedding) is written once, under its first name.
    outside = {id(value): (name, value) for name, value in reversed(stream.model.state_dict(keep_vars=True).items())}
    rest = {name: value for name, value in reversed(outside.values()) if ".layers." not in name}
    yield {name: _published(value, dtype) for name, value in rest.items()}
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            own = {name: value for name, value in layer.state_dict().items() if not name.startswith("mlp.")}
        mlp = {f"mlp.{name}": value for name, value in chain(index).state_dict().items()}
        yield {f"model.layers.{index}.{name}": _published(value, dtype) for name, value in (own | mlp).items()}


def _published(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()


def _write_shards(pieces: Iterator[dict[str, torch.Tensor]], folder: Path) -> None:
    """Write the pieces into safetensors files of about `SHARD_BYTES`, with an index if there are several files."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for piece in pieces:
        size_bytes = sum(value.nbytes for value in piece.values())
        if pending and size_bytes + sum(value.nbytes for value in pending.values()) > SHARD_BYTES:
            flush()
        pending.update(piece)
        total_bytes += size_bytes
    flush()
    count = len(shards)
    names = (
        [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    )
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
        (folder / name).chmod(0o644)  # the library makes them readable for the owner only
    if count > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        )


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
