"""What an export can be made for: one row for each execution provider and for each precision.

Everything that depends on one of them reads it here; the configurations take `Provider` and
`Precision` as types. Imports no library that computes.

What runs where, tried with onnxruntime 1.31.1 on the CPU provider (x86-64):

| precision | for cpu | for cuda |
|---|---|---|
| fp32 | yes | yes, without soft caps (Gemma 2) and sliding windows; its graph also runs on the CPU |
| fp16 | yes: attention and norms in fp16, other products by casts that onnxruntime inserts | yes, also on the CPU |
| bf16 | no: no kernels (Mul, MatMul, Where), refused | builds; not tried for want of a GPU |
| int8, int4 | yes, arithmetic in fp32 (int8 products of activations) | yes, arithmetic in fp16, also on the CPU |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from lockkit.errors import UsageError


@dataclass(frozen=True)
class ElementType:
    """A floating-point format, by the name that each library has for it.

    Attributes:
        onnx: its number in `onnx.TensorProto.DataType` and `onnx_ir.DataType`.
        onnxruntime: type of a tensor as onnxruntime writes it.
        torch: name of the PyTorch type.
        numpy: name of the NumPy type that holds the bits.
    """

    onnx: int
    onnxruntime: str
    torch: str
    numpy: str


FLOAT = ElementType(1, "tensor(float)", "float32", "float32")
FLOAT16 = ElementType(10, "tensor(float16)", "float16", "float16")
BFLOAT16 = ElementType(16, "tensor(bfloat16)", "bfloat16", "uint16")  # NumPy has none
_ELEMENT_TYPES = {row.onnxruntime: row for row in (FLOAT, FLOAT16, BFLOAT16)}


def element_type(onnxruntime_name: str) -> ElementType:
    """The row of a type as onnxruntime writes it, `tensor(float)` for instance."""
    return _ELEMENT_TYPES[onnxruntime_name]


@dataclass(frozen=True)
class ProviderRow:
    """All that is known of an execution provider.

    Attributes:
        title: in a sentence.
        onnxruntime: its name in onnxruntime.
        torch_device: where its tensors are, and where a PyTorch model runs beside it.
        genai: its name in onnxruntime-genai; None is the default there.
        settings: of a session, by onnxruntime's names.
        preload: load its libraries as pip installed them beside PyTorch, before the first session.
        package: what to install where onnxruntime does not have it.
        needs: what must be there for it to start.
        runs_kernel: lockkit's fused operator exists for it.
    """

    title: str
    onnxruntime: str
    torch_device: str
    package: str = ""
    needs: str = ""
    genai: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    preload: bool = False
    runs_kernel: bool = False


class Provider(StrEnum):
    """Execution provider of onnxruntime; its `row` has all that is known of it."""

    row: ProviderRow

    def __new__(cls, name: str, row: ProviderRow) -> Provider:
        member = str.__new__(cls, name)
        member._value_, member.row = name, row
        return member

    cpu = (
        "cpu",
        ProviderRow(
            title="the CPU",
            onnxruntime="CPUExecutionProvider",
            torch_device="cpu",
            runs_kernel=True,
        ),
    )
    cuda = (
        "cuda",
        ProviderRow(
            title="CUDA",
            onnxruntime="CUDAExecutionProvider",
            torch_device="cuda",
            package="onnxruntime-gpu",
            needs="a usable GPU, CUDA and cuDNN",
            genai="cuda",
            # TF32 would round fp32 products to 10 bits of mantissa, which no fp32 gate could pass.
            settings={"use_tf32": "0"},
            preload=True,
        ),
    )

    @property
    def reference_device(self) -> str:
        """The PyTorch device beside this provider: its own where PyTorch has it, else the CPU."""
        import torch

        device = self.row.torch_device
        return device if device == "cpu" or torch.get_device_module(device).is_available() else "cpu"


@dataclass(frozen=True)
class PrecisionRow:
    """All that is known of a precision.

    Attributes:
        weights: number format of the weights in matrix products, by its name in `onnx_ir.DataType`.
        arithmetic: number format of everything else, by provider; a provider without one refuses this precision.
        gates: default limits of `lockkit verify`, by gate (lockkit/verify/figures.py); None is off.
        bits: of a quantised weight. Blocks of `--block-size` weights share a scale.
        quantises_lookup: the embedding table is quantised, too, where it is the output head's.
    """

    weights: str
    arithmetic: Mapping[Provider, ElementType]
    gates: Mapping[str, float | None]
    bits: int | None = None
    quantises_lookup: bool = False


class Precision(StrEnum):
    """Number format of the exported weights; its `row` has all that is known of it."""

    row: PrecisionRow

    def __new__(cls, name: str, row: PrecisionRow) -> Precision:
        member = str.__new__(cls, name)
        member._value_, member.row = name, row
        return member

    # PyTorch and ONNX compute the same in another order and differ by rounding alone: KL is 1e-13 to
    # 1e-12 on the tiny models and the bundled one. The perplexity ratio leaves room for the lock itself.
    fp32 = (
        "fp32",
        PrecisionRow(
            weights="FLOAT",
            arithmetic={Provider.cpu: FLOAT, Provider.cuda: FLOAT},
            gates={"max_kl": 1e-6, "min_top1": 0.999, "max_perplexity_ratio": 1.02, "min_continuations": 1.0},
        ),
    )
    # 11 and 8 bits of mantissa: near-ties turn over, and greedy continuations part there.
    fp16 = (
        "fp16",
        PrecisionRow(
            weights="FLOAT16",
            arithmetic={Provider.cpu: FLOAT16, Provider.cuda: FLOAT16},
            gates={"max_kl": 1e-3, "min_top1": 0.99, "max_perplexity_ratio": 1.02, "min_continuations": None},
        ),
    )
    bf16 = (
        "bf16",
        PrecisionRow(
            weights="BFLOAT16",
            arithmetic={Provider.cuda: BFLOAT16},
            gates={"max_kl": 1e-2, "min_top1": 0.97, "max_perplexity_ratio": 1.03, "min_continuations": None},
        ),
    )
    # The weights are other numbers. On the bundled model KL is 6e-5 and 7e-3, top-1 0.99 and 0.92,
    # perplexity 1.0005 and 1.006 of the original; larger models lose more. The limits tell a working
    # export from a broken one (KL of nats, top-1 near 0) and from a careless one. How much loss is
    # acceptable is the owner's decision, so set them for your model.
    int8 = (
        "int8",
        PrecisionRow(
            weights="INT8",
            arithmetic={Provider.cpu: FLOAT, Provider.cuda: FLOAT16},
            gates={"max_kl": 1e-2, "min_top1": 0.97, "max_perplexity_ratio": 1.03, "min_continuations": None},
            bits=8,  # onnxruntime has no lookup of 8 bits
        ),
    )
    int4 = (
        "int4",
        PrecisionRow(
            weights="INT4",
            arithmetic={Provider.cpu: FLOAT, Provider.cuda: FLOAT16},
            gates={"max_kl": 2e-1, "min_top1": 0.80, "max_perplexity_ratio": 1.20, "min_continuations": None},
            bits=4,
            quantises_lookup=True,
        ),
    )

    @property
    def quantised(self) -> bool:
        """Whether weights are whole numbers with scales."""
        return self.row.bits is not None

    def arithmetic(self, provider: Provider) -> ElementType:
        """The number format that a graph for `provider` computes in.

        Raises:
            UsageError: the provider cannot compute in this precision.
        """
        if provider not in self.row.arithmetic:
            raise UsageError(
                f"onnxruntime has no {self} arithmetic on {provider.row.title}: change --precision, "
                f"or give --provider {' or '.join(self.row.arithmetic)}"
            )
        return self.row.arithmetic[provider]


def provider_called(name: str) -> Provider:
    """The provider called `name`.

    Raises:
        UsageError: there is none.
    """
    try:
        return Provider(name)
    except ValueError:
        raise UsageError(f"there is no provider '{name}': give --provider {' or '.join(Provider)}") from None
