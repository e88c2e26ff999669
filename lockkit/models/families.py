"""The model families that lockkit can lock, and the names of the parts of their MLPs.

To add a family: one entry in `_ALL` below, one in `lockkit/export/family_builders.py`, and a tiny
configuration in `tests/tiny.py`. The tests then lock, save, load and export it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lockkit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from lockkit.dlr.mlp import MLPWeights

    class DecoderLayer(nn.Module):
        """A decoder layer of any family, as a type for mypy."""

        mlp: Any  # the family's own MLP; in a locked model, a `DLRNet`

    class DecoderLayers(nn.ModuleList):
        """The decoder layers of a model, as a type for mypy."""

        def __iter__(self) -> Iterator[DecoderLayer]: ...
        def __getitem__(self, index: Any) -> Any: ...


LOCKED_PREFIX = "dlr_lock_"


@dataclass(frozen=True)
class Family:
    """One family: its classes in transformers, and the names of the linear layers in its MLP.

    Attributes:
        model_type: the family's name in `config.json`.
        config_class, model_class: names of its classes in transformers.
        up, down: names of the up and down projections.
        gate: name of the gate projection; None for an MLP of two layers.
        packed_gate_up: name of one matrix that holds the rows of gate and then those of up; None if they are separate.
    """

    model_type: str
    config_class: str
    model_class: str
    up: str = "up_proj"
    down: str = "down_proj"
    gate: str | None = "gate_proj"
    packed_gate_up: str | None = None

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.gate is not None

    @property
    def locked_model_type(self) -> str:
        """The `model_type` of locked models of this family."""
        return LOCKED_PREFIX + self.model_type


_ALL = [
    Family("llama", "LlamaConfig", "LlamaForCausalLM"),
    Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
    Family("mistral", "MistralConfig", "MistralForCausalLM"),
    Family("gemma2", "Gemma2Config", "Gemma2ForCausalLM"),
    Family("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM"),
    Family("phi3", "Phi3Config", "Phi3ForCausalLM", packed_gate_up="gate_up_proj"),
    Family("granite", "GraniteConfig", "GraniteForCausalLM"),
    Family("olmo2", "Olmo2Config", "Olmo2ForCausalLM"),
    Family("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM"),
    Family("nemotron", "NemotronConfig", "NemotronForCausalLM", gate=None),
    Family("phi", "PhiConfig", "PhiForCausalLM", gate=None, up="fc1", down="fc2"),
]
FAMILIES = {family.model_type: family for family in _ALL}


def is_locked(config: PreTrainedConfig) -> bool:
    """Whether `config` is the configuration of a locked model."""
    return (config.model_type or "").startswith(LOCKED_PREFIX)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of an original or a locked model.

    Raises:
        UnsupportedModelError: there is no such family, or the model is quantised. The message says what to use instead.
    """
    model_type = config.model_type or "unknown"
    family = FAMILIES.get(model_type.removeprefix(LOCKED_PREFIX))
    if family is None:
        raise UnsupportedModelError(f"model type '{model_type}' {_why_unsupported(config)}")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "this model is quantised: give MODEL the unquantised original, and choose a --precision at export"
        )
    return family


def require_unlocked(config: PreTrainedConfig, model: str) -> Family:
    """The family of an original. `model` is the name that the user gave, for the message.

    Raises:
        UnsupportedModelError: the model is locked already, or there is no such family.
    """
    if is_locked(config):
        raise UnsupportedModelError(f"{model} is locked already: give MODEL the original")
    return family_of(config)


def _why_unsupported(config: PreTrainedConfig) -> str:
    supported = ", ".join(FAMILIES)
    expert_fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, field, None) for field in expert_fields):
        return f"is a mixture of experts, which cannot be locked: give MODEL a dense model ({supported})"
    if getattr(config, "is_encoder_decoder", False):
        return f"is an encoder-decoder, not a causal language model: give MODEL one of {supported}"
    if getattr(config, "text_config", None) is not None and hasattr(config, "vision_config"):
        return f"has a vision part: extract its text model and give MODEL that ({supported})"
    architectures = getattr(config, "architectures", None) or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return f"is {architectures[0]}, an encoder, not a causal language model: give MODEL one of {supported}"
    return f"is not supported yet: give MODEL one of {supported}, or add it in lockkit/models/families.py"


def mlp_weights(mlp: nn.Module, family: Family) -> MLPWeights:
    """The weights of an original's MLP, not copied. Gate and up are views if the family packs them into one matrix."""
    from lockkit.dlr.mlp import MLPWeights

    down = getattr(mlp, family.down)
    if family.packed_gate_up is None:
        up = getattr(mlp, family.up)
        gate = getattr(mlp, family.gate) if family.gate else None
        weights = MLPWeights(
            up.weight, down.weight, gate.weight if gate else None, up.bias, gate.bias if gate else None, down.bias
        )
    else:
        packed = getattr(mlp, family.packed_gate_up)
        gate_weight, up_weight = packed.weight.chunk(2)
        gate_bias, up_bias = packed.bias.chunk(2) if packed.bias is not None else (None, None)
        weights = MLPWeights(up_weight, down.weight, gate_weight, up_bias, gate_bias, down.bias)
    return weights


def decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """The decoder layers of an original or a locked model, an `nn.ModuleList`. `layer.mlp` is the MLP or chain."""
    return model.model.layers


def activation_name(config: PreTrainedConfig) -> str:
    """The name of the MLP's activation function in transformers."""
    return getattr(config, "hidden_activation", None) or config.hidden_act
