"""All steps of a lock, from a model to a locked checkpoint.

1. Check the model and the output folder. Open the work folder, from which an interrupted lock resumes (work.py).
2. Read or sample the text (data.py).
3. Phase 1: distil the layers, one group after the other (phase_1.py, modulewise.py).
4. Phase 2: train all layers together (end_to_end.py).
5. Round the chains to the dtype of the checkpoint and perturb rows that are still bit-identical to the teacher's. Write
   the checkpoint to a temporary folder. Measure it as written, on text that neither trained it nor chose its state.
   Rename the folder.

The teacher is read one decoder layer at a time (lockkit/models/layered.py). So memory does not grow with the number of
layers, unless all of them fit (`--offload`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lockkit.devices import PeakMemory, choose_device
from lockkit.dlr.mlp import chains_for
from lockkit.dlr.net import ChainConfig, DLRNet
from lockkit.dlr.shape import block_ranks
from lockkit.errors import DistillationError, UsageError, counted
from lockkit.files import CARD, LOCK_RECORD, files_below, readable_disk_errors
from lockkit.lock.card import locked_model_card
from lockkit.lock.config import LockConfig, effective_source
from lockkit.lock.data import DistillationData, load_data, other_rows, row_tokens, sampled_data
from lockkit.lock.end_to_end import EndToEnd, EndToEndResult
from lockkit.lock.initialise import scrub_teacher_rows
from lockkit.lock.memory import keeps_everything, predicted_memory
from lockkit.lock.meter import FidelityMeter
from lockkit.lock.modulewise import LayerResult
from lockkit.lock.phase_1 import distil_all_layers
from lockkit.lock.record import lock_record
from lockkit.lock.stack import ChainStack
from lockkit.lock.weights import require_finite
from lockkit.lock.work import Work, work_folder
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.models.checkpoint import stored_dtype
from lockkit.models.families import Family, activation_name, mlp_weights, require_unlocked
from lockkit.models.identity import public_name, weights_sha256
from lockkit.models.layered import StreamedModel, import_model_class, return_free_memory
from lockkit.models.load import load_config, load_tokenizer, resolve_model_apart
from lockkit.models.locked import empty_chain
from lockkit.models.origin import Origin, copy_legal_files, origin_of
from lockkit.models.save import save_description, save_locked_weights
from lockkit.output_folders import check_apart, new_folder
from lockkit.progress import NoProgress, Progress
from lockkit.text import require_columns
from lockkit.text.sources import BUILT_IN
from lockkit.version import versions
from lockkit.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Above this share of the perplexity of a guess among all tokens, a model cannot read a text.
ABSURD_PERPLEXITY_SHARE = 0.1

FinalChains = Callable[[int], DLRNet]  # from the index of a layer to its chain


@dataclass(frozen=True)
class LockResult:
    """A finished lock.

    Attributes:
        folder: the locked checkpoint.
        record: the content of its `lockkit.json`.
        origin: the original's name, licence and card.
    """

    folder: Path
    record: dict[str, Any]
    origin: Origin


def lock_model(
    model: str,
    out: Path,
    config: LockConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LockResult | None:
    """Lock a pretrained causal language model (arXiv 2605.10777) and save it to `out`.

    After an interruption, call it again with the same arguments to resume. Under torchrun, all processes share the
    work; the first one writes the checkpoint and returns the result.

    Args:
        model: `demo`, a local folder, a GGUF file, or a Hub id.
        out: the folder to write. It is created only when the checkpoint is complete.
        config: the recipe.
        overwrite: replace `out` if lockkit wrote it.
        progress: reports the steps.

    Returns:
        The result; None on workers other than the first.

    Raises:
        UsageError: the model, the text, the output folder or the work folder cannot be used.
        UnsupportedModelError: lockkit cannot lock models of this kind.
        DistillationError: distillation diverged, and nothing was written.
    """
    return _Lock(model, out, config or LockConfig(), overwrite, progress or NoProgress()).run()


class _Lock:
    """One call of `lock_model`. Its methods are the steps."""

    def __init__(self, model: str, out: Path, config: LockConfig, overwrite: bool, progress: Progress):
        self.started = time.perf_counter()
        self.model, self.out, self.config, self.overwrite = model, Path(out), config, overwrite
        self.workers = Workers.from_environment()
        self.progress = progress if self.workers.first else NoProgress()
        self.original = resolve_model_apart(model, self.out, overwrite)
        self.raw_config = load_config(self.original)
        self.family: Family = require_unlocked(self.raw_config, model)
        import_model_class(self.family)
        self.device = choose_device(config.device, self.workers)
        self.memory = PeakMemory(self.device)
        config.check_depth(self.raw_config.intermediate_size)
        config.check_amounts(row_tokens(config, self.raw_config))
        self.tokenizer = load_tokenizer(self.original)
        named = config.dtype
        self.dtype = stored_dtype(self.original, self.raw_config) if named == "auto" else getattr(torch, named)
        self.work = Work(work_folder(self.out, config.work), self.workers.first)
        check_apart(self.work.folder, self.original, option="--work")
        if config.work:  # the default is apart from OUT, and it is deleted at the end
            check_apart(self.work.folder, self.out, "OUT", "--work")

    def run(self) -> LockResult | None:
        """Open the work folder, lock, and close it again, whether or not the lock succeeded."""
        self.resumable = False  # whether the same command resumes: not in a folder of other settings
        self.workers.join(self.device)
        finished = False
        try:
            with self.workers.together():
                if self.workers.first:
                    self.work.open()
            with self.workers.together():
                self.work.require_shared()
            result = self._lock()
            finished = True
            return result
        except BaseException as error:  # also Ctrl-C
            if self.resumable and self.work.claimed and self.work.has_any_layer():
                error.add_note(f"finished layers are kept in {self.work.folder}: run the same command again to resume")
            raise
        finally:
            self.work.close(finished)
            self.workers.leave()

    def _lock(self) -> LockResult | None:
        with self.workers.together():
            self.stream = StreamedModel(self.original, self.raw_config, self.family, self.device)
            if self.workers.first:
                require_finite(self.stream, self.model, self.dtype)
            data = self._data()
            if self.workers.first:
                self.other_rows = other_rows(self.config, data.source, self.stream.config, self.tokenizer)
        self.workers.require_same(versions() | self._fingerprint(data))
        with self.workers.together():
            if self.workers.first:
                self.work.require_same(self._fingerprint(data))
        self.resumable = True
        prediction = predicted_memory(self.stream, self.config, data, self.dtype)
        self.progress.say(_summary(self.raw_config, self.config, data))
        for line in _lowered(self.raw_config, self.config):
            self.progress.say(line)
        self.progress.say(prediction.line())
        self._check_text(data)
        layers = distil_all_layers(
            self.stream, self.empty_chain, data, self.config, self.work, self.workers, self.progress
        )
        final, after_phase_1, end_to_end = self._end_to_end(data)
        if not self.workers.first:
            self.workers.wait()
            return None
        origin = origin_of(self.model, self.original)
        with new_folder(self.out, self.overwrite) as folder:
            scrubbed, fidelity, elsewhere = self._write(folder, final, layers, data)
            copy_legal_files(origin, self.original, folder)
            record = lock_record(
                model=public_name(self.model),
                original_sha256=self.original_sha256,
                weights_sha256=weights_sha256(folder),
                intermediate_size=self.raw_config.intermediate_size,
                family=self.family,
                config=self.config,
                data=data,
                layers=layers,
                after_phase_1=after_phase_1,
                end_to_end=end_to_end,
                fidelity=fidelity,
                other_texts=elsewhere,
                scrubbed_rows=scrubbed,
                dtype=self.dtype,
                seconds=time.perf_counter() - self.started,
                workers=self.workers.count,
                memory=prediction.record(self.memory),
                files=[*files_below(folder), CARD, LOCK_RECORD],
                licence=origin.record(),
            )
            save_description(folder, record, locked_model_card(record, origin))
        self.workers.wait()
        return LockResult(self.out, record, origin)

    def _check_text(self, data: DistillationData) -> None:
        """Refuse text on which the original is broken, and warn of text that it predicts hardly better than chance."""
        meter = FidelityMeter.on("evaluation", self.stream, data, self.workers, self.progress)
        perplexity, vocab_size = meter.original_perplexity(), self.stream.config.vocab_size
        if not perplexity < float("inf"):
            raise UsageError(
                f"{self.model} computes values that are not finite on {meter.text}: change MODEL or --data"
            )
        if perplexity > ABSURD_PERPLEXITY_SHARE * vocab_size:
            self.progress.say(
                f"warning: the perplexity of {self.model} on {meter.text} is {perplexity:,.0f}, and that of a guess "
                f"{vocab_size:,}: the model cannot read this text, so a lock distilled on it will be poor on others; "
                "change --data"
            )

    def _data(self) -> DistillationData:
        """The text. Text from the model itself is sampled once and kept in the work folder."""
        source = effective_source(self.config, self.model)
        if source != "self":
            return load_data(self.config, source, self.stream.config, self.tokenizer)
        if {"none", "stdlib", *BUILT_IN}.issuperset(self.config.other_texts):  # else the column may be of one of those
            require_columns(source, self.config.data_column)
        if self.workers.first and not self.work.has_rows():
            with self.stream.without_outside():  # the model that samples has the same weights
                rows = sampled_data(
                    self.original, self.config, self.stream.config, self.tokenizer, self.device, self.progress
                )
                return_free_memory()
            self.work.save_rows(rows)
        self.workers.wait()
        return DistillationData(source, **self.work.load_rows())

    @functools.cached_property
    def original_sha256(self) -> str:
        """Hash of the original's weights, computed once."""
        return weights_sha256(self.original)

    def _fingerprint(self, data: DistillationData) -> dict[str, Any]:
        """Everything that the weights depend on."""
        rows = {name: value for name, value in data.record().items() if name.endswith("sha256")}
        return {
            "recipe": self.config.result_settings() | {"data": public_name(data.source)},
            "model_sha256": self.original_sha256,
            "text": rows,
            "versions": {name: versions().get(name) for name in ("lockkit", "torch", "transformers")},
            "processor": "GPU" if self.device.startswith("cuda") else "CPU",
        }

    @functools.cached_property
    def chains(self) -> ChainConfig:
        """The description of the chains, without their gains, which phase 1 chooses."""
        shape = mlp_weights(self.stream.layers[0].mlp, self.family).shape
        return chains_for(shape, self.config.depth, activation_name(self.stream.config))

    def empty_chain(self, gain: float) -> DLRNet:
        """An untrained chain for any layer of this model."""
        return empty_chain(self.stream.config, self.chains, gain)

    def _phase_1_chain(self, layer: int) -> DLRNet:
        return self.work.load_chain(self.work.layer_file(layer), self.empty_chain)[0].to(self.device)

    def _end_to_end(self, data: DistillationData) -> tuple[FinalChains, Fidelity, EndToEndResult | None]:
        """Phase 2, unless the recipe skips it.

        Returns:
            A function from the index of a layer to its final chain, the fidelity after phase 1, and the result of
            phase 2 or None.
        """
        meter = FidelityMeter.on("evaluation", self.stream, data, self.workers, self.progress)
        after_phase_1 = meter.measure(self._phase_1_chain)
        if self.config.end_to_end_tokens < self.config.end_to_end_batch_tokens:
            return self._phase_1_chain, after_phase_1, None
        in_memory = keeps_everything(self.stream, self.config)
        folder = None if in_memory else self.work.folder / f"working-{self.workers.rank}"
        with readable_disk_errors(self.work.folder, "--work"):
            stack = ChainStack(self.stream, self._phase_1_chain, self.config, folder)
            meter = FidelityMeter.on("validation", self.stream, data, self.workers)
            result = EndToEnd(
                self.stream, stack, data.train, meter, self.config, self.work, self.workers, self.progress
            ).run()
        self.stream.drop_layers()
        return stack.unpacked, after_phase_1, result

    def _write(
        self, folder: Path, final: FinalChains, layers: list[LayerResult], data: DistillationData
    ) -> tuple[int, Fidelity, list[Fidelity]]:
        """Write the weights.

        Returns:
            The number of perturbed rows, and the fidelity of the weights as written: on the evaluation set, and on each
            other text.
        """
        scrubbed = 0

        @torch.no_grad()
        def rounded(layer: int) -> DLRNet:
            nonlocal scrubbed
            chain = final(layer).to(self.dtype)
            with self.stream.layer(layer) as teacher:
                scrubbed += scrub_teacher_rows(chain, mlp_weights(teacher.mlp, self.family), self.config.seed)
            return chain

        chains = replace(self.chains, gains=tuple(layer.gain for layer in layers))
        save_locked_weights(self.stream, rounded, folder, chains, self.dtype)
        written = StreamedModel(folder, load_config(folder), self.family, self.device, beside=self.stream)
        meter = FidelityMeter.on("evaluation", self.stream, data, progress=self.progress)
        fidelity = meter.measure_model(written)
        if not fidelity.kl_divergence < float("inf"):
            raise DistillationError(
                f"the locked model's held-out KL divergence is {fidelity.kl_divergence}: lower --learning-rate or "
                "--coupling, or save with --dtype float32"
            )
        return scrubbed, fidelity, self._measure_elsewhere(written)

    def _measure_elsewhere(self, written: StreamedModel) -> list[Fidelity]:
        """The fidelity of a locked model on text of other kinds than the distillation text."""
        found = []
        for name, rows in self.other_rows.items():
            text = MeasuredText.of(rows, public_name(name), "evaluate")
            found.append(FidelityMeter(self.stream, rows, text, progress=self.progress).measure_model(written))
        return found


