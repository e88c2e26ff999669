"""Weights outside the decoder layers: shared by an original and its lock, and freed while text is sampled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lockkit.models.families import family_of
from lockkit.models.layered import StreamedModel
from lockkit.models.load import load_config

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWN_HEAD_AND_TIED = pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])


def streamed(folder: Path, beside: StreamedModel | None = None, dtype: torch.dtype = torch.float32) -> StreamedModel:
    config = load_config(folder)
    return StreamedModel(folder, config, family_of(config), "cpu", dtype, beside)


def test_a_model_of_another_dtype_is_not_shared(originals):
    half = streamed(originals("llama"), dtype=torch.float16)
    found = streamed(originals("llama"), beside=half).outside()
    assert {value.dtype for value in found.values()} == {torch.float32}


@OWN_HEAD_AND_TIED
def test_an_original_and_its_lock_have_one_copy(model_type, originals, locks):
    original = streamed(originals(model_type))
    found, expected = streamed(locks(model_type), beside=original).outside(), original.outside()
    assert {EMBEDDINGS, HEAD} < found.keys() == expected.keys()
    assert all(found[name].data_ptr() == value.data_ptr() for name, value in expected.items())


@OWN_HEAD_AND_TIED
def test_a_tensor_that_differs_in_the_last_bit_is_what_the_file_has(
    model_type, originals, locks, tmp_path, monkeypatch
):
    monkeypatch.setattr("lockkit.models.checkpoint.PIECE_VALUES", 1000)
    folder = shutil.copytree(locks(model_type), tmp_path / "locked")
    weights = load_file(folder / "model.safetensors")
    weights[EMBEDDINGS][-1, -1] = weights[EMBEDDINGS][-1, -1].nextafter(torch.tensor(9.0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    original = streamed(originals(model_type))
    before = {name: value.clone() for name, value in original.outside().items()}
    found = streamed(folder, beside=original).outside()
    assert torch.equal(found[EMBEDDINGS], weights[EMBEDDINGS])
    assert torch.equal(found[HEAD], weights.get(HEAD, weights[EMBEDDINGS]))
    assert {name for name, value in original.outside().items() if value.data_ptr() == found[name].data_ptr()} == (
        before.keys() - {EMBEDDINGS} - ({HEAD} - weights.keys())
    )
    assert all(torch.equal(value, before[name]) for name, value in original.outside().items())


@OWN_HEAD_AND_TIED
def test_weights_that_were_freed_are_read_again(model_type, originals):
    stream = streamed(originals(model_type))
    states = torch.randn(3, stream.config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits, expected = stream.head(states), stream.outside()
    with stream.without_outside():
        assert all(value.is_meta for value in stream.outside().values())
    assert all(torch.equal(value, expected[name]) for name, value in stream.outside().items())
    assert torch.equal(stream.head(states), logits)
    tied = stream.model.get_output_embeddings().weight is stream.model.get_input_embeddings().weight
    assert tied is (model_type == "gemma3_text")
