"""The targets of an export: one row per execution provider and one row per precision.

Whatever depends on a provider or a precision reads it here. Configurations use `Provider` and `Precision` as types.
Imports no heavy library.

Support, tested with onnxruntime 1.31.1 on the CPU provider (x86-64):

| precision | exported for cpu | exported for cuda |
|---|---|---|
| fp32 | yes | refused: there is no GroupQueryAttention in fp32, and MultiHeadAttention needs cuDNN and much of the CPU |
| fp16 | yes; attention and norms in fp16, onnxruntime inserts casts for other products | yes; also runs on the CPU |
| bf16 | refused: kernels are missing (Mul, MatMul, Where) | yes; starts and is captured on a fake GPU, never run on one |
| int8, int4 | yes; arithmetic in fp32, products with activations in int8 | yes; arithmetic in fp16; also runs on the CPU |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from lockkit.errors import UsageError


@dataclass(frozen=True)
class ElementType:
    """A number format, with its name in each library.

    Attributes:
        onnx: its number in `onnx.TensorProto.DataType` and `onnx_ir.DataType`.
        onnxruntime: onnxruntime's name of a tensor type, such as `tensor(float)`.
        torch: name of the PyTorch dtype.
        numpy: name of the NumPy dtype that holds the bits.
    """

    onnx: int
    onnxruntime: str
    torch: str
    numpy: str


FLOAT = ElementType(1, "tensor(float)", "float32", "float32")
FLOAT16 = ElementType(10, "tensor(float16)", "float16", "float16")
BFLOAT16 = ElementType(16, "tensor(bfloat16)", "bfloat16", "uint16")  # NumPy has no bfloat16
INT64 = ElementType(7, "tensor(int64)", "int64", "int64")
_ELEMENT_TYPES = {row.onnxruntime: row for row in (FLOAT, FLOAT16, BFLOAT16)}


def element_type(onnxruntime_name: str) -> ElementType:
    """The row of a tensor type, given onnxruntime's name of it, such as `tensor(float)`.

    Raises:
        KeyError: there is no row for this type.
    """
    return _ELEMENT_TYPES[onnxruntime_name]


@dataclass(frozen=True)
class ProviderRow:
    """The properties of an execution provider.

    Attributes:
        title: its name in a sentence.
        onnxruntime: its name in onnxruntime.
        torch_device: the PyTorch device of its tensors, and of a PyTorch model that it is compared with.
        package: the package to install if onnxruntime lacks this provider.
        needs: what it needs to start, in words.
        genai: its name in onnxruntime-genai; None is the default there.
        settings: provider options of a session, by onnxruntime's names.
        preload: load the CUDA libraries that pip installed for PyTorch, before the first session.
        runs_kernel: lockkit's fused operator supports it.
        precisions: the precision of an export by default, by the PyTorch dtype in which the model is stored.
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
    precisions: Mapping[str, str] = field(default_factory=dict)


class Provider(StrEnum):
    """An execution provider of onnxruntime. Its `row` has its properties."""

    row: ProviderRow

    def __new__(cls, name: str, row: ProviderRow) -> Self:
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
            # onnxruntime has hardly any kernels for bf16 and fp16 here. In fp32, a model of 16 bits doubles in size; in int8
            # it has half. tools/results/fidelity.md has what that costs Gemma 3 270M.
            precisions={"float32": "fp32", "float16": "int8", "bfloat16": "int8"},
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
            # TF32 rounds the factors of fp32 products to 10 bits of mantissa.
            settings={"use_tf32": "0"},
            preload=True,
            runs_kernel=True,
            precisions={"float32": "fp16", "float16": "fp16", "bfloat16": "bf16"},
        ),
    )

    @property
    def reference_device(self) -> str:
        """The device for a PyTorch model that is compared with this provider: the provider's own, or else the CPU."""
        import torch

        device = self.row.torch_device
        return device if device == "cpu" or torch.get_device_module(device).is_available() else "cpu"


# Default limits of the distance from the original to the locked model, both in PyTorch. They do not depend on the
# precision. A lock at the default recipe has 0.002 nats per token and 97 % (`demo`), or 0.05 and 87 % (a model of 270 M
# parameters). Where a model's probabilities are flat, the same divergence changes more of the top tokens: 0.03 nats and
# 63 % for a tiny model of random weights. Another model has more than 1 nat per token and almost no agreement.
LOCK_GATES = {"max_lock_kl": 0.1, "min_lock_top1": 0.5}


