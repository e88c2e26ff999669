"""Running an export in plain onnxruntime, the way any program without lockkit would.

Batches of unequal lengths: the graphs' GroupQueryAttention does not look at *where* the attention
mask is zero. It takes the sum of each row as that row's length, and lays the row's keys out from
position 0. So the graph itself understands prompts padded on the right, and only those; the mask
of later calls may be the prompt's with ones appended, since only its sum counts. Tried on all
three sides, tiny models, against PyTorch row by row:

* `ExportSession.forward` takes padding on either side (it turns left into right): within 1e-5;
* onnxruntime-genai pads on the right by itself (`Tokenizer.encode_batch`), with the pad token of
  `genai_config.json`: the same tokens as row by row. Rows padded on the left by hand come out wrong;
* transformers' and optimum's `generate` pad on the left and hand the mask to the graph as it is:
  rows shorter than the longest come out wrong, silently. Give them rows of equal length.

Graphs with MultiHeadAttention (see `builders.py`) look at the mask itself and take both sides.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError, first_line
from lockkit.export.manifest import MODEL_FILE, check_manifest, read_manifest
from lockkit.files import EXPORT_MANIFEST, read_json
from lockkit.targets import Provider, element_type, provider_called

if TYPE_CHECKING:
    import numpy as np
    import torch

# Operators that do the work; the others look after shapes, which belong on the CPU.
HEAVY_OPERATORS = {"MatMul", "MatMulNBits", "Gemm", "GroupQueryAttention", "MultiHeadAttention", "Attention"}
Cache = dict[str, Any]  # name of a cache input -> onnxruntime.OrtValue, [batch, kv_heads, past, head_size]


class ExportSession:
    """An export, loaded into onnxruntime.

    Args:
        folder: what `lockkit export` wrote.
        provider: one of `lockkit.targets.Provider`, or its name.
        check: compare every file with the manifest first. Without, any folder with a `model.onnx` will do.
        threads: of one operator on the CPU; None leaves it to onnxruntime.
        kernel: the library of `lockkit.kernel.build_kernel`, to compute each chain in one call; CPU only.

    Attributes:
        folder, manifest: of the export; no manifest in another program's folder.
        config: `config.json` as a dict, the original family's configuration.
        provider: the execution provider in use, by its name in onnxruntime.
        device: "cpu" or "cuda", where caches live.
        fused: chains run in the kernel.
        cache_names: the cache inputs of the graph.
        counts_positions: the graph takes a row's length from the mask (GroupQueryAttention).

    Raises:
        UsageError: the folder is not an intact export, the graph cannot be loaded, or the
            provider cannot be had (there is no silent fall-back to the CPU).
    """

    def __init__(
        self,
        folder: Path | str,
        provider: str = Provider.cpu,
        check: bool = True,
        threads: int | None = None,
        kernel: Path | None = None,
    ):
        self.folder = Path(folder)
        has_manifest = check or (self.folder / EXPORT_MANIFEST).is_file()
        read = check_manifest if check else read_manifest
        self.manifest = read(self.folder) if has_manifest else None
        self.config = read_json(self.folder / "config.json", "EXPORT")
        wanted = provider_called(provider)
        self._session = _load(self.folder / MODEL_FILE, wanted, threads, kernel)
        self.provider = self._session.get_providers()[0]
        self.fused = bool(kernel) and any(op.startswith("DLRChain") for _, op in placement(self._session))
        self.device = wanted.row.torch_device
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._output_names = [node.name for node in self._session.get_outputs()]
        self.cache_names = [name for name in self._inputs if name.startswith("past_key_values.")]
        # Graphs with GroupQueryAttention count positions themselves and have no such input.
        self.counts_positions = "position_ids" not in self._inputs

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        cache: Cache | None = None,
    ) -> tuple[np.ndarray, Cache]:
        """Run the model on the next tokens of every row.

        Args:
            input_ids: int64 `[batch, seq]`.
            attention_mask: int64 `[batch, past + seq]`, 1 for tokens and 0 for padding; None
                means no padding.
            cache: what the previous call returned; None starts anew.

        Batches of unequal lengths work like this:

        1. In the first call (`cache=None`) pad the prompts on either side and say so in the
           mask. Logits come back where the tokens stood; at padding they are zero.
        2. In later calls append a 1 to every row of the mask for every new token, as
           transformers does, whichever side the padding was on; all new tokens must be real.

        Returns:
            logits float32 `[batch, seq, vocab]`, and the cache for the next call. Pass a cache on
            once: where a provider shares buffers, it may be overwritten.

        Raises:
            UsageError: the mask has the wrong shape, pads new tokens after the first call, or
                the text grows longer than the model's context.
        """
        import numpy as np

        past = next(iter(cache.values())).shape()[2] if cache else 0
        batch, seq = input_ids.shape
        mask = np.ones((batch, past + seq), np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        if mask.shape != (batch, past + seq):
            raise UsageError(f"the attention mask is {list(mask.shape)}, it must be {[batch, past + seq]}")
        context = self.config.get("max_position_embeddings")
        if context and past + seq > context:
            raise UsageError(f"{past + seq} tokens are more than the model's context of {context}: give it fewer")
        if past and seq > 1 and (batch > 1 or not self.counts_positions):
            return self._one_by_one(input_ids, mask, cache)
        real = mask[:, past:].astype(bool)  # [batch, seq]
        if self.counts_positions and not real.all():
            if past:
                raise UsageError("padding among new tokens: this graph takes padded rows in the first call only")
            # Real tokens first, padding last, and the logits back to where they came from.
            order = np.argsort(~real, axis=1, kind="stable")
            sorted_logits, new_cache = self._run(
                np.take_along_axis(input_ids, order, 1), np.take_along_axis(mask, order, 1), cache
            )
            logits = np.empty_like(sorted_logits)
            np.put_along_axis(logits, order[..., None], sorted_logits, 1)
        else:
            logits, new_cache = self._run(input_ids, mask, cache)
        if not real.all():
            logits[~real] = 0
        return logits, new_cache

    def cache_shapes(self) -> dict[str, tuple[int, int, str]]:
        """For each cache input its key and value heads, head size, and onnxruntime type."""
        nodes = [self._inputs[name] for name in self.cache_names]
        return {node.name: (node.shape[1], node.shape[3], node.type) for node in nodes}

    def step(self, input_ids: np.ndarray, mask: np.ndarray, caches: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the next tokens of every row and write their keys and values into `caches`, in place.

        For graphs that count positions. Unlike `forward`, nothing of the past is copied.

        Args:
            input_ids: int64 `[batch, seq]`; `batch` is 1 where `seq` is not and there is a past.
            mask: int64 `[batch, total]`, a row of ones as long as the row is with the new tokens.
            caches: a contiguous `[batch, kv_heads, capacity, head_size]` for each of `cache_names`.

        Returns:
            logits `[batch, seq, vocab]` on the CPU, in the graph's own type.
        """
        import torch

        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("attention_mask", mask)
        for name, cache in caches.items():
            place = (self.device, 0, element_type(self._inputs[name].type).onnx, list(cache.shape), cache.data_ptr())
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values.", "present."), *place)
        node = self._session.get_outputs()[0]
        logits = torch.empty((*input_ids.shape, node.shape[2]), dtype=torch_type(node.type))
        kind = element_type(node.type).onnx
        binding.bind_output("logits", "cpu", 0, kind, list(logits.shape), logits.data_ptr())
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits

    def _one_by_one(self, input_ids: np.ndarray, mask: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Several tokens after the first call, where the graph takes one at a time."""
        import numpy as np

        seq, parts = input_ids.shape[1], []
        for column in range(seq):
            end = mask.shape[1] - seq + column + 1
            logits, cache = self.forward(input_ids[:, column : column + 1], mask[:, :end], cache)
            parts.append(logits)
        return np.concatenate(parts, axis=1), cache

    def _run(self, input_ids: np.ndarray, mask: np.ndarray, cache: Cache | None) -> tuple[np.ndarray, Cache]:
        import numpy as np

        feeds = {"input_ids": input_ids.astype(np.int64), "attention_mask": mask}
        if not self.counts_positions:
            positions = np.maximum(mask.cumsum(1) - 1, 0)
            feeds["position_ids"] = positions[:, -input_ids.shape[1] :]
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in (cache or self._empty_cache(input_ids.shape[0])).items():
            binding.bind_ortvalue_input(name, value)
        for name in self._output_names:
            binding.bind_output(name, "cpu" if name == "logits" else self.device)
        self._session.run_with_iobinding(binding)
        outputs = dict(zip(self._output_names, binding.get_outputs(), strict=True))
        logits = outputs.pop("logits").numpy().astype(np.float32)
        return logits, {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}

    def _empty_cache(self, batch: int) -> Cache:
        import numpy as np
        from onnxruntime import OrtValue

        cache = {}
        for name in self.cache_names:
            node = self._inputs[name]
            kind = element_type(node.type)
            empty = np.zeros((batch, node.shape[1], 0, node.shape[3]), kind.numpy)
            cache[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(empty, kind.onnx)
        return cache


def torch_type(onnx_type: str) -> torch.dtype:
    """PyTorch's type for onnxruntime's name of one: "tensor(float)" is `torch.float32`."""
    import torch

    return getattr(torch, element_type(onnx_type).torch)


def _load(path: Path, provider: Provider, threads: int | None, kernel: Path | None) -> Any:
    import onnxruntime

    row, wanted = provider.row, provider.row.onnxruntime
    if wanted not in onnxruntime.get_available_providers():
        raise UsageError(f"this onnxruntime has no {wanted}: install {row.package} alone, or give --provider cpu")
    onnxruntime.set_default_logger_severity(4)  # what matters arrives as an exception
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if row.preload:
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    if threads:
        options.intra_op_num_threads = threads
    # Which provider runs which node, to find those that onnxruntime gave to the CPU without a word.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        if kernel and row.runs_kernel:
            options.register_custom_ops_library(str(kernel))
        session = onnxruntime.InferenceSession(path, options, providers=[(wanted, dict(row.settings))])
    except Exception as error:
        raise UsageError(
            f"onnxruntime cannot load {path} ({first_line(error)}): export again, or change EXPORT"
        ) from error
    if session.get_providers()[0] != wanted:
        raise UsageError(f"onnxruntime could not start {wanted} (it needs {row.needs}): give --provider cpu")
    strays = sorted({op for name, op in placement(session) if name != wanted and op in HEAVY_OPERATORS})
    if strays:
        raise UsageError(f"onnxruntime has no {', '.join(strays)} for {wanted} and would use the CPU: export again")
    return session


def placement(session: Any) -> list[tuple[str, str]]:
    """Provider and operator of every node that `session` runs; functions are their bodies here."""
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
