"""Install the kernel into an export, for onnxruntime-genai.

onnxruntime-genai loads a library of operators only from the model's own folder, and only if `genai_config.json` names
it. The folder then runs only on machines with the same type of processor.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from lockkit.errors import UsageError
from lockkit.export.chains import has_kernel_form
from lockkit.export.manifest import FileRecord, Manifest, check_manifest
from lockkit.export.session import MODEL_FILE
from lockkit.files import EXPORT_MANIFEST, read_json, readable_disk_errors, sha256_of_file, write_json
from lockkit.kernel.build import build_kernel
from lockkit.output_folders import check_results_folder

LIBRARY = "dlr_chain.so"
SETTINGS = "genai_config.json"
_OPTION = "custom_ops_library"  # of onnxruntime-genai's session options
_PROVIDER = "lockkit.provider"  # tells the library which operators to register; genai passes it on to onnxruntime


def has_kernel(export: Path) -> bool:
    """Whether `install_kernel` has been run on this export, and not `remove_kernel`."""
    return (export / LIBRARY).is_file()


def install_kernel(export: Path | str) -> Path:
    """Build the kernel, copy it into an export, and add it to `genai_config.json` and the manifest.

    The export then runs only on machines with this type of processor. `remove_kernel` undoes it.

    Returns:
        The path of the library in the export.

    Raises:
        UsageError: the folder is not an intact export, it has no chains that the kernel computes, there is no
            compiler, or the export cannot be written.
    """
    folder = Path(export)
    manifest = check_manifest(folder)
    if not has_kernel_form(folder / MODEL_FILE, manifest.provider):
        raise UsageError(
            f"{folder} has no chains that the kernel computes (it needs a locked model, exported in the form that this "
            "version writes): change EXPORT, or export again"
        )
    check_results_folder(folder, "EXPORT")
    kernel = build_kernel()
    _rewrite(folder, manifest, kernel)
    return folder / LIBRARY


def remove_kernel(export: Path | str) -> Path:
    """Remove the kernel from an export, which then runs on every machine again. Returns the folder.

    Raises:
        UsageError: the folder is not an intact export, it has no kernel, or it cannot be written.
    """
    folder = Path(export)
    manifest = check_manifest(folder)
    if not has_kernel(folder):
        raise UsageError(f"{folder} has no kernel: change EXPORT, or do without --remove")
    check_results_folder(folder, "EXPORT")
    _rewrite(folder, manifest, None)
    return folder


def _rewrite(folder: Path, manifest: Manifest, kernel: Path | None) -> None:
    """Make `kernel` the library of an export; None for no library.

    Files are replaced, not overwritten: a process may have loaded the library.
    """
    settings = read_json(folder / SETTINGS, "EXPORT")
    options = settings["model"]["decoder"]["session_options"]
    with (
        readable_disk_errors(folder, "EXPORT"),
        tempfile.TemporaryDirectory(prefix=".kernel-", dir=folder) as temporary,
    ):
        new = Path(temporary)
        if kernel is not None:
            options |= {_OPTION: LIBRARY, _PROVIDER: manifest.provider}
            shutil.copyfile(kernel, new / LIBRARY)
        else:
            for name in (_OPTION, _PROVIDER):
                options.pop(name, None)
            manifest.files.pop(LIBRARY, None)
        # As the builder writes it, so that `remove_kernel` gives back the same bytes: the folder may be signed.
        (new / SETTINGS).write_text(json.dumps(settings, indent=4), encoding="utf-8")
        for path in sorted(new.iterdir()):
            manifest.files[path.name] = FileRecord(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))
        write_json(new / EXPORT_MANIFEST, manifest.model_dump(by_alias=True))
        for name in (LIBRARY, SETTINGS, EXPORT_MANIFEST):
            if (new / name).exists():
                (new / name).replace(folder / name)
        if kernel is None:
            (folder / LIBRARY).unlink(missing_ok=True)
