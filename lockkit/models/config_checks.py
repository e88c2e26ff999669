"""Whether a model can be built from config.json and generation_config.json, and settings of theirs that must not matter.

transformers reads many entries without a check and fails much later. Here the cause is named before any work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError, first_line
from lockkit.files import read_json
from lockkit.models.quiet import errors_only

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GENERATION_CONFIG = "generation_config.json"
_ATTENTION = ("eager", "sdpa")  # those that need no package besides PyTorch
_TOKEN_IDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
)
# The lowest values of the numbers in generation_config.json.
_LOWEST = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "top_k", "typical_p", "repetition_penalty"), 0),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("num_beams", "num_return_sequences"), 1),
}


def reset_run_settings(config: PreTrainedConfig, raw: dict[str, Any]) -> None:
    """Remove what a configuration says about one run of the model, not about the model. It is changed in place.

    These are additional outputs, the type of the outputs, gradient checkpointing, and an implementation of attention
    that needs another package.

    Args:
        config: the configuration.
        raw: the content of its file.
    """
    named = raw.get("attn_implementation") or raw.get("_attn_implementation")
    config._attn_implementation = "eager"  # with another one, `output_attentions` cannot be set
    config.output_attentions = False
    config.output_hidden_states = False
    config.return_dict = True
    config._attn_implementation = named if named in _ATTENTION else None
    vars(config).pop("gradient_checkpointing", None)


def unusable(config: PreTrainedConfig, error: Exception) -> UsageError:
    """The error for a configuration from which no model can be built.

    Args:
        config: the configuration.
        error: what transformers raised.
    """
    folder = f"{config.name_or_path}/" if config.name_or_path else ""
    return UsageError(f"{folder}config.json cannot be used ({_reason(config, error)}): change MODEL")


def _reason(config: PreTrainedConfig, error: Exception) -> str:
    vocab_size, pad = config.vocab_size, config.pad_token_id
    if vocab_size < 1:
        return f"vocab_size is {vocab_size}"
    if pad is not None and not -vocab_size <= pad < vocab_size:
        return f"pad_token_id is {pad}, and vocab_size is {vocab_size}"
    if isinstance(error, KeyError) and error.args:
        names = [name for name, value in _entries(config.to_dict()) if value == error.args[0]]
        if names:
            return f"{names[-1]} is {error.args[0]!r}, which transformers does not have"
    return f"{type(error).__name__}: {first_line(error)}"


def _entries(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries of a dictionary and of those inside it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield name, value


def require_generation_config(folder: Path) -> None:
    """Check the generation_config.json of a model folder, if it has one.

    Raises:
        UsageError: it cannot be read, or it has a value that no generation can use.
    """
    raw = checked_generation_config(folder)
    if raw is None:
        return
    from transformers import GenerationConfig

    file = folder / GENERATION_CONFIG
    try:
        with errors_only():  # entries without effect are no problem
            GenerationConfig.from_dict(raw).validate()
    except Exception as error:
        raise UsageError(f"{file} cannot be used ({first_line(error)}): correct it, or change MODEL") from error


def checked_generation_config(folder: Path) -> dict[str, Any] | None:
    """The content of a model folder's generation_config.json, without a check by transformers; None if there is no file.

    Raises:
        UsageError: it cannot be read, or a token id or a number in it is none.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return None
    raw = read_json(file, "MODEL")
    for name in _TOKEN_IDS:
        found = raw.get(name)
        if found is not None and not all(_is_whole(token) for token in (found if isinstance(found, list) else [found])):
            raise UsageError(f"{name} is {found!r} in {file}, which is no token id: correct it, or change MODEL")
    for name, lowest in _LOWEST.items():
        found = raw.get(name)
        if found is not None and not (_is_number(found) and found >= lowest):
            raise UsageError(
                f"{name} is {found!r} in {file}, and it must be a number from {lowest}: correct it, or change MODEL"
            )
    return raw


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
