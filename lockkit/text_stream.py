"""Tokens to text, piece by piece: whole characters only, and never a part of a stop string.

A character can take several tokens, and some tokenizers write a token differently at the start of a
text than after another. So each new token is decoded together with a few tokens before it: those
since the last place where all characters were whole. The work per token does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a part of a character
PROMPT_TOKENS = 4  # of the prompt's end, decoded with the first token


class TextStream:
    """The text of one answer.

    Bytes of a character wait until the character is whole. Text that may be the beginning of a stop
    string waits until it is clear that it is not.

    Args:
        decode: from token ids to text, of any tokenizer.
        prompt_ids: the prompt, which the answer continues.
        stops: texts that end the answer; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int], stops: Sequence[str] = ()):
        self._decode = decode
        self._ids = list(prompt_ids[-PROMPT_TOKENS:])
        self._given_tokens = len(self._ids)  # of `_ids`, whose text was given away
        self._given_characters = len(decode(self._ids)) if self._ids else 0  # of the text of `_ids`
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token; return the text that is certain now, "" if none is.

        Once `stopped` is true, a stop string has come: what was returned so far is the answer.
        """
        new = self._whole_characters(token)
        if not self._stops or not new:
            return new
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _whole_characters(self, token: int) -> str:
        """The characters that are whole with one more token, and were not before."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(UNFINISHED)
        new = whole[self._given_characters :]
        self._given_characters = max(self._given_characters, len(whole))
        if new and whole == text:
            self._ids = self._ids[self._given_tokens :]
            self._given_tokens = len(self._ids)
            self._given_characters = len(self._decode(self._ids))
        return new

    def flush(self) -> str:
        """The text still held back at the end of an answer. A part of a character is left out."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
