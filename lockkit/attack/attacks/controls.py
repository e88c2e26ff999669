"""Controls: what doing nothing gives, and what starting from nothing gives."""

from __future__ import annotations

from lockkit.attack.attacks.full_ft import FullFinetune
from lockkit.attack.base import NoSettings, Probe
from lockkit.attack.finetune import held_out_loss
from lockkit.attack.rebuild import ordinary_model


class Untouched(Probe):
    name = "untouched"
    description = "Control: the held-out loss of the lock and of the original, as they are."
    reference = "control"
    family = "control"
    in_quick = True
    Config = NoSettings

    def probe(self, bench) -> dict:
        return {
            "held_out": {
                name: {
                    subject: held_out_loss(bench.frozen(subject), task.held_out, bench.device)
                    for subject in ("original", "locked")
                }
                for name, task in bench.tasks.items()
            }
        }


class RandomMLPs(FullFinetune):
    name = "random-mlps"
    description = "Control: all weights, after the chains (the MLPs) were replaced by random MLPs."
    reference = "control"
    family = "control"
    in_quick = False

    def prepare(self, model, bench):
        import torch

        torch.manual_seed(self.config.seed)
        return super().prepare(ordinary_model(model, bench.family).requires_grad_(True), bench)
