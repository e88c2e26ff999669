"""Whether trainable weights can be recovered from an ONNX export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, Field

from lockkit.attack.base import Probe
from lockkit.targets import Precision

if TYPE_CHECKING:
    from lockkit.attack.config import AuditConfig
    from lockkit.attack.subjects import Subjects

MAX_NMSE = {Precision.fp32: 1e-6, Precision.int4: 1e-2}  # of logits; the products of int4 also round activations
ROWS, TOKENS = 2, 64  # on which logits are compared; all of them are in memory together


class RecoverConfig(BaseModel):
    """Settings of `recover-onnx`."""

    precision: Literal[Precision.fp32, Precision.int4] = Field(Precision.fp32, description="Precision of the export.")


class RecoverOnnx(Probe):
    """Tests whether publishing ONNX alone hides the weights."""

    name = "recover-onnx"
    description = (
        "Export the lock, rebuild trainable PyTorch weights from the graph, and compare the model with the graph."
    )
    reference = "this project (lockkit/attack/recover_onnx.py)"
    family = "export"
    needs_chains = True
    in_quick = True
    Config = RecoverConfig
    config: RecoverConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[RecoverConfig]:
        """A quantised export, and in other suites than `quick` one in fp32."""
        precisions = [Precision.int4] if audit.suite == "quick" else list(MAX_NMSE)
        return [RecoverConfig(precision=precision) for precision in precisions]

    def probe(self, subjects: Subjects) -> dict[str, Any]:
        """The NMSE of the recovered model's logits to the graph's, and whether every weight gets a gradient."""
        from lockkit.attack.recover_onnx import recover_onnx
        from lockkit.export import ExportConfig, ExportSession, export_model

        ids = subjects.evaluation[:ROWS, :TOKENS]
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder) / "export"
            export_model(str(subjects.folders["locked"]), export, ExportConfig(precision=self.config.precision))
            graph = torch.from_numpy(ExportSession(export).forward(ids.numpy())[0])
            model = recover_onnx(export)
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        nmse = ((out.logits.detach() - graph).square().sum() / (graph - graph.mean()).square().sum()).item()
        trainable = all(parameter.grad is not None for parameter in model.parameters())
        return {
            "logits_nmse": nmse,
            "all_weights_trainable": trainable,
            "passed": trainable and nmse <= MAX_NMSE[self.config.precision],
        }
