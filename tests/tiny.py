"""Tiny models with random weights, one for each supported family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from lockkit.dlr import DLRNet, MLPShape
from lockkit.dlr.mlp import chains_for
from lockkit.models.families import FAMILIES
from lockkit.models.load import DEMO, TOKENIZER_FILES, load_tokenizer

VOCAB = 4096  # tokens of the bundled tokenizer

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
SPECIAL = {
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"head_dim": 8},
    "phi3": {"original_max_position_embeddings": 256},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.7,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "nemotron": {"head_dim": 8},
    "phi": {"num_key_value_heads": 4},
}


def empty_chain(shape: MLPShape, depth: int, gain: float, activation: Callable) -> DLRNet:
    """An untrained chain in place of an MLP of `shape`."""
    config = chains_for(shape, depth, activation="")
    return config.empty_chain(shape.hidden_size, shape.intermediate_size, activation, gain)


def tiny_config(model_type: str, **overrides) -> transformers.PreTrainedConfig:
    """The configuration of a tiny model; `overrides` are fields of it."""
    family = FAMILIES[model_type]
    return getattr(transformers, family.config_class)(**(COMMON | SPECIAL.get(model_type, {}) | overrides))


def tiny_model(model_type: str, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A tiny model with random weights, biases and norms."""
    family = FAMILIES[model_type]
    torch.manual_seed(seed)
    model = getattr(transformers, family.model_class)(tiny_config(model_type, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 1:  # norms: random, so that a missing norm changes the output
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_tiny(model_type: str, folder: Path, seed: int = 0, **overrides) -> Path:
    """Save a tiny model with the bundled tokenizer; return the folder."""
    tiny_model(model_type, seed, **overrides).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (DEMO / name).is_file():
            (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def add_token(folder: Path, token: str) -> None:
    """Add a token to the tokenizer of a saved model. The model's embeddings are not resized."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
