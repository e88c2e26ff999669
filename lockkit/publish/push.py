"""Upload a locked folder or an export to the Hub, with huggingface_hub's own client and login.

Hidden and partial files stay here. Weights that an earlier upload left in the repository, and that are not in the
folder, are deleted in the same commit: loaders would mix them with the new ones.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lockkit.errors import LockkitError, UsageError, first_line
from lockkit.files import EXPORT_MANIFEST, LOCK_RECORD, SIGNATURE
from lockkit.models.card import read_metadata
from lockkit.publish.config import PushConfig
from lockkit.publish.folder import Publishable, open_publishable
from lockkit.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LEFT_OUT = [".*", "*/.*", "*.partial*", "*.incomplete", "*.tmp", "*.lock", "*~", "*.pyc", "*__pycache__/*"]
_BRANCH = re.compile(r"(?!.*(\.\.|//))\w[\w./-]*")  # what git allows, and no more than is needed
_REPLACED = [
    *("*.safetensors", "*.safetensors.index.json", "*.onnx", "*.onnx_data*", "genai_config.json"),
    *(EXPORT_MANIFEST, LOCK_RECORD, SIGNATURE),
]


@dataclass(frozen=True)
class PushResult:
    """What was uploaded, or would be.

    Attributes:
        files: names of the files, with their sizes in bytes.
        url: of the commit; empty after a dry run.
        notes: what the owner should know or do, one line each.
    """

    files: dict[str, int]
    url: str
    notes: list[str]

    @property
    def size_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(self.files.values())


def push_folder(folder: Path, repository: str, config: PushConfig | None = None) -> PushResult:
    """Upload a locked folder or an export to the Hub.

    The repository is created if it does not exist. The login is that of huggingface_hub (`hf auth login`, or HF_TOKEN).

    Args:
        folder: that `lockkit lock` or `lockkit export` wrote.
        repository: `owner/name`.
        config: the settings.

    Raises:
        UsageError: lockkit did not write the folder, or a file of it is damaged; the name is not valid; there is no
            login or no permission; the Hub cannot be reached, or refuses the upload.
    """
    config = config or PushConfig()
    _check_name(repository)
    if config.revision and not _BRANCH.fullmatch(config.revision):
        raise UsageError(f"'{config.revision}' is not the name of a branch: change --revision")
    opened = open_publishable(folder)
    opened.require_intact()
    files = published_files(folder)
    notes = _notes(opened)
    if config.dry_run:
        return PushResult(files, "", notes)
    with _readable_errors(repository):
        return PushResult(files, _upload(opened, repository, config), notes)


def published_files(folder: Path) -> dict[str, int]:
    """Names and sizes in bytes of the files of a folder that are uploaded or signed: no hidden or partial ones.

    Raises:
        UsageError: a file is a link out of the folder.
    """
    from huggingface_hub.utils import filter_repo_objects

    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: paths[name] for name in filter_repo_objects(paths, ignore_patterns=LEFT_OUT)}
    for path in kept.values():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{path} is a link out of the folder: copy the file itself, or remove it")
    return {name: path.stat().st_size for name, path in kept.items()}


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"'{repository}' is not a name on the Hub, such as owner/name: change REPOSITORY")


def _notes(opened: Publishable) -> list[str]:
    """What the owner should know before others load the model, from its card."""
    try:
        metadata = read_metadata(opened.card)
    except ValueError as error:
        raise UsageError(f"{opened.card} cannot be used ({first_line(error)}): mend it, or run lockkit card") from error
    notes = []
    if not metadata.get("license"):
        notes.append("the card names no licence: add one to its YAML if you may publish this model")
    signature = opened.path / SIGNATURE
    if signature.is_file():
        signed_at = signature.stat().st_mtime
        newer = [name for name in published_files(opened.path) if (opened.path / name).stat().st_mtime > signed_at]
        if newer:
            notes.append(f"{newer[0]} is newer than the signature: run lockkit sign and lockkit push again")
    if any(key.startswith("extra_gated_") for key in metadata):
        notes.append("the card has a prompt for access requests: turn them on in the settings of the repository")
    return notes


def _upload(opened: Publishable, repository: str, config: PushConfig) -> str:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UsageError("there is no login for the Hub: run hf auth login, or set HF_TOKEN")
    api = HfApi(library_name="lockkit", library_version=__version__)
    api.create_repo(repository, private=config.private or None, exist_ok=True)
    if config.private and not api.repo_info(repository).private:
        raise UsageError(f"{repository} exists and is public: make it private on the Hub, or do without --private")
    if config.revision:
        api.create_branch(repository, branch=config.revision, exist_ok=True)
    return _commit(api, opened, repository, config)


def _commit(api: HfApi, opened: Publishable, repository: str, config: PushConfig) -> str:
    kind = "locked model" if opened.manifest is None else f"ONNX export, {opened.manifest.precision}"
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=opened.path,
        ignore_patterns=LEFT_OUT,
        delete_patterns=_REPLACED,
        revision=config.revision,
        commit_message=config.message or f"{kind[0].upper()}{kind[1:]}, by lockkit {__version__}",
    )
    return commit.commit_url


@contextlib.contextmanager
def _readable_errors(repository: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one line that names the cause."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except LockkitError:
        raise
    except OfflineModeIsEnabled as error:
        raise UsageError("the Hub's client is set to work offline: unset HF_HUB_OFFLINE") from error
    except Exception as error:  # of the client, and of the HTTP library below it
        causes = [error, *_causes(error)]
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if answer is not None:
            raise UsageError(_refusal(answer.response.status_code, repository, str(answer))) from error
        if any(type(cause).__module__.startswith("httpx") or isinstance(cause, OSError) for cause in causes):
            raise UsageError(f"the Hub cannot be reached ({first_line(error)}): check the network") from error
        raise UsageError(f"the Hub's client failed ({first_line(error)}): run the command again") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


def _refusal(status: int, repository: str, text: str) -> str:
    """One line for an answer of the Hub that is an error."""
    said = " ".join(text.split())[-200:]
    if status == 401:
        return "the Hub does not accept the login: run hf auth login, or set HF_TOKEN to a valid token"
    if status in (403, 404):
        return (
            f"this login may not write to {repository} ({said}): change REPOSITORY, or use a token that may write to it"
        )
    if status in (400, 422):
        return f"the Hub refuses the upload ({said}): mend the card or the name, or change REPOSITORY"
    return f"the Hub failed with status {status} ({said}): run the command again later"
