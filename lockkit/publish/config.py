"""Settings of `lockkit push`, `lockkit sign` and the check of a signature, for Python and for the command line."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class PushConfig(BaseModel):
    """Settings of `push_folder`. The description of a field is the help text of its option."""

    model_config = ConfigDict(extra="forbid")

    private: bool = Field(
        False, description="Create the repository as private. An existing public repository is then refused."
    )
    revision: str | None = Field(
        None, min_length=1, description="Branch to upload to. It is created if it does not exist. Default: main."
    )
    message: str | None = Field(None, min_length=1, description="First line of the commit.")
    dry_run: bool = Field(False, description="List the files and stop. Needs no login and no network.")


class SignConfig(BaseModel):
    """Settings of `sign_folder`: a private key, a key with its certificate, or sigstore."""

    model_config = ConfigDict(extra="forbid")

    key: Path | None = Field(
        None,
        description="Private key: elliptic curve, PEM. The password of an encrypted key is read from "
        "LOCKKIT_KEY_PASSWORD.",
    )
    certificate: Path | None = Field(None, description="Signing certificate of the key, PEM.")
    chains: list[Path] = Field([], description="Certificate between it and a root, PEM.")
    sigstore: bool = Field(
        False, description="Sign without a key, by a login with sigstore. Needs a network, and a browser outside CI."
    )


class CheckConfig(BaseModel):
    """Settings of `check_signature`: what the signature must have been made with."""

    model_config = ConfigDict(extra="forbid")

    signature: Path | None = Field(
        None,
        description="Check the signature of EXPORT, which may be a locked folder, with this public key or root "
        "certificate (PEM). Without --reference, nothing else is checked.",
    )
    signed_by: str | None = Field(
        None, min_length=1, description="The same for a signature by sigstore: who must have signed, such as an e-mail."
    )
    issuer: str | None = Field(None, min_length=1, description="Address of the login that knows --signed-by.")

    @property
    def wanted(self) -> bool:
        """Whether a signature is to be checked."""
        return self.signature is not None or self.signed_by is not None or self.issuer is not None
