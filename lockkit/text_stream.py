"""Streaming detokenization: tokens to text, piece by piece.

A piece has whole characters only, and never a part of a stop string. A character can take several
tokens, and some tokenizers decode a token differently at the start of a text than after another token.
So each new token is decoded together with a few tokens before it: those since the last position where
all characters were complete. The work per token does not grow with the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # tokenizers decode a part of a character to this
_PROMPT_TOKENS = 4  # last tokens of the prompt, decoded together with the first token of the answer


class TextStream:
    """The text of one answer.

    An incomplete character is held back until it is complete. Text that may be the beginning of a stop
    string is held back until it is clear that it is not.

    Args:
        decode: any tokenizer's function from token ids to text.
        prompt_ids: the prompt's tokens, which the answer continues.
        stops: strings that end the answer. They are not part of it.

    Attributes:
        stopped: a stop string was found. The answer is complete.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int], stops: Sequence[str] = ()):
        self._decode = decode
        self._ids = list(prompt_ids[-_PROMPT_TOKENS:])
        self._known_tokens = len(self._ids)  # first tokens of `_ids`, whose characters were complete before
        self._known_characters = len(decode(self._ids)) if self._ids else 0  # of the text of `_ids`
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, which may be empty.

        If `stopped` is true afterwards, the answer is what was returned so far.
        """
        new = self._complete_characters(token)
        if not self._stops or not new:
            return new
        text = self._held + new
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _complete_characters(self, token: int) -> str:
        """Add a token; return the characters that it completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        complete = text.rstrip(_INCOMPLETE)
        new = complete[self._known_characters :]
        self._known_characters = max(self._known_characters, len(complete))
        if new and complete == text:
            self._ids = self._ids[self._known_tokens :]
            self._known_tokens = len(self._ids)
            self._known_characters = len(self._decode(self._ids))
        return new

    def flush(self) -> str:
        """Return the text held back at the end of an answer. An incomplete character is left out."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
