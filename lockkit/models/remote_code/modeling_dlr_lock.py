"""A causal language model whose MLPs are deep low-rank residual networks (DLR-Lock).

Every locked checkpoint contains this file. It needs PyTorch and transformers (4.57 or 5), not lockkit.
Only the MLPs differ from the base model. Attention, embeddings, cache and generation are the base
model's own. The entry `dlr` of `config.json` describes the chains: see `ChainConfig`.
"""

from __future__ import annotations

from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers import LlamaModel as BaseModel
from transformers.activations import ACT2FN

from lockkit.dlr.net import ChainConfig, DLRNet


def empty_chain(config: BaseConfig, chains: ChainConfig, gain: float) -> DLRNet:
    """An untrained chain for one decoder layer of a model with configuration `config`."""
    return chains.empty_chain(config.hidden_size, config.intermediate_size, ACT2FN[chains.activation], gain)


def swap_mlps(model: BaseForCausalLM | BaseModel, config: BaseConfig) -> None:
    """Replace the MLP of every decoder layer by an untrained chain, in place."""
    chains = ChainConfig.from_dict(config.dlr)
    layers = getattr(model, "model", model).layers  # the base model has no `model`
    for layer, gain in zip(layers, chains.gains, strict=True):
        layer.mlp = empty_chain(config, chains, gain).to(model.dtype)
    # The base model's tensor-parallel plan names projections that no longer exist.
    if getattr(model, "_tp_plan", None):
        model._tp_plan = {name: plan for name, plan in model._tp_plan.items() if ".mlp." not in name}


class DLRLockConfig(BaseConfig):
    """The base model's configuration, with the chains described under `dlr`."""

    model_type = "dlr_lock_llama"


class DLRLockModel(BaseModel):
    """The base model without a head, with a chain in place of every MLP."""

    config_class = DLRLockConfig

    def __init__(self, config: DLRLockConfig):
        super().__init__(config)
        swap_mlps(self, config)


class DLRLockForCausalLM(BaseForCausalLM):
    """The base model with a chain (`DLRNet`) in place of every MLP."""

    config_class = DLRLockConfig

    def __init__(self, config: DLRLockConfig):
        super().__init__(config)
        swap_mlps(self, config)
