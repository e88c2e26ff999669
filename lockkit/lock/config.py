"""The recipe of a lock: every setting with its default and its description.

The command line, the Python API, the recipe file (`--config`) and `lockkit.json` use this class. The description of a
field is the help text of its option.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.errors import UsageError
from lockkit.settings import UserPath, option_of, refuse_unused, shown, validated
from lockkit.text import DataColumn, read_text

if TYPE_CHECKING:
    import torch

# Defaults that depend on the start of a chain. With `random`, a pilot would have to train the chains.
LEARNING_RATES = {"teacher": 0.001, "random": 0.03}
RANDOM_COUPLING = 0.25


class LockConfig(BaseModel):
    """Settings of both phases of distillation (arXiv 2605.10777, phases 1 and 2)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    depth: int = Field(32, ge=2, description="Blocks in each chain. Their ranks add up to the MLP's width.")
    init: Literal["teacher", "random"] = Field(
        "teacher",
        description="Start of a chain. `teacher` takes the hidden units of the original MLP (the teacher) and fits them "
        "by least squares to what each block reads; `random` takes noise, as the paper does.",
    )
    max_kl: float = Field(
        0.002,
        gt=0,
        description="The loss that may be spent on the lock: KL divergence from the original, in nats per token, of all "
        "layers together. A pilot measures each layer. The layer then gets the --coupling at which its chain, before "
        "training, spends an equal share. Not used with --coupling, --gain or --init random.",
    )
    coupling: float | None = Field(
        None,
        gt=0,
        description="How strongly the blocks depend on each other: root mean square (rms) of the residual stream at the "
        "end of a chain, divided by that of the chain's input. A higher value makes a deeper function, which is harder to "
        f"distil. Default: one value per layer, by --max-kl; {RANDOM_COUPLING:g} with --init random.",
    )
    gain: float | None = Field(
        None,
        gt=0,
        description="Factor with which the residual stream enters the input of a block, the same in all layers. "
        "Default: one factor per layer, chosen to reach --coupling.",
    )
    data: UserPath = Field(
        "auto",
        description="Text to distil on: a file (text, JSON, JSON lines, CSV, TSV or Parquet, also compressed), a folder of "
        "such files, a Hub dataset, `stdlib` (sources of Python's standard library), or `self` (text that the model "
        "writes). `auto` is `stdlib` for `demo` and `self` for other models.",
    )
    data_column: DataColumn = None
    other_texts: list[UserPath] = Field(
        ["stdlib", "docs", "licences"],
        description="Text of another kind than --data on which the finished lock is measured, too: `stdlib`, `docs` "
        "(the English documentation of Python), `licences` (of the installed packages), or whatever --data takes. `none` "
        "for no such text.",
    )
    tokens: int = Field(
        65_536,
        ge=1,
        description="Training tokens of phase 1, for each layer's chain by itself: whole steps of --batch-tokens.",
    )
    end_to_end_tokens: int = Field(
        0,
        ge=0,
        description="Training tokens of phase 2, for all chains together on the logits: whole steps of "
        "--end-to-end-batch-tokens; 0 skips phase 2.",
    )
    block_tokens: int = Field(256, ge=8, description="Length of a row of text, in tokens.")
    batch_tokens: int = Field(512, ge=8, description="Tokens per step of phase 1.")
    end_to_end_batch_tokens: int = Field(1024, ge=8, description="Tokens per step of phase 2.")
    validation_tokens: int = Field(
        8_192,
        ge=64,
        description="Tokens in each of two held-out sets. The first measures the layers and chooses the best state of "
        "phase 2; the second measures the result.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak step size of phase 1 (Adam), as a share of the rms of each matrix. Halved for a layer that "
        f"diverges. Default: {LEARNING_RATES['teacher']:g}, or {LEARNING_RATES['random']:g} with --init random.",
    )
    end_to_end_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak step size of phase 2 (Adam), as a share of the rms of each matrix. Default: chosen by short "
        "trials.",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="Seed for the grouping of units, the initialisation, the order of text and sampling.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the saved weights; `auto` keeps the original's."
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Number format in which chains are computed during training. Weights and losses stay in float32.",
    )
    layers_together: int | None = Field(
        None,
        ge=1,
        description="Layers that phase 1 trains in one batched computation. Default: 1 on a CPU, where more is slower; "
        "as many as fit on a GPU.",
    )
    device: str = Field("auto", description="`cpu`, `cuda`, `cuda:1`, ...; `auto` uses a GPU if there is one.")
    offload: Literal["auto", "none", "disk"] = Field(
        "auto",
        description="Where phase 2 keeps the layers that it is not computing: `none` in memory, `disk` in the work "
        "folder; `auto` decides by the free memory.",
    )
    cache_gigabytes: float = Field(
        2.0, ge=0, description="Memory for stored activations, in gigabytes. The rest goes to files in the work folder."
    )
    work: UserPath | None = Field(
        None,
        description="Folder for finished layers and activations, from which an interrupted run resumes. Default: a "
        "hidden folder beside OUT (inside OUT if that is a mount point), deleted at the end.",
    )

    @property
    def torch_compute_dtype(self) -> torch.dtype:
        """`compute_dtype` as PyTorch's type."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.compute_dtype]

    @property
    def phase_1_learning_rate(self) -> float:
        """`learning_rate`, or its default for this start."""
        return self.learning_rate or LEARNING_RATES[self.init]

    def check_depth(self, width: int) -> None:
        """Check that an MLP of `width` hidden units can be divided into `depth` blocks.

        Raises:
            UsageError: it cannot.
        """
        if self.depth > width:
            raise UsageError(f"--depth {self.depth} is larger than the MLP's width {width}: lower it")

    def unused(self) -> dict[str, str]:
        """Settings without an effect beside others: see `lockkit.settings.refuse_unused`."""
        found = {}
        fixed = {"--gain": self.gain, "--coupling": self.coupling, "--init random": self.init == "random"}
        if one := next((option for option, value in fixed.items() if value), None):
            found["max_kl"] = f"with {one}: leave out one of them"
        if self.gain:
            found["coupling"] = "with --gain: leave out one of them"
        if not self.end_to_end_tokens:
            phase_2 = ("end_to_end_batch_tokens", "end_to_end_learning_rate", "offload")
            found |= dict.fromkeys(phase_2, "without phase 2: give --end-to-end-tokens, or leave it out")
        if "none" in self.other_texts and len(self.other_texts) > 1:
            found["other_texts"] = "where it is `none`: leave out `none`, or the other texts"
        elif self.data in self.other_texts:
            found["other_texts"] = f"for {self.data}, the text of the lock: leave it out"
        return found

    def check_amounts(self, block: int) -> None:
        """Check that each amount of text is at least what one step, or one row of `block` tokens, takes.

        Raises:
            UsageError: one is not.
        """
        least = {"tokens": ("batch_tokens", self.batch_tokens), "validation_tokens": ("block_tokens", block)}
        if self.end_to_end_tokens:
            least["end_to_end_batch_tokens"] = ("block_tokens", block)
            least["end_to_end_tokens"] = ("end_to_end_batch_tokens", self.end_to_end_batch_tokens)
        for name, (other, lowest) in [*least.items(), ("tokens", ("block_tokens", block))]:
            option, of = option_of(LockConfig, name), option_of(LockConfig, other)
            if (value := getattr(self, name)) < lowest:
                raise UsageError(f"{option} {value:,} is less than {of} {lowest:,}: raise {option}, or lower {of}")

    def result_settings(self) -> dict[str, Any]:
        """The settings that the locked weights depend on: all but device, memory, work folder and what is only measured."""
        return self.model_dump(exclude={"device", "offload", "cache_gigabytes", "work", "other_texts"})


def effective_source(config: LockConfig, model: str) -> str:
    """The source of the text for a lock of `model`, with `--data auto` resolved."""
    if config.data != "auto":
        return config.data
    return "stdlib" if model == "demo" else "self"


def make_config(recipe: Path | None = None, **overrides: Any) -> LockConfig:
    """Build the configuration from a recipe file (YAML) and `overrides`, which map field names to values.

    Overrides that are None are ignored.

    Raises:
        UsageError: the recipe cannot be read, or a setting is unknown or out of range; the message names the option.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    values = _read_recipe(recipe) if recipe else {}
    config = validated(LockConfig, values | given, recipe, values.keys() - given.keys())
    # A recipe may list defaults that have no effect beside its other settings.
    fields = LockConfig.model_fields
    refuse_unused(config, {*given, *(name for name in values if getattr(config, name) != fields[name].default)})
    return config


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    text = read_text(path, "--config")

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in one mapping, of which YAML's own loader takes the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise UsageError(f"{path} has the setting {shown(twice)} twice: change --config")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(text, Loader)
    except UsageError:
        raise
    except Exception as error:  # PyYAML also raises IndexError, KeyError, AttributeError and RecursionError
        reason = " ".join(str(error).split())[:300] if isinstance(error, yaml.YAMLError) else type(error).__name__
        raise UsageError(f"{path} is not valid YAML ({reason}): change --config") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path} must have lines of the form `setting: value`: change --config")
    named = {key.replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise UsageError(f"{path} has a setting twice, once with - and once with _: change --config")
    return named
