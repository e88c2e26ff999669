"""`lockkit sign` and `lockkit verify --signature`: keys and certificates made here, tampering, other keys."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_export import exports, models  # noqa: F401 (fixtures)

pytest.importorskip("model_signing", reason="pip install lockkit[sign]")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID


def save_key(path: Path, key, password: str = "") -> Path:
    """Save a private key in `path`, and its public key beside it with the ending .pub."""
    encryption = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, pkcs8, encryption))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


def save_certificate(path: Path, name: str, key, issuer: str, issuer_key, authority: bool) -> Path:
    """Save a certificate of `key` that `issuer_key` signed."""
    now = datetime.datetime.now(datetime.UTC)
    names = {who: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in (name, issuer)}
    builder = x509.CertificateBuilder(names[issuer], names[name], key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    uses = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **uses)
    certificate = builder.add_extension(usage, critical=True).sign(issuer_key, hashes.SHA256())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def key(tmp_path):
    return save_key(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(params=["export", "locked"])
def folder(request, exports, locks, tmp_path):  # noqa: F811
    source = exports("llama", True) if request.param == "export" else locks("llama")
    return Path(shutil.copytree(source, tmp_path / "folder"))


@pytest.fixture
def export(exports, tmp_path):  # noqa: F811
    return Path(shutil.copytree(exports("llama", True), tmp_path / "folder"))


def refused(done, code: int) -> str:
    assert (done.code, done.err.count("\n")) == (code, 1), done.out + done.err
    return done.err


def test_a_signed_folder_is_accepted_and_by_other_tools_too(folder, key, cli):
    done = cli("sign", folder, "--key", key)
    assert done.code == 0, done.err
    assert done.out.split() == ["wrote", str(folder / "model.sig")]
    done = cli("verify", folder, "--signature", key.with_suffix(".pub"))
    assert done.code == 0, done.err
    assert done.out == f"{folder} is as it was signed, by the key of key.pub\n"
    theirs = [sys.executable, "-m", "model_signing", "verify", "key", folder, "--signature", folder / "model.sig"]
    found = subprocess.run([*theirs, "--public_key", key.with_suffix(".pub")], capture_output=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("tampering", ["weights", "card", "added", "missing", "signature"])
def test_tampering_is_refused(tampering, folder, key, cli):
    assert cli("sign", folder, "--key", key).code == 0
    weights = next(path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "model.onnx_data")
    if tampering == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif tampering == "card":
        (folder / "README.md").write_text("another card")
    elif tampering == "added":
        (folder / "modeling_evil.py").write_text("")
    elif tampering == "missing":
        (folder / "generation_config.json").unlink()
    else:
        text = (folder / "model.sig").read_text()
        start = text.index('"payload":') + 40
        (folder / "model.sig").write_text(text[:start] + ("A" if text[start] != "A" else "B") + text[start + 1 :])
    line = refused(cli("verify", folder, "--signature", key.with_suffix(".pub")), 1)
    assert "is not valid" in line and "Digest(" not in line
    if tampering in ("weights", "card"):
        assert f"{weights.name if tampering == 'weights' else 'README.md'} changed after it" in line


def test_another_key_and_a_missing_signature_are_refused(export, key, cli, tmp_path):
    other = save_key(tmp_path / "other.pem", ec.generate_private_key(ec.SECP256R1()))
    public = key.with_suffix(".pub")
    assert "is not signed" in refused(cli("verify", export, "--signature", public), 2)
    assert cli("sign", export, "--key", other).code == 0
    assert "is not valid" in refused(cli("verify", export, "--signature", public), 1)
    (export / "model.sig").write_text("{}")
    assert "is not valid" in refused(cli("verify", export, "--signature", public), 1)


def test_a_certificate_is_checked_against_its_root(export, cli, tmp_path):
    root, leaf = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    key = save_key(tmp_path / "leaf.pem", leaf)
    authority = save_certificate(tmp_path / "root.crt", "root", root, "root", root, authority=True)
    certificate = save_certificate(tmp_path / "leaf.crt", "leaf", leaf, "root", root, authority=False)
    stranger = save_certificate(tmp_path / "other.crt", "other", leaf, "other", leaf, authority=True)
    done = cli("sign", export, "--key", key, "--certificate", certificate, "--chain", authority)
    assert done.code == 0, done.err
    done = cli("verify", export, "--signature", authority)
    assert done.code == 0 and "a certificate that root.crt vouches for" in done.out
    refused(cli("verify", export, "--signature", stranger), 1)
    wrong = save_key(tmp_path / "wrong.pem", ec.generate_private_key(ec.SECP256R1()))
    assert "cannot be used" in refused(cli("sign", export, "--key", wrong, "--certificate", certificate), 2)


def test_keys_that_cannot_be_used_are_refused(export, cli, tmp_path, monkeypatch):
    unsupported = save_key(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048))
    (tmp_path / "text.pem").write_text("no key")
    for path in (unsupported, tmp_path / "text.pem", tmp_path / "missing.pem", tmp_path):
        assert str(path) in refused(cli("sign", export, "--key", path), 2)
    for path in (unsupported.with_suffix(".pub"), tmp_path / "text.pem", tmp_path / "missing.pem"):
        (export / "model.sig").write_text("{}")
        assert "change --signature" in refused(cli("verify", export, "--signature", path), 2)
    (export / "model.sig").unlink()
    encrypted = save_key(tmp_path / "secret.pem", ec.generate_private_key(ec.SECP384R1()), "word")
    assert "LOCKKIT_KEY_PASSWORD" in refused(cli("sign", export, "--key", encrypted), 2)
    assert not (export / "model.sig").exists()
    monkeypatch.setenv("LOCKKIT_KEY_PASSWORD", "word")
    assert cli("sign", export, "--key", encrypted).code == 0
    assert cli("verify", export, "--signature", encrypted.with_suffix(".pub")).code == 0


@pytest.mark.parametrize(
    "options", [[], ["--key", "a", "--sigstore"], ["--certificate", "a"], ["--key", "a", "--chain", "b"]]
)
def test_contradictory_options_are_refused(options, export, cli):
    assert "give --" in refused(cli("sign", export, *options), 2)
    assert "give --signature" in refused(cli("verify", export, "--issuer", "x"), 2)


def test_only_what_is_published_is_signed(export, originals, key, cli):
    refused(cli("sign", originals("llama"), "--key", key), 2)
    (export / ".env").write_text("SECRET=1")
    assert ".env is hidden" in refused(cli("sign", export, "--key", key), 2)
    (export / ".env").unlink()
    assert cli("sign", export, "--key", key).code == 0
    (export / ".gitattributes").write_text("what the Hub adds")
    (export / ".cache").mkdir()
    (export / ".cache" / "file.metadata").write_text("what its client adds")
    done = cli("verify", export, "--signature", key.with_suffix(".pub"))
    assert done.code == 0, done.err


def test_a_signature_is_checked_in_a_folder_of_links(folder, key, cli, tmp_path):
    """The cache of the Hub's client is such a folder."""
    assert cli("sign", folder, "--key", key).code == 0
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    done = cli("verify", tmp_path / "snapshot", "--signature", key.with_suffix(".pub"))
    if (folder / "lockkit.json").exists():
        assert done.code == 0, done.err
    else:  # exports are read from folders without links out of them
        assert "link out of the folder" in refused(done, 2)


def test_push_says_that_a_signature_is_old(export, key, cli):
    assert cli("sign", export, "--key", key).code == 0
    assert "newer" not in cli("push", export, "owner/name", "--dry-run").out
    later = (export / "model.sig").stat().st_mtime + 10
    os.utime(export / "README.md", (later, later))
    assert "README.md is newer than the signature" in cli("push", export, "owner/name", "--dry-run").out


def test_a_missing_package_is_named(export, key, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    assert "pip install 'lockkit[sign]'" in refused(cli("sign", export, "--key", key), 2)
