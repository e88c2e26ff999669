"""The export that is served: verified, then opened.

1. Compare every file with the manifest (`check_manifest`). Links that leave the folder are refused, and
   an export of which anything is read that the manifest does not list.
2. Load the tokenizer. No code from the folder ever runs: where `lockkit kernel` has been run on it, the
   library that this user compiled on this machine is loaded, not the folder's copy of one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError
from lockkit.export.chains import has_kernel_form
from lockkit.export.manifest import Manifest, check_manifest
from lockkit.export.session import MODEL_FILE, ExportSession
from lockkit.files import read_json
from lockkit.targets import provider_called

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """An intact export and what is needed to speak with it."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]  # the original family's config.json
    tokenizer: PreTrainedTokenizerBase
    start_id: int | None  # what an empty prompt becomes
    end_ids: frozenset[int]  # tokens that end an answer
    context: int | None  # tokens the model can attend to

    @property
    def fast_tokenizer(self) -> Tokenizer:
        return self.tokenizer.backend_tokenizer

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return int(self.config["vocab_size"])

    @property
    def chats(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt)["input_ids"]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of a conversation, by the tokenizer's own chat template (in transformers' sandbox).

        Raises:
            jinja2.TemplateError: the template refuses these messages.
        """
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def open_session(model: ServedModel, provider: str, threads: int | None) -> ExportSession:
    """The graph, with the fused kernel if `lockkit kernel` gave it to the export.

    Without it the answers are the same and slower, so where it is to be used and cannot be, one line is logged.

    Raises:
        UsageError: the graph cannot be loaded.
    """
    from lockkit.kernel import find_kernel, has_kernel

    if provider_called(provider).row.runs_kernel and has_kernel(model.folder):
        kernel, remedy = find_kernel(), f"run lockkit kernel {model.folder}"
        if not has_kernel_form(model.folder / MODEL_FILE):
            reason, remedy = "its chains are not in the form that this version knows", "export again"
        elif not kernel:
            reason = "it has not been compiled for this machine and version"
        else:
            try:
                session = ExportSession(model.folder, provider, check=False, threads=threads, kernel=kernel)
            except UsageError as error:
                reason = str(error)
            else:
                if session.fused:
                    return session
                reason = "onnxruntime did not take it"
        log.warning("serving %s without the fused kernel, slower (%s): %s", model.folder, reason, remedy)
    return ExportSession(model.folder, provider, check=False, threads=threads)


def open_served_model(folder: Path) -> ServedModel:
    """Verify and open an export.

    Raises:
        UsageError: it is not an export, or not the one that was written.
    """
    from lockkit.generate import special_tokens
    from lockkit.models.load import load_tokenizer

    manifest = check_manifest(folder)
    config = read_json(folder / "config.json", "EXPORT")
    tokenizer = load_tokenizer(folder, "EXPORT")
    if not tokenizer.is_fast:
        raise UsageError(f"{folder} has no tokenizer.json, which a server needs: add it to the model and export again")
    start_id, end_ids = special_tokens(folder, config, tokenizer)
    return ServedModel(
        folder=folder,
        manifest=manifest,
        config=config,
        tokenizer=tokenizer,
        start_id=start_id,
        end_ids=frozenset(end_ids),
        context=config.get("max_position_embeddings"),
    )
