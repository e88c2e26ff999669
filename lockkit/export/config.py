"""Settings of an export, for the Python API and the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.targets import Precision, Provider


class ExportConfig(BaseModel):
    """Settings of `export_model`. The description of a field is the help text of its option."""

    model_config = ConfigDict(extra="forbid")

    precision: Precision | None = Field(
        None,
        description="Number format of the weights. int8 and int4 quantise the weights of every matrix product; their "
        "arithmetic is fp32 on the CPU and fp16 on CUDA. By default the format in which MODEL is stored; for the CPU, "
        "which has hardly any arithmetic of 16 bits, int8 if that is bf16 or fp16.",
    )
    provider: Provider = Field(
        Provider.cpu,
        description="Execution provider that the graph is made for. Exporting for cuda needs no GPU; running it does.",
    )
    no_cuda_graphs: bool = Field(
        False,
        description="In exports for cuda, do not let onnxruntime-genai capture each step as a CUDA graph.",
    )
    block_size: Literal[16, 32, 64, 128, 256] = Field(
        32, description="Weights that share one scale, along the input of a matrix; for int8 and int4."
    )

    def unused(self) -> dict[str, str]:
        """Settings without an effect beside others: see `lockkit.settings.refuse_unused`."""
        found = {}
        if self.precision and not self.precision.quantised:
            found["block_size"] = f"in {self.precision}, which is not quantised: leave it out, or change --precision"
        if self.provider == Provider.cpu:
            found["no_cuda_graphs"] = "in an export for the CPU: leave it out, or give --provider cuda"
        return found
