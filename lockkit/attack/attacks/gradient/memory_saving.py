"""The baseline with memory savers: fewer activations are kept for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lockkit.attack.attacks.gradient.full_ft import FullFinetune
from lockkit.attack.base import CannotRun
from lockkit.attack.finetune import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects


class Checkpointing(FullFinetune):
    """Activations are recomputed in the backward pass."""

    name = "checkpointing"
    description = "All weights; activations are recomputed in the backward pass: per layer, every k blocks, or nested."
    reference = "Chen et al. 2016, arXiv 1604.06174"
    family = "memory"

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """One memory saver each."""
        names = ["checkpoint-layers", "checkpoint-nested", "checkpoint-blocks", "checkpoint-sqrt", "checkpoint-chains"]
        return [{"saver": name} for name in names]


class Reversal(FullFinetune):
    """Reversal (lockkit/dlr/reversal.py), without and with anchors."""

    name = "reversal"
    description = "All weights; the backward pass recomputes the stream of each chain from its blocks' units."
    reference = "this project (lockkit/dlr/reversal.py), after Gomez et al. 2017, arXiv 1707.04585"
    family = "memory"
    lock_aware = True
    needs_chains = True

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """One memory saver each."""
        return [{"saver": name} for name in ("reversal", "reversal-anchored", "reversal-anchored-12")]


class Offload(FullFinetune):
    """Saved activations are compressed, or kept in the CPU's memory."""

    name = "offload"
    description = "All weights; saved activations are compressed to bfloat16, or kept in the CPU's memory."
    reference = "PyTorch, saved tensor hooks and save_on_cpu"
    family = "memory"
    in_quick = False

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """One memory saver each."""
        return [{"saver": "compress"}, {"saver": "offload"}]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights.

        Raises:
            CannotRun: the training runs on a CPU, where offloading saves nothing.
        """
        if self.config.saver == "offload" and subjects.device.type == "cpu":
            raise CannotRun("offloading to the CPU saves nothing if the training runs on the CPU: use --device cuda")
        return super().prepare(model, subjects)
