"""Check an export against its manifest, and open it.

1. Every file is compared with the manifest (`check_manifest`). The export is refused if a link leaves
   the folder, or if a file would be read that the manifest does not list.
2. The tokenizer is loaded. No code from the folder runs. After `lockkit kernel`, the library that
   was compiled on this machine is loaded, never a copy in the folder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError, first_line
from lockkit.export.manifest import Manifest, check_manifest
from lockkit.export.session import ExportSession
from lockkit.files import read_json
from lockkit.kernel.opened import open_generating

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class ServedModel:
    """An export that matches its manifest, and its tokenizer.

    Attributes:
        folder: of the export.
        manifest: hashes of its files.
        config: `config.json`, that of the original family.
        tokenizer: of the model.
        start_id: token that stands for an empty prompt; None if the model has none.
        end_ids: tokens that end an answer.
        context: most tokens that the model can attend to; None if the configuration does not say.
        chat_problem: why `encode_chat` cannot work; None if it can.
    """

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    end_ids: frozenset[int]
    context: int | None
    chat_problem: str | None

    @property
    def fast_tokenizer(self) -> Tokenizer:
        """The tokenizer without transformers, from `tokenizer.json`."""
        return self.tokenizer.backend_tokenizer

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return int(self.config["vocab_size"])

    def describe_token(self, token: int) -> str:
        """A token for messages: its text, if the tokenizer has it, and its id."""
        text = self.fast_tokenizer.id_to_token(token) if token < 2**32 else None
        return f"token {token}" if text is None else f"the token {text!r} ({token})"

    def stop_ids(self, stops: list[str]) -> frozenset[int]:
        """The special tokens among strings that end an answer. They are not in the answer's text.

        Spaces and line breaks around a token are ignored: the text before it is complete anyway.
        """
        special = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        return frozenset(special[stop.strip()] for stop in stops if stop.strip() in special)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds."""
        return self.tokenizer(prompt)["input_ids"]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, by the tokenizer's chat template.

        The template runs in transformers' sandbox.

        Args:
            messages: each with `role` and `content`.

        Raises:
            Exception: of any class, from the template, for instance because it refuses these messages.
        """
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def open_session(model: ServedModel, provider: str, threads: int | None, cuda_graphs: bool = True) -> ExportSession:
    """Load the graph, with the fused operator if `lockkit kernel` installed it in the export.

    If it is installed but cannot be used, the export is loaded without it and one warning is logged. The
    answers are then the same, but slower.

    Args:
        model: the export.
        provider: execution provider, a name in `lockkit.targets.Provider`.
        threads: of one operator on the CPU; None for onnxruntime's choice.
        cuda_graphs: on a GPU, launch each step as one CUDA graph. If that is not possible, one warning is logged.

    Raises:
        UsageError: the graph cannot be loaded.
    """
    session = open_generating(
        model.folder, provider, threads, cuda_graphs, warn=lambda text: log.warning("serving %s %s", model.folder, text)
    )
    if cuda_graphs and session.gpu is not None and not session.captures:
        log.warning("serving %s without CUDA graphs, slower: onnxruntime cannot capture its graph", model.folder)
    return session


def open_served_model(folder: Path) -> ServedModel:
    """Check an export against its manifest, and open it.

    Raises:
        UsageError: the folder is no export, a file differs from the manifest, or the tokenizer cannot be loaded.
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
        chat_problem=_chat_problem(tokenizer),
    )


def _chat_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a tokenizer cannot encode any conversation; None if it may."""
    import jinja2

    template = tokenizer.chat_template
    if not template:
        return "this model has no chat template"
    if isinstance(template, dict) and "default" not in template:
        return f"this model has chat templates named {', '.join(sorted(template))}, and none named default"
    try:
        tokenizer.apply_chat_template(_HELLO, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        return f"this model's chat template is no valid Jinja ({first_line(error)})"
    except Exception:  # these messages are refused; others may not be
        return None
    return None


def warn_about_chat(model: ServedModel) -> None:
    """Log a warning if conversations cannot be encoded, or if a conversation of one message cannot."""
    if model.chat_problem:
        log.warning("serving %s without /v1/chat/completions: %s", model.folder, model.chat_problem)
        return
    try:
        model.encode_chat(_HELLO)
    except Exception as error:  # a template is a program, and may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        log.warning("serving %s: its chat template refuses a conversation of one message (%s)", model.folder, reason)
