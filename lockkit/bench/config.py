"""The settings of a benchmark, for the command line and Python."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lockkit.targets import Provider

_Positive = Annotated[int, Field(ge=1)]


class Runtime(StrEnum):
    """What runs a model.

    An export runs in onnxruntime or onnxruntime-genai, a GGUF file in llama.cpp. A Hugging Face folder runs in PyTorch. On
    the CPU that is float32; and if its weights have 16 bits, it runs a second time, in these: one or the other is faster.
    """

    onnxruntime = "onnxruntime"
    genai = "onnxruntime-genai"
    pytorch = "pytorch"
    pytorch_16_bit = "pytorch-16-bit"
    llama_cpp = "llama.cpp"


OF_EXPORTS = (Runtime.onnxruntime, Runtime.genai)


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
    no_cuda_graphs: bool = Field(
        False,
        description="On a GPU, do not launch each step of an export as one CUDA graph, even if it can be captured.",
    )
    kernel: bool = Field(
        False,
        description="In onnxruntime, run every export that has chains, EXPORT and those of --against, with the fused "
        "operator of `lockkit kernel`. onnxruntime-genai runs an export with it where it is installed.",
    )

    def unused(self) -> dict[str, str]:
        """Settings without an effect beside others: see `lockkit.settings.refuse_unused`."""
        found = {}
        if self.provider == Provider.cpu:
            found["no_cuda_graphs"] = "on the CPU: leave it out, or give --provider cuda"
        if Runtime.onnxruntime not in self.runtimes:
            found["kernel"] = f"in {Runtime.genai}, which runs what `lockkit kernel EXPORT` installed: change --runtime"
        if other := next((one for one in self.runtimes if one not in OF_EXPORTS), None):
            found["runtimes"] = f"for {other}, which runs no exports: leave it out"
        return found
