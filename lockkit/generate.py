"""Text generation with a PyTorch folder, locked or original, or an ONNX export.

One loop serves both. It generates token by token with the KV cache:

1. Tokenize the prompt. An empty prompt becomes the model's begin-of-text or end-of-text token.
2. Run the prompt, then each new token. The next token is the most likely one (temperature 0), or it is
   sampled. With the same seed, the same logits give the same tokens, whatever computed the logits.
3. Stop at an end-of-text token, after `max_new_tokens`, or at the end of the model's context.
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
from lockkit.text import require_embedded
from lockkit.text_stream import TextStream, byte_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lockkit.runners import Runner


class GenerateConfig(BaseModel):
    """Settings of `generate`."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = Field(64, ge=1, description="Tokens to generate at most.")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 takes the most likely token, 1 samples.")
    seed: int = Field(0, description="Seed of the sampling.")
    provider: Provider = Field(
        Provider.cpu, description="Where an export runs, in onnxruntime; cuda runs PyTorch there too, if it can."
    )


@dataclass
class TextModel:
    """A model with its tokenizer, ready to generate.

    Attributes:
        name: as the user gave it.
        runner: computes logits.
        tokenizer: of the model.
        start_id: token that stands for an empty prompt; None if the model has none.
        end_ids: tokens that end the text.
        context: most tokens that the model can attend to; None if the configuration does not say.
        vocab_size: number of the model's embeddings.
    """

    name: str
    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    end_ids: set[int]
    context: int | None
    vocab_size: int


@dataclass
class Generation:
    """A generated text.

    Attributes:
        text: without an incomplete character at the end.
        token_ids: without the prompt and without the end-of-text token.
        ends: for each token, the number of characters of `text` that are complete with it.
        stopped: why the text ended.
    """

    text: str
    token_ids: list[int]
    ends: list[int]
    stopped: Literal["end of text", "max_new_tokens", "context"]

    def characters(self, tokens: int | None) -> int:
        """Number of characters of `text` that are complete with the first `tokens` tokens; None for all tokens."""
        if tokens is None:
            return len(self.text)
        return self.ends[tokens - 1] if tokens else 0


def open_model(name: str, provider: str = Provider.cpu, option: str = "MODEL") -> TextModel:
    """Load a model. PyTorch models run in float32, as in `lockkit verify`.

    Args:
        name: `demo`, a model folder, a `.gguf` file, an export, or a Hub id.
        provider: execution provider of an export, a name in `lockkit.targets.Provider`. A PyTorch
            model runs on the same device if PyTorch has it.
        option: the argument or option that `name` came from, for messages.

    Raises:
        UsageError: there is no such model, or it is damaged. The message names `option`.
    """
    import torch

    from lockkit.export.session import ExportSession
    from lockkit.models.load import load_model, load_tokenizer, resolve_model
    from lockkit.runners import OnnxRunner, TorchRunner

    runner: Runner
    if (Path(name) / EXPORT_MANIFEST).is_file():
        session = ExportSession(Path(name), provider=provider, last_only=True)
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
        vocab_size=config["vocab_size"],
    )


def special_tokens(
    folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[int | None, set[int]]:
    """The token that stands for an empty prompt (None if there is none), and the tokens that end a text.

    A token ends the text if the configuration, the generation configuration or the tokenizer says so.

    Args:
        folder: of the model.
        config: its `config.json`.
        tokenizer: its tokenizer.
    """
    found = [config.get("eos_token_id"), tokenizer.eos_token_id]
    # This file is optional, so a damaged one is ignored.
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
    """Continue a prompt.

    Args:
        model: see `open_model`.
        prompt: the text; may be empty.
        config: see `GenerateConfig`.
        on_text: called with each piece of text as soon as its characters are complete.

    Raises:
        UsageError: the prompt does not fit into the model's context, is not valid text, or has a token without an
            embedding; or it is empty and the model has no token for that.
    """
    config = config or GenerateConfig()
    prompt_ids = _prompt_ids(model, prompt)
    room = (
        config.max_new_tokens if model.context is None else min(config.max_new_tokens, model.context - len(prompt_ids))
    )
    if room < 1:
        raise UsageError(
            f"the prompt has {len(prompt_ids)} tokens and the context of {model.name} is {model.context}: "
            f"shorten --prompt"
        )
    decode = model.tokenizer.decode
    stream = TextStream(decode, prompt_ids, byte_of=byte_tokens(model.tokenizer.get_vocab(), decode))
    ids: list[int] = []
    ends: list[int] = []
    text = ""
    for token in _tokens(model, prompt_ids, room, config):
        ids.append(token)
        if piece := stream.push(token):
            text += piece
            on_text(piece)
        ends.append(len(text))
    if len(ids) < room:
        return Generation(text, ids, ends, "end of text")
    return Generation(text, ids, ends, "max_new_tokens" if room == config.max_new_tokens else "context")


def _prompt_ids(model: TextModel, prompt: str) -> list[int]:
    """The token ids of a prompt, at least one."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        raise UsageError(f"the prompt is not valid UTF-8 (character {error.start}): change --prompt") from error
    prompt_ids = model.tokenizer(prompt)["input_ids"] if prompt else []
    if not prompt_ids:
        if model.start_id is None:
            raise UsageError(f"{model.name} has no begin-of-text token, so the prompt must not be empty: give --prompt")
        prompt_ids = [model.start_id]
    require_embedded(model.tokenizer, prompt_ids, model.vocab_size, "the prompt", "--prompt")
    return prompt_ids


def _tokens(model: TextModel, prompt_ids: list[int], room: int, config: GenerateConfig) -> Iterator[int]:
    """Yield at most `room` new tokens. An end-of-text token ends them and is not yielded."""
    import torch

    random = torch.Generator().manual_seed(config.seed)
    ids, cache = torch.tensor([prompt_ids]), None
    for _ in range(room):
        logits, cache = model.runner.next_logits(ids, cache)
        token = next_token(logits[0], config.temperature, random)
        if token in model.end_ids:
            return
        yield token
        ids = torch.tensor([[token]])


def next_token(logits: torch.Tensor, temperature: float, random: torch.Generator, top_p: float = 1.0) -> int:
    """Choose the next token.

    Args:
        logits: `[vocab]`.
        temperature: 0 takes the most likely token; above 0, the logits are divided by it before sampling.
        random: generator for sampling.
        top_p: sample only the most likely tokens that together have this probability (nucleus sampling,
            Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).

    Returns:
        the token's id.
    """
    import torch

    if temperature == 0:
        return int(logits.argmax())
    # The highest logit is subtracted first, so that a very low temperature does not overflow.
    probabilities = torch.softmax((logits - logits.max()).double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities[order[before >= top_p]] = 0
    return int(torch.multinomial(probabilities, 1, generator=random))


def first_difference(first: Generation, second: Generation) -> int | None:
    """Index of the first generated token in which two generations differ; None if they are equal."""
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if same is None and len(first.token_ids) != len(second.token_ids):
        return min(len(first.token_ids), len(second.token_ids))
    return same
