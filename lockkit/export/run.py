"""Export a model to an ONNX folder.

1. Check that OUT can be written. Load the model and its tokenizer.
2. In a temporary folder, write the description of the model: `config.json` of the original's family, the generation
   configuration, and the tokenizer's files, byte for byte. To a runtime, a locked model is a model of its family with
   another graph.
3. Build the graph (`builders.py`): `model.onnx`, its weights and `genai_config.json`.
4. Rename the file of the weights to `model.onnx_data`, which all runtimes find. Read a tied embedding table where it is
   (`tied_table.py`). Replace each chain by one call of a function (`chains.py`). This graph becomes
   `model_all_logits.onnx`; the one in `model.onnx` has logits of the last position only (`last_position.py`).
5. Check that both graphs are valid ONNX, that all weights exist, and that they have no training information.
6. Write the card, with the licence files of the model, and the manifest. Rename the folder to OUT.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lockkit.errors import LockkitError
from lockkit.export.config import ExportConfig
from lockkit.export.manifest import ALL_LOGITS_FILE, MODEL_FILE, Manifest, write_manifest
from lockkit.files import CARD
from lockkit.models.identity import weight_hashes
from lockkit.output_folders import new_folder
from lockkit.settings import refuse_unused
from lockkit.targets import Precision, default_precision
from lockkit.version import git_hash, versions

if TYPE_CHECKING:
    import onnx
    from transformers import PreTrainedConfig, PreTrainedModel

    from lockkit.dlr.net import ChainConfig
    from lockkit.models.families import Family
    from lockkit.models.origin import Origin
    from lockkit.progress import Progress

WEIGHTS_FILE = "model.onnx_data"


@dataclass(frozen=True)
class ExportResult:
    """A finished export: its folder, its manifest, and the name, licence and card of the exported model."""

    folder: Path
    manifest: Manifest
    origin: Origin

    @property
    def size_bytes(self) -> int:
        """Size of all files that the manifest lists, in bytes."""
        return sum(record.size_bytes for record in self.manifest.files.values())


def export_model(
    model: str,
    out: Path,
    config: ExportConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a locked or an original model to an ONNX folder.

    Args:
        model: `demo`, a local folder, a GGUF file, or a Hub id.
        out: the folder to write. It is created only when everything has succeeded.
        config: the settings.
        overwrite: replace `out` if lockkit wrote it.
        progress: reports the layers of the graph, and writing.

    Raises:
        UsageError: MODEL or OUT cannot be used, or the settings contradict each other.
        UnsupportedModelError: lockkit cannot export models of this kind.
        LockkitError: the graph could not be built, or it is not valid.
    """
    from lockkit.export.card import export_card
    from lockkit.models.load import load_model, load_tokenizer, resolve_model_apart
    from lockkit.models.locked import base_config, chain_config
    from lockkit.models.origin import copy_legal_files, origin_of

    config = config or ExportConfig()
    if config.precision:
        config.precision.arithmetic(config.provider)  # raises an error if the provider does not support it
    source = resolve_model_apart(model, Path(out), overwrite)
    load_tokenizer(source)
    network, family = load_model(source)
    precision = config.precision or default_precision(str(network.dtype).removeprefix("torch."), config.provider)
    refuse_unused(config.model_copy(update={"precision": precision}), config.model_fields_set)
    base = base_config(network.config, family)
    base.use_cache = True
    manifest = _manifest(network.config, family, source, config, precision)
    origin = origin_of(model, source)
    with new_folder(Path(out), overwrite) as folder:
        _write_description(network, base, source, folder)
        _builders().build_graph(network, base, family, folder, config, precision, progress)
        _finish_graph(folder, chain_config(network.config))
        for graph in (MODEL_FILE, ALL_LOGITS_FILE):
            check_graph(folder / graph)
        copy_legal_files(origin, source, folder)
        (folder / CARD).write_text(export_card(manifest, origin), encoding="utf-8")
        manifest = write_manifest(folder, manifest)
    return ExportResult(Path(out), manifest, origin)


def _builders() -> ModuleType:
    """Import `builders.py` without the changes that onnxruntime's quantiser makes to the process's logging."""
    handlers, level = logging.root.handlers[:], logging.root.level
    from lockkit.export import builders

    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    return builders


def _manifest(
    config: PreTrainedConfig, family: Family, source: Path, export: ExportConfig, precision: Precision
) -> Manifest:
    """The manifest, without the list of files."""
    from lockkit.models.locked import chain_config

    chains = chain_config(config)
    return Manifest(
        versions=versions(),
        git_hash=git_hash(),
        model_type=family.model_type,
        locked=chains is not None,
        depth=chains.depth if chains else None,
        gains=list(chains.gains) if chains else None,
        precision=precision.value,
        provider=export.provider.value,
        block_size=export.block_size if precision.quantised else None,
        source_sha256=weight_hashes(source),
        files={},
    )


def _write_description(model: PreTrainedModel, base: PreTrainedConfig, source: Path, folder: Path) -> None:
    """Write the configuration, the generation configuration and the tokenizer."""
    from lockkit.models.save import copy_tokenizer

    base.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        model.generation_config.save_pretrained(folder)
    copy_tokenizer(source, folder)


def _finish_graph(folder: Path, chains: ChainConfig | None) -> None:
    """Rename the file of the weights, replace each chain by one call of a function, and write both graphs."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    from lockkit.export.chains import name_chains
    from lockkit.export.last_position import keep_last_position
    from lockkit.export.tied_table import read_table_in_place

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            next(entry for entry in tensor.external_data if entry.key == "location").value = WEIGHTS_FILE
    (folder / f"{MODEL_FILE}.data").rename(folder / WEIGHTS_FILE)
    read_table_in_place(model)
    if chains:
        name_chains(model, chains)
    onnx.save(model, folder / ALL_LOGITS_FILE)
    keep_last_position(model)
    onnx.save(model, folder / MODEL_FILE)


def check_graph(path: Path) -> onnx.ModelProto:
    """Check the graph at `path` and return it without its weights.

    onnxruntime defines `SimplifiedLayerNormalization` in ONNX's own domain, where ONNX does not know it. So the checker
    gets a copy of the graph that has this operator in onnxruntime's domain.

    Raises:
        LockkitError: the graph is not valid ONNX, weights are missing, or it has training information.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False)
    if graph.training_info:
        raise LockkitError(f"{path.name} has training information, so nothing was written")
    checked = onnx.ModelProto()
    checked.CopyFrom(graph)
    for node in checked.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    copy = path.with_name(f".checked-{path.name}")  # beside the weights, which the checker opens
    try:
        onnx.save(checked, copy)
        onnx.checker.check_model(str(copy))
    except onnx.checker.ValidationError as error:
        raise LockkitError(f"the exported graph is not valid ONNX ({str(error).splitlines()[0]})") from error
    finally:
        copy.unlink(missing_ok=True)
    return graph
