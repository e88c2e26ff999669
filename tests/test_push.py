"""`lockkit push` and loading from the Hub, against a fake Hub on loopback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import TOKEN, Repository, running_hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import disable_progress_bars
from test_export import exports, models  # noqa: F401 (fixtures)
from test_origin import CARD, LEGAL


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


@pytest.fixture
def lockkit(hub, tmp_path):
    """Run `lockkit ARGS...` in a process whose Hub is the fake one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url}

    def run(*arguments: object) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "lockkit", *map(str, arguments)],
            capture_output=True, text=True, check=False, env=environment | {"HF_TOKEN": TOKEN},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def push(hub, cli, monkeypatch):
    """Run `lockkit push FOLDER ARGS...` in this process, against the fake Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    disable_progress_bars()  # as the program does before it imports the client
    return lambda *arguments: cli("push", *arguments)


@pytest.fixture
def export(exports, tmp_path):  # noqa: F811
    """A copy of an export, with files that must not be published."""
    folder = Path(shutil.copytree(exports("llama", True), tmp_path / "export"))
    (folder / ".env").write_text("SECRET=1")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("cached")
    (folder / ".model.onnx.partial-17").write_text("half")
    (folder / "verify.json.tmp").write_text("half")
    (folder / "figures").mkdir()
    (folder / "figures" / "plot.svg").write_text("<svg/>")
    return folder


def published(folder: Path) -> dict[str, bytes]:
    """The files of the folder that should reach the Hub."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    public = [name for name in names if not any(part.startswith(".") for part in name.parts) and name.suffix != ".tmp"]
    return {name.as_posix(): (folder / name).read_bytes() for name in public}


def one_line(done) -> str:
    assert (done.code, done.err.count("\n")) == (2, 1), done.out + done.err
    return done.err


def test_a_name_that_no_branch_can_have_is_refused_before_anything_is_sent(push, export):
    for name in ("bad name", "a..b", "-x"):
        done = push(export, "owner/my-model", "--dry-run", "--revision", name)
        assert done.code == 2 and done.err.endswith("change --revision\n"), name


def test_an_export_is_uploaded_whole_and_again_without_old_weights(export, hub, push):
    done = push(export, "owner/my-model", "--private", "--message", "First")
    assert done.code == 0, done.err
    assert f"{hub.url}/owner/my-model/commit/" in done.out and "names no licence" in done.out
    repository = hub.repositories["owner/my-model"]
    assert repository.private and repository.messages == ["First"]
    assert repository.branches["main"] == published(export)
    assert "figures/plot.svg" in repository.branches["main"] and len(hub.objects) >= 2

    repository.branches["main"] |= {"old.onnx_data": b"of an earlier export", "NOTES.md": b"mine"}
    done = push(export, "owner/my-model", "--revision", "int4")
    assert done.code == 0, done.err
    assert repository.branches["int4"] == published(export) | {"NOTES.md": b"mine"}
    assert "old.onnx_data" in repository.branches["main"]
    assert "ONNX export, fp32" in repository.messages[1]


def test_a_locked_folder_is_uploaded_and_loads_from_the_hub(locks, hub, push, lockkit, tmp_path):
    folder = shutil.copytree(locks("llama"), tmp_path / "locked")
    text = (folder / "README.md").read_text().replace("---\n", "---\nlicense: mit\nextra_gated_prompt: Agree?\n", 1)
    (folder / "README.md").write_text(text)
    (folder / "LICENSE.txt").write_text("the licence")
    done = push(folder, "owner/locked")
    assert done.code == 0, done.err
    assert "access requests" in done.out and "no licence" not in done.out
    assert hub.repositories["owner/locked"].branches["main"] == published(folder)

    lockkit("export", "owner/locked", tmp_path / "onnx")
    card = ModelCard.load(tmp_path / "onnx" / "README.md").data
    assert (card.base_model, card.base_model_relation, card.license) == ("owner/locked", "quantized", "mit")
    assert (tmp_path / "onnx" / "LICENSE.txt").read_text() == "the licence"


