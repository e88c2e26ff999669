"""The work folder of a lock: finished parts stay on disk, so an interrupted lock resumes.

    in-use                      marks a work folder; file lock of the process that uses the folder
    fingerprint.json            model, recipe, data and versions that everything here depends on
    rows.safetensors            token ids of text that was sampled from the model
    layer-0007.safetensors      the chain of a finished layer, with its figures
    end-to-end/snapshot-120/    phase 2 after 120 steps: weights, optimiser, position
    end-to-end/best-120/        the best held-out state of phase 2 so far
    activations/, working-0/    temporary files, not used after an interruption

Every file and folder is written under a temporary name and then renamed. Whatever has its final name is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lockkit.dlr.net import DLRNet
from lockkit.errors import UsageError
from lockkit.files import read_json, readable_disk_errors, replaced, write_json
from lockkit.output_folders import content, scratch_folder

SCHEMA = "lockkit-work/1"


def work_folder(out: Path, work: str | None) -> Path:
    """The work folder of a lock that writes `out`: `work` if given, otherwise a hidden folder beside or inside `out`."""
    return Path(work) if work else scratch_folder(out, "work")


class Work:
    """The work folder of one lock.

    Args:
        folder: its path; `open` creates it.
        first: whether this process is the first worker. Only that one writes files that all workers share.

    Attributes:
        end_to_end: the folder of phase 2's states.
    """

    def __init__(self, folder: Path, first: bool = True):
        self.folder, self.first = folder.absolute(), first
        self.end_to_end = self.folder / "end-to-end"
        self._in_use = FileLock(self.folder / "in-use", timeout=0)

    @property
    def claimed(self) -> bool:
        """Whether this process has claimed the folder."""
        return self._in_use.is_locked

    def open(self) -> None:
        """Claim the folder for this lock.

        Raises:
            UsageError: another process uses the folder, it is not a work folder, or it cannot be created.
        """
        with readable_disk_errors(self.folder, "--work"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
                raise UsageError(f"cannot create the folder {self.folder} ({error.strerror}): change --work") from error
            if content(self.folder) and not (self.folder / "in-use").exists():
                raise UsageError(f"{self.folder} is not a work folder of lockkit: change --work")
            try:
                self._in_use.acquire()
            except Timeout as error:
                raise UsageError(f"another `lockkit lock` uses {self.folder}: change OUT or --work") from error

    def require_shared(self) -> None:
        """Check that this worker can see the folder that the first worker opened.

        Raises:
            UsageError: it cannot.
        """
        if not (self.folder / "in-use").exists():
            raise UsageError(
                f"there is no {self.folder} on this machine: give all workers the same OUT and --work, on a disk they share"
            )

    def require_same(self, fingerprint: dict[str, Any]) -> None:
        """Check that the folder belongs to the same lock. In a new folder, save the fingerprint.

        Args:
            fingerprint: everything that the weights depend on, as JSON values.

        Raises:
            UsageError: the fingerprint differs. The message names the first five differences.
        """
        fingerprint = json.loads(json.dumps({"schema": SCHEMA} | fingerprint))
        file = self.folder / "fingerprint.json"
        if file.is_file():
            before = _flat(json.loads(file.read_text(encoding="utf-8")))
            now = _flat(fingerprint)
            changed = [
                f"{name}: {before.get(name)} there, {now.get(name)} now"
                for name in sorted(before | now)
                if before.get(name) != now.get(name)
            ]
            if changed:
                raise UsageError(
                    f"{self.folder} holds an unfinished lock with other settings ({'; '.join(changed[:5])}): "
                    "restore those settings, change --work, or delete the folder"
                )
        else:
            with readable_disk_errors(self.folder, "--work"):
                write_json(file, fingerprint)

    # --- finished parts

    def has_rows(self) -> bool:
        """Whether sampled text is in the folder."""
        return (self.folder / "rows.safetensors").is_file()

    def save_rows(self, rows: dict[str, torch.Tensor]) -> None:
        """Save sampled token ids, `[rows, block]` each, by name."""
        self._write(self.folder / "rows.safetensors", lambda path: save_file(rows, path))

    def load_rows(self) -> dict[str, torch.Tensor]:
        """Read what `save_rows` saved."""
        return load_file(self.folder / "rows.safetensors")

    def couplings(self) -> list[float] | None:
        """The coupling of each layer that the pilot chose; None before it."""
        file = self.folder / "couplings.json"
        return read_json(file, "--work")["couplings"] if file.is_file() else None

    def save_couplings(self, couplings: list[float]) -> None:
        """Save the pilot's result."""
        with readable_disk_errors(self.folder, "--work"):
            write_json(self.folder / "couplings.json", {"couplings": couplings})

    def layer_file(self, layer: int) -> Path:
        """The file of a layer's chain."""
        return self.folder / f"layer-{layer:04}.safetensors"

    def has_layer(self, layer: int) -> bool:
        """Whether phase 1 has finished a layer."""
        return self.layer_file(layer).is_file()

    def save_chain(self, file: Path, chain: DLRNet, figures: dict[str, Any]) -> None:
        """Write a chain with its figures (JSON values)."""
        state = {name: value.contiguous() for name, value in chain.state_dict().items()}
        metadata = {"figures": json.dumps(figures | {"gain": chain.gain})}
        self._write(file, lambda path: save_file(state, path, metadata=metadata))

    def load_chain(self, file: Path, empty: Callable[[float], DLRNet]) -> tuple[DLRNet, dict[str, Any]]:
        """Read a chain and its figures.

        Args:
            file: what `save_chain` wrote.
            empty: returns an untrained chain, given its gain.
        """
        with safe_open(file, "pt") as tensors:
            figures = json.loads(tensors.metadata()["figures"])
            chain = empty(figures["gain"])
            chain.load_state_dict({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
        return chain.requires_grad_(False), figures

    @contextlib.contextmanager
    def new_state(self, kind: str, step: int) -> Iterator[Path]:
        """A temporary folder that becomes the state `kind`-`step` of phase 2 at the end of the `with` block."""
        final = self.end_to_end / f"{kind}-{step}"
        partial = self.end_to_end / f"{kind}-{step}.partial"
        with readable_disk_errors(self.folder, "--work"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def state(self, kind: str) -> tuple[Path, int] | None:
        """The folder of the newest complete state of a kind, and its step. None if there is none."""
        found = [
            (int(path.name.removeprefix(f"{kind}-")), path)
            for path in self.end_to_end.glob(f"{kind}-*")
            if path.name.removeprefix(f"{kind}-").isdigit()
        ]
        return (max(found)[1], max(found)[0]) if found else None

    def drop_states(self, kind: str, keep: int) -> None:
        """Delete the states of a kind, except that of step `keep`."""
        for path in self.end_to_end.glob(f"{kind}-*"):
            if path.name != f"{kind}-{keep}":
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, file: Path, write: Callable[[Path], object]) -> None:
        with readable_disk_errors(self.folder, "--work"), replaced(file) as partial:
            write(partial)

    # --- the end

    def has_any_layer(self) -> bool:
        """Whether phase 1 has finished at least one layer."""
        return any(self.folder.glob("layer-*.safetensors"))

    def close(self, finished: bool) -> None:
        """Release the folder. Delete it if the lock is finished or if no layer is.

        A folder that this process has not claimed is not touched.
        """
        if not self.claimed:
            return
        if finished or not self.has_any_layer():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            for temporary in [self.folder / "activations", *self.folder.glob("working-*")]:
                shutil.rmtree(temporary, ignore_errors=True)
        self._in_use.release()
        if self.folder.exists():
            (self.folder / "in-use").touch()  # some versions of filelock delete it


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as one level, with names such as `recipe.depth`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
