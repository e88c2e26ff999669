"""The classes of locked models, in this process and as a file in a checkpoint.

The source of both is `remote_code/modeling_dlr_lock.py`. `locked_classes` derives classes from those of a family.
`render_modeling_file` writes the same classes as one self-contained file.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.dlr import net
from lockkit.dlr.net import ChainConfig, DLRNet
from lockkit.models.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODELING_FILE = "modeling_dlr_lock.py"
AUTO_MAP = {
    "AutoConfig": "modeling_dlr_lock.DLRLockConfig",
    "AutoModel": "modeling_dlr_lock.DLRLockModel",
    "AutoModelForCausalLM": "modeling_dlr_lock.DLRLockForCausalLM",
}
# The definitions of lockkit/dlr/net.py that the modelling file contains.
_TRAVELLING = (net.block_ranks, net.ChainConfig, net.DLRBlock, net.DLRNet)
_TEMPLATE = Path(__file__).parent / "remote_code" / MODELING_FILE


def empty_chain(config: PreTrainedConfig, chains: ChainConfig, gain: float) -> DLRNet:
    """An untrained chain for one decoder layer of a model with configuration `config`."""
    from lockkit.models.remote_code import modeling_dlr_lock

    return modeling_dlr_lock.empty_chain(config, chains, gain)


@functools.cache
def locked_classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration class and the model class of locked models of a family."""
    import transformers

    from lockkit.models.remote_code import modeling_dlr_lock as template

    base_config = getattr(transformers, family.config_class)
    base_model = getattr(transformers, family.model_class)
    config_class = type(
        "DLRLockConfig", (base_config,), {"model_type": family.locked_model_type, "__module__": __name__}
    )

    def __init__(self: Any, config: PreTrainedConfig) -> None:
        base_model.__init__(self, config)
        template.swap_mlps(self, config)

    model_class = type(
        "DLRLockForCausalLM",
        (base_model,),
        {"config_class": config_class, "__init__": __init__, "__module__": __name__},
    )
    return config_class, model_class


def chain_config(config: PreTrainedConfig) -> ChainConfig | None:
    """The description of the chains in a locked model's configuration; None for an original.

    Raises:
        ValueError: the entry `dlr` is not valid.
    """
    values = getattr(config, "dlr", None)
    return ChainConfig.from_dict(values) if values is not None else None


def locked_config(config: PreTrainedConfig, family: Family, chains: ChainConfig) -> PreTrainedConfig:
    """The configuration of the locked model whose original has configuration `config`."""
    values = _values(config)
    config_class, model_class = locked_classes(family)
    locked = config_class(**values, dlr=chains.to_dict())
    locked.architectures = [model_class.__name__]
    locked.auto_map = dict(AUTO_MAP)
    return locked


# Entries that depend on the class, and names of RoPE settings older than `rope_parameters`.
_NOT_COPIED = (
    *("model_type", "architectures", "auto_map", "transformers_version", "dlr"),
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"),
)


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_COPIED}


def base_config(config: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    """The configuration of the original, recovered from that of its locked model."""
    import transformers

    base = getattr(transformers, family.config_class)(**_values(config))
    base.architectures = [family.model_class]
    return base


def render_modeling_file(family: Family) -> str:
    """The text of the modelling file for a family. It contains the source of `DLRNet` and does not import lockkit."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    definitions = "\n\n".join(inspect.getsource(part) for part in _TRAVELLING)
    replacements = {
        "from transformers import LlamaConfig as BaseConfig": f"from transformers import {family.config_class} as BaseConfig",
        "from transformers import LlamaForCausalLM as BaseForCausalLM": (
            f"from transformers import {family.model_class} as BaseForCausalLM"
        ),
        "from transformers import LlamaModel as BaseModel": (
            f"from transformers import {MODEL_MAPPING_NAMES[family.model_type]} as BaseModel"
        ),
        "from __future__ import annotations\n": (
            "from __future__ import annotations\n\nfrom collections.abc import Callable, Mapping, Sequence\n"
            "from dataclasses import MISSING, asdict, dataclass, fields\nfrom typing import Any\n\nimport torch\nfrom torch import nn"
        ),
        "\n\nfrom lockkit.dlr.net import ChainConfig, DLRNet\n": "\n\n\n" + definitions.rstrip() + "\n",
        '"dlr_lock_llama"': f'"{family.locked_model_type}"',
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for old, new in replacements.items():
        if text.count(old) != 1:
            raise RuntimeError(f"the template of the modelling file must contain {old!r} once")
        text = text.replace(old, new)
    return text
