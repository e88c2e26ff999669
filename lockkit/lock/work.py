"""The work folder of a lock: finished parts stay on disk, so that an interrupted lock resumes.

    in-use                      marks a work folder; locked by the process that works here
    fingerprint.json            model, recipe, data and versions everything here was made with
    rows.safetensors            token ids of the text, once read or sampled
    layer-0007.safetensors      the chain of a finished layer, with its figures
    end-to-end/snapshot-120/    phase 2 after 120 steps: weights, optimiser, position
    end-to-end/best-120/        phase 2's best held-out state so far
    activations/, working-0/    scratch, of no use after a crash

Every file and folder is written under another name and renamed: what has its final name is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lockkit.dlr.net import DLRNet
from lockkit.errors import UsageError
from lockkit.files import readable_disk_errors, replaced, write_json

SCHEMA = "lockkit-work/1"


def work_folder(out: Path, work: str | None) -> Path:
    """Where a lock of `out` keeps its state: `work` if given, else beside `out`."""
    return Path(work) if work else out.absolute().parent / f".{out.absolute().name}.lockkit-work"


class Work:
    """A work folder, open for one lock.

    Args:
        folder: created if it is not there.
        first: whether this is the first worker, who alone writes what all share.
    """

    def __init__(self, folder: Path, first: bool = True):
        self.folder, self.first = folder.absolute(), first
        self.end_to_end = self.folder / "end-to-end"
        self._in_use = FileLock(self.folder / "in-use", timeout=0)

    @property
    def claimed(self) -> bool:
        """Whether this process holds the folder."""
        return self._in_use.is_locked

    def open(self) -> None:
        """Claim the folder for this lock.

        Raises:
            UsageError: another process works here, or the folder cannot be used.
        """
        with readable_disk_errors(self.folder, "--work"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
                raise UsageError(f"cannot make the folder {self.folder} ({error.strerror}): change --work") from error
            if any(self.folder.iterdir()) and not (self.folder / "in-use").exists():
                raise UsageError(f"{self.folder} is not a work folder of lockkit: change --work")
            try:
                self._in_use.acquire()
            except Timeout as error:
                raise UsageError(f"another lockkit lock is at work in {self.folder}: change OUT or --work") from error

    def require_shared(self) -> None:
        """Stop a worker that does not see the folder that the first one opened.

        Raises:
            UsageError: the folder is not there.
        """
        if not (self.folder / "in-use").exists():
            raise UsageError(
                f"there is no {self.folder} here: give all workers the same OUT and --work, on a disk they share"
            )

    def require_same(self, fingerprint: dict) -> None:
        """Resume only with what the folder was made with; remember it if the folder is new.

        Raises:
            UsageError: naming what differs.
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
                    f"{self.folder} holds an unfinished lock of another kind ({'; '.join(changed[:5])}): "
                    "change that back, change --work, or delete that folder"
                )
        else:
            with readable_disk_errors(self.folder, "--work"):
                write_json(file, fingerprint)

    # --- finished pieces

    def has_rows(self) -> bool:
        return (self.folder / "rows.safetensors").is_file()

    def save_rows(self, rows: dict[str, torch.Tensor]) -> None:
        """Keep token ids, `[rows, block]` each."""
        self._write(self.folder / "rows.safetensors", lambda path: save_file(rows, path))

    def load_rows(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "rows.safetensors")

    def layer_file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04}.safetensors"

    def has_layer(self, layer: int) -> bool:
        return self.layer_file(layer).is_file()

    def save_chain(self, file: Path, chain: DLRNet, figures: dict) -> None:
        """Write a chain and figures about it."""
        state = {name: value.contiguous() for name, value in chain.state_dict().items()}
        figures = {"figures": json.dumps(figures | {"gain": chain.gain})}
        self._write(file, lambda path: save_file(state, path, metadata=figures))

    def load_chain(self, file: Path, empty: Callable[[float], DLRNet]) -> tuple[DLRNet, dict]:
        """Read a chain into `empty(gain)`; return it and its figures."""
        with safe_open(file, "pt") as tensors:
            figures = json.loads(tensors.metadata()["figures"])
            chain = empty(figures["gain"])
            chain.load_state_dict({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
        return chain.requires_grad_(False), figures

    @contextlib.contextmanager
    def new_state(self, kind: str, step: int) -> Iterator[Path]:
        """Yield a folder that becomes phase 2's `kind`-`step`; older ones of the kind go once it stands."""
        final = self.end_to_end / f"{kind}-{step}"
        partial = self.end_to_end / f"{kind}-{step}.partial"
        with readable_disk_errors(self.folder, "--work"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def state(self, kind: str) -> tuple[Path, int] | None:
        """The newest complete state of a kind, and its step."""
        found = [
            (int(path.name.removeprefix(f"{kind}-")), path)
            for path in self.end_to_end.glob(f"{kind}-*")
            if path.name.removeprefix(f"{kind}-").isdigit()
        ]
        return (max(found)[1], max(found)[0]) if found else None

    def drop_states(self, kind: str, but: int) -> None:
        """Delete the states of a kind, all but that of one step."""
        for path in self.end_to_end.glob(f"{kind}-*"):
            if path.name != f"{kind}-{but}":
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, file: Path, write: Callable[[Path], object]) -> None:
        with readable_disk_errors(self.folder, "--work"), replaced(file) as partial:
            write(partial)

    # --- the end

    def worth_keeping(self) -> bool:
        """Whether a layer is finished."""
        return any(self.folder.glob("layer-*.safetensors"))

    def close(self, finished: bool) -> None:
        """Release the folder; delete it if the lock is finished or nothing in it is worth keeping.

        A folder that was never claimed (it is another lock's, or no work folder at all) is left alone.
        """
        if not self.claimed:
            return
        if finished or not self.worth_keeping():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            for scratch in [self.folder / "activations", *self.folder.glob("working-*")]:
                shutil.rmtree(scratch, ignore_errors=True)
        self._in_use.release()
        if self.folder.exists():
            (self.folder / "in-use").touch()  # some versions of filelock delete it


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