@dataclass(frozen=True)
class PrecisionRow:
    """The properties of a precision.

    Attributes:
        weights: number format of the weights in matrix products, by its name in `onnx_ir.DataType`.
        arithmetic: number format of everything else, by provider. Other providers do not support this precision.
        gates: default limits of `lockkit verify`, by gate (lockkit/verify/figures.py), besides `LOCK_GATES`. None is off.
        bits: bits of a quantised weight; None if weights are not quantised. `--block-size` weights share one scale. The
            embedding table is quantised too if the output head uses the same matrix.
    """

    weights: str
    arithmetic: Mapping[Provider, ElementType]
    gates: Mapping[str, float | None]
    bits: int | None = None

    def limit(self, gate: str) -> float | None:
        """The default limit of a gate. None is off."""
        return self.gates.get(gate, LOCK_GATES.get(gate))


class Precision(StrEnum):
    """The number format of the exported weights. Its `row` has its properties."""

    row: PrecisionRow

    def __new__(cls, name: str, row: PrecisionRow) -> Self:
        member = str.__new__(cls, name)
        member._value_, member.row = name, row
        return member

    # PyTorch and ONNX compute the same in a different order, so they differ by rounding only: KL is 1e-13 to 1e-12 nats
    # per token on the tiny models and the bundled one. The limit of the perplexity ratio leaves room for the lock.
    fp32 = (
        "fp32",
        PrecisionRow(
            weights="FLOAT",
            arithmetic={Provider.cpu: FLOAT},
            gates={"max_kl": 1e-6, "min_top1": 0.999, "max_perplexity_ratio": 1.02, "min_continuations": 1.0},
        ),
    )
    # fp16 and bf16 have 11 and 8 bits of precision. Rounding changes the order of nearly equal logits, so greedy
    # continuations differ.
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
    # Quantisation changes the weights. For int8 and int4 on the bundled model, KL is 6e-5 and 7e-3 nats per token, top-1
    # agreement 0.99 and 0.92, and perplexity 1.0005 and 1.006 times the original's. Larger models lose more: in int8,
    # a locked Gemma 3 270M has KL 0.004 and 0.93 to 0.97 (tools/results/fidelity.md). The limits
    # detect a broken export (KL of several nats, top-1 agreement near 0) and a poor quantisation. How much loss is
    # acceptable depends on the use, so set the limits for your model.
    int8 = (
        "int8",
        PrecisionRow(
            weights="INT8",
            arithmetic={Provider.cpu: FLOAT, Provider.cuda: FLOAT16},
            gates={"max_kl": 2e-2, "min_top1": 0.93, "max_perplexity_ratio": 1.03, "min_continuations": None},
            bits=8,
        ),
    )
    int4 = (
        "int4",
        PrecisionRow(
            weights="INT4",
            arithmetic={Provider.cpu: FLOAT, Provider.cuda: FLOAT16},
            gates={"max_kl": 2e-1, "min_top1": 0.80, "max_perplexity_ratio": 1.20, "min_continuations": None},
            bits=4,
        ),
    )

    @property
    def quantised(self) -> bool:
        """Whether weights are integers with scales."""
        return self.row.bits is not None

    def arithmetic(self, provider: Provider) -> ElementType:
        """The number format of the arithmetic in a graph for `provider`.

        Raises:
            UsageError: the provider does not support this precision.
        """
        if provider not in self.row.arithmetic:
            raise UsageError(
                f"onnxruntime has no {self} arithmetic on {provider.row.title}: change --precision, "
                f"or give --provider {' or '.join(self.row.arithmetic)}"
            )
        return self.row.arithmetic[provider]


def default_precision(stored: str, provider: Provider) -> Precision:
    """The precision of an export by default.

    Args:
        stored: name of the PyTorch dtype of the model's weights. Any other dtype is treated as float32.
        provider: that the graph is made for.
    """
    return Precision[provider.row.precisions.get(stored, provider.row.precisions["float32"])]


def provider_called(name: str) -> Provider:
    """The provider with this name.

    Raises:
        UsageError: there is none.
    """
    if name not in Provider.__members__:
        raise UsageError(f"there is no provider '{name}': give --provider {' or '.join(Provider)}")
    return Provider[name]
