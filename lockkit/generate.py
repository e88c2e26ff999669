"""Text generation with a PyTorch folder, locked or original, or an ONNX export.

One loop serves both. It generates token by token with the KV cache:

1. Tokenize the prompt, in the model's chat template if that is asked for. An empty prompt becomes the model's
   begin-of-text or end-of-text token.
2. Run the prompt, then each new token. The next token is the most likely one (temperature 0), or it is
   sampled. With the same seed, the same logits give the same tokens, whatever computed the logits. What is not set comes
   from the model's generation_config.json.
3. Stop at an end-of-text token, after `max_new_tokens`, or at the end of the model's context.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.errors import UsageError, first_line
from lockkit.files import EXPORT_MANIFEST
from lockkit.targets import Provider, provider_called
from lockkit.text import require_embedded
from lockkit.text_stream import TextStream, byte_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lockkit.runners import Runner

LOWEST_PENALTY = 0.01  # of repetition; divided by a much lower one, logits are no longer finite


class GenerateConfig(BaseModel):
    """Settings of `generate`."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = Field(64, ge=1, description="Tokens to generate at most.")
    chat: bool = Field(False, description="The prompt is a user's message: put it into the model's chat template.")
    temperature: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="0 takes the most likely token, 1 samples. Default for this and the next three: the model's "
        "generation_config.json; without one, 0 and no limits, or 1 if --top-k or --top-p is given.",
    )
    top_k: int | None = Field(None, ge=0, description="Sample only from this many most likely tokens; 0 for all.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample only from the most likely tokens that together have this probability."
    )
    repetition_penalty: float | None = Field(
        None,
        ge=LOWEST_PENALTY,
        allow_inf_nan=False,
        description="Above 1, tokens that were there before become less likely.",
    )
    seed: int = Field(0, description="Seed of the sampling.")
    provider: Provider = Field(
        Provider.cpu, description="Where an export runs, in onnxruntime; cuda runs PyTorch there too, if it can."
    )
    no_cuda_graphs: bool = Field(
        False,
        description="On a GPU, do not launch each step of an export as one CUDA graph, even if it can be captured.",
    )

    def unused(self) -> dict[str, str]:
        """Settings without an effect beside others: see `lockkit.settings.refuse_unused`."""
        reason = "with --temperature 0, which takes the most likely token: change one of them"
        found = dict.fromkeys(("top_k", "top_p", "seed"), reason) if self.temperature == 0 else {}
        if self.provider == Provider.cpu:
            found["no_cuda_graphs"] = "on the CPU: leave it out, or give --provider cuda"
        return found


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; above 0, the logits are divided by it before sampling.
        top_k: sample only from this many most likely tokens; 0 for all.
        top_p: sample only from the most likely tokens that together have this probability (nucleus sampling,
            Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).
        min_p: sample only from tokens whose probability is at least this share of the highest.
        repetition_penalty: the logits of tokens that were there before are divided by it if they are positive, else
            multiplied (Keskar et al. 2019, "CTRL", section 4.1).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def takes_the_most_likely(self) -> bool:
        """Whether the next token is simply the one with the highest logit."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def choose(self, logits: torch.Tensor, random: torch.Generator, before: Sequence[int] = ()) -> int:
        """Choose the next token.

        Args:
            logits: `[vocab]`; not changed.
            random: generator for sampling.
            before: all tokens so far, with the prompt.
        """
        import torch

        if self.repetition_penalty != 1 and before:
            logits, seen = logits.clone(), torch.tensor(sorted(set(before)))
            found = logits[seen]
            logits[seen] = torch.where(found > 0, found / self.repetition_penalty, found * self.repetition_penalty)
        return next_token(logits, self.temperature, random, self.top_p, self.top_k, self.min_p)


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """The fields of `Sampling` that a model's generation_config.json sets; none if it does not say to sample.

    Values that the file cannot have are left out: the file is optional, so a damaged one is ignored.
    """
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    names = ["repetition_penalty"]
    if found.get("do_sample") is True:
        names += ["temperature", "top_k", "top_p", "min_p"]
        found.setdefault("temperature", 1.0)
    lowest = {"repetition_penalty": LOWEST_PENALTY, "top_p": 1e-6, "min_p": 0, "temperature": 0, "top_k": 0}
    values = {name: found[name] for name in names if type(found.get(name)) in (int, float)}
    return {name: value for name, value in values.items() if lowest[name] <= value < float("inf")}


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
        notes: what a user should know about how it runs: the GPU, CUDA graphs, and an operator that cannot be used.
        defaults: fields of `Sampling` that the model's generation_config.json sets.
    """

    name: str
    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    end_ids: set[int]
    context: int | None
    vocab_size: int
    notes: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)


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


