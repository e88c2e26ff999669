"""The builder of each family, with its corrections of onnxruntime-genai's.

To add a family: one entry in `BUILDERS`, with a class if it needs corrections. Those of all families are in `builders.py`.
These are for single ones:

* OLMo 2: there is no builder upstream (`_Olmo2`);
* Gemma: the embedding factor is rounded to two decimals upstream (`_ExactScale`), and tables of RoPE are not the model's own
  (`_Gemma3`);
* SmolLM3: layers without RoPE read an input that the graph does not have (`_SmolLM3`);
* Nemotron: biases of the MLP are ignored upstream (`_Nemotron`).
"""

from __future__ import annotations

import types
from typing import Any

import torch
from onnxruntime_genai.models import builders as upstream  # importing the package adds its folder to sys.path
from transformers import PreTrainedConfig


class _SmolLM3(upstream.SmolLM3Model):
    def make_attention(self, layer_id: int, attention: torch.nn.Module, root_input: str, **kwargs: Any) -> None:
        before = dict(self.attention_attrs)
        rope = bool(self.no_rope_layers[layer_id])  # 1 means that the layer has RoPE, in spite of the name
        self.attention_attrs.update(rope=rope, use_rope_in_attn=rope and before["use_rope_in_attn"])
        upstream.Model.make_attention(self, layer_id, attention, root_input, **kwargs)
        self.attention_attrs.update(rope=before["rope"], use_rope_in_attn=before["use_rope_in_attn"])


class _Nemotron(upstream.NemotronModel):
    def make_mlp_proj(self, layer_id: int, mlp: Any, root_input: str) -> None:
        if mlp.up_proj.bias is None:
            super().make_mlp_proj(layer_id, mlp, root_input)
        else:
            self.make_mlp_fc(layer_id, types.SimpleNamespace(fc1=mlp.up_proj, fc2=mlp.down_proj), root_input)


class _ExactScale(upstream.Model):
    """Gemma's embedding factor, the square root of the hidden size, rounded in the same way as in PyTorch."""

    def make_embedding(self, embedding: torch.Tensor) -> None:
        self.embed_attrs["scale"] = float(self.hidden_size**0.5)
        super().make_embedding(embedding)


class _Gemma2(_ExactScale, upstream.Gemma2Model):
    pass


class _Gemma3(_ExactScale, upstream.Gemma3Model):
    def make_rotary_embedding_multi_cache(self) -> None:
        for layer_type, scope in (("full_attention", "global"), ("sliding_attention", "local")):
            names = {f"{table}_cache_name": f"{table}_cache_{scope}" for table in ("cos", "sin")}
            self.rope_prefix, self.rope_attrs["create_caches"] = f"{layer_type}_", True
            upstream.Model.make_rotary_embedding_caches(self, **names)
        # The names that upstream uses to select the tables of a layer:
        self.cos_cache_global_name, self.sin_cache_global_name = "cos_cache_global", "sin_cache_global"
        self.cos_cache_local_name, self.sin_cache_local_name = "cos_cache_local", "sin_cache_local"


class _Olmo2(upstream.Model):
    """OLMo 2 has norms after attention and MLP, before the residual is added. It norms q and k over all heads."""

    def make_attention_init(self, config: PreTrainedConfig) -> None:
        self.attention_attrs.update(q_norm=True, k_norm=True)
        super().make_attention_init(config)

    def is_fused_qk_norm_gqa_supported(self) -> bool:
        return False  # the fused norm is per head

    def make_qk_norm(self, layer_id: int, attention: Any) -> None:
        for path, norm, size in (("q", attention.q_norm, self.q_size), ("k", attention.k_norm, self.kv_size)):
            name = f"/model/layers.{layer_id}/attn/{path}_norm/SimplifiedLayerNormalization"
            weight = f"model.layers.{layer_id}.attn.{path}_norm.layernorm.weight"
            self.make_initializer(norm.weight, weight, to=self.io_dtype)
            self.make_node(
                "SimplifiedLayerNormalization",
                inputs=[self.attention_attrs[f"{path}_path"], weight],
                outputs=[f"{name}/output_0"],
                name=name,
                epsilon=self.layernorm_attrs["epsilon"],
                axis=-1,
                stash_type=1,
            )
            self.make_value(f"{name}/output_0", self.io_dtype, shape=self.make_hidden_state_shape(last_dim=size))
            self.attention_attrs[f"{path}_path"] = f"{name}/output_0"

    def make_layer(self, layer_id: int, layer: Any) -> None:
        # attention -> norm -> add -> MLP -> norm -> add; in the last layer, the final norm does the last add.
        last = layer_id == self.num_layers - 1
        self.make_attention(layer_id, layer.self_attn, root_input=self.layernorm_attrs["root_input"])
        self._make_post_norm(layer_id, layer.post_attention_layernorm, "post_attention", add=True)
        self.make_mlp(layer_id, layer.mlp, root_input=self.layernorm_attrs["root_input"])
        self._make_post_norm(layer_id, layer.post_feedforward_layernorm, "post_feedforward", add=not last)
        self.layernorm_attrs["first_layernorm"] = False
        self.layernorm_attrs["last_layernorm"] = last

    def _make_post_norm(self, layer_id: int, norm: torch.nn.Module, location: str, add: bool) -> None:
        """Norm `skip_input`. With `add`, add it to `root_input`; else the norm that follows does so."""
        residual = self.layernorm_attrs["root_input"]
        self.layernorm_attrs["root_input"] = self.layernorm_attrs["skip_input"]
        self.make_layernorm(layer_id, norm, skip=False, simple=True, location=location)
        self.layernorm_attrs["skip_input"] = self.layernorm_attrs["output_0"]
        self.layernorm_attrs["root_input"] = residual
        if add:
            name = f"/model/layers.{layer_id}/{location}_residual/Add"
            inputs = [residual, self.layernorm_attrs["skip_input"]]
            self.make_add(name, inputs, dtype=self.io_dtype, shape=self.make_hidden_state_shape())
            self.layernorm_attrs["root_input"] = f"{name}/output_0"


BUILDERS: dict[str, type] = {
    "llama": upstream.LlamaModel,
    "qwen2": upstream.QwenModel,
    "qwen3": upstream.Qwen3Model,
    "mistral": upstream.MistralModel,
    "gemma2": _Gemma2,
    "gemma3_text": _Gemma3,
    "phi3": upstream.Phi3MiniModel,
    "phi3:longrope": upstream.Phi3MiniLongRoPEModel,
    "granite": upstream.GraniteModel,
    "olmo2": _Olmo2,
    "smollm3": _SmolLM3,
    "nemotron": _Nemotron,
    "phi": upstream.PhiModel,
}
# The model's name in genai_config.json, where it is not that of the architecture.
GENAI_NAMES = {"gemma3_text": "gemma3_text", "olmo2": "olmo"}
