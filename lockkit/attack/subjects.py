"""The subjects of an audit: the two models, the tasks, and unlabelled text. And the measurements of attacks' results.

LOCKED can be a lock of lockkit, or any model that somebody made harder to fine-tune: then it has no chains, and attacks
that need chains are left out. Both models must have the same tokenizer, because their predictions are compared.

A model is loaded from its folder each time it is changed, so no attack sees the changes of another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lockkit.attack.config import AuditConfig
from lockkit.attack.losses import held_out_loss
from lockkit.attack.tasks import IGNORED, Rows, Task, load_task
from lockkit.devices import choose_device
from lockkit.errors import UsageError, naming
from lockkit.measure.metrics import PREDICTION_FIGURES, PairFigure
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
SUBJECTS: tuple[Subject, ...] = ("original", "locked")
_OPTIONS = {"locked": "LOCKED", "original": "--original"}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
# Two tokenizers are the same if they have the same vocabulary and agree on this text.
PROBE_TEXT = 'def probe(a, b=None):\n    """Any text will do: 0123456789, été, 日本語."""\n    return a\n'
TEXT_BLOCK_TOKENS = 256
MEASURED_SPLIT = "evaluate"
KL_ONLY = {"kl_divergence": PREDICTION_FIGURES["kl_divergence"]}
MEASURED_ROWS = 4  # in one forward pass
GENERAL_ROWS = 2  # of `evaluation`: on these, a fine-tuned model shows what is left of its other abilities


@dataclass(frozen=True)
class Quality:
    """The figures of a model on `Subjects.text`, which neither trained the lock nor chose its state.

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


class Subjects:
    """The inputs and measurements of an audit.

    Args:
        locked: the locked or hardened model, a folder or Hub id.
        original: the model that it was made from, or that it is compared with: `demo`, a folder or Hub id.
        config: the settings of the audit.

    Attributes:
        folders, names, hashes: folder, public name and SHA-256 of the weights of both models, by `Subject`.
        family: of LOCKED.
        has_chains: whether LOCKED is a lock of lockkit.
        tokenizer: of both models.
        device: where attacks run.
        lock, record: the record of the lock, and its values.
        source, column: source of the text, and the column of its rows (None for the default).
        text_block: tokens in a row of `unlabelled` and `evaluation`.
        unlabelled: token ids that an attacker may use, `[rows, text_block]`.
        evaluation: held-out token ids, `[rows, text_block]`.
        general: some of them, with labels.
        text: description of `evaluation`.
        tasks: the fine-tuning tasks, by name.

    Raises:
        UsageError: the original is a lock or does not match LOCKED, or there is too little text.
    """

    def __init__(self, locked: str, original: str, config: AuditConfig):
        self.config = config
        self.folders: dict[str, Path] = {
            "locked": resolve_model(locked, _OPTIONS["locked"]),
            "original": resolve_model(original, _OPTIONS["original"]),
        }
        self.names = {"locked": public_name(locked), "original": public_name(original)}
        self.family, self.has_chains = _matching_family(self.folders, locked, original)
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
        self.general = Rows(self.evaluation[:GENERAL_ROWS], _first_ignored(self.evaluation[:GENERAL_ROWS]))
        self.text = MeasuredText.of(self.evaluation, public_name(self.source), MEASURED_SPLIT)
        self.tasks = {name: self._task(name) for name in config.tasks}
        self.hashes = {name: weights_sha256(folder) for name, folder in self.folders.items()}
        self._kept: dict[str, PreTrainedModel] = {}
        self._hidden: dict[str, list[torch.Tensor]] = {}

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

    @functools.cached_property
    def general_losses(self) -> dict[str, float]:
        """The losses of both models on `general` before any fine-tuning, in nats per token."""
        return {name: held_out_loss(self.frozen(name), self.general, self.device) for name in SUBJECTS}

    def parameters(self, subject: Subject) -> int:
        """The number of parameters of a model, each tensor once."""
        return sum(parameter.numel() for parameter in self.frozen(subject).parameters())

    @functools.cached_property
    def _both(self) -> TextFigures:
        """Both models on `text`, measured once."""
        return self._measure(None, SUBJECTS, [("original", "locked"), ("locked", "original")], PREDICTION_FIGURES)

    def quality_of(self, subject: Subject) -> Quality:
        """The quality of the locked model or of the original."""
        perplexity = self._both.perplexity[subject].value
        to: dict[str, float] = {
            other: self._both.comparison[other, subject].kl_divergence for other in SUBJECTS if other != subject
        }
        to[subject] = math.nan if math.isnan(perplexity) else 0.0
        return Quality(perplexity, to["locked"], to["original"])

    @property
    def fidelity(self) -> Fidelity:
        """The fidelity of the locked model to the original on `text`."""
        return self._both.fidelity(self.text)

    def kl(self, model: PreTrainedModel, subject: Subject) -> float:
        """KL(subject || model) on `text`, in nats per token. Cheaper than `quality`."""
        return self._measure(model, [], [(subject, "model")]).comparison[subject, "model"].kl_divergence

    @torch.no_grad()
    def _measure(
        self,
        model: PreTrainedModel | None,
        perplexities: Iterable[str],
        pairs: list[tuple[_Measured, _Measured]],
        figures: Mapping[str, PairFigure] = KL_ONLY,
    ) -> TextFigures:
        """Figures on `text`.

        Args:
            model: the model called `model` in the other arguments.
            perplexities: names of models whose perplexity is wanted. Each must be in a pair.
            pairs: names of models to compare: (reference, candidate).
            figures: the figures of each comparison.
        """
        found = TextFigures(perplexities, pairs, dict.fromkeys(pairs, figures))
        models: dict[str, tuple[LayeredModel, list[torch.Tensor]]] = {}
        for name in dict.fromkeys(name for pair in pairs for name in pair):
            own = model if name == "model" else self.frozen(name)
            assert own is not None  # a caller that names `model` gives it
            models[name] = LayeredModel(own, self.device), self._states(own, name)
        for number, ids in enumerate(self.evaluation.split(MEASURED_ROWS)):
            outputs = {name: Outputs(states[number], layered.head) for name, (layered, states) in models.items()}
            found.add(ids.to(self.device), outputs)
        return found

    def _states(self, model: PreTrainedModel, name: _Measured) -> list[torch.Tensor]:
        """The last hidden states of a model on `text`, one `[rows, block, hidden]` a part; of the subjects, computed once."""
        if name not in self._hidden:
            layered = LayeredModel(model, self.device)
            found = [layered.hidden(ids.to(self.device)) for ids in self.evaluation.split(MEASURED_ROWS)]
            if name == "model":
                return found
            self._hidden[name] = found
        return self._hidden[name]

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
        """The architecture of the chains as JSON values, without the gains, which distillation chose. Empty without chains."""
        chains = chain_config(self.frozen("locked").config) if self.has_chains else None
        if chains is None:
            return {}
        return {key: value for key, value in chains.to_dict().items() if key != "gains"}

    @property
    def depth(self) -> int:
        """Blocks in each chain of the lock; 1 without chains."""
        if not self.has_chains:
            return 1
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


