"""Log probabilities of an answer's tokens, in the two forms of OpenAI's API.

They are those of the model: before temperature, limits of sampling and penalties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockkit.serve.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the text of a token that is a part of a character


@dataclass(frozen=True)
class _Token:
    """A token of an answer, with the most likely ones in its place.

    Attributes:
        begins: number of characters of the answer before it.
    """

    text: str
    logprob: float
    top: list[tuple[str, float]]
    begins: int


class LogprobRecorder:
    """Collects the tokens of one answer. The engine's thread adds them, the event loop takes them.

    Args:
        tokenizer: of the model.
        top: number of most likely tokens for each place.
        ends: tokens that end the answer; they are no part of it.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, ends: frozenset[int]):
        self._tokenizer, self._top, self._ends = tokenizer, top, ends
        self._tokens: list[_Token] = []
        self._characters = 0  # of all tokens so far
        self._taken = 0  # tokens

    def add(self, logits: torch.Tensor, token: int) -> None:
        """Record a token that was chosen by its logits, `[vocab]`."""
        import torch

        if token in self._ends:
            return
        values = torch.log_softmax(logits.double(), dim=-1)
        best = values.topk(min(self._top, len(values)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [(self._text(index), value) for index, value in pairs]
        text = self._text(token)
        self._tokens.append(_Token(text, float(values[token]), top, self._characters))
        self._characters += 0 if _INCOMPLETE in text else len(text)

    def _text(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        piece = self._tokenizer.id_to_token(token) or ""
        # SentencePiece's decoder drops the space before the first word of a text.
        return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text

    def _take(self, characters: int | None) -> list[_Token]:
        """The tokens that were not taken yet and begin within the first `characters` of the answer; None for all."""
        tokens = self._tokens[self._taken :]
        taken = [token for token in tokens if characters is None or token.begins < characters]
        self._taken += len(taken)
        return taken

    def completion(self, characters: int | None) -> CompletionLogprobs:
        """The next tokens in the form of /v1/completions, up to this number of characters of the answer."""
        tokens = self._take(characters)
        return CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[dict(token.top) for token in tokens],
            text_offset=[token.begins for token in tokens],
        )

    def chat(self, characters: int | None) -> ChatLogprobs:
        """The next tokens in the form of /v1/chat/completions, up to this number of characters of the answer."""
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **_plain(token.text, token.logprob),
                    top_logprobs=[TopLogprob(**_plain(text, value)) for text, value in token.top],
                )
                for token in self._take(characters)
            ]
        )


def _plain(text: str, logprob: float) -> dict:
    return {"token": text, "logprob": logprob, "bytes": None if _INCOMPLETE in text else list(text.encode())}
