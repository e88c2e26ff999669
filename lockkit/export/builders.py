"""The graph builder: onnxruntime-genai's model builder, extended to emit the chains of a locked model.

Only this file and `family_builders.py` use the builder. The builder is not a public interface, hence the narrow version
range in pyproject.toml. `family_builders.py` has a class for each family. These corrections are for all or several:

* locked models: `make_mlp` emits the nodes of a chain (`_LockkitBuilder`);
* Mistral, Phi-3: a sliding window without `layer_types` is ignored upstream (`_prepare_config`);
* Nemotron, Phi: the epsilon of LayerNorms is ignored upstream (`_prepare_config`);
* RoPE scalings are ignored, refused or computed wrongly upstream, depending on the family. So the tables of cosines and
  sines are computed from the model's own frequencies (`_LockkitBuilder`);
* int8: an embedding table that is also the output head is written twice upstream, once in the type of the arithmetic
  (`_LockkitBuilder`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxruntime_genai.models import builders as upstream  # importing the package adds its folder to sys.path
from onnxruntime_genai.models.builders import base as upstream_base
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from lockkit.dlr.net import DLRBlock, DLRNet
from lockkit.errors import LockkitError, UnsupportedModelError, UsageError
from lockkit.export.config import ExportConfig
from lockkit.export.family_builders import BUILDERS, GENAI_NAMES
from lockkit.models.families import Family
from lockkit.progress import NoProgress, Progress
from lockkit.targets import Precision


class _LockkitBuilder(upstream.Model):
    """Changes for all families: weights from memory, chains, progress, concrete cache shapes.

    `build_graph` combines it with a family's builder. It sets `source_model` and `progress` on the class, since the
    builders' constructors use them.
    """

    source_model: PreTrainedModel
    progress: Progress
    intermediate_size: int  # set by the builder
    rope_prefix = ""  # first part of the frequencies' names, in models with several types of layers

    def load_weights(self, input_path: str) -> PreTrainedModel:
        # Norms and biases are converted to fp32, since the builder adds Gemma's offset of 1 to them.
        for parameter in self.source_model.parameters():
            if parameter.ndim == 1:
                parameter.data = parameter.data.float()
        return self.source_model

    def make_rope_init(self, config: PreTrainedConfig) -> None:
        rope_type = config.rope_parameters["rope_type"]
        if rope_type == "longrope":  # two tables; the graph selects one by the length of the text
            super().make_rope_init(config)
        elif rope_type == "dynamic":
            raise NotImplementedError("its RoPE is 'dynamic', which changes with the length of the text")

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        if "multi_cache" in self.rope_attrs:
            return super().make_rotary_embedding_caches_from_scratch()
        rotary, prefix = self.source_model.model.rotary_emb, self.rope_prefix
        frequencies = getattr(rotary, f"{prefix}inv_freq").float()  # [rotary_size / 2]
        factor = getattr(rotary, f"{prefix}attention_scaling")
        angles = torch.outer(torch.arange(self.rope_attrs["cache_length"]).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)  # [context, rotary_size]
        return angles.cos() * factor, angles.sin() * factor

    def make_layer(self, layer_id: int, layer: torch.nn.Module) -> None:
        super().make_layer(layer_id, layer)
        self.progress.advance()

    def has_lm_head(self, module: torch.nn.Module) -> bool:
        # The builder compares shapes, and other matrices of a small model may have the same shape.
        return module is self.source_model.lm_head

    def make_key_value_cache_shape(self, layer_id: int, shape: list[Any]) -> list[Any]:
        # The builder writes a symbol for the head size. transformers.js needs the number.
        return [*super().make_key_value_cache_shape(layer_id, shape)[:3], self.head_size]

    def is_gqa_supported(self) -> bool:
        # GroupQueryAttention fails at run time for sizes that are not multiples of 16. Use MultiHeadAttention for them.
        rotary_size = self.rope_attrs["rotary_embedding_dim"] or self.head_size
        exists = super().is_gqa_supported() or (self.ep, self.io_dtype) == ("cpu", ir.DataType.FLOAT16)
        return exists and self.head_size % 16 == 0 and rotary_size % 16 == 0

    def is_packed_attn_supported(self) -> bool:
        # That operator has no cache here.
        return False

    def make_tied_embeddings_init(self, config: PreTrainedConfig) -> None:
        # The builder looks up tables of 4 bits only. onnxruntime looks up those of 8 bits, too.
        super().make_tied_embeddings_init(config)
        self.tied_quantized_embeddings = self.extra_options["shared_embeddings"] and self.is_lm_head_quantized()

    def make_tied_quantized_embedding_input_names(self) -> tuple[int, str, str, str]:
        # The builder expects the names of another method of quantisation at 8 bits.
        bits = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}[self.onnx_dtype]
        return bits, f"lm_head.MatMul.weight_Q{bits}", "lm_head.MatMul.weight_scales", ""

    def make_mlp(self, layer_id: int, mlp: torch.nn.Module, root_input: str) -> None:
        if isinstance(mlp, DLRNet):
            self.layernorm_attrs["skip_input"] = self._make_chain(layer_id, mlp, root_input)
        else:
            super().make_mlp(layer_id, mlp, root_input)

    def _make_chain(self, layer_id: int, chain: DLRNet, root_input: str) -> str:
        """Emit the nodes of a chain and return the name of their output.

        The graph computes the stream multiplied by the gain, `s' = gain * s`. A block then reads `x + s'` and adds
        `(gain U) a`. One division at the end replaces a product in every block. At gain 0 all blocks read `x`, and no
        division is needed. `chains.py` later replaces the nodes by one function call.
        """
        scale = float(chain.gain) or 1.0
        basename = f"/model/layers.{layer_id}/mlp"
        shape = {"dtype": self.io_dtype, "shape": self.make_hidden_state_shape()}
        stream = ""
        for index, block in enumerate(chain.blocks):
            name = f"{basename}/blocks.{index}"
            block_input = root_input
            if stream and chain.gain:
                self.make_add(f"{name}/input/Add", [root_input, stream], **shape)
                block_input = f"{name}/input/Add/output_0"
            units = self._make_units(f"{layer_id}/mlp/blocks.{index}", name, block, block_input)
            scaled_down = types.SimpleNamespace(weight=block.down_proj.weight.detach().float() * scale)
            update = self.make_matmul(scaled_down, f"{name}/down_proj/MatMul", units) + "/output_0"
            if stream:
                self.make_add(f"{name}/output/Add", [stream, update], **shape)
                update = f"{name}/output/Add/output_0"
            stream = update
        if chain.gain:
            divisor = f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{scale}"
            self.make_div(f"{basename}/gain/Div", [stream, divisor], **shape)
            stream = f"{basename}/gain/Div/output_0"
        if chain.output_bias is not None:
            self.make_add_bias(chain.output_bias.detach(), f"{basename}/output/Add", root_input=stream)
            stream = f"{basename}/output/Add/output_0"
        return stream

    def _make_units(self, scope: str, name: str, block: DLRBlock, block_input: str) -> str:
        """Emit the units of a block, `act(G t) * (V t)` or `act(V t + b)`, and return their name."""
        rank = block.up_proj.weight.shape[0]
        up = self._make_linear(block.up_proj, f"{name}/up_proj", block_input)
        activated = (
            up if block.gate_proj is None else self._make_linear(block.gate_proj, f"{name}/gate_proj", block_input)
        )
        # The builder expects one activation per layer, of the MLP's width. A chain has one per block, of its rank.
        width, self.intermediate_size = self.intermediate_size, rank
        units = self.make_activation(scope, root_input=activated) + "/output_0"
        self.intermediate_size = width
        if block.gate_proj is not None:
            shape = self.make_hidden_state_shape(last_dim=rank)
            self.make_mul(f"{name}/Mul", [units, up], dtype=self.io_dtype, shape=shape)
            units = f"{name}/Mul/output_0"
        return units

    def _make_linear(self, linear: torch.nn.Linear, name: str, root_input: str) -> str:
        """Emit a linear layer and return the name of its output."""
        output = self.make_matmul(linear, f"{name}/MatMul", root_input) + "/output_0"
        if linear.bias is not None:
            self.make_add_bias(linear.bias.detach(), f"{name}/Add", root_input=output)
            output = f"{name}/Add/output_0"
        return output


def build_graph(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    family: Family,
    folder: Path,
    export: ExportConfig,
    precision: Precision,
    progress: Progress | None = None,
) -> None:
    """Write `model.onnx`, `model.onnx.data` and `genai_config.json` into `folder`.

    Args:
        model: locked or original. Its norms and biases are converted to fp32 in place.
        config: the original's configuration, see `lockkit.models.locked.base_config`.
        family: the model's family.
        folder: contains `config.json`, the tokenizer and `generation_config.json` already.
        export: provider and block size.
        precision: of the weights.
        progress: reports layers, and the writing.

    Raises:
        UnsupportedModelError: the builder cannot express this model.
        UsageError: the model's attention does not exist in this precision on this provider.
        LockkitError: the builder failed. The message contains its reason.
    """
    progress = progress or NoProgress()
    prepared = _prepare_config(config, family, folder)
    name = family.model_type
    if f"{name}:{prepared.rope_parameters['rope_type']}" in BUILDERS:
        name = f"{name}:{prepared.rope_parameters['rope_type']}"
    members = {"source_model": model, "progress": progress}
    builder_class = type(f"Lockkit{BUILDERS[name].__name__}", (_LockkitBuilder, BUILDERS[name]), members)
    try:
        with _silence(), torch.no_grad():
            builder = builder_class(
                prepared, *_dtypes(export, precision), export.provider.value, str(folder), _options(prepared, export)
            )
            builder.model_type = GENAI_NAMES.get(family.model_type, builder.model_type)
            _refuse_what_attention_lacks(builder, export, precision)
            if not builder.past_present_share_buffer:  # caches are then new buffers in every step
                builder.ep_attrs["cuda"]["enable_cuda_graph"] = "0"
            progress.start("building the graph", builder.num_layers)
            builder.make_model(str(folder))
            progress.finish()
            progress.start("writing the weights", 1)
            builder.save_model(str(folder))
            progress.finish()
            builder.make_genai_config(prepared, {"local_files_only": True}, str(folder))
    except (LockkitError, MemoryError, OSError):
        raise
    except NotImplementedError as error:
        raise UnsupportedModelError(f"this {name} model cannot be exported ({error}): change MODEL") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise LockkitError(f"the graph of this {name} model could not be built ({reason}): change MODEL") from error


def _dtypes(export: ExportConfig, precision: Precision) -> tuple[ir.DataType, ir.DataType]:
    """The types of the graph's arithmetic and of its weights."""
    arithmetic = precision.arithmetic(export.provider)
    return ir.DataType(arithmetic.onnx), ir.DataType[precision.row.weights]


