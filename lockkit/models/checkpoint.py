"""What the weight files of a folder hold, and whether that is the model of its config.json.

The names, sizes and dtypes of tensors are compared with the model before anything else is read. So loading a model as a
whole and layer by layer refuse the same folders. As in transformers, tensors that the model does not have are ignored;
one line says so. weight_files.py says which files are read.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from lockkit.errors import UnsupportedModelError, UsageError, counted, first_line
from lockkit.files import impostor, read_json
from lockkit.models.weight_files import INDEX_FILE, SINGLE_FILE, ignored_files, listed, weight_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

PIECE_VALUES = 1 << 22  # of a tensor, that are read or written at a time
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD = "lm_head.weight"
# What the names of tensors begin with if the model was saved inside another one, and what to save instead.
_WRAPPERS = {
    "base_model.model.": "the merged model (merge_and_unload in peft)",
    "module.": "the model itself (the attribute module)",
    "_orig_mod.": "the model before torch.compile (the attribute _orig_mod)",
    "_fsdp_wrapped_module.": "the full state dict",
}
# Other formats of weights, by their first bytes.
_OTHER_FORMATS = {
    b"PK": "is a pickle of PyTorch, and pickled weights are never loaded: convert it to safetensors",
    b"\x80": "is a pickle of PyTorch, and pickled weights are never loaded: convert it to safetensors",
    b"GGUF": "is a GGUF file: use the model in safetensors that it was made from",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file.

    Attributes:
        file, name: where it is, and its name there.
        dtype: its type, by its name in safetensors, such as `BF16`.
        shape: its sizes.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors in the weight files of a folder, by their names there. Only the files' heads are read.

    Raises:
        UsageError: the files cannot be used (`weight_files`), one is not safetensors, or two hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in _head(file):
            if tensor.name in found:
                raise UsageError(
                    f"{found[tensor.name].file} and {file.name} both hold {tensor.name}: remove one, or change MODEL"
                )
            found[tensor.name] = tensor
    return found


def _head(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in list(tensors.keys())}
            return [StoredTensor(file, name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{file} {impostor(file) or _other_format(file) or _incomplete(error)}, or change MODEL"
        ) from error


def _other_format(file: Path) -> str | None:
    """The format of weights that are not safetensors, in words; None if that is unknown."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError:
        return None
    if start[8:9] == b"{":  # safetensors, cut off: the length of the head, then the head as JSON
        return None
    return next((words for magic, words in _OTHER_FORMATS.items() if start.startswith(magic)), None)


def _incomplete(error: Exception) -> str:
    return f"is not a complete safetensors file ({first_line(error)}): copy it again"


