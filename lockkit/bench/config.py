"""The settings of a benchmark, for the command line and Python."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lockkit.targets import Provider

_Positive = Annotated[int, Field(ge=1)]


class Runtime(StrEnum):
    """What runs a model.

    An export runs in onnxruntime or onnxruntime-genai, a Hugging Face folder in PyTorch, a GGUF file in llama.cpp.
    """

    onnxruntime = "onnxruntime"
    genai = "onnxruntime-genai"
    pytorch = "pytorch"
    llama_cpp = "llama.cpp"


class BenchConfig(BaseModel):
    """Settings of `lockkit bench`. The description of a field is the help text of its option."""

    model_config = ConfigDict(extra="forbid")

    runtimes: list[Runtime] = Field(
        [Runtime.onnxruntime, Runtime.genai],
        min_length=1,
        description="Runtime of the exports. Hugging Face models always run in PyTorch, GGUF files in llama.cpp.",
    )
    provider: Provider = Field(
        Provider.cpu, description="Where all models run: exports with this execution provider, PyTorch on that device."
    )
    batch_sizes: list[_Positive] = Field([1], min_length=1, description="Rows in a batch.")
    prompt_lengths: list[_Positive] = Field([128], min_length=1, description="Length of each row's prompt, in tokens.")
    new_tokens: int = Field(32, ge=2, description="Tokens generated after each prompt, one at a time.")
    rounds: int = Field(7, ge=1, description="Measured rounds. In each, all models run in turn.")
    threads: int | None = Field(None, ge=1, description="CPU threads of each runtime. Default: the runtime's choice.")
    kernel: bool = Field(
        False,
        description="Run EXPORT with the fused operator of `lockkit kernel`, in onnxruntime on the CPU.",
    )
