"""Models in GGUF files. The files are written, and read for comparison, by the package gguf of llama.cpp."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from filelock import FileLock
from safetensors.torch import load_file
from tiny import tiny_model

from lockkit.errors import UsageError
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.models.load import DEMO, load_model, load_tokenizer, resolve_model

gguf = pytest.importorskip("gguf")


def write_gguf(
    path: Path,
    architecture: str = "qwen2",
    *,
    without: tuple[str, ...] = (),
    block_count: int = 2,
    feed_forward: int = 64,
    context: int = 256,
) -> dict[str, torch.Tensor]:
    """Write a tiny Qwen2 of two layers with matrices of 8 bits, 64 wide in their MLPs.

    Args:
        path: the file to write.
        architecture, block_count, feed_forward, context: of its metadata.
        without: names of tensors that it lacks.

    Returns:
        The values that the file stores, by transformers' names.
    """
    model = tiny_model("qwen2", intermediate_size=64)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(block_count)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    stored = {}
    for name, value in model.state_dict().items():
        array, kind = value.numpy(), gguf.GGMLQuantizationType.F32
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quantize(array, kind)
        own_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own_name in without:
            continue
        writer.add_tensor(own_name, array, raw_dtype=kind)
        stored[name] = torch.from_numpy(gguf.dequantize(array, kind).reshape(value.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _add_tokenizer(writer) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for _, index in vocab]
    )
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lockkit" / "gguf"


def test_a_gguf_file_is_locked_with_the_values_that_it_stores(tmp_path, cache):
    file = tmp_path / "tiny model.gguf"
    stored = write_gguf(file)
    lock_model(str(file), tmp_path / "locked", LockConfig(**QUICK | {"data": "stdlib"}))
    (folder,) = cache.iterdir()
    read = load_file(folder / "model.safetensors")
    assert read.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(read[name], value), name
    locked = load_file(tmp_path / "locked" / "model.safetensors")
    assert torch.equal(locked["lm_head.weight"], stored["lm_head.weight"])
    record = json.loads((tmp_path / "locked" / "lockkit.json").read_text())
    assert record["model"] == "tiny model.gguf"
    text = "def add(a, b):\n    return a + b  # naïve\n"
    assert load_tokenizer(folder)(text).input_ids == load_tokenizer(DEMO)(text).input_ids


def test_a_gguf_file_is_converted_once(tmp_path, cache, caplog):
    write_gguf(tmp_path / "a.gguf")
    folder = resolve_model(str(tmp_path / "a.gguf"))
    assert "dequantised" in caplog.text
    caplog.clear()
    assert resolve_model(str(tmp_path / "a.gguf")) == folder
    assert not caplog.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"PK" + content, "not a GGUF file"),
        (lambda content: content[:2000], "cannot be read"),
        (lambda content: content[: len(content) // 2], "cannot be read"),
    ],
)
def test_a_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path, cache, damage, reason):
    file = tmp_path / "broken.gguf"
    write_gguf(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UsageError, match=f"broken.gguf.*{reason}.*change MODEL"):
        resolve_model(str(file))
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"without": ("blk.1.ffn_down.weight",)}, r"lacks 1 tensor \(model.layers.1.mlp.down_proj.weight\)"),
        ({"without": ("output_norm.weight",)}, r"lacks 1 tensor \(model.norm.weight\)"),
        ({"without": ("token_embd.weight", "blk.0.attn_q.bias")}, "lacks 2 tensors .*embed_tokens"),
        ({"block_count": 1}, "block_count is 1 in .*, but it has the tensors of 2 layers"),
        ({"block_count": 3}, "block_count is 3 in .*, but it has the tensors of 2 layers"),
        ({"feed_forward": 96}, r"sizes of model.layers.0.mlp.* in .* are \[.*64.*\], and its metadata says \[.*96"),
    ],
)
def test_an_incomplete_gguf_file_is_refused_and_leaves_nothing(tmp_path, cache, options, reason):
    file = tmp_path / "incomplete.gguf"
    write_gguf(file, **options)
    with pytest.raises(UsageError, match=f"{reason}.*: change MODEL") as refused:
        resolve_model(str(file))
    assert len(str(refused.value).splitlines()) == 1 and file.name in str(refused.value)
    assert not list(cache.iterdir())


def test_a_gguf_file_without_a_head_has_tied_embeddings(tmp_path):
    stored = write_gguf(tmp_path / "tied.gguf", without=("output.weight",))
    model, _ = load_model(resolve_model(str(tmp_path / "tied.gguf")))
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "new.gguf", "grok9")
    with pytest.raises(UsageError, match=r"new.gguf cannot be read \(.*grok9.*\): change MODEL"):
        resolve_model(str(tmp_path / "new.gguf"))


def test_a_file_that_another_process_converts_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    write_gguf(file)
    folder = resolve_model(str(file))
    folder.rename(tmp_path / "converted")
    # In this order, so that the lock is released before the pool waits for its thread.
    with ThreadPoolExecutor(1) as pool, FileLock(folder.parents[1] / "locks" / f"{folder.name}.lock"):
        waiting = pool.submit(resolve_model, str(file))
        end = time.monotonic() + 20
        while "another process dequantises model.gguf: waiting for it" not in caplog.text:
            assert time.monotonic() < end and not waiting.done()
            time.sleep(0.01)
        (tmp_path / "converted").rename(folder)
        os.utime(folder / "config.json", (1, 1))
    assert waiting.result() == folder and (folder / "config.json").stat().st_mtime == 1  # not written again


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    write_gguf(file)
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="change XDG_CACHE_HOME"):
        resolve_model(str(file))
