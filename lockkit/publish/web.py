"""A folder for transformers.js, from one or several exports of the same model.

transformers.js looks for `onnx/model.onnx` (its `dtype: "fp32"`), `onnx/model_fp16.onnx` (`fp16`),
`onnx/model_quantized.onnx` (`q8`, its default in a browser without WebGPU), `onnx/model_q4.onnx` (`q4`) and
`onnx/model_q4f16.onnx` (`q4f16`), each with its weights in a file `..._data` beside it. The configuration and the tokenizer
are in the folder itself, once for all precisions.

1. Compare each export with its manifest. All must be made from the same weights.
2. Put each graph under its name into `onnx/`, reading its weights under their new name. The files of the weights are linked,
   not copied, where the file system can do that.
3. Say in `config.json` that weights are in files of their own, so that users need no option for that.
4. Write the card, and the hashes of all files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.export.manifest import ALL_LOGITS_FILE, MODEL_FILE, FileRecord, Manifest, check_manifest, sha256_of_file
from lockkit.files import CARD, EXPORT_MANIFEST, WEB_MANIFEST, files_below, read_json, write_json
from lockkit.kernel import has_kernel
from lockkit.models.card import card_text, from_results, read_metadata
from lockkit.output_folders import check_apart, new_folder
from lockkit.targets import Precision, provider_called

FOLDER = "onnx"
_LEFT_OUT = (MODEL_FILE, ALL_LOGITS_FILE, f"{MODEL_FILE}_data", "genai_config.json", CARD, EXPORT_MANIFEST)
# (precision, arithmetic) -> transformers.js's dtype, and the end of the graph's name.
_NAMES = {
    ("fp32", "float32"): ("fp32", ""),
    ("fp16", "float16"): ("fp16", "_fp16"),
    ("fp16", "float32"): ("fp16", "_fp16"),
    ("int8", "float32"): ("q8", "_quantized"),
    ("int4", "float32"): ("q4", "_q4"),
    ("int4", "float16"): ("q4f16", "_q4f16"),
}


def web_folder(exports: list[Path], out: Path, overwrite: bool = False) -> dict[str, str]:
    """Arrange exports for transformers.js.

    Args:
        exports: folders that `lockkit export` wrote, of one model in different precisions. The configuration, the
            tokenizer and the card come from the first.
        out: the folder to write.
        overwrite: replace `out` if lockkit wrote it.

    Returns:
        The name of each graph in `out`, by transformers.js's dtype.

    Raises:
        UsageError: an export is damaged or has the operator of `lockkit kernel`, transformers.js has no name for its
            precision, two have the same, they are not of the same model, or `out` cannot be written.
    """
    for export in exports:
        check_apart(out, export, "EXPORT", "--out")
    manifests = [check_manifest(export) for export in exports]
    graphs: dict[str, tuple[str, Path]] = {}
    for export, manifest in zip(exports, manifests, strict=True):
        if has_kernel(export):
            raise UsageError(
                f"{export} has the operator for this machine's processor: run lockkit kernel {export} --remove"
            )
        if manifest.source_sha256 != manifests[0].source_sha256:
            raise UsageError(f"{export} and {exports[0]} are exports of different models: change EXPORT")
        dtype, name = _name(export, manifest)
        if dtype in graphs:
            raise UsageError(f"{export} and {graphs[dtype][1]} are both {dtype} in transformers.js: leave out one")
        graphs[dtype] = name, export
    with new_folder(out, overwrite, "--out") as folder:
        for entry in files_below(exports[0]):
            if entry in manifests[0].files and entry not in _LEFT_OUT:
                (folder / entry).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(exports[0] / entry, folder / entry)
        (folder / FOLDER).mkdir()
        for name, export in graphs.values():
            _put(export, folder / FOLDER / name)
        config = read_json(folder / "config.json", "EXPORT")
        config["transformers.js_config"] = {"use_external_data_format": True}
        write_json(folder / "config.json", config)
        names = {dtype: f"{FOLDER}/{name}" for dtype, (name, _) in graphs.items()}
        (folder / CARD).write_text(_card(exports[0] / CARD, names), encoding="utf-8")
        listed = [name for name in files_below(folder) if name != CARD]
        files = {
            name: FileRecord(size_bytes=(folder / name).stat().st_size, sha256=sha256_of_file(folder / name))
            for name in listed
        }
        written = manifests[0].model_copy(update={"files": files, "precision": " and ".join(graphs)})
        write_json(folder / WEB_MANIFEST, written.model_dump(by_alias=True))
    return names


def read_web_manifest(folder: Path, option: str) -> Manifest:
    """The record of such a folder.

    Raises:
        UsageError: it is broken.
    """
    try:
        return Manifest.model_validate(read_json(folder / WEB_MANIFEST, option))
    except ValueError as error:
        raise UsageError(f"{folder / WEB_MANIFEST} is broken: run lockkit web again, or change {option}") from error


def _name(export: Path, manifest: Manifest) -> tuple[str, str]:
    """transformers.js's dtype for an export, and the name of its graph."""
    arithmetic = Precision[manifest.precision].row.arithmetic[provider_called(manifest.provider)].torch
    found = _NAMES.get((manifest.precision, arithmetic))
    if found is None:
        raise UsageError(
            f"transformers.js has no name for {manifest.precision} with arithmetic in {arithmetic} ({export}): export with "
            "another --precision"
        )
    return found[0], f"model{found[1]}.onnx"


def _put(export: Path, graph: Path) -> None:
    """Write the graph of an export as `graph`, with its weights beside it."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    weights = f"{graph.name}_data"
    model = onnx.load(export / MODEL_FILE, load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            next(entry for entry in tensor.external_data if entry.key == "location").value = weights
    onnx.save(model, graph)
    source, target = export / f"{MODEL_FILE}_data", graph.with_name(weights)
    with contextlib.suppress(OSError):  # another file system, or one without links
        os.link(source.resolve(), target)
        return
    shutil.copyfile(source, target)


def _card(card: Path, names: dict[str, str]) -> str:
    """The card of the first export with what users of transformers.js type, in place of how to run that export."""
    from huggingface_hub import ModelCardData

    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    metadata = ModelCardData(**read_metadata(card) | {"library_name": "transformers.js"})
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    title, _, rest = body.partition("## How to run it")
    title = re.sub(r"^\| (files|made for|precision of the weights) \|.*\n", "", title, flags=re.M)
    title = title.replace("| | |\n|---|---|\n", "")
    rest = from_results(rest, "verify").replace(EXPORT_MANIFEST, WEB_MANIFEST)
    dtypes = "\n".join(f"| `{dtype}` | `{name}` |" for dtype, name in names.items())
    first = next(iter(names))
    how = f"""## How to run it

With transformers.js, in a browser or in Node:

```js
import {{ pipeline }} from "@huggingface/transformers";

const generator = await pipeline("text-generation", "owner/name", {{ dtype: "{first}" }});
const [answer] = await generator("Once upon a time", {{ max_new_tokens: 40 }});
console.log(answer.generated_text);
```

| `dtype` | graph |
|---|---|
{dtypes}

"""
    return card_text(metadata, title + how + rest)
