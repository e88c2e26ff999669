"""The model card of a copy: the original's YAML, the copy's own entries, and the part that `lockkit card` rewrites."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockkit.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import ModelCardData

    from lockkit.models.origin import Origin

# Entries of a card that lockkit sets itself, and figures of the original, which are not those of the copy.
_NOT_COPIED = {
    *("library_name", "pipeline_tag", "base_model", "base_model_relation", "tags", "datasets"),
    *("model-index", "model_name", "eval_results", "metrics", "co2_eq_emissions", "new_version", "quantized_by"),
    *("inference", "widget", "ignore_metadata_errors", "self"),
}
# Tags that name a file format or a library: the copy has its own.
_FORMAT_TAGS = {
    *("safetensors", "pytorch", "tf", "jax", "gguf", "ggml", "mlx", "onnx", "openvino", "transformers"),
    *("transformers.js", "text-generation-inference", "autotrain_compatible", "endpoints_compatible", "vllm"),
}
NOT_AUDITED = """## What this lock is worth

Not measured: `lockkit attack` audits a lock, and `lockkit card` writes its figures here."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_metadata(card: Path) -> dict[str, Any]:
    """The YAML at the top of a card; empty if there is no card, or it has no YAML.

    Raises:
        ValueError: the YAML cannot be read.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not card.is_file():
        return {}
    block = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig", errors="replace"))
    try:
        metadata = yaml.safe_load(block.group(2)) if block else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"its YAML is broken: {first_line(error)}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("its YAML is not a mapping")
    metadata = {key: value for key, value in (metadata or {}).items() if isinstance(key, str)}
    if "language" in metadata:  # YAML reads Norwegian, `no`, as false
        languages = metadata["language"] if isinstance(metadata["language"], list) else [metadata["language"]]
        metadata["language"] = ["no" if language is False else language for language in languages]
    return metadata


def copied_metadata(
    origin: Origin, *, library: str, relation: str, tags: Sequence[str], datasets: Sequence[str] = ()
) -> ModelCardData:
    """The metadata of a copy's card: the original's, with the copy's own entries.

    `base_model` is the original's Hub id. A local original has none, so the copy names what the original's own card
    names. Local paths are left out.

    Args:
        origin: the original.
        library: the library that loads the copy.
        relation: of the copy to an original on the Hub, one of the Hub's words (`finetune`, `quantized`).
        tags: added to the original's.
        datasets: Hub datasets that the copy was trained on; added to the original's.
    """
    from huggingface_hub import ModelCardData
    from huggingface_hub.constants import HUGGINGFACE_CO_URL_HOME

    own = origin.metadata
    bases = [origin.hub_id] if origin.hub_id else [base for base in strings(own.get("base_model")) if is_hub_id(base)]
    inherited = own.get("base_model_relation")
    if not origin.hub_id:
        relation = inherited if inherited in ("finetune", "quantized", "merge") else "finetune"
    kept = {key: value for key, value in own.items() if key not in _NOT_COPIED and not hasattr(ModelCardData, key)}
    link = kept.get("license_link")
    if origin.hub_id and isinstance(link, str) and "://" not in link and link not in origin.files:
        kept["license_link"] = f"{HUGGINGFACE_CO_URL_HOME}{origin.hub_id}/blob/main/{link}"
    old_tags = [tag for tag in strings(own.get("tags")) if tag.lower() not in _FORMAT_TAGS]
    all_datasets = list(dict.fromkeys([*filter(_is_dataset_id, strings(own.get("datasets"))), *datasets]))
    return ModelCardData(
        **kept,
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=relation if bases else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[*old_tags, *tags],
        datasets=all_datasets or None,
    )


def card_text(metadata: ModelCardData, body: str) -> str:
    """A card in Markdown, with its metadata as YAML at the top."""
    return f"---\n{metadata.to_yaml()}\n---\n{body}"


def results_part(part: str, text: str) -> str:
    """A part of a card that `lockkit card` replaces, with `text` in it.

    Args:
        part: the command with these results, `verify` or `attack`.
        text: Markdown.
    """
    start, end = _marks(part)
    return f"{start}\n{text.strip()}\n{end}\n"


def with_results(card: str, part: str, text: str) -> str:
    """A card whose part for the results of a command contains `text`. A card without this part gets it at the end."""
    marks = _marks(part)
    start, end = (card.find(mark) for mark in marks)
    if start < 0 or end < start:
        return f"{card.rstrip()}\n\n{results_part(part, text)}"
    return card[:start] + results_part(part, text) + card[end + len(marks[1]) :].removeprefix("\n")


def from_results(card: str, part: str) -> str:
    """A card from its part for the results of a command on; empty if it has none."""
    start = card.find(_marks(part)[0])
    return card[start:] if start >= 0 else ""


def _marks(part: str) -> tuple[str, str]:
    return f"<!-- results of lockkit {part}, written by lockkit card -->", f"<!-- end of lockkit {part} -->"


def strings(value: Any) -> list[str]:
    """The texts in an entry of a card: one text, or a list of them. Other values are left out."""
    values = value if isinstance(value, list) else [value]
    return [" ".join(entry.split()) for entry in values if isinstance(entry, str) and entry.strip()]


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a model on the Hub: it has an owner, and is no path."""
    return _HUB_ID.fullmatch(name) is not None and name[0] not in "./" and not Path(name).exists()


def _is_dataset_id(name: str) -> bool:
    """Whether a name may be that of a Hub dataset: old ones have no owner."""
    return is_hub_id(name) or re.fullmatch(r"[A-Za-z][\w.-]*", name) is not None
