"""Sign a folder, and check its signature, with OpenSSF model signing (package `model-signing`).

The manifest of an export says that no file changed. A signature also says who wrote them. It covers every published file,
the card included: sign last. It is one file in the folder, `model.sig`, in the format of sigstore bundles, and other tools
for OpenSSF model signing read it. Keys and certificates need no network. Sigstore's way without a key needs one.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockkit.errors import GateFailed, UsageError, first_line
from lockkit.files import SIGNATURE, readable_disk_errors, replaced
from lockkit.models.weight_files import listed
from lockkit.publish.config import CheckConfig, SignConfig
from lockkit.publish.folder import open_publishable
from lockkit.publish.push import published_files

PASSWORD = "LOCKKIT_KEY_PASSWORD"  # name of the environment variable
# Files that the Hub, git and the Hub's client add to a copy.
_NOT_SIGNED = (SIGNATURE, ".cache", ".git", ".gitattributes", ".gitignore", ".github")


def sign_folder(folder: Path, config: SignConfig) -> Path:
    """Sign a locked folder or an export.

    Args:
        folder: that `lockkit lock` or `lockkit export` wrote.
        config: the key, or the way to sign. The password of an encrypted key is in the environment variable
            LOCKKIT_KEY_PASSWORD.

    Returns:
        The signature, `model.sig` in the folder.

    Raises:
        UsageError: lockkit did not write the folder, or a file of it is damaged or would not be published; the key or
            the certificate cannot be used; sigstore cannot be reached; or the package is missing.
    """
    _check_choice(config)
    signing, hashing = _library("signing"), _library("hashing")
    opened = open_publishable(folder)
    opened.require_intact()
    _require_no_other_files(folder)
    with readable_disk_errors(folder, "FOLDER"), replaced(folder / SIGNATURE) as new, _quiet():
        signer = signing.Config().set_hashing_config(_hashing_of(folder, hashing))
        try:
            if config.sigstore:
                signer.use_sigstore_signer(use_ambient_credentials=True)
            elif config.certificate:
                signer.use_certificate_signer(
                    private_key=config.key, signing_certificate=config.certificate, certificate_chain=config.chains
                )
            else:
                password = os.environ.get(PASSWORD)
                signer.use_elliptic_key_signer(private_key=config.key, password=password and password.encode())
        except (
            Exception
        ) as error:  # OSError, ValueError, TypeError, AttributeError, errors of cryptography and sigstore
            raise UsageError(_unusable_key(config, error)) from error
        try:
            signer.sign(folder, new)
        except Exception as error:  # of sigstore and its HTTP client
            raise UsageError(f"{folder} cannot be signed ({first_line(error)}): change --key, or try again") from error
    return folder / SIGNATURE


def check_signature(folder: Path, config: CheckConfig) -> str:
    """Check the signature of a locked folder or an export, and then the folder itself.

    Returns:
        Who signed it, in words.

    Raises:
        UsageError: lockkit did not write the folder, it is not signed, the key cannot be used, or the package is missing.
        GateFailed: the signature is not valid: another key, a changed, added or missing file.
    """
    if (config.signed_by is None) != (config.issuer is None) or (config.signature is None) == (config.issuer is None):
        raise UsageError("give --signature, or both --signed-by and --issuer")
    verifying, hashing = _library("verifying"), _library("hashing")
    opened = open_publishable(folder)
    path = folder / SIGNATURE
    if not path.is_file():
        raise UsageError(f"{folder} is not signed: it has no {SIGNATURE}")
    with _quiet():
        verifier = verifying.Config()
        try:
            signed_by = _use_key(verifier, config)
        except Exception as error:  # as above
            what = f"{config.signature} cannot be used ({_reason(error)}): change --signature"
            raise UsageError(what if config.signature else _no_sigstore(error, "--signature")) from error
        if any(file.is_symlink() for file in folder.rglob("*")):  # the cache of the Hub's client
            verifier.set_hashing_config(_hashing_of(folder, hashing))
        try:
            verifier.verify(folder, path)
        except Exception as error:  # ValueError, InvalidSignature, errors of OpenSSL and of sigstore
            raise GateFailed(f"the signature of {folder} is not valid: {_reason(error)}") from error
    opened.require_intact()
    return signed_by


def _use_key(verifier: Any, config: CheckConfig) -> str:
    """Set what `verifier` checks a signature with, and return it in words."""
    if config.signature is None:
        verifier.use_sigstore_verifier(identity=config.signed_by, oidc_issuer=config.issuer)
        return f"{config.signed_by}, according to {config.issuer}"
    if b"BEGIN CERTIFICATE" in config.signature.read_bytes():
        verifier.use_certificate_verifier(certificate_chain=[config.signature])
        return f"a certificate that {config.signature.name} vouches for"
    verifier.use_elliptic_key_verifier(public_key=config.signature)
    return f"the key of {config.signature.name}"


def _hashing_of(folder: Path, hashing: Any) -> Any:
    """Hash every file but those that a copy adds. Links are read: the Hub's client stores files so."""
    links = any(file.is_symlink() for file in folder.rglob("*"))
    return hashing.Config().set_ignored_paths(paths=_NOT_SIGNED).set_allow_symlinks(links)


def _require_no_other_files(folder: Path) -> None:
    """Raise a UsageError if a file is neither published nor one of `_NOT_SIGNED`: its name would be in the signature."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    known = published_files(folder).keys()
    others = sorted(name for name in names - known if name.split("/")[0] not in _NOT_SIGNED)
    if others:
        raise UsageError(f"{folder / others[0]} is hidden or partial, and is never published: remove it, then sign")


def _check_choice(config: SignConfig) -> None:
    if config.sigstore == (config.key is not None):
        raise UsageError("give --key with a private key, or --sigstore")
    if config.certificate and config.key is None:
        raise UsageError("--certificate belongs to a private key: give --key, too")
    if config.chains and config.certificate is None:
        raise UsageError("--chain belongs to a certificate: give --certificate, too")


def _unusable_key(config: SignConfig, error: Exception) -> str:
    if config.sigstore:
        return _no_sigstore(error, "--key")
    if "assword" in str(error):
        return f"{config.key} is encrypted ({_reason(error)}): set {PASSWORD} to its password, or change --key"
    names = ", ".join(str(path) for path in (config.key, config.certificate, *config.chains) if path)
    return f"{names} cannot be used ({_reason(error)}): give an elliptic-curve key (PEM; P-256, P-384 or P-521)"


def _no_sigstore(error: Exception, option: str) -> str:
    return f"sigstore cannot be used ({_reason(error)}): check the network, or give {option}"


def _reason(error: Exception) -> str:
    """An error of the libraries in one line. Some have no text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if changed := re.findall(r"Hash mismatch for \\?'([^'\\]+)", str(error)):
        return f"{listed(changed)} changed after it"
    known = {"InvalidSignature": "it was made with another key", "AttributeError": "not an elliptic-curve key"}
    return known.get(type(error).__name__, first_line(error))


def _library(module: str) -> Any:
    """A module of `model_signing`."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise UsageError("signatures need the package model-signing: pip install 'lockkit[sign]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the library prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
