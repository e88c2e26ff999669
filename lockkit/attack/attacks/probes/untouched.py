"""A control: the models without fine-tuning."""

from __future__ import annotations

from typing import Any

from lockkit.attack.base import NoSettings, Probe
from lockkit.attack.losses import held_out_loss
from lockkit.attack.subjects import SUBJECTS, Subjects


class Untouched(Probe):
    """Held-out losses before any fine-tuning."""

    name = "untouched"
    description = "Control: the held-out loss of the lock and of the original without fine-tuning."
    reference = "control"
    family = "control"
    in_quick = True
    Config = NoSettings

    def probe(self, subjects: Subjects) -> dict[str, Any]:
        """Held-out losses by task and model, in nats per label."""
        return {
            "held_out": {
                name: {
                    subject: held_out_loss(subjects.frozen(subject), task.held_out, subjects.device)
                    for subject in SUBJECTS
                }
                for name, task in subjects.tasks.items()
            }
        }