def test_licence_files_and_card_of_a_hub_model_are_fetched(originals, hub, lockkit, tmp_path):
    files = {path.name: path.read_bytes() for path in originals("llama").iterdir()}
    files |= {name: text.encode() for name, text in LEGAL.items()} | {"README.md": CARD.encode(), "x.bin": b"pickle"}
    hub.repositories["owner/original"] = Repository(private=False, branches={"main": files})
    lockkit("export", "owner/original", tmp_path / "onnx")
    assert {name: (tmp_path / "onnx" / name).read_text() for name in LEGAL} == LEGAL
    card = ModelCard.load(tmp_path / "onnx" / "README.md").data
    assert (card.base_model, card.license_name) == ("owner/original", "llama-example")


def test_a_dry_run_lists_the_files_and_needs_no_hub(export, cli):
    done = cli("push", export, "owner/my-model", "--dry-run")
    assert done.code == 0, done.err
    listed = set(re.findall(r"^ *[\d,.]+ (?:MB|kB|bytes)  (.+)$", done.out, re.M))
    assert " 0.0 " not in done.out  # small files are in kB or bytes
    assert listed == set(published(export))
    assert "would be uploaded to owner/my-model" in done.out


def test_folders_that_must_not_be_published_are_refused(export, originals, cli, tmp_path):
    (tmp_path / "outside.txt").write_text("secret")
    for folder, name in ((originals("llama"), "not written by lockkit"), (tmp_path / "none", "no folder")):
        done = cli("push", folder, "owner/name", "--dry-run")
        assert (done.code, done.err.count("\n")) == (2, 1) and name in done.err and "change FOLDER" in done.err
    (export / "notes.txt").symlink_to(tmp_path / "outside.txt")
    done = cli("push", export, "owner/name", "--dry-run")
    assert done.code == 2 and "link out of the folder" in done.err
    (export / "notes.txt").unlink()
    (export / "config.json").write_text("{}")
    done = cli("push", export, "owner/name", "--dry-run")
    assert done.code == 2 and "config.json has" in done.err and "change FOLDER" in done.err


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json", "modeling_dlr_lock.py"])
def test_damaged_locks_are_refused(damaged, locks, cli, tmp_path):
    folder = Path(shutil.copytree(locks("llama"), tmp_path / "locked"))
    content = (folder / damaged).read_bytes()
    (folder / damaged).unlink()
    if damaged != "modeling_dlr_lock.py":
        (folder / damaged).write_bytes(content[: len(content) // 2])
    done = cli("push", folder, "owner/name", "--dry-run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "change FOLDER" in done.err and "MODEL" not in done.err


@pytest.mark.parametrize("name", ["name", "a/b/c", "own er/name", "owner/-name", "owner/", "/name", "owner/na..me"])
def test_names_that_are_not_valid_are_refused(name, exports, cli):  # noqa: F811
    done = cli("push", exports("llama", True), name, "--dry-run")
    assert (done.code, done.err.count("\n")) == (2, 1) and "change REPOSITORY" in done.err


def test_refusals_of_the_hub_are_one_line(export, hub, push, monkeypatch, tmp_path):
    assert "may not write to someone/name" in one_line(push(export, "someone/name"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the login" in one_line(push(export, "owner/name"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "no login" in one_line(push(export, "owner/name"))
    assert hub.repositories == {}


def test_a_hub_that_cannot_be_reached_is_named(export, push, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in one_line(push(export, "owner/name"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in one_line(push(export, "owner/name"))


def test_failures_during_the_upload_are_one_line(export, hub, push):
    hub.repositories["owner/public"] = Repository(private=False)
    assert "exists and is public" in one_line(push(export, "owner/public", "--private"))
    for path, status, said in (
        ("/objects/", 403, "may not write to"),
        ("/commit/", 403, "may not write to owner/public"),
        ("/validate-yaml", 400, "refuses"),
    ):
        hub.fail = (path, status)
        assert said in one_line(push(export, "owner/public"))
    assert hub.repositories["owner/public"].branches["main"] == {}


def test_a_card_with_broken_yaml_is_not_published(export, cli):
    (export / "README.md").write_text("---\na: [\n---\n")
    done = cli("push", export, "owner/name", "--dry-run")
    assert (done.code, done.err.count("\n")) == (2, 1) and "README.md" in done.err
