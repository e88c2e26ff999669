"""Controls: the models without fine-tuning, and fine-tuning with random MLPs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lockkit.attack.attacks.full_ft import FullFinetune
from lockkit.attack.base import NoSettings, Probe
from lockkit.attack.finetune import Training, held_out_loss
from lockkit.attack.rebuild import ordinary_model
from lockkit.attack.selection import SUBJECTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.bench import Bench


class Untouched(Probe):
    """Held-out losses before any fine-tuning."""

    name = "untouched"
    description = "Control: the held-out loss of the lock and of the original without fine-tuning."
    reference = "control"
    family = "control"
    in_quick = True
    Config = NoSettings

    def probe(self, bench: Bench) -> dict[str, Any]:
        """Held-out losses by task and model, in nats per label."""
        return {
            "held_out": {
                name: {
                    subject: held_out_loss(bench.frozen(subject), task.held_out, bench.device) for subject in SUBJECTS
                }
                for name, task in bench.tasks.items()
            }
        }


class RandomMLPs(FullFinetune):
    """How far fine-tuning gets with random MLPs."""

    name = "random-mlps"
    description = "Control: replace the chains (on the original, the MLPs) by random MLPs, and fine-tune all weights."
    reference = "control"
    family = "control"
    in_quick = False

    def prepare(self, model: PreTrainedModel, bench: Bench) -> Training:
        """Replace all chains or MLPs by random MLPs. All weights are trained."""
        torch.manual_seed(self.config.seed)
        return super().prepare(ordinary_model(model, bench.family).requires_grad_(True), bench)
