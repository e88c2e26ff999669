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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import LockkitError, UsageError, first_line
from lockkit.export.loading import CannotCaptureError, is_of_the_gpu, load_graph, placement, require_arithmetic
from lockkit.export.manifest import ALL_LOGITS_FILE, MODEL_FILE, check_manifest, read_manifest
from lockkit.export.tensors import Tensor, as_float32
from lockkit.files import EXPORT_MANIFEST, read_json
from lockkit.targets import ElementType, Provider, element_type, provider_called

if TYPE_CHECKING:
    import numpy as np

    from lockkit.export.cuda import Gpu

Cache = dict[str, Any]  # from the name of a cache input to an OrtValue, [batch, kv_heads, past, head_size]
_NOT_CAPTURED = -1  # onnxruntime's number of a run that is neither captured as a CUDA graph nor launched as one


class ExportSession:
    """An export, loaded into onnxruntime.

    Args:
        folder: the folder that `lockkit export` wrote.
        provider: one of `lockkit.targets.Provider`, or its name.
        check: compare every file with the manifest first. If False, any folder with `model.onnx` and `config.json` is
            accepted.
        threads: threads per operator on the CPU; None is onnxruntime's default.
        kernel: the library of `lockkit.kernel.build_kernel`, which computes each chain in one call.
        last_only: compute the logits of the last token of each row only, as text generation needs.
        cuda_graphs: on a GPU, capture steps of `cache_rows` as CUDA graphs, if onnxruntime can capture this graph.

    Several threads may run one session. On a GPU they take turns, and so do all sessions of a process: while a step is
    captured, CUDA forbids every thread of the process to allocate memory, and copies of another thread would go into the
    CUDA graph.

    Attributes:
        folder: the export's folder.
        manifest: its manifest; None if the folder has none, which is possible only without `check`.
        config: content of `config.json`, the configuration of the original's family.
        provider: the execution provider in use, by its name in onnxruntime.
        device: onnxruntime's name of the device that holds caches.
        gpu: the GPU and the stream that it runs on; None on the CPU.
        captures: whether steps are captured as CUDA graphs.
        fused: whether the kernel computes the chains.
        cache_names: names of the graph's cache inputs.
        counts_positions: whether the graph takes the length of a row from the mask (GroupQueryAttention).
        steps_in_place: whether rows of one batch may have caches of a fixed size, as in `rows.py`, and a mask that is
            wider than their texts.

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
        cuda_graphs: bool = True,
    ):
        self.folder = Path(folder)
        has_manifest = check or (self.folder / EXPORT_MANIFEST).is_file()
        read = check_manifest if check else read_manifest
        self.manifest = read(self.folder) if has_manifest else None
        self.config = read_json(self.folder / "config.json", "EXPORT")
        wanted = provider_called(provider)
        has_twin = (self.folder / ALL_LOGITS_FILE).is_file()
        graph = self.folder / (ALL_LOGITS_FILE if has_twin and not last_only else MODEL_FILE)
        if self.manifest is not None:
            require_arithmetic(self.folder, self.manifest, wanted)
        self.gpu = _gpu() if wanted is Provider.cuda else None
        self.captures, self._wants_graphs = self.gpu is not None and cuda_graphs, cuda_graphs
        self._graphs = 0  # numbers of CUDA graphs in use
        with self._one_at_a_time():
            try:
                self._session = load_graph(graph, wanted, threads, kernel, self.gpu, self.captures)
            except CannotCaptureError:
                self.captures = False
                self._session = load_graph(graph, wanted, threads, kernel, self.gpu, False)
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
        # LongRoPE has two tables of positions, and the width of the mask chooses for all rows.
        rope = (self.config.get("rope_parameters") or {}).get("rope_type")
        self.steps_in_place = self.counts_positions and rope != "longrope"

    @property
    def device_note(self) -> str | None:
        """What runs the graph on a GPU, for people; None on the CPU."""
        if self.gpu is None:
            return None
        if self.captures:
            steps = "each step is one CUDA graph"
        elif not self._wants_graphs:
            steps = "without CUDA graphs, as asked for"
        else:
            steps = "without CUDA graphs, slower: onnxruntime cannot capture this graph"
        return f"{self.gpu.name}, {steps}; chains run {'in the fused operator' if self.fused else 'block by block'}"

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

    @property
    def logits_type(self) -> ElementType:
        """The number format of the logits."""
        return element_type(self._logits.type)

    def logits_shape(self, batch: int, seq: int) -> tuple[int, int, int]:
        """The shape of the logits for inputs `[batch, seq]`: `[batch, seq, vocab]`, or `[batch, 1, vocab]`."""
        return batch, 1 if self._selects else seq, self._logits.shape[2]

    def bind(self, input_ids: Tensor, mask: Tensor, caches: dict[str, Tensor], logits: Tensor) -> Any:
        """An `onnxruntime.IOBinding` of a run that reads and writes the given tensors in place.

        Only for graphs with `counts_positions`. Unlike `forward`, such a run copies no old keys and values.

        Args:
            input_ids: int64 `[batch, seq]`. If there is a past and `seq` is not 1, `batch` must be 1.
            mask: int64 `[batch, total]`. The number of ones in a row is the length of the row with its new tokens.
            caches: a tensor `[batch, kv_heads, capacity, head_size]` for each of `cache_names`.
            logits: of `logits_shape`, is written.
        """
        with self._one_at_a_time():  # onnxruntime copies inputs to the device here
            binding = self._session.io_binding()
            for name, tensor in {"input_ids": input_ids, "attention_mask": mask, **caches}.items():
                binding.bind_input(name, *tensor.place())
            for name, tensor in caches.items():
                binding.bind_output(name.replace("past_key_values.", "present."), *tensor.place())
            binding.bind_output("logits", *logits.place())
        return binding

    def run_bound(self, binding: Any, graph: int = _NOT_CAPTURED) -> None:
        """Run what `bind` made.

        Args:
            graph: on a GPU, the number of the CUDA graph that the first run with this number captures, and the others
                launch, from `new_graph`. All runs with one number have the same binding. By default, nothing is captured.

        Raises:
            LockkitError: the GPU failed, for instance because its memory is full.
        """
        with self._one_at_a_time():
            self._session.run_with_iobinding(binding, self._run_options(graph))
            if self.gpu is not None and graph == _NOT_CAPTURED:
                self.gpu.wait()  # a captured step goes on until the caller reads its logits

    def new_graph(self) -> int:
        """A number for `run_bound` that is not in use yet."""
        self._graphs += 1
        return self._graphs

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """On a GPU, let one thread of the process work, and turn errors of the GPU into one line."""
        if self.gpu is None:
            yield
            return
        with self.gpu.turn():
            try:
                yield
            except Exception as error:  # onnxruntime raises classes of its own
                if isinstance(error, LockkitError) or not is_of_the_gpu(error):
                    raise
                raise LockkitError(
                    f"{self.folder} failed on the GPU ({first_line(error)}; {self.gpu.description()}): free its memory, "
                    "run fewer or shorter texts, or give --provider cpu"
                ) from error

    def _run_options(self, graph: int = _NOT_CAPTURED) -> Any:
        """Options of a run; None are needed where nothing is captured."""
        if not self.captures:
            return None
        from onnxruntime import RunOptions

        options = RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _checked_mask(self, mask: np.ndarray | None, batch: int, total: int) -> np.ndarray:
        """The attention mask as int64 `[batch, total]`; ones if it is None."""
        import numpy as np

        checked = np.ones((batch, total), np.int64) if mask is None else mask.astype(np.int64)
        if checked.shape != (batch, total):
            raise UsageError(f"the attention mask is {list(checked.shape)}, it must be {[batch, total]}")
        self.check_length(total)
        return checked

    def check_length(self, tokens: int) -> None:
        """Raise a UsageError if a text of this many tokens is longer than the model's context."""
        context = self.config.get("max_position_embeddings")
        if context and tokens > context:
            raise UsageError(f"{tokens} tokens are more than the model's context of {context}: give it fewer")

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
        with self._one_at_a_time():  # with the copies of inputs to the device
            binding = self._session.io_binding()
            for name, value in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            for name, value in (cache or self._empty_cache(input_ids.shape[0])).items():
                binding.bind_ortvalue_input(name, value)
            for name in self._output_names:
                binding.bind_output(name, self.device)
            self._session.run_with_iobinding(binding, self._run_options())
            outputs = dict(zip(self._output_names, binding.get_outputs(), strict=True))
            logits = self._on_the_host(outputs.pop("logits"))
        return logits, {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}

    def _on_the_host(self, logits: Any) -> np.ndarray:
        """The numbers of an OrtValue, as float32."""
        if self.gpu is None:
            return as_float32(logits.numpy(), self.logits_type)
        return self.gpu.read(logits.data_ptr(), tuple(logits.shape()), self.logits_type)

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


def _gpu() -> Gpu:
    from lockkit.export.cuda import Gpu

    return Gpu()
