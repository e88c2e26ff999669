"""How to serve: every setting, with its default and its meaning, for the command line and Python."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from lockkit.errors import UsageError
from lockkit.targets import Provider

API_KEY_VARIABLE = "LOCKKIT_API_KEY"


class ServeConfig(BaseModel):
    """Settings of `lockkit serve`; every field's description is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 is every IPv4 address.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0 takes a free one and prints it.")
    name: str | None = Field(
        None, min_length=1, max_length=200, description="The model's name in requests. Default: the folder's."
    )
    api_key_file: Path | None = Field(
        None,
        description=f"File with the API key that every request but /health must carry. "
        f"Default: the environment variable {API_KEY_VARIABLE}; where that is not set either, no key is asked for.",
    )
    provider: Provider = Field(Provider.cpu, description="Where the graph runs, in onnxruntime.")
    threads: int | None = Field(None, ge=1, description="Threads of onnxruntime. Default: all physical cores but one.")
    max_batch: int = Field(16, ge=1, le=4096, description="Requests that generate at the same time.")
    max_queue: int = Field(256, ge=0, description="Requests that may wait for a place; more are refused (429).")
    max_prompt_tokens: int = Field(2048, ge=1, description="Longest prompt, in tokens.")
    max_output_tokens: int = Field(1024, ge=1, description="Longest answer, in tokens.")
    max_body_bytes: int = Field(262_144, ge=1024, description="Largest body of a request.")
    max_connections: int = Field(1024, ge=1, description="Open connections; more are refused (429).")
    request_seconds: float = Field(
        120, gt=0, description="Seconds from a request to the end of its answer, waiting included (408)."
    )
    read_seconds: float = Field(
        10,
        gt=0,
        description="Seconds a client may take to send its headers, to send its body, to send another request, "
        "and to make room for more of an answer.",
    )
    shutdown_seconds: float = Field(
        30, ge=0, description="Seconds that running requests get to finish when the server is told to stop."
    )

    def read_api_key(self) -> SecretStr | None:
        """The API key, from the file or the environment; None where neither is given.

        Raises:
            UsageError: the file cannot be read, or the key is empty or not plain ASCII. The
                message never holds the key.
        """
        if self.api_key_file is None:
            key, where = os.environ.get(API_KEY_VARIABLE), f"the environment variable {API_KEY_VARIABLE}"
            if key is None:
                return None
        else:
            where = f"{self.api_key_file}"
            try:
                key = self.api_key_file.read_bytes().decode("ascii").strip()
            except OSError as error:
                raise UsageError(f"cannot read {where} ({error.strerror}): change --api-key-file") from error
            except UnicodeDecodeError as error:
                raise UsageError(f"{where} is not a line of ASCII: change --api-key-file") from error
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(f"{where} must hold one word of printable ASCII: change --api-key-file")
        return SecretStr(key)
