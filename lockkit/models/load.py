"""Loading models and tokenizers: the bundled `demo`, a local folder, or the Hub.

Only safetensors are read, never pickles. Models are built from the classes of transformers, locked ones from
lockkit's own, so no code that comes with a model ever runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import UsageError, first_line
from lockkit.files import CARD, EXPORT_MANIFEST
from lockkit.models.families import FAMILIES, LOCKED_PREFIX, Family, family_of, is_locked
from lockkit.models.locked import base_config, chain_config, locked_classes
from lockkit.models.origin import LEGAL_FILES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEMO = Path(__file__).parent / "demo"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", CARD, *LEGAL_FILES]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
]


def resolve_model(model: str, option: str = "MODEL") -> Path:
    """The local folder of `demo`, of a local path, or of a Hub id, which is downloaded.

    Raises:
        UsageError: there is no such model. The message names `option`.
    """
    if model == "demo":
        return DEMO
    path = Path(model)
    if path.is_dir():
        if (path / EXPORT_MANIFEST).is_file():
            raise UsageError(f"{path} is an ONNX export: give the model it was made from as {option}")
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} has no config.json, so it is not a model folder: change {option}")
        return path
    if path.exists():
        raise UsageError(f"{path} is a file, not a model folder: change {option}")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model:
        raise UsageError(f"there is no folder {model}: change {option}")
    return _download(model, option)


def _download(repository: str, option: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise UsageError(f"there is no folder {repository}, and it is not a Hub id: change {option}") from error
    except Exception as error:  # many kinds: no network, no such repository, no permission, ...
        raise UsageError(
            f"there is no folder {repository}, and the Hub did not deliver it ({first_line(error)}): change {option}"
        ) from error


def load_config(folder: Path) -> PreTrainedConfig:
    """Load a configuration. That of a locked model gets lockkit's own class.

    Raises:
        UsageError: the configuration is broken, or needs code from the model's folder.
        UnsupportedModelError: the model is of no family that lockkit supports.
    """
    from transformers import AutoConfig

    raw = _read_config(folder)
    model_type = str(raw.get("model_type", ""))
    family = FAMILIES.get(model_type.removeprefix(LOCKED_PREFIX))
    try:
        if family is not None and model_type.startswith(LOCKED_PREFIX):
            config = locked_classes(family)[0].from_pretrained(folder)
            chains = chain_config(config)  # raises ValueError if the description of the chains is not valid
            if chains is None or len(chains.gains) != config.num_hidden_layers:
                raise ValueError("dlr must have one gain per decoder layer")
            return config
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{folder} needs code of its own, and lockkit does not run a model's own code: change MODEL"
            ) from error
        raise UsageError(f"{folder}/config.json cannot be used ({first_line(error)}): change MODEL") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}/config.json cannot be read ({first_line(error)}): change MODEL") from error
    return raw


def load_model(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
) -> tuple[PreTrainedModel, Family]:
    """Load an original or a locked model, in evaluation mode.

    `dtype` is a torch dtype, or "auto" for the dtype of the stored weights.

    Raises:
        UsageError: weights are missing, broken, incomplete or not safetensors.
        UnsupportedModelError: lockkit does not support the model's family.
    """
    import transformers

    config = load_config(folder)
    family = family_of(config)
    check_safetensors(folder)
    model_class = locked_classes(family)[1] if is_locked(config) else getattr(transformers, family.model_class)
    try:
        with no_progress_bars():
            model, info = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        mismatch = "ignore_mismatched_sizes" in str(error)
        reason = "their shapes are not those of its config.json" if mismatch else first_line(error)
        raise UsageError(f"the weights in {folder} cannot be loaded ({reason}): change MODEL") from error
    missing = sorted(info["missing_keys"]) + [str(key) for key in info.get("mismatched_keys", [])]
    if missing:
        raise UsageError(f"the weights in {folder} lack {len(missing)} tensors, {missing[0]} among them: change MODEL")
    return model.to(device).eval(), family


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turn off transformers' progress bars inside the `with` block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def check_safetensors(folder: Path) -> None:
    """Open every safetensors file of a folder, without reading its tensors.

    Raises:
        UsageError: there is no file, one is missing, or one is broken.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"{index} is broken ({first_line(error)}): change MODEL") from error
        files = [folder / name for name in sorted(names)]
    if not files:
        raise UsageError(f"{folder} has no safetensors (pickled weights are never loaded): change MODEL")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{file} is not a complete safetensors file ({first_line(error)}): change MODEL"
            ) from error


def load_tokenizer(folder: Path, option: str = "MODEL") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or of an export.

    Raises:
        UsageError: there is no tokenizer, or it is broken. The message names `option`.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(f"{folder} has no tokenizer (tokenizer.json): add it, or change {option}")
    try:
        # Without trust_remote_code=False, transformers asks the user a question on a locked folder.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=_tokenizer_config(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise UsageError(
            f"the tokenizer in {folder} cannot be loaded ({first_line(error)}): change {option}"
        ) from error
    # lockkit tokenizes whole documents and cuts them into blocks later: turn off the warning about their length.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _tokenizer_config(folder: Path) -> PreTrainedConfig | None:
    """The original's configuration for a locked folder, else None. transformers warns about locked model types."""
    if not (folder / "config.json").is_file():
        return None
    model_type = str(_read_config(folder).get("model_type", ""))
    if not model_type.startswith(LOCKED_PREFIX):
        return None
    config = load_config(folder)
    return base_config(config, family_of(config))
