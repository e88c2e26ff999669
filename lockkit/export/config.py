"""What an export can be told: the one truth for the Python API and the command line.

What runs where, tried with onnxruntime 1.31.1 on the CPU provider (x86-64):

| precision | for cpu | for cuda |
|---|---|---|
| fp32 | yes | yes, without soft caps (Gemma 2) and sliding windows; its graph also runs on the CPU |
| fp16 | yes: attention and norms in fp16, other products by casts that onnxruntime inserts | yes, also on the CPU |
| bf16 | no: no kernels (Mul, MatMul, Where), refused | builds; not tried for want of a GPU |
| int8, int4 | yes, arithmetic in fp32 (int8 products of activations) | yes, arithmetic in fp16, also on the CPU |
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Precision(StrEnum):
    """Number format of the exported weights."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"

    @property
    def quantised(self) -> bool:
        return self in (Precision.int8, Precision.int4)


class Provider(StrEnum):
    """Execution provider of onnxruntime that the graph is made for."""

    cpu = "cpu"
    cuda = "cuda"


class ExportConfig(BaseModel):
    """Options of `export_model`; every field's description is its help text."""

    model_config = ConfigDict(extra="forbid")

    precision: Precision = Field(
        Precision.fp32,
        description="Number format of the weights. int8 and int4 quantise every matrix product; "
        "their arithmetic is fp32 on the CPU and fp16 on CUDA.",
    )
    provider: Provider = Field(
        Provider.cpu,
        description="What the graph is made for. Exporting for cuda needs no GPU; running it does.",
    )
    block_size: Literal[16, 32, 64, 128, 256] = Field(
        32, description="Weights that share a scale, along a matrix's input; for int8 and int4."
    )
