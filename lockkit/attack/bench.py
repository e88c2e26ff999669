"""The inputs of all attacks: the two models, the tasks, and unlabelled text. And the measurements of their results.

A model is loaded from its folder each time it is changed, so no attack sees the changes of another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lockkit.attack.config import AuditConfig
from lockkit.attack.tasks import Task, load_task
from lockkit.devices import choose_device
from lockkit.errors import UsageError, naming
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.measure.totals import Outputs, TextFigures
from lockkit.models.checkpoint import Checkpoint
from lockkit.models.families import Family, decoder_layers, family_of, is_locked
from lockkit.models.identity import public_name, weights_sha256
from lockkit.models.layered import LayeredModel, empty_model
from lockkit.models.load import load_config, load_model, load_tokenizer, resolve_model
from lockkit.models.lock_record import read_lock_record
from lockkit.models.locked import chain_config
from lockkit.text import Need, documents_by_split, read_rows, require_embedded, rows_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Subject = Literal["original", "locked"]
_Measured = Literal["original", "locked", "model"]
_OPTIONS = {"locked": "LOCKED", "original": "--original"}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
# Two tokenizers are the same if they have the same vocabulary and agree on this text.
PROBE_TEXT = 'def probe(a, b=None):\n    """Any text will do: 0123456789, été, 日本語."""\n    return a\n'
TEXT_BLOCK_TOKENS = 256
MEASURED_SPLIT = "evaluate"
MEASURED_ROWS = 4  # in one forward pass


@dataclass(frozen=True)
class Quality:
    """The figures of a model on `Bench.text`, which neither trained the lock nor chose its state.

    Attributes:
        perplexity: per token.
        kl_to_lock: KL(locked model || model), nats per token.
        kl_to_original: KL(original || model), nats per token.
    """

    perplexity: float
    kl_to_lock: float
    kl_to_original: float

    def record(self) -> dict[str, float]:
        """The figures as JSON values."""
        return dict(vars(self))


class Bench:
    """The inputs and measurements of an audit.

    Args:
        locked: the locked model, a folder or Hub id.
        original: the model that it was made from: `demo`, a folder or Hub id.
        config: the settings of the audit.

    Attributes:
        folders, names, hashes: folder, public name and SHA-256 of the weights of both models, by `Subject`.
        family, tokenizer: of both models.
        device: where attacks run.
        lock, record: the record of the lock, and its values.
        source, column: source of the text, and the column of its rows (None for the default).
        text_block: tokens in a row of `unlabelled` and `evaluation`.
        unlabelled: token ids that an attacker may use, `[rows, text_block]`.
        evaluation: held-out token ids, `[rows, text_block]`.
        text: description of `evaluation`.
        tasks: the fine-tuning tasks, by name.

    Raises:
        UsageError: LOCKED is not a locked model, the original does not match it, or there is too little text.
    """

    def __init__(self, locked: str, original: str, config: AuditConfig):
        self.config = config
        self.folders: dict[str, Path] = {
            "locked": resolve_model(locked, _OPTIONS["locked"]),
            "original": resolve_model(original, _OPTIONS["original"]),
        }
        self.names = {"locked": public_name(locked), "original": public_name(original)}
        self.family = _matching_family(self.folders, locked, original)
        self.tokenizer = _matching_tokenizer(self.folders, original)
        self.device = torch.device(choose_device(config.device))
        self.lock = read_lock_record(self.folders["locked"], "LOCKED")
        self.record = self.lock.values
        context = getattr(load_config(self.folders["original"]), "max_position_embeddings", None) or 2**31
        if config.block_tokens > context:
            raise UsageError(f"--block-tokens {config.block_tokens} exceeds the model's context of {context}: lower it")
        self.source, self.column = config.data, config.data_column
        if self.source == "auto":
            self.source, self.column = self.lock.source(locked), self.column or self.lock.data_column
        self.text_block = min(TEXT_BLOCK_TOKENS, context)
        self.unlabelled, self.evaluation = self._text(
            distill=max(config.unlock_tokens, config.redistill_tokens), evaluate=config.evaluation_tokens
        )
        self.text = MeasuredText.of(self.evaluation, public_name(self.source), MEASURED_SPLIT)
        self.tasks = {name: self._task(name) for name in config.tasks}
        self.hashes = {name: weights_sha256(folder) for name, folder in self.folders.items()}
        self._kept: dict[str, PreTrainedModel] = {}
        self._quality: dict[str, Quality] = {}

    def _text(self, **tokens: int) -> tuple[torch.Tensor, ...]:
        """Token ids, `[rows, text_block]`, of each split in `tokens`, up to the given number of tokens."""
        block = self.text_block
        needs = {split: Need(block, max(count, 2 * block)) for split, count in tokens.items()}
        found = documents_by_split(self.source, column=self.column)
        rows = read_rows(self.tokenizer, found, block, needs, self.source)
        for part in rows.values():
            self._require_embedded(part, self.source, "--data")
        return tuple(rows[split] for split in tokens)

    def _task(self, name: str) -> Task:
        """Load a task, and check that no row is both trained on and held out."""
        task = load_task(
            name,
            self.tokenizer,
            block_tokens=self.config.block_tokens,
            train_tokens=self.config.steps * self.config.batch_rows * self.config.block_tokens,
            held_out_tokens=self.config.held_out_tokens,
            distilled_on=self.source if self.lock.distilled_on else None,
            distilled_column=self.column,
            column=self.config.data_column,
        )
        for part in (task.train, task.held_out):
            self._require_embedded(part.ids, name, "--task")
        shared = {tuple(row) for row in task.train.ids.tolist()} & {tuple(row) for row in task.held_out.ids.tolist()}
        if shared:
            raise UsageError(f"{name}: {len(shared)} rows are both trained on and held out: change --task")
        return task

    def _require_embedded(self, ids: torch.Tensor, name: str, option: str) -> None:
        vocab_size = load_config(self.folders["original"]).vocab_size
        require_embedded(self.tokenizer, ids, vocab_size, name, option)

    def load(self, subject: Subject) -> PreTrainedModel:
        """A new copy of a model, in float32, on the device, with all weights trainable."""
        model, _ = load_model(self.folders[subject], torch.float32, str(self.device))
        return model.requires_grad_(True)

    def frozen(self, subject: Subject) -> PreTrainedModel:
        """The shared copy of a model, in float32, with frozen weights. Do not change it."""
        if subject not in self._kept:
            self._kept[subject] = self.load(subject).requires_grad_(False)
        return self._kept[subject]

    def quality(self, model: PreTrainedModel) -> Quality:
        """Perplexity and KL divergences of a model on `text`."""
        figures = self._measure(model, ["model"], [("locked", "model"), ("original", "model")])
        to_lock, to_original = (comparison.kl_divergence for comparison in figures.comparison.values())
        return Quality(figures.perplexity["model"].value, to_lock, to_original)

    def quality_of(self, subject: Subject) -> Quality:
        """The quality of the locked model or of the original, measured once."""
        if subject not in self._quality:
            self._quality[subject] = self.quality(self.frozen(subject))
        return self._quality[subject]

    @functools.cached_property
    def fidelity(self) -> Fidelity:
        """The fidelity of the locked model to the original on `text`, measured once."""
        return self._measure(None, ["original", "locked"], [("original", "locked")]).fidelity(self.text)

    def kl(self, model: PreTrainedModel, subject: Subject) -> float:
        """KL(subject || model) on `text`, in nats per token. Cheaper than `quality`."""
        return self._measure(model, [], [(subject, "model")]).comparison[subject, "model"].kl_divergence

    @torch.no_grad()
    def _measure(
        self, model: PreTrainedModel | None, perplexities: Iterable[str], pairs: list[tuple[_Measured, _Measured]]
    ) -> TextFigures:
        """Figures on `text`.

        Args:
            model: the model called `model` in the other arguments.
            perplexities: names of models whose perplexity is wanted. Each must be in a pair.
            pairs: names of models to compare: (reference, candidate).
        """
        figures = TextFigures(perplexities, pairs)
        models: dict[str, LayeredModel] = {}
        for name in dict.fromkeys(name for pair in pairs for name in pair):
            found = model if name == "model" else self.frozen(name)
            assert found is not None  # a caller that names `model` gives it
            models[name] = LayeredModel(found, self.device)
        for ids in self.evaluation.split(MEASURED_ROWS):
            ids = ids.to(self.device)
            figures.add(ids, {name: Outputs(found.hidden(ids), found.head) for name, found in models.items()})
        return figures

    @functools.cached_property
    def kl_without_mlps(self) -> float:
        """KL(original || original with MLPs whose output is 0), in nats per token. An unlock can win back this much."""
        emptied = self.load("original").requires_grad_(False)
        for layer in decoder_layers(emptied):
            for weight in layer.mlp.parameters():
                weight.zero_()
        return self.kl(emptied, "original")

    @property
    def lock_tokens(self) -> int:
        """Tokens of both phases of distillation; 0 if the record does not say."""
        return self.lock.tokens

    @property
    def lock_shape(self) -> dict[str, Any]:
        """The architecture of the chains as JSON values, without the gains, which distillation chose."""
        chains = chain_config(self.frozen("locked").config)
        assert chains is not None  # the constructor refuses a model that is not locked
        return {key: value for key, value in chains.to_dict().items() if key != "gains"}

    @property
    def depth(self) -> int:
        """Blocks in each chain of the lock."""
        return len(decoder_layers(self.frozen("locked"))[0].mlp.blocks)

    def identity(self) -> dict[str, Any]:
        """Everything that a result depends on besides the task and the settings of an attack. Weights and text by hash."""
        return {
            "locked_sha256": self.hashes["locked"],
            "original_sha256": self.hashes["original"],
            "unlabelled_sha256": rows_sha256(self.unlabelled),
            "evaluation_sha256": rows_sha256(self.evaluation),
            "unlock_tokens": self.config.unlock_tokens,
            "redistill_tokens": self.config.redistill_tokens,
            "device": self.device.type,
        }


def _matching_family(folders: dict[str, Path], locked: str, original: str) -> Family:
    """The family of both models. Raises a UsageError if they do not match, or if one cannot be loaded."""
    configs = {}
    for name, folder in folders.items():
        with naming(_OPTIONS[name]):
            configs[name] = load_config(folder)
    if not is_locked(configs["locked"]):
        raise UsageError(f"{locked} is not a locked model: give LOCKED a folder that `lockkit lock` wrote")
    if is_locked(configs["original"]):
        raise UsageError(f"{original} is a locked model itself: give --original the model the lock was made from")
    family = family_of(configs["locked"])
    if family_of(configs["original"]) != family:
        raise UsageError(
            f"{original} is a {configs['original'].model_type}, the lock is of a {family.model_type}: change --original"
        )
    for size in SIZES:
        sizes = [getattr(config, size, None) for config in configs.values()]
        if sizes[0] != sizes[1]:
            raise UsageError(f"{size} is {sizes[0]} in the lock and {sizes[1]} in {original}: change --original")
    for name, folder in folders.items():
        with naming(_OPTIONS[name]):
            Checkpoint(folder, empty_model(configs[name], family))  # raises an error if it cannot be loaded
    return family


def _matching_tokenizer(folders: dict[str, Path], original: str) -> PreTrainedTokenizerBase:
    """The tokenizer of both models. Raises a UsageError if they differ."""
    tokenizer, other = load_tokenizer(folders["locked"], "LOCKED"), load_tokenizer(folders["original"], "--original")
    same = tokenizer.get_vocab() == other.get_vocab() and (
        tokenizer(PROBE_TEXT)["input_ids"] == other(PROBE_TEXT)["input_ids"]
    )
    if not same:
        raise UsageError(f"the tokenizer of {original} is not that of the lock: change --original")
    return tokenizer