def _summary(raw_config: PreTrainedConfig, config: LockConfig, data: DistillationData) -> str:
    """One line for the user: the architecture, and the amount of text."""
    ranks = block_ranks(raw_config.intermediate_size, config.depth)
    rank = f"rank {ranks[0]}"
    if ranks[0] != ranks[-1]:
        rank = f"rank {ranks[-1]} or {ranks[0]}, since {config.depth} does not divide {raw_config.intermediate_size}"
    passes = config.tokens / data.train.numel()
    return (
        f"{counted(raw_config.num_hidden_layers, 'layer')}, each a chain of {config.depth} blocks of {rank}; "
        f"text: {data.source}, {data.train.numel():,} training tokens"
        + (f" ({passes:.1f} passes)" if passes > 1 else "")
        + f", two held-out sets of {data.validation.numel():,} tokens"
    )


def _lowered(raw_config: PreTrainedConfig, config: LockConfig) -> Iterator[str]:
    """One line for each setting that is higher than the model allows."""
    if (context := row_tokens(config, raw_config)) < config.block_tokens:
        yield f"rows have {context:,} tokens, the model's context, not --block-tokens {config.block_tokens:,}"
    if (config.layers_together or 0) > (layers := raw_config.num_hidden_layers):
        yield f"{counted(layers, 'layer')} together, all of the model, not --layers-together {config.layers_together}"