def stored_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that transformers calls "auto": that of config.json, else that of the first floating-point tensor.

    Raises:
        UsageError: the files cannot be used, or config.json names a dtype that a model cannot have.
    """
    named = getattr(config, "dtype", None)
    index = folder / INDEX_FILE
    if named is None and weight_files(folder) != [folder / SINGLE_FILE]:
        named = read_json(index, "MODEL")["metadata"].get("dtype")  # transformers reads it there, too
    if named is None:
        first = next((t.dtype for t in stored_tensors(folder).values() if t.dtype in _DTYPES), "F32")
        return _DTYPES[first]
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES.values():
        raise UsageError(f"dtype is {named} in {folder}, which is not a dtype of a model: correct it, or change MODEL")
    return dtype


class Checkpoint:
    """The weights of a model folder, read by their names in the model.

    Args:
        folder: the model's folder.
        model: the model of its configuration. Its own weights do not matter and may be on `meta`.

    Attributes:
        stored: the tensors that the folder has for the model, by their names in the model.

    Raises:
        UsageError: the files cannot be used (`stored_tensors`), or do not hold the weights of this model.
        UnsupportedModelError: the weights are quantised.
    """

    def __init__(self, folder: Path, model: PreTrainedModel):
        self.folder = folder
        tensors = stored_tensors(folder)
        if unused := ignored_files(folder):
            read = listed([file.name for file in weight_files(folder)])
            _say_once(f"{folder}: the weights are read from {read}; ignored, as in transformers: {listed(unused)}")
        expected = model.state_dict()
        self.stored: dict[str, StoredTensor] = {}
        unexpected = []
        for tensor in tensors.values():
            name = _name_in_model(tensor.name, expected)
            if name not in expected:
                unexpected.append(tensor.name)
                continue
            if name in self.stored:
                raise UsageError(
                    f"the weights in {folder} have {name} twice, as {self.stored[name].name} and {tensor.name}: "
                    "remove one, or change MODEL"
                )
            self.stored[name] = tensor
        self._require_known_prefix(model, list(tensors))
        self._require_listed(model)
        self._require_layers(model.config.num_hidden_layers, list(tensors))
        for name, tensor in self.stored.items():
            self._require_fit(name, tensor, expected[name], model.config.vocab_size)
        self._require_complete(model)
        # Old checkpoints have the rotary frequencies of each layer. The model computes them.
        if unexpected := [name for name in unexpected if "rotary_emb.inv_freq" not in name]:
            _say_once(
                f"{folder}: ignored, as in transformers, because config.json has no such part: {listed(unexpected)}"
            )

    def _require_known_prefix(self, model: PreTrainedModel, names: list[str]) -> None:
        """Refuse weights of a model inside another one, such as a wrapper for training. transformers ignores them."""
        wrapper = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in names)), None)
        if wrapper and self._missing(model):
            raise UsageError(
                f"the names of the weights in {self.folder} begin with {wrapper}: save {_WRAPPERS[wrapper]}, or change "
                "MODEL"
            )

    def _require_listed(self, model: PreTrainedModel) -> None:
        """Refuse weights that are incomplete because a file in the folder that has the rest is not read."""
        missing, expected = self._missing(model), model.state_dict()
        for file in (self.folder / name for name in ignored_files(self.folder) if missing and name != INDEX_FILE):
            held: set[str] = set()
            with contextlib.suppress(UsageError):  # what is not read may be broken
                held = {_name_in_model(tensor.name, expected) for tensor in _head(file)} & missing
            if held:
                index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
                cause = f"{single} is there" if single.is_file() else f"{index} does not list it"
                raise UsageError(
                    f"{file.name} has {counted(len(held), 'tensor')} of the model ({listed(sorted(held))}), but is not "
                    f"read, because {cause}: correct the index ({INDEX_FILE}), or change MODEL"
                )

    def _require_layers(self, layers: int, names: list[str]) -> None:
        """Refuse weights with more or fewer decoder layers than config.json says. transformers drops the others."""
        found = [re.match(r"(?:model\.)?layers\.(\d+)\.(?!.*rotary_emb\.inv_freq)", name) for name in names]
        stored = 1 + max((int(match[1]) for match in found if match), default=layers - 1)
        if stored != layers:
            raise UsageError(
                f"num_hidden_layers is {layers} in {self.folder}/config.json, but the weights have "
                f"{counted(stored, 'decoder layer')}: correct config.json, or change MODEL"
            )

    def _require_fit(self, name: str, tensor: StoredTensor, expected: torch.Tensor, vocab_size: int) -> None:
        where, shape = f"{tensor.name} in {tensor.file}", tuple(expected.shape)
        if tensor.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{where} has the dtype {tensor.dtype}, so the model is quantised: give MODEL the unquantised original"
            )
        if tensor.shape == shape:
            return
        if shape[0] == vocab_size and tensor.shape[1:] == shape[1:]:
            raise UsageError(
                f"vocab_size is {vocab_size} in config.json, but {where} has {tensor.shape[0]} rows: correct "
                "config.json, or change MODEL"
            )
        raise UsageError(
            f"the sizes of {where} are {list(tensor.shape)}, and config.json says {list(shape)}: change MODEL"
        )

    def _missing(self, model: PreTrainedModel) -> set[str]:
        """The names of the model's tensors that the checkpoint lacks. Of tied ones, one is enough."""
        missing = model.state_dict().keys() - self.stored.keys()
        for one, other in model.all_tied_weights_keys.items():
            if not {one, other} <= missing:
                missing -= {one, other}
        return missing

    def _require_complete(self, model: PreTrainedModel) -> None:
        missing = self._missing(model)
        if missing == {HEAD}:
            raise UsageError(
                f"the weights in {self.folder} lack {HEAD}: set tie_word_embeddings to true in config.json if the head "
                "is the embeddings, or change MODEL"
            )
        if missing:
            raise UsageError(
                f"the weights in {self.folder} lack {counted(len(missing), 'tensor')} ({listed(sorted(missing))}): "
                "change MODEL"
            )

    def read(self, names: list[str], device: str | torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Read the tensors of `names` that the checkpoint has, as `dtype`."""
        found = {}
        for name in (name for name in names if name in self.stored):
            stored = self.stored[name]
            if math.prod(stored.shape) > PIECE_VALUES:
                found[name] = torch.empty(stored.shape, dtype=dtype, device=device)
                for rows, piece in self._pieces(stored):
                    found[name][rows] = piece
            else:
                with safe_open(stored.file, "pt") as tensors:
                    found[name] = tensors.get_tensor(stored.name).to(device, dtype, copy=True)
        return found

    def holds(self, name: str, value: torch.Tensor) -> bool:
        """Whether the checkpoint has the tensor `name`, and read as `value`'s dtype it is `value` bit by bit."""
        stored = self.stored.get(name)
        if stored is None or not stored.shape or stored.shape != tuple(value.shape) or not value.is_contiguous():
            return False
        return all(
            torch.equal(piece.to(value.device, value.dtype).view(torch.uint8), value[rows].view(torch.uint8))
            for rows, piece in self._pieces(stored)
        )

    @staticmethod
    def _pieces(stored: StoredTensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows of a tensor, at most `PIECE_VALUES` values at a time, as stored.

        The file is opened for each piece, because what is read of a mapped file counts as this process's memory until
        the file is closed.
        """
        step = max(1, PIECE_VALUES * stored.shape[0] // max(1, math.prod(stored.shape)))
        for start in range(0, stored.shape[0], step):
            rows = slice(start, start + step)
            with safe_open(stored.file, "pt") as tensors:
                yield rows, tensors.get_slice(stored.name)[rows]

    def exact_in(self, names: list[str], dtype: torch.dtype) -> bool:
        """Whether every value of the dtypes in which `names` are stored is one of `dtype`."""
        stored = [_DTYPES[self.stored[name].dtype] for name in names if name in self.stored]
        return all(torch.promote_types(each, dtype) == dtype for each in stored)


def _name_in_model(stored: str, expected: dict[str, torch.Tensor]) -> str:
    """The name in the model of a stored tensor, which may lack the base model's prefix or have one too many."""
    without = re.sub(r"^model.", "", stored)  # any character, as in transformers
    if without != stored and without in expected:
        return without
    return f"model.{stored}" if f"model.{stored}" in expected else stored


def note_untied_head(model: PreTrainedModel, folder: Path) -> None:
    """Set `tie_word_embeddings` to false if the weights have a head that differs from the embeddings.

    transformers does not tie such a head, and leaves its configuration as it is. A model that is saved or exported
    with that configuration would have the embeddings as its head.
    """
    if model.config.tie_word_embeddings and HEAD not in model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False
        _say_once(
            f"{folder}: the weights have a head ({HEAD}) that differs from the embeddings, so "
            "tie_word_embeddings is taken as false"
        )


@functools.cache
def _say_once(line: str) -> None:
    """Log a line once in a process, because a command opens the same folder several times."""
    log.warning("%s", line)
