"""Which files in a model folder hold its weights. Opens none of them, and imports no PyTorch.

There is one rule, that of transformers' `from_pretrained(folder, use_safetensors=True)`: `model.safetensors`, or else
all files that `model.safetensors.index.json` names. Everything that reads, hashes or checks weights uses it. A folder
from which transformers would load something else besides (an adapter, pickles) is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
# transformers reads files of such names with PyTorch's distributed checkpoints, before all others.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in the order in which transformers reads them. None is opened.

    Raises:
        UsageError: there are none, the index is broken, or transformers would read something else besides.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise UsageError(
            f"{folder} has an adapter ({ADAPTER_FILE}), which transformers would add to the model: merge it "
            "(merge_and_unload in peft) or move it to another folder, or change MODEL"
        )
    if any(_DISTRIBUTED.fullmatch(file.name) for file in folder.glob("shard-*")):
        raise UsageError(f"{folder} has a distributed checkpoint: save the model in one process, or change MODEL")
    _refuse_other_name(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    for file in (single, index):
        if file.is_symlink() and not file.exists():
            raise UsageError(f"{file} is a link to a file that does not exist: change MODEL")
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    others = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".safetensors" and file.is_file())
    if others:
        raise UsageError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, and {listed(others)} is not read under that name: "
            "rename it, or change MODEL"
        )
    raise UsageError(f"{folder} has no safetensors (pickled weights are never loaded): change MODEL")


def _refuse_other_name(folder: Path) -> None:
    """Refuse a configuration that names the weight file itself."""
    config = folder / "config.json"
    named = read_json(config, "MODEL").get("transformers_weights") if config.is_file() else None
    if named is not None:
        raise UsageError(
            f"{config} names its own weight file (transformers_weights): remove that entry and call the file "
            f"{SINGLE_FILE}, or change MODEL"
        )


def _shards(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        UsageError: the index is broken, or it names a file outside of its folder or one that is not safetensors.
    """
    content = read_json(index, "MODEL")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise UsageError(f"{index} is broken (it must have weight_map and metadata): change MODEL")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise UsageError(f"{index} names '{name}', and only safetensors are loaded: change MODEL")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"{index} names '{name}', which is not a file in its folder: change MODEL")
        if not (index.parent / name).is_file():
            raise UsageError(f"{index} names '{name}', which does not exist: add it, or change MODEL")
    return [index.parent / name for name in sorted(names)]


def ignored_files(folder: Path) -> list[str]:
    """Names of weight files in the folder that are not read: other safetensors, or an index beside a single file."""
    read = weight_files(folder)
    unused = [file for file in sorted(folder.glob("*.safetensors")) if file not in read]
    if read == [folder / SINGLE_FILE] and (folder / INDEX_FILE).is_file():
        unused.append(folder / INDEX_FILE)
    return [file.name for file in unused]


def listed(names: list[str]) -> str:
    """Up to three names and the number of the others, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
