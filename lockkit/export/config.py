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
    block_size: Literal[16, 32, 64, 128, 256] = Field(
        32, description="Weights that share one scale, along the input of a matrix; for int8 and int4."
    )
