"""Text from a model: a PyTorch folder, locked or original, or an ONNX export.

One loop for both, token by token with the KV cache:

1. Tokenize the prompt; an empty one becomes the model's begin-of-text or end-of-text token.
2. Run the prompt, then each new token, and take the most likely next one (temperature 0) or
   draw one: a seed draws the same tokens from the same logits, whatever computed them.
3. Stop at an end-of-text token, at `max_new_tokens`, or where the model's context ends.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.errors import UsageError
from lockkit.files import EXPORT_MANIFEST
from lockkit.targets import Provider, provider_called
from lockkit.text_stream import TextStream

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lockkit.runners import Runner


class GenerateConfig(BaseModel):
    """How to generate."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = Field(64, ge=1, description="Tokens to generate at most.")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 takes the most likely token, 1 samples.")
    seed: int = Field(0, description="Seed of the sampling.")
    provider: Provider = Field(
        Provider.cpu, description="Where an export runs, in onnxruntime; cuda runs PyTorch there too, if it can."
    )


@dataclass
class TextModel:
    """A model that can be asked for text."""

    name: str  # as given
    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    start_id: int | None  # what an empty prompt becomes
    end_ids: set[int]  # tokens that end the text
    context: int | None  # tokens that the model can attend to


@dataclass
class Generation:
    """What was generated."""

    text: str  # whole characters; a part of one at the end is left out
    token_ids: list[int]  # without the prompt's, without the end-of-text token
    ends: list[int]  # for each token, the characters of `text` that are whole once it is there
    stopped: Literal["end of text", "max_new_tokens", "context"]

    def characters(self, tokens: int | None) -> int:
        """Characters of `text` made of the first `tokens` tokens; None for all."""
        if tokens is None:
            return len(self.text)
        return self.ends[tokens - 1] if tokens else 0


def open_model(name: str, provider: str = Provider.cpu, option: str = "MODEL") -> TextModel:
    """Load `demo`, a model folder, an export or a Hub id; PyTorch models run in float32, as `verify` runs them.

    Raises:
        UsageError: naming `option`, when it is none of them, or is damaged.
    """
    import torch

    from lockkit.export.session import ExportSession
    from lockkit.models.load import load_model, load_tokenizer, resolve_model
    from lockkit.runners import OnnxRunner, TorchRunner

    if (Path(name) / EXPORT_MANIFEST).is_file():
        session = ExportSession(Path(name), provider=provider)
        runner, folder, config = OnnxRunner(session), session.folder, session.config
    else:
        folder = resolve_model(name, option)
        model, _ = load_model(folder, torch.float32, provider_called(provider).reference_device)
        runner, config = TorchRunner(model), model.config.to_dict()
    tokenizer = load_tokenizer(folder, option)
    start_id, end_ids = special_tokens(folder, config, tokenizer)
    return TextModel(
        name=name,
        runner=runner,
        tokenizer=tokenizer,
        start_id=start_id,
        end_ids=end_ids,
        context=config.get("max_position_embeddings"),
    )


def special_tokens(
    folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[int | None, set[int]]:
    """The token that an empty prompt becomes, and those that end a text.

    The latter by the generation configuration, the configuration and the tokenizer.
    """
    found = [config.get("eos_token_id"), tokenizer.eos_token_id]
    # Optional, and what is broken in it is not needed here.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id"))
    ends = {token for entry in found if entry is not None for token in (entry if isinstance(entry, list) else [entry])}
    starts = [tokenizer.bos_token_id, config.get("bos_token_id"), tokenizer.eos_token_id, *sorted(ends)]
    return next((token for token in starts if token is not None), None), ends


def generate(
    model: TextModel,
    prompt: str,
    config: GenerateConfig | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue `prompt`; `on_text` gets each piece of text as soon as its characters are whole.

    Raises:
        UsageError: the prompt does not fit into the model's context, or is empty for a model
            that has no token to start from.
    """
    config = config or GenerateConfig()
    prompt_ids = model.tokenizer(prompt)["input_ids"] if prompt else []
    if not prompt_ids:
        if model.start_id is None:
            raise UsageError(f"{model.name} has no begin-of-text token, so it needs a text: give --prompt")
        prompt_ids = [model.start_id]
    room = (
        config.max_new_tokens if model.context is None else min(config.max_new_tokens, model.context - len(prompt_ids))
    )
    if room < 1:
        raise UsageError(
            f"the prompt has {len(prompt_ids)} tokens, {model.name} has room for {model.context}: shorten --prompt"
        )
    stream = TextStream(model.tokenizer.decode, prompt_ids)
    ids: list[int] = []
    ends: list[int] = []
    text = ""
    for token in _tokens(model, prompt_ids, room, config):
        ids.append(token)
        if piece := stream.push(token):
            text += piece
            on_text(piece)
        ends.append(len(text))
    limit = "max_new_tokens" if room == config.max_new_tokens else "context"
    stopped = "end of text" if len(ids) < room else limit
    return Generation(text, ids, ends, stopped)


def _tokens(model: TextModel, prompt_ids: list[int], room: int, config: GenerateConfig) -> Iterator[int]:
    """At most `room` new tokens, ending before an end-of-text token."""
    import torch

    random = torch.Generator().manual_seed(config.seed)
    ids, cache = torch.tensor([prompt_ids]), None
    for _ in range(room):
        logits, cache = model.runner.extend(ids, cache)
        token = next_token(logits[0, -1], config.temperature, random)
        if token in model.end_ids:
            return
        yield token
        ids = torch.tensor([[token]])


def next_token(logits: torch.Tensor, temperature: float, random: torch.Generator, top_p: float = 1.0) -> int:
    """Choose a token by its logits, `[vocab]`, among the most likely ones that make up `top_p` together."""
    import torch

    if temperature == 0:
        return int(logits.argmax())
    # Subtracting the highest first keeps a tiny temperature from overflowing.
    probabilities = torch.softmax((logits - logits.max()).double() / temperature, dim=-1)
    # Nucleus sampling (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities[order[before >= top_p]] = 0
    return int(torch.multinomial(probabilities, 1, generator=random))


def parting(first: Generation, second: Generation) -> int | None:
    """Number of the first generated token in which two generations differ; None if they do not."""
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if same is None and len(first.token_ids) != len(second.token_ids):
        return min(len(first.token_ids), len(second.token_ids))
    return same
