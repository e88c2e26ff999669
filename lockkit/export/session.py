"""Run an export in plain onnxruntime.

Batches of unequal lengths: GroupQueryAttention, the attention operator of most graphs, does not use the position of the
zeros in the attention mask. It takes the sum of each row of the mask as the length of that row, and places the keys of
the row from position 0. So the graph itself accepts prompts that are padded on the right only. In later calls, the mask
may be that of the prompt with ones appended, because only its sum counts. Tests with tiny models, compared with PyTorch
row by row:

* `ExportSession.forward` accepts padding on either side, because it moves padding to the right. It agrees within 1e-5.
* onnxruntime-genai pads on the right (`Tokenizer.encode_batch`), with the pad token of `genai_config.json`. It generates
  the same tokens. With rows that the caller pads on the left, its results are wrong.
* `generate` of transformers and optimum pads on the left and passes the mask to the graph unchanged. The results of rows
  shorter than the longest are wrong, without an error. Give it rows of equal length.

Graphs with MultiHeadAttention (see `builders.py`) use the mask itself and accept padding on both sides.

An export has two graphs over the same weights (see `last_position.py`). Exports of earlier versions have one, with the
logits of all positions; a session takes the last ones from it.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError, first_line
from lockkit.export.manifest import ALL_LOGITS_FILE, MODEL_FILE, check_manifest, read_manifest
from lockkit.files import EXPORT_MANIFEST, read_json
from lockkit.targets import Provider, element_type, provider_called

if TYPE_CHECKING:
    import numpy as np
    import torch

# Operators with most of the arithmetic. The others compute shapes, and onnxruntime runs those on the CPU.
HEAVY_OPERATORS = {"MatMul", "MatMulNBits", "Gemm", "GroupQueryAttention", "MultiHeadAttention", "Attention"}
Cache = dict[str, Any]  # from the name of a cache input to an OrtValue, [batch, kv_heads, past, head_size]


class ExportSession:
    """An export, loaded into onnxruntime.

    Args:
        folder: the folder that `lockkit export` wrote.
        provider: one of `lockkit.targets.Provider`, or its name.
        check: compare every file with the manifest first. If False, any folder with `model.onnx` and `config.json` is
            accepted.
        threads: threads per operator on the CPU; None is onnxruntime's default.
        kernel: the library of `lockkit.kernel.build_kernel`, which computes each chain in one call. CPU only.
        last_only: compute the logits of the last token of each row only, as text generation needs.

    Attributes:
        folder: the export's folder.
        manifest: its manifest; None if the folder has none, which is possible only without `check`.
        config: content of `config.json`, the configuration of the original's family.
        provider: the execution provider in use, by its name in onnxruntime.
        device: PyTorch's name of the device that holds caches.
        fused: whether the kernel computes the chains.
        cache_names: names of the graph's cache inputs.
        counts_positions: whether the graph takes the length of a row from the mask (GroupQueryAttention).

    Raises:
        UsageError: the folder is not an intact export, the graph cannot be loaded, or the provider is not available.
            There is no silent fall-back to the CPU.
    """

    def __init__(
        self,
        folder: Path | str,
        provider: str = Provider.cpu,
        check: bool = True,
        threads: int | None = None,
        kernel: Path | None = None,
        last_only: bool = False,
    ):
        self.folder = Path(folder)
        has_manifest = check or (self.folder / EXPORT_MANIFEST).is_file()
        read = check_manifest if check else read_manifest
        self.manifest = read(self.folder) if has_manifest else None
        self.config = read_json(self.folder / "config.json", "EXPORT")
        wanted = provider_called(provider)
        has_twin = (self.folder / ALL_LOGITS_FILE).is_file()
        graph = self.folder / (ALL_LOGITS_FILE if has_twin and not last_only else MODEL_FILE)
        self._session = _load(graph, wanted, threads, kernel)
        self.provider = self._session.get_providers()[0]
        self.fused = bool(kernel) and any(op.startswith("DLRChain") for _, op in placement(self._session))
        self.device = wanted.row.torch_device
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._output_names = [node.name for node in self._session.get_outputs()]
        self._logits = next(node for node in self._session.get_outputs() if node.name == "logits")
        self._last_only, self._selects = last_only, self._logits.shape[1] == 1
        if self._selects and not last_only:
            raise UsageError(f"{graph} has the logits of the last position only: export again, or change EXPORT")
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

        For a batch of unequal lengths:

        1. In the first call (`cache=None`), pad the prompts on either side and mark the padding in the mask. The
           logits at padding are zero.
        2. In later calls, append one 1 per new token to every row of the mask, as transformers does, on whichever side
           the padding was. New tokens cannot be padding.

        Args:
            input_ids: int64 `[batch, seq]`.
            attention_mask: int64 `[batch, past + seq]`, 1 for tokens and 0 for padding. None means no padding.
            cache: the cache that the previous call returned. None starts a new text.

        Returns:
            Logits, float32 `[batch, seq, vocab]`, and the cache for the next call. With `last_only`, the logits are
            those of the last token of each row, `[batch, 1, vocab]`. Use each cache once: a provider that shares buffers
            may overwrite it.

        Raises:
            UsageError: the mask has the wrong shape or pads new tokens after the first call, or the text is longer
                than the model's context.
        """
        import numpy as np

        past = next(iter(cache.values())).shape()[2] if cache else 0
        batch, seq = input_ids.shape
        mask = self._checked_mask(attention_mask, batch, past + seq)
        if cache and past and seq > 1 and (batch > 1 or not self.counts_positions):
            return self._one_by_one(input_ids, mask, cache)
        real = mask[:, past:].astype(bool)  # [batch, seq]
        if real.all():
            logits, new_cache = self._run(input_ids, mask, cache)
            return (logits[:, -1:] if self._last_only else logits), new_cache
        if not self.counts_positions:
            logits, new_cache = self._run(input_ids, mask, cache)
        elif past:
            raise UsageError("padding among new tokens: this graph takes padded rows in the first call only")
        else:
            logits, new_cache = self._run_padded_right(input_ids, mask, real)
        if self._selects:
            return logits, new_cache
        if self._last_only:
            return logits[np.arange(batch), seq - 1 - real[:, ::-1].argmax(1)][:, None], new_cache
        logits[~real] = 0
        return logits, new_cache

    def cache_shapes(self) -> dict[str, tuple[int, int, str]]:
        """For each cache input: the number of key and value heads, the head size, and onnxruntime's type."""
        nodes = [self._inputs[name] for name in self.cache_names]
        return {node.name: (node.shape[1], node.shape[3], node.type) for node in nodes}

    def step(self, input_ids: np.ndarray, mask: np.ndarray, caches: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the next tokens of every row and write their keys and values into `caches`, in place.

        Only for graphs with `counts_positions`. Unlike `forward`, this copies no old keys and values.

        Args:
            input_ids: int64 `[batch, seq]`. If there is a past and `seq` is not 1, `batch` must be 1.
            mask: int64 `[batch, total]`. The number of ones in a row is the length of the row with its new tokens.
            caches: a contiguous tensor `[batch, kv_heads, capacity, head_size]` for each of `cache_names`.

        Returns:
            Logits, `[batch, seq, vocab]`, on the CPU, in the graph's own type. From a graph that selects the last
            token of each row, `[batch, 1, vocab]`.
        """
        import torch

        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("attention_mask", mask)
        for name, cache in caches.items():
            place = (self.device, 0, element_type(self._inputs[name].type).onnx, list(cache.shape), cache.data_ptr())
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values.", "present."), *place)
        batch, seq = input_ids.shape
        shape = (batch, 1 if self._selects else seq, self._logits.shape[2])
        logits, kind = torch.empty(shape, dtype=torch_type(self._logits.type)), element_type(self._logits.type).onnx
        binding.bind_output("logits", "cpu", 0, kind, list(logits.shape), logits.data_ptr())
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits

    def _checked_mask(self, mask: np.ndarray | None, batch: int, total: int) -> np.ndarray:
        """The attention mask as int64 `[batch, total]`; ones if it is None."""
        import numpy as np

        checked = np.ones((batch, total), np.int64) if mask is None else mask.astype(np.int64)
        if checked.shape != (batch, total):
            raise UsageError(f"the attention mask is {list(checked.shape)}, it must be {[batch, total]}")
        context = self.config.get("max_position_embeddings")
        if context and total > context:
            raise UsageError(f"{total} tokens are more than the model's context of {context}: give it fewer")
        return checked

    def _run_padded_right(self, input_ids: np.ndarray, mask: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, Cache]:
        """Run prompts with their padding moved to the right; return the logits at the original positions."""
        import numpy as np

        order = np.argsort(~real, axis=1, kind="stable")  # tokens first, padding last
        if (order == np.arange(order.shape[1])).all():
            return self._run(input_ids, mask, None)
        sorted_logits, cache = self._run(
            np.take_along_axis(input_ids, order, 1), np.take_along_axis(mask, order, 1), None
        )
        if self._selects:
            return sorted_logits, cache
        logits = np.empty_like(sorted_logits)
        np.put_along_axis(logits, order[..., None], sorted_logits, 1)
        return logits, cache

    def _one_by_one(self, input_ids: np.ndarray, mask: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Run several new tokens one after the other, for graphs that take one at a time after the first call."""
        import numpy as np

        seq, parts = input_ids.shape[1], []
        for column in range(seq):
            end = mask.shape[1] - seq + column + 1
            logits, cache = self.forward(input_ids[:, column : column + 1], mask[:, :end], cache)
            parts.append(logits)
        return (parts[-1] if self._last_only else np.concatenate(parts, axis=1)), cache

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
        logits = outputs.pop("logits").numpy().astype(np.float32, copy=False)
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
    """The PyTorch dtype for onnxruntime's name of a type: `torch.float32` for `tensor(float)`."""
    import torch

    return getattr(torch, element_type(onnx_type).torch)


def _load(path: Path, provider: Provider, threads: int | None, kernel: Path | None) -> Any:
    """An `onnxruntime.InferenceSession` in which `provider` runs all heavy operators."""
    import onnxruntime

    row, wanted = provider.row, provider.row.onnxruntime
    if wanted not in onnxruntime.get_available_providers():
        raise UsageError(f"this onnxruntime has no {wanted}: install {row.package} alone, or give --provider cpu")
    onnxruntime.set_default_logger_severity(4)  # errors are raised as exceptions
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if row.preload:
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    if threads:
        options.intra_op_num_threads = threads
    # Record which provider runs which node, to find nodes that onnxruntime silently assigned to the CPU.
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
    elsewhere = sorted({op for name, op in placement(session) if name != wanted and op in HEAVY_OPERATORS})
    if elsewhere:
        raise UsageError(f"onnxruntime has no {', '.join(elsewhere)} for {wanted} and would use the CPU: export again")
    return session


def placement(session: Any) -> list[tuple[str, str]]:
    """The provider and the operator of every node that an `InferenceSession` runs. Functions are inlined."""
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
