"""Putting the kernel into an export, where onnxruntime-genai looks for it.

onnxruntime-genai loads a library of operators only from the model's own folder, and only if
`genai_config.json` names it. Such a folder is for machines of this kind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.export.chains import has_kernel_form
from lockkit.export.manifest import check_manifest, write_manifest
from lockkit.export.session import MODEL_FILE
from lockkit.files import read_json
from lockkit.kernel.build import build_kernel

LIBRARY = "dlr_chain.so"


def has_kernel(export: Path) -> bool:
    """Whether `install_kernel` has been run on this export."""
    return (export / LIBRARY).is_file()


def install_kernel(export: Path | str) -> Path:
    """Build the kernel, copy it into an export, and enter it in `genai_config.json` and the manifest.

    Raises:
        UsageError: no intact export, none with chains that the kernel computes, or no compiler.
    """
    folder = Path(export)
    manifest = check_manifest(folder)
    if manifest.provider != "cpu" or not has_kernel_form(folder / MODEL_FILE):
        raise UsageError(
            f"{folder} has no chains that the kernel computes (it is for locked models exported for the CPU, in the form that "
            "this version writes): change EXPORT, or export again"
        )
    settings = read_json(folder / "genai_config.json", "EXPORT")
    settings["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
    library = Path(shutil.copyfile(build_kernel(), folder / LIBRARY))
    (folder / "genai_config.json").write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
    write_manifest(folder, manifest)
    return library