def open_model(name: str, provider: str = Provider.cpu, option: str = "MODEL", cuda_graphs: bool = True) -> TextModel:
    """Load a model. PyTorch models run in float32, as in `lockkit verify`; an export as in `lockkit serve`.

    Args:
        name: `demo`, a model folder, a `.gguf` file, an export, or a Hub id.
        provider: execution provider of an export, a name in `lockkit.targets.Provider`. A PyTorch
            model runs on the same device if PyTorch has it.
        option: the argument or option that `name` came from, for messages.
        cuda_graphs: on a GPU, launch each step of an export as one CUDA graph, if it can be captured.

    Raises:
        UsageError: there is no such model, or it is damaged. The message names `option`.
    """
    import torch

    from lockkit.kernel.opened import open_generating
    from lockkit.models.load import load_model, load_tokenizer, resolve_model
    from lockkit.runners import OnnxRunner, TorchRunner

    runner: Runner
    notes: list[str] = []
    if (Path(name) / EXPORT_MANIFEST).is_file():
        session = open_generating(Path(name), provider, cuda_graphs=cuda_graphs, check=True, warn=notes.append)
        runner, folder, config = OnnxRunner(session), session.folder, session.config
        if session.device_note:
            notes.append(f"on {session.device_note}")
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
        notes=notes,
        defaults=sampling_defaults(folder),
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
            embedding; it is empty and the model has no token for that; or there is no chat template to put it into.
    """
    config = config or GenerateConfig()
    prompt_ids = _prompt_ids(model, prompt, config.chat)
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


def _prompt_ids(model: TextModel, prompt: str, chat: bool) -> list[int]:
    """The token ids of a prompt, at least one."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        raise UsageError(f"the prompt is not valid UTF-8 (character {error.start}): change --prompt") from error
    if chat:
        prompt = _as_message(model, prompt)
    prompt_ids = model.tokenizer(prompt, add_special_tokens=not chat)["input_ids"] if prompt else []
    if not prompt_ids:
        if model.start_id is None:
            raise UsageError(f"{model.name} has no begin-of-text token, so the prompt must not be empty: give --prompt")
        prompt_ids = [model.start_id]
    require_embedded(model.tokenizer, prompt_ids, model.vocab_size, "the prompt", "--prompt")
    return prompt_ids


def _as_message(model: TextModel, prompt: str) -> str:
    """A user's message in the model's chat template, up to where the answer begins."""
    if not model.tokenizer.chat_template:
        raise UsageError(f"{model.name} has no chat template: leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    try:
        return model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may raise anything
        raise UsageError(
            f"the chat template of {model.name} refuses the prompt ({first_line(error)}): leave out --chat"
        ) from error


def sampling_of(model: TextModel, config: GenerateConfig) -> Sampling:
    """How a model chooses tokens: by the settings, and where they say nothing by its generation_config.json."""
    given = config.model_dump(include=set(Sampling.__dataclass_fields__), exclude_none=True)
    if given.keys() & {"top_k", "top_p"}:
        given = {"temperature": 1.0} | model.defaults | given  # limits are for sampling
    return Sampling(**model.defaults | given)


def _tokens(model: TextModel, prompt_ids: list[int], room: int, config: GenerateConfig) -> Iterator[int]:
    """Yield at most `room` new tokens. An end-of-text token ends them and is not yielded."""
    import torch

    sampling, random = sampling_of(model, config), torch.Generator().manual_seed(config.seed)
    ids, before = torch.tensor([prompt_ids]), list(prompt_ids)
    tokens = len(prompt_ids) + room
    try:
        texts = model.runner.begin(1, tokens)
    except MemoryError as error:
        raise UsageError(
            f"the cache of a text of {tokens:,} tokens does not fit into memory: lower --max-new-tokens, or shorten --prompt"
        ) from error
    for _ in range(room):
        token = sampling.choose(texts.next_logits(ids)[0], random, before)
        before.append(token)
        if token in model.end_ids:
            return
        yield token
        ids = torch.tensor([[token]])


def next_token(
    logits: torch.Tensor,
    temperature: float,
    random: torch.Generator,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> int:
    """Choose the next token by its logits, `[vocab]`; see `Sampling`. First top_k limits the choice, then top_p and min_p.

    Returns:
        the token's id.
    """
    import torch

    if temperature == 0:
        return int(logits.argmax())
    # The highest logit is subtracted first, so that a very low temperature does not overflow.
    probabilities = torch.softmax((logits - logits.max()).double() / temperature, dim=-1)
    if 0 < top_k < len(probabilities):
        likely = probabilities.topk(top_k).indices
        kept = probabilities[likely] / probabilities[likely].sum()
        probabilities = torch.zeros_like(probabilities).index_put_((likely,), kept)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities[order[before >= top_p]] = 0
    if min_p > 0:
        probabilities[probabilities < min_p * probabilities.max()] = 0
    return int(torch.multinomial(probabilities, 1, generator=random))


def first_difference(first: Generation, second: Generation) -> int | None:
    """Index of the first generated token in which two generations differ; None if they are equal."""
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if same is None and len(first.token_ids) != len(second.token_ids):
        return min(len(first.token_ids), len(second.token_ids))
    return same
