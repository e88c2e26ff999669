"""A causal language model whose MLPs are deep low-rank residual networks (DLR-Lock).

This file travels inside every locked checkpoint: it needs PyTorch and transformers (4.57 or 5),
not lockkit. Only the MLPs differ from the base model; attention, embeddings, cache and
generation are the base model's own. `config.dlr` says what the chains look like:

    depth           blocks in each chain
    gains           for each decoder layer, the factor of the stream in a block's input
    activation      name of the activation function
    gated           gate, up and down in a block, or up and down only
    bias            the blocks' units have biases
    output_bias     each chain ends with a bias
"""

from __future__ import annotations

from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers.activations import ACT2FN

from lockkit.dlr.net import DLRNet, block_ranks


def swap_mlps(model, config) -> None:
    """Replace the MLP of every decoder layer by an untrained DLR-Net, in place."""
    dlr = config.dlr
    for layer, gain in zip(model.model.layers, dlr["gains"], strict=True):
        layer.mlp = DLRNet(
            hidden_size=config.hidden_size,
            ranks=block_ranks(config.intermediate_size, dlr["depth"]),
            activation=ACT2FN[dlr["activation"]],
            gated=dlr["gated"],
            bias=dlr["bias"],
            output_bias=dlr["output_bias"],
            gain=gain,
        ).to(model.dtype)
    # Tensor-parallel plans of the base model name projections that are no longer there.
    if getattr(model, "_tp_plan", None):
        model._tp_plan = {name: plan for name, plan in model._tp_plan.items() if ".mlp." not in name}


class DLRLockConfig(BaseConfig):
    """The base model's configuration, with the chains described under `dlr`."""

    model_type = "dlr_lock_llama"


class DLRLockForCausalLM(BaseForCausalLM):
    """The base model with a DLR-Net in place of every MLP."""

    config_class = DLRLockConfig

    def __init__(self, config):
        super().__init__(config)
        swap_mlps(self, config)
