"""Settings of `lockkit push`, for the Python API and the command line."""

from __future__ import annotations

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
