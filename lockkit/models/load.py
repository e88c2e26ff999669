"""Loading models and tokenizers: the bundled `demo`, a local folder, a GGUF file, or the Hub.

Only safetensors and GGUF files are read, never pickles. Models are built from the classes of transformers, locked ones from
lockkit's own, so no code that comes with a model ever runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lockkit.errors import UsageError, first_line
from lockkit.files import CARD, EXPORT_MANIFEST, impostor, read_json
from lockkit.models.config_checks import require_generation_config, reset_run_settings
from lockkit.models.families import FAMILIES, LOCKED_PREFIX, Family, family_of
from lockkit.models.gguf import folder_of_gguf
from lockkit.models.origin import LEGAL_FILES
from lockkit.models.quiet import no_progress_bars
from lockkit.models.weight_files import ADAPTER_FILE
from lockkit.output_folders import check_apart, check_output_folder
from lockkit.settings import expanded

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
    """The local folder of `demo`, of a local path, of a GGUF file, or of a Hub id, which is downloaded.

    Raises:
        UsageError: there is no such model. The message names `option`.
    """
    if model == "demo":
        return DEMO
    path = Path(expanded(model))
    if path.is_dir():
        if (path / EXPORT_MANIFEST).is_file():
            raise UsageError(f"{path} is an ONNX export: give the model it was made from as {option}")
        if not (path / "config.json").is_file() and (path / ADAPTER_FILE).is_file():
            raise UsageError(
                f"{path} is an adapter, not a model: merge it into its model (merge_and_unload in peft), or change {option}"
            )
        if (path / "model.onnx").is_file() and not any(path.glob("*.safetensors")):
            raise UsageError(f"{path} has no {EXPORT_MANIFEST}, so it is not an export of lockkit: change {option}")
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} has no config.json, so it is not a model folder: change {option}")
        return path
    if path.is_file() and path.suffix.lower() == ".gguf":
        return folder_of_gguf(path, option)
    if path.exists():
        raise UsageError(f"{path} is a file, not a model folder: change {option}")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model:
        raise UsageError(f"there is no folder {model}: change {option}")
    return _download(model, option)


def resolve_model_apart(model: str, out: Path, overwrite: bool) -> Path:
    """The local folder of MODEL, as `resolve_model` finds it, after a check that OUT can be written and is apart from it.

    The checks come before a download.

    Raises:
        UsageError: there is no such model, OUT cannot be written, or one folder contains the other.
    """
    local = DEMO if model == "demo" else Path(expanded(model))
    if local.exists():
        check_apart(out, local)
    check_output_folder(out, overwrite)
    folder = resolve_model(model)
    check_apart(out, folder)
    return folder


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
        UsageError: the configuration or generation_config.json is broken, or the model needs code from the model's folder.
        UnsupportedModelError: the model is of no family that lockkit supports.
    """
    from transformers import AutoConfig

    from lockkit.models.locked import chain_config, locked_classes

    raw = read_json(folder / "config.json", "MODEL")
    model_type = str(raw.get("model_type", ""))
    family = FAMILIES.get(model_type.removeprefix(LOCKED_PREFIX))
    require_generation_config(folder)
    try:
        if family is not None and model_type.startswith(LOCKED_PREFIX):
            config = locked_classes(family)[0].from_pretrained(folder)
            chains = chain_config(config)  # raises ValueError if the description of the chains is not valid
            if chains is None or len(chains.gains) != config.num_hidden_layers:
                raise ValueError("dlr must have one gain per decoder layer")
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        reset_run_settings(config, raw)
        return config
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{folder} needs code of its own, and lockkit does not run a model's own code: change MODEL"
            ) from error
        raise UsageError(f"{folder}/config.json cannot be used ({first_line(error)}): change MODEL") from error


def load_model(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
) -> tuple[PreTrainedModel, Family]:
    """Load an original or a locked model, in evaluation mode.

    `dtype` is a torch dtype, or "auto" for the dtype of the stored weights.

    Raises:
        UsageError: weights are missing, broken, incomplete, of another model or not safetensors.
        UnsupportedModelError: lockkit does not support the model's family, or the weights are quantised.
    """
    from lockkit.models.checkpoint import Checkpoint, note_untied_head
    from lockkit.models.layered import empty_model

    config = load_config(folder)
    empty = empty_model(config, family_of(config))
    Checkpoint(folder, empty)  # raises an error if the weights are not this model's
    try:
        with no_progress_bars():
            model, info = type(empty).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise UsageError(f"the weights in {folder} cannot be loaded ({first_line(error)}): change MODEL") from error
    if info["missing_keys"]:  # a version of transformers that reads other files or names than `Checkpoint`
        raise UsageError(f"transformers did not load {min(info['missing_keys'])} from {folder}: change MODEL")
    note_untied_head(model, folder)
    return model.to(device).eval(), family_of(config)


def load_tokenizer(folder: Path, option: str = "MODEL") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or of an export.

    Raises:
        UsageError: there is no tokenizer, or it is broken. The message names `option`.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(f"{folder} has no tokenizer (tokenizer.json): add it, or change {option}")
    for file in (folder / name for name in TOKENIZER_FILES):
        if words := impostor(file):
            raise UsageError(f"{file} {words}, or change {option}")
    config = _tokenizer_config(folder)
    try:
        # Without trust_remote_code=False, transformers asks the user a question on a locked folder.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"{_tokenizer_problem(folder, error)}, or change {option}") from error
    # lockkit tokenizes whole documents and cuts them into blocks later: turn off the warning about their length.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _tokenizer_problem(folder: Path, error: Exception) -> str:
    """Why transformers raised `error` when it loaded a tokenizer, and what to do.

    If transformers cannot read tokenizer.model with sentencepiece, it tries tiktoken and reports that this is missing.
    """
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    file = folder / "tokenizer.model"
    if "tiktoken" not in str(error) or not file.is_file():
        return f"the tokenizer in {folder} cannot be loaded ({first_line(error)}): correct it"
    if is_sentencepiece_available() and is_protobuf_available():
        return f"{file} is not a SentencePiece model: add tokenizer.json"
    return f"{file} cannot be read without sentencepiece and protobuf: pip install 'lockkit[sentencepiece]', add tokenizer.json"


def _tokenizer_config(folder: Path) -> PreTrainedConfig | None:
    """The original's configuration for a locked folder, else None. transformers warns about locked model types."""
    if not (folder / "config.json").is_file():
        return None
    model_type = str(read_json(folder / "config.json", "MODEL").get("model_type", ""))
    if not model_type.startswith(LOCKED_PREFIX):
        return None
    from lockkit.models.locked import base_config

    config = load_config(folder)
    return base_config(config, family_of(config))
