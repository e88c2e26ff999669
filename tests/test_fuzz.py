"""Files from others, damaged by hypothesis: each is read, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockkit.errors import UsageError
from lockkit.export.manifest import Manifest, check_manifest, write_manifest
from lockkit.files import EXPORT_MANIFEST
from lockkit.lock.config import LockConfig, make_config

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)
names = st.sampled_from(
    ["a.txt", "../outside", "/etc/passwd", "C:\\x", "sub/../../outside", "link", "", ".", "a.txt\0", "dir", "./a.txt", EXPORT_MANIFEST]
) | st.text(max_size=20)  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A folder with a file, a folder and a link out of it, a manifest, and a file outside."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "outside").write_text("not yours")
    (folder / "export" / "dir").mkdir(parents=True)
    (folder / "export" / "a.txt").write_text("text")
    (folder / "export" / "config.json").write_text("{}")
    onnx.save(onnx.ModelProto(), folder / "export" / "model.onnx")
    write_manifest(
        folder / "export",
        Manifest(
            versions={}, model_type="llama", locked=False, precision="fp32", provider="cpu", source_sha256={}, files={}
        ),
    )
    (folder / "export" / "link").symlink_to(folder / "outside")
    return folder / "export"


def check(folder: Path) -> None:
    """Read the manifest: a result whose every file is inside, or one line that names EXPORT."""
    try:
        manifest = check_manifest(folder)
    except UsageError as error:
        assert "EXPORT" in str(error) and "\n" not in str(error) and len(str(error)) < 2000
    else:
        for name in manifest.files:
            assert (folder / name).resolve().is_relative_to(folder.resolve())


@FUZZ
@given(data=st.data())
def test_manifests(export, data):
    """A valid manifest with some values replaced, and some files added."""
    content = (export / EXPORT_MANIFEST).read_text()
    manifest, record = json.loads(content), json.loads(content)["files"]["a.txt"]
    records = st.just(record) | values | st.fixed_dictionaries({"size_bytes": values, "sha256": values})
    manifest["files"] |= data.draw(st.dictionaries(names, records, max_size=3))
    manifest |= data.draw(
        st.dictionaries(st.sampled_from([*Manifest.model_fields, "schema", "more"]), values, max_size=2)
    )
    try:
        (export / EXPORT_MANIFEST).write_text(json.dumps(manifest))
        check(export)
    finally:
        (export / EXPORT_MANIFEST).write_text(content)


@FUZZ
@given(
    content=st.binary(max_size=200)
    | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 9000, b'{"schema": NaN}', b"\xff"])
)
def test_manifests_of_any_bytes(export, tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    (folder / EXPORT_MANIFEST).write_bytes(content)
    check(folder)


def test_manifests_cut_short(export, tmp_path):
    content = (export / EXPORT_MANIFEST).read_bytes()
    for length in range(0, len(content) - 1, 17):
        (tmp_path / EXPORT_MANIFEST).write_bytes(content[:length])
        with pytest.raises(UsageError):
            check_manifest(tmp_path)


def test_a_manifest_that_is_a_link_or_a_folder(export, tmp_path):
    shutil.copytree(export, tmp_path / "copy", symlinks=True)
    path = tmp_path / "copy" / EXPORT_MANIFEST
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UsageError, match="link out of the folder"):
        check_manifest(tmp_path / "copy")
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="not an export"):
        check_manifest(tmp_path / "copy")


def recipe(content: bytes, folder: Path) -> None:
    """Read a recipe: a configuration, or one line that says what to change."""
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(make_config(path), LockConfig)
    except UsageError as error:
        assert ("--" in str(error) or str(path) in str(error)) and "\n" not in str(error) and len(str(error)) < 2000


@FUZZ
@given(settings=st.dictionaries(st.sampled_from([*LockConfig.model_fields]) | st.text(max_size=9), values, max_size=4))
def test_recipes(tmp_path, settings):
    recipe(yaml.safe_dump(settings, allow_unicode=True).encode("utf-8", "surrogatepass"), tmp_path)


@FUZZ
@given(content=st.binary(max_size=60) | st.text("{}[]:,-!&*|>'\"?#%@ \nabdepth0123.<", max_size=60).map(str.encode))
def test_recipes_of_any_bytes(tmp_path, content):
    recipe(content, tmp_path)


BOMB = (
    "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmn", "bcdefghijklmno", strict=True))
    + "depth: *o"
)


@pytest.mark.parametrize(
    "content",
    ["!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "depth: !!int ''", "? [a]: b", "[" * 5000, "!!python/object/apply:os.system [x]",
     BOMB, "depth: &a [*a]", "depth: 2001-99-99", "a: " + "9" * 9000, "depth: .nan", "depth: 1e999", "<<: 5", "depth: 32\ndepth: 16"],
)  # fmt: skip
def test_recipes_known_to_hurt_parsers(content, tmp_path):
    recipe(content.encode(), tmp_path)
