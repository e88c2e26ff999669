"""Locks of unusual weights: layers of zeros, constant outputs, values that are not finite or too large."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from lockkit.errors import DistillationError, UsageError
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.lock.sampling import draw
from lockkit.models.load import load_model


def quick(**changes) -> LockConfig:
    return LockConfig(**(QUICK | changes))


def change_weights(folder: Path, **changes: float) -> None:
    """Multiply tensors of a saved model, given by parts of their names."""
    weights = load_file(folder / "model.safetensors")
    for part, factor in changes.items():
        for name in weights:
            if part in name.replace(".", "_"):
                weights[name] = weights[name] * factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "settings",
    [
        {"end_to_end_tokens": 0},
        {"gain": 0.5, "layers_together": 2},
        {"init": "random", "coupling": 0.5, "offload": "disk"},
        {"compute_dtype": "bfloat16", "dtype": "float16"},
    ],
)
def test_the_chain_of_a_layer_of_zeros_is_zero(tmp_path, settings):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, layers_1_mlp_down=0)
    record = lock_model(str(original), tmp_path / "out", quick(**settings)).record
    assert record["layers"][1]["nmse"] == 0 < record["layers"][0]["nmse"]
    locked, _ = load_model(tmp_path / "out")
    assert not any(block.down_proj.weight.any() for block in locked.model.layers[1].mlp.blocks)
    assert all(block.down_proj.weight.any() for block in locked.model.layers[0].mlp.blocks)
    assert all(weight.isfinite().all() for weight in locked.parameters())


def test_the_chain_of_a_layer_with_constant_output_is_constant(tmp_path):
    original = save_tiny("phi", tmp_path / "original")
    change_weights(original, layers_1_mlp_fc2_weight=0)
    record = lock_model(str(original), tmp_path / "out", quick(end_to_end_tokens=0)).record
    assert record["layers"][1]["nmse"] < 1e-3


@pytest.mark.parametrize(
    ("name", "factor", "dtype", "says"),
    [
        ("layers_1_self_attn_q_proj", math.nan, "auto", r"model\.layers\.1\.self_attn\.q_proj\.weight .*not finite"),
        ("layers_0_mlp_up_proj", math.inf, "auto", r"model\.layers\.0\.mlp\.up_proj\.weight .*not finite"),
        ("embed_tokens", math.nan, "auto", r"model\.embed_tokens\.weight .*not finite"),
        ("lm_head", 1e6, "float16", r"lm_head\.weight .*too large for float16: change --dtype"),
        ("layers_0_mlp_up", 1e12, "auto", r"layers\.0\.mlp\.up_proj\.weight .* up to .*e\+1.*too large to distil"),
    ],
)
def test_a_weight_that_is_not_finite_or_too_large_is_refused_before_any_work(tmp_path, name, factor, dtype, says):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, **{name: factor})
    with pytest.raises(UsageError, match=says):
        lock_model(str(original), tmp_path / "out", quick(data=str(tmp_path / "no text yet"), dtype=dtype))


def test_a_text_of_no_finite_perplexity_is_refused(tmp_path):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, model_norm=1e4, lm_head=1e4)
    with pytest.raises(UsageError, match=r"not finite on .* tokens of stdlib.*: change MODEL or --data"):
        lock_model(str(original), tmp_path / "out", quick())


def test_logits_that_are_not_finite_are_not_sampled_from():
    for value in (math.nan, math.inf):
        with pytest.raises(UsageError, match="logits that are not finite"):
            draw(torch.full((2, 600), value), [3], torch.Generator())


def test_chains_of_no_finite_perplexity_end_the_lock_in_one_line(tmp_path):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, model_norm=1e2, lm_head=1e4)
    with pytest.raises(DistillationError, match="perplexity after phase 1 is inf: raise --tokens"):
        lock_model(str(original), tmp_path / "out", quick(data="self", tokens=512, init="random"))


def test_mlp_outputs_whose_squares_overflow_are_refused_before_distillation(tmp_path):
    original = save_tiny("llama", tmp_path / "original")
    change_weights(original, layers_0_post_attention_layernorm=1e4, layers_0_mlp=1e4)
    with pytest.raises(UsageError, match=r"MLP of layer 0 .* computes values up to .*squares are too large"):
        lock_model(str(original), tmp_path / "out", quick())