def _first_ignored(ids: torch.Tensor) -> torch.Tensor:
    """`ids`, `[rows, block]`, as labels: all but the first of a row count."""
    labels = ids.clone()
    labels[:, 0] = IGNORED
    return labels


def _matching_family(folders: dict[str, Path], locked: str, original: str) -> tuple[Family, bool]:
    """The family of LOCKED, and whether it has chains.

    Raises:
        UsageError: LOCKED has chains and the original is not of its shape; the original is a lock; one cannot be loaded.
    """
    configs = {}
    for name, folder in folders.items():
        with naming(_OPTIONS[name]):
            configs[name] = load_config(folder)
    has_chains = is_locked(configs["locked"])
    if is_locked(configs["original"]):
        raise UsageError(f"{original} is a locked model itself: give --original the model the lock was made from")
    families = {name: family_of(config) for name, config in configs.items()}
    family = families["locked"]
    if has_chains and families["original"] != family:
        raise UsageError(
            f"{original} is a {configs['original'].model_type}, the lock is of a {family.model_type}: change --original"
        )
    for size in SIZES if has_chains else ("vocab_size",):
        sizes = [getattr(config, size, None) for config in configs.values()]
        if sizes[0] != sizes[1]:
            raise UsageError(f"{size} is {sizes[0]} in the lock and {sizes[1]} in {original}: change --original")
    for name, folder in folders.items():
        with naming(_OPTIONS[name]):
            Checkpoint(folder, empty_model(configs[name], families[name]))  # raises an error if it cannot be loaded
    return family, has_chains


def _matching_tokenizer(folders: dict[str, Path], original: str) -> PreTrainedTokenizerBase:
    """The tokenizer of both models. Raises a UsageError if they differ."""
    tokenizer, other = load_tokenizer(folders["locked"], "LOCKED"), load_tokenizer(folders["original"], "--original")
    same = tokenizer.get_vocab() == other.get_vocab() and (
        tokenizer(PROBE_TEXT)["input_ids"] == other(PROBE_TEXT)["input_ids"]
    )
    if not same:
        raise UsageError(f"the tokenizer of {original} is not that of the lock: change --original")
    return tokenizer
