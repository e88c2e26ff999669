"""The settings of the server, with their defaults and descriptions. The command line is made from them."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from lockkit.errors import UsageError
from lockkit.targets import Provider

API_KEY_VARIABLE = "LOCKKIT_API_KEY"


class ServeConfig(BaseModel):
    """Settings of `lockkit serve`. The description of a field is the help text of its option."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 listens on every IPv4 address."
    )
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0 chooses a free one and prints it.")
    name: str | None = Field(
        None, min_length=1, max_length=200, description="Name of the model in requests. Default: the folder's name."
    )
    api_key_file: Path | None = Field(
        None,
        description=f"File with the API key that every request except /health must carry. "
        f"Default: the environment variable {API_KEY_VARIABLE}. If that is not set either, no key is needed.",
    )
    provider: Provider = Field(Provider.cpu, description="Execution provider of onnxruntime.")
    threads: int | None = Field(None, ge=1, description="Threads of onnxruntime. Default: all physical cores but one.")
    no_cuda_graphs: bool = Field(
        False, description="On a GPU, do not launch each step as one CUDA graph, even if the export can be captured."
    )
    request_log: Path | None = Field(
        None,
        description="File that gets a line of JSON for each request: time, endpoint, status, seconds and numbers of "
        "tokens. It never contains prompts, answers, keys or addresses.",
    )
    max_batch: int = Field(16, ge=1, le=4096, description="Largest number of requests that generate at the same time.")
    max_queue: int = Field(
        256, ge=0, description="Largest number of waiting requests. Further ones are refused (HTTP 429)."
    )
    max_prompt_tokens: int = Field(2048, ge=1, description="Longest prompt, in tokens.")
    max_output_tokens: int = Field(1024, ge=1, description="Longest answer, in tokens.")
    max_body_bytes: int = Field(262_144, ge=1024, description="Largest body of a request, in bytes.")
    max_connections: int = Field(
        1024, ge=1, description="Largest number of open connections. Further ones are refused (HTTP 429)."
    )
    request_seconds: float = Field(
        120,
        gt=0,
        description="Longest time from a request to the end of its answer, in seconds. Waiting counts. A request that "
        "takes longer is ended (HTTP 408).",
    )
    read_seconds: float = Field(
        10,
        gt=0,
        description="Seconds that a client may take for each of these: to send the headers, to send the body, to send "
        "the next request, and to read a part of the answer.",
    )
    shutdown_seconds: float = Field(
        30, ge=0, description="Seconds that running requests get to finish after a signal to stop."
    )

    def unused(self) -> dict[str, str]:
        """Settings without an effect beside others: see `lockkit.settings.refuse_unused`."""
        on_cpu = "on the CPU: leave it out, or give --provider cuda"
        return {"no_cuda_graphs": on_cpu} if self.provider == Provider.cpu else {}

    def read_api_key(self) -> SecretStr | None:
        """The API key from the file or the environment variable; None if neither is set.

        Raises:
            UsageError: the file cannot be read, or the key is empty or not plain ASCII. The message never contains
                the key.
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
                raise UsageError(f"{where} is not one line of ASCII: change --api-key-file") from error
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(f"{where} must hold one word of printable ASCII: change --api-key-file")
        return SecretStr(key)
