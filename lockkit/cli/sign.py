"""`lockkit sign`: who wrote a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import console
from lockkit.publish.config import SignConfig


def sign(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Locked folder or export.")],
    config: SignConfig,
) -> None:
    """Sign FOLDER, so that others can check who wrote it.

    The signature is model.sig in FOLDER, in the format of OpenSSF model signing. It covers every
    file that `lockkit push` uploads, the card included, so sign after `lockkit card`. `lockkit
    verify FOLDER --signature` checks it. Needs model-signing: pip install 'lockkit[sign]'.

    Examples:

    \b
        openssl ecparam -name prime256v1 -genkey -noout -out key.pem
        openssl ec -in key.pem -pubout -out key.pub
        lockkit sign ./locked-onnx --key key.pem
        lockkit verify ./locked-onnx --signature key.pub
    """
    from lockkit.publish.sign import sign_folder

    console.print(f"wrote {sign_folder(folder, config)}", soft_wrap=True)