def _options(config: PreTrainedConfig, export: ExportConfig) -> dict[str, Any]:
    """The options of the builder."""
    return {
        "hf_token": None,
        "hf_remote": False,
        # The cache of every layer is as long as the text. Consumers other than genai expect this.
        "windowed_kv_cache": False,
        # Norms of q and k are separate nodes. Only the CUDA provider has attention with these norms.
        "fuse_qk_norm_gqa": False,
        "block_size": export.block_size,
        "shared_embeddings": bool(config.tie_word_embeddings),
        # LongRoPE selects its table in a branch of the graph, and branches run on the CPU.
        "enable_cuda_graph": not export.no_cuda_graphs and config.rope_parameters["rope_type"] != "longrope",
    }


def _prepare_config(config: PreTrainedConfig, family: Family, folder: Path) -> PreTrainedConfig:
    """A copy of the configuration, in the form that the builder reads."""
    config = copy.deepcopy(config)
    config._name_or_path = str(folder)
    config.architectures = [family.model_class]
    config.rms_norm_eps = next(
        getattr(config, name) for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if hasattr(config, name)
    )
    if "full_attention" in config.rope_parameters:
        config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]
        config.rope_parameters = config.rope_parameters["full_attention"]
    config.rope_parameters = {**config.rope_parameters, "type": config.rope_parameters["rope_type"]}
    if getattr(config, "original_max_position_embeddings", 0) is None:
        config.original_max_position_embeddings = config.max_position_embeddings
    if getattr(config, "sliding_window", None) is None:
        config.sliding_window = -1
    elif getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    for name in ("qk_layernorm", "use_bidirectional_attention"):
        if getattr(config, name, False):
            raise UnsupportedModelError(
                f"this {family.model_type} model has {name}, which cannot be exported: change MODEL"
            )
    return config


def _refuse_what_attention_lacks(builder: upstream.Model, export: ExportConfig, precision: Precision) -> None:
    """Raise UsageError if the model needs something that MultiHeadAttention does not have.

    MultiHeadAttention has no soft cap, no sliding window, and in fp16 no cache on the CPU. It replaces
    GroupQueryAttention where the head size or its rotary part is not a multiple of 16.
    """
    if builder.attention_attrs["op_type"] == "GroupQueryAttention":
        return
    windowed = 0 < builder.window_size < builder.context_length and "sliding_attention" in builder.layer_types
    if builder.attention_attrs["softcap"] or windowed or builder.io_dtype == ir.DataType.FLOAT16:
        raise UsageError(
            f"the attention of this model (head size {builder.head_size}, soft cap or sliding window) does not exist "
            f"in {precision.value} on {export.provider.value}: change --precision"
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the builder's prints, progress bars and log messages inside the `with` block.

    Standard error stays open, since lockkit's own progress is shown there.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    upstream_base.tqdm = functools.partial(tqdm, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        upstream_base.tqdm = tqdm
        logging.disable(disabled)
