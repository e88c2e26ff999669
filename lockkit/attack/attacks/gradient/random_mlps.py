"""A control: fine-tuning with random MLPs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lockkit.attack.attacks.gradient.full_ft import FullFinetune
from lockkit.attack.finetune import Training
from lockkit.attack.rebuild import ordinary_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects


class RandomMLPs(FullFinetune):
    """How far fine-tuning gets with random MLPs."""

    name = "random-mlps"
    description = "Control: replace the chains (on the original, the MLPs) by random MLPs, and fine-tune all weights."
    reference = "control"
    family = "control"
    in_quick = False

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Replace all chains or MLPs by random MLPs. All weights are trained."""
        torch.manual_seed(self.config.seed)
        return super().prepare(ordinary_model(model, subjects.family).requires_grad_(True), subjects)
