"""What a benchmark can be told: the one truth for the Python API and the command line."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lockkit.targets import Provider

Positive = Annotated[int, Field(ge=1)]


class Runtime(StrEnum):
    """What runs an export. A Hugging Face folder always runs in PyTorch."""

    onnxruntime = "onnxruntime"
    genai = "onnxruntime-genai"
    pytorch = "pytorch"


class BenchConfig(BaseModel):
    """Options of `bench`; every field's description is its help text."""

    model_config = ConfigDict(extra="forbid")

    runtimes: list[Runtime] = Field(
        [Runtime.onnxruntime, Runtime.genai], min_length=1, description="What runs the exports."
    )
    provider: Provider = Field(Provider.cpu, description="Where exports run; PyTorch models run there too.")
    batch_sizes: list[Positive] = Field([1], min_length=1, description="Rows run together.")
    prompt_lengths: list[Positive] = Field([128], min_length=1, description="Tokens of each row's prompt.")
    new_tokens: int = Field(32, ge=2, description="Tokens made after each prompt, one at a time.")
    rounds: int = Field(7, ge=1, description="How often every model is measured, in turns.")
    threads: int | None = Field(None, ge=1, description="CPU threads of each runtime; by default its own choice.")
    kernel: bool = Field(
        False, description="Run EXPORT with the fused operator of `lockkit kernel` (onnxruntime, on the CPU)."
    )
