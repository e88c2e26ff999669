"""Low-rank adapters on all linear layers: LoRA, LoRA-FA, and LoRA on 4-bit weights (QLoRA).

A chain has more linear layers than the MLP it replaces, so adapters of one rank train more parameters on a lock. So each
rank is tried at two capacities, on both models: the trained parameters of this rank on the original, and those on the
lock. The rank that is used on a model is the one that comes nearest.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from lockkit.attack.base import CannotRun, GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.optimisers import make_optimiser, optional_package
from lockkit.models.families import decoder_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects


CapacityOf = Literal["itself", "original", "locked"]


class LoraConfig(FinetuneConfig):
    """Settings of the attacks with adapters."""

    rank: int = Field(16, ge=1, description="Rank of the adapters. Alpha is twice the rank that is used.")
    capacity_of: CapacityOf = Field(
        "itself",
        description="The model on which adapters of this rank have as many parameters as are trained. `itself`: the rank "
        "is used as it is.",
    )


def matched_rank(model: PreTrainedModel, rank: int, capacity_of: CapacityOf, subjects: Subjects) -> int:
    """The rank at which adapters of `model` have as many parameters as those of `rank` on the model `capacity_of`."""
    if capacity_of == "itself":
        return rank
    wanted = rank * _parameters_per_rank(subjects.frozen(capacity_of))
    return max(1, round(wanted / _parameters_per_rank(model)))


def _parameters_per_rank(model: PreTrainedModel) -> int:
    """Parameters of adapters of rank 1 on all linear layers except the head."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return sum(m.in_features + m.out_features for m in linears)


def adapted(model: PreTrainedModel, rank: int, modules: str | list[str] = "all-linear") -> PeftModel:
    """The model with adapters.

    Args:
        modules: names of linear layers. By default all except the head, including those in chains.

    Raises:
        CannotRun: peft is not installed.
    """
    peft = optional_package("peft")
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name in transformers
        return peft.get_peft_model(model, settings)


class Lora(GradientAttack):
    """LoRA: two trained matrices of low rank beside every linear layer."""

    name = "lora"
    description = "Adapters on all linear layers; the weights stay frozen."
    reference = "Hu et al. 2021, arXiv 2106.09685"
    family = "adapters"
    in_quick = True
    Config = LoraConfig
    config: LoraConfig
    learning_rate_factor = 5.0
    learning_rate_range = (1e-4, 3e-2)
    quick_variants = 2

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Several ranks, each at both capacities, and the main rank with reversal."""
        matched = [{"rank": rank, "capacity_of": of} for rank in (16, 8, 64) for of in ("locked", "original")]
        return [*matched, {"rank": 16, "capacity_of": "locked", "saver": "reversal"}]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Add adapters to `model`. Only they are trained."""
        rank = matched_rank(model, self.config.rank, self.config.capacity_of, subjects)
        model = adapted(model, rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = make_optimiser("adamw", model.named_parameters(), self.config.learning_rate)
        return Training(model, trained, optimiser, notes={"rank_used": rank})


class FrozenLora(Lora):
    """LoRA that leaves the chains as they are. With `frozen-dlr`, it bounds what any lock can cost (ratios.py)."""

    name = "frozen-lora"
    description = "Adapters on attention only, not in the chains (on the original, not in the MLPs)."
    reference = "this project"
    family = "partial training"
    lock_aware = True
    in_quick = False

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Two ranks."""
        return [{"rank": rank} for rank in (16, 64)]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Add adapters to the linear layers of `model` outside of its chains or MLPs and head."""
        inside = {id(module) for layer in decoder_layers(model) for module in layer.mlp.modules()}
        inside.add(id(model.get_output_embeddings()))
        named = model.named_modules()
        names = [name for name, module in named if isinstance(module, nn.Linear) and id(module) not in inside]
        model = adapted(model, self.config.rank, names)
        trained = [p for p in model.parameters() if p.requires_grad]
        return Training(model, trained, make_optimiser("adamw", model.named_parameters(), self.config.learning_rate))


class LoraFA(Lora):
    """LoRA whose first matrices keep their initial values."""

    name = "lora-fa"
    description = "Adapters of which only the second matrix is trained, so that fewer activations are saved."
    reference = "Zhang et al. 2023, arXiv 2308.03303"
    family = "memory"
    in_quick = False

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Two ranks, each at both capacities."""
        return [{"rank": rank, "capacity_of": of} for rank in (16, 64) for of in ("locked", "original")]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Add adapters to `model`. Only their second matrices are trained."""
        rank = matched_rank(model, self.config.rank, self.config.capacity_of, subjects)
        model = adapted(model, rank)
        from peft.optimizers import create_lorafa_optimizer

        optimiser = create_lorafa_optimizer(model, r=rank, lora_alpha=2 * rank, lr=self.config.learning_rate)
        trained = [p for p in model.parameters() if p.requires_grad]
        return Training(model, trained, optimiser, notes={"rank_used": rank})


class QLora(Lora):
    """LoRA on 4-bit weights."""

    name = "qlora"
    description = "Adapters on a base quantised to 4 bits (NF4, double quantisation)."
    reference = "Dettmers et al. 2023, arXiv 2305.14314"
    family = "memory"
    in_quick = False

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """One rank at both capacities, and with reversal."""
        matched = [{"rank": 16, "capacity_of": of} for of in ("locked", "original")]
        return [*matched, {"rank": 16, "capacity_of": "locked", "saver": "reversal"}]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Quantise `model` in place and add adapters. Only the adapters are trained.

        Raises:
            CannotRun: bitsandbytes is missing, or has no kernels for this device.
        """
        quantise(model)
        training = super().prepare(model, subjects)
        training.state = lambda: _scales(training.model)
        return training


def quantise(model: PreTrainedModel) -> None:
    """Replace all linear layers in the decoder layers by 4-bit ones of bitsandbytes, in place.

    Raises:
        CannotRun: bitsandbytes is missing, or has no kernels for this device.
    """
    bitsandbytes = optional_package("bitsandbytes")
    try:
        for layer in decoder_layers(model):
            for module in list(layer.modules()):
                for name, linear in list(module.named_children()):
                    if type(linear) is nn.Linear:
                        setattr(module, name, _four_bits(linear, bitsandbytes.nn))
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    except (NotImplementedError, RuntimeError) as error:
        raise CannotRun(f"bitsandbytes has no 4-bit kernels for this device ({error}): try another --device") from error
    model.is_loaded_in_4bit = True  # peft reads this attribute


def _four_bits(linear: nn.Linear, library: ModuleType) -> nn.Module:
    found = library.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    found.weight = library.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    if linear.bias is not None:
        found.bias = linear.bias
    # On some CPUs, bitsandbytes repacks weights of some shapes for inference, in a form that training cannot read.
    found.support_avx512bf16_for_cpu = False
    return found.to(linear.weight.device)  # this call quantises the weight


def _scales(model: nn.Module) -> list[torch.Tensor]:
    """The scales of 4-bit weights. They are not parameters."""
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    nested = [state.state2 for state in states if state.nested]
    return [tensor for state in states + nested for tensor in (state.absmax, state.code)]
