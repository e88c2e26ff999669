"""Locked checkpoints on disk: files as `save_pretrained` splits them, written with one tensor in memory at a time."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from conftest import QUICK
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.models import save
from lockkit.models.save import TensorHead, write_shards


def heads_of(tensors: dict[str, torch.Tensor]) -> list[TensorHead]:
    return [TensorHead(name, value.dtype, value.shape) for name, value in tensors.items()]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
def test_files_are_what_safetensors_reads(tmp_path, dtype):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b.ü": torch.tensor(1), "none": torch.zeros(0, 4)}
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    write_shards(heads_of(tensors), tensors.values(), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_is_written_before_the_next_is_made(tmp_path, monkeypatch):
    """The files split where the limit says, as by transformers' own split, and no tensor is kept."""
    from huggingface_hub import split_torch_state_dict_into_shards

    monkeypatch.setattr(save, "SHARD_BYTES", 1000)
    shapes = {f"t{index}": (size,) for index, size in enumerate((100, 100, 100, 140, 10, 400))}
    alive: list[weakref.ref] = []

    def tensors():
        for shape in shapes.values():
            assert not any(other() is not None for other in alive[:-1])
            value = torch.rand(shape)
            alive.append(weakref.ref(value))
            yield value
            del value

    write_shards([TensorHead(n, torch.float32, torch.Size(shape)) for n, shape in shapes.items()], tensors(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(state, max_shard_size=1000)
    groups = {tuple(sorted(names)) for names in split.filename_to_tensors.values()}
    by_file: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, []).append(name)
    assert {tuple(sorted(names)) for names in by_file.values()} == groups
    assert index["metadata"]["total_size"] == split.metadata["total_size"]


def test_a_wrong_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a is"):
        write_shards([TensorHead("a", torch.float32, torch.Size([2]))], [torch.zeros(3)], tmp_path)


def test_a_lock_in_several_files_loads_in_transformers(originals, tmp_path, monkeypatch):
    lock_model(str(originals("qwen3")), tmp_path / "one", LockConfig(**QUICK))
    monkeypatch.setattr(save, "SHARD_BYTES", 300_000)
    lock_model(str(originals("qwen3")), tmp_path / "many", LockConfig(**QUICK))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    one, many = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).state_dict()
        for name in ("one", "many")
    )
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
