"""The recipe of a lock: every setting, with its default and its meaning, in one place.

The command line, the Python API, the recipe file (`--config`) and `lockkit.json` all use
this class; a help text is a field's description.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.errors import UsageError
from lockkit.settings import validated

if TYPE_CHECKING:
    import torch


class LockConfig(BaseModel):
    """Settings of both phases of distillation (arXiv 2605.10777, phases 1 and 2)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    depth: int = Field(32, ge=2, description="Blocks in each chain. Their ranks add up to the MLP's width.")
    init: Literal["continuation", "random"] = Field(
        "continuation",
        description="Start from the teacher's own units and raise the coupling from 0 to 1 (`continuation`), "
        "or from noise as in the paper (`random`).",
    )
    coupling: float = Field(
        0.25,
        gt=0,
        description="How much the blocks depend on each other: rms of the stream over rms of the input at the end of "
        "a chain. More is a deeper function, and harder to distil.",
    )
    gain: float | None = Field(
        None, gt=0, description="One factor of the stream for all layers, in place of the one --coupling implies."
    )
    data: str = Field(
        "auto",
        description="Text to distil on: a text file, a folder, a Hub dataset, `stdlib`, or `self` (sampled from the "
        "model). `auto` is `stdlib` for `demo`, else `self`.",
    )
    tokens: int = Field(200_000, ge=1, description="Tokens each layer's chain is trained on in phase 1.")
    end_to_end_tokens: int = Field(
        40_000, ge=0, description="Tokens of phase 2, all chains together on the logits; 0 leaves it out."
    )
    block_tokens: int = Field(256, ge=8, description="Length of a row of text, in tokens.")
    batch_tokens: int = Field(512, ge=8, description="Tokens in a step of phase 1.")
    end_to_end_batch_tokens: int = Field(1024, ge=8, description="Tokens in a step of phase 2.")
    validation_tokens: int = Field(
        8_192,
        ge=64,
        description="Tokens in each of two held-out sets: one measures the layers and chooses phase 2's best state, the "
        "other measures the result.",
    )
    learning_rate: float = Field(
        0.03,
        gt=0,
        description="Peak step size of phase 1 (Adam), as a share of the rms of each matrix; halved for a layer that "
        "diverges.",
    )
    end_to_end_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak step size of phase 2 (Adam), as a share of the rms of each matrix. Default: found by short "
        "trials.",
    )
    ramp_share: float = Field(
        0.25, ge=0, le=1, description="Share of phase 1's steps over which `continuation` raises the coupling from 0."
    )
    seed: int = Field(0, ge=0, description="Seed of grouping, initialisation, order of text and sampling.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the saved weights; `auto` keeps the original's."
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type the chains are computed in while they are trained; weights and losses are float32."
    )
    layers_together: int | None = Field(
        None,
        ge=1,
        description="Layers trained in one batched computation in phase 1. Default: 1 on a CPU, where more is "
        "slower; as many as fit on a GPU.",
    )
    device: str = Field("auto", description="`cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one.")
    offload: Literal["auto", "none", "disk"] = Field(
        "auto",
        description="Where phase 2 keeps layers between their turns: `none` in memory, `disk` in the work folder; "
        "`auto` decides by what is free.",
    )
    cache_gigabytes: float = Field(
        2.0, ge=0, description="Memory for activations; what is more goes to files in the work folder."
    )
    work: str | None = Field(
        None,
        description="Folder for finished layers and activations, from which an interrupted lock resumes. "
        "Default: a hidden folder beside OUT, deleted at the end.",
    )

    @property
    def torch_compute_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.compute_dtype)

    def result_settings(self) -> dict[str, Any]:
        """The settings that a lock's weights depend on: all but where and with how much memory it is made."""
        return self.model_dump(exclude={"device", "offload", "cache_gigabytes", "work"})


def make_config(recipe: Path | None = None, **overrides: Any) -> LockConfig:
    """Build the configuration from a recipe file (YAML) and options that override it.

    Options that are None count as not given.

    Raises:
        UsageError: naming the option or the line of the recipe to change.
    """
    values = _read_recipe(recipe) if recipe else {}
    values.update({name: value for name, value in overrides.items() if value is not None})
    return validated(LockConfig, values)


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): change --config") from error
    except Exception as error:  # PyYAML also lets IndexError, KeyError, AttributeError and RecursionError through
        reason = " ".join(str(error).split())[:300] if isinstance(error, yaml.YAMLError) else type(error).__name__
        raise UsageError(f"{path} is not valid YAML ({reason}): change --config") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path} must be a list of `setting: value` lines: change --config")
    return {key.replace("-", "_"): value for key, value in values.items()}
