"""Tokens to text, piece by piece: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer


class TextStream:
    """The text of one answer.

    Bytes of a character wait until the character is whole (`tokenizers`' own `DecodeStream`);
    text that may be the beginning of a stop string waits until it is clear that it is not.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt; some tokenizers drop the space before a text's first token, so the
            answer is decoded after the end of the prompt.
        stops: texts that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str] = ()):
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt_ids[-4:]), skip_special_tokens=True)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token; return the text that is certain now, "" if none is.

        Once `stopped` is true, a stop string has come: what was returned so far is the answer.
        """
        new = self._stream.step(self._tokenizer, token)
        if new is None:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """The text still held back, at the end of an answer; half a character is left out."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
