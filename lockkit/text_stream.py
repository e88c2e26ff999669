"""Streaming detokenization: tokens to text, piece by piece.

A piece has whole characters only, and never a part of a stop string. A character can take several
tokens, and some tokenizers decode a token differently at the start of a text than after another token.
So each new token is decoded together with a few tokens before it. The work per token does not grow
with the length of the text.

The pieces together are the text that the tokenizer decodes from all tokens, without the prompt's text. There
are two differences, both for bytes that are no valid UTF-8:

* An incomplete character at the end is left out.
* A tokenizer with byte fallback (Llama 2, Gemma) decodes a run of byte tokens to U+FFFD, one for each byte, if any
  byte of the run is invalid. Here, each invalid part becomes one U+FFFD, and the valid characters of the run stay,
  since they were returned before. This is what UTF-8 decoders do, and other tokenizers.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence

_INVALID = "\N{REPLACEMENT CHARACTER}"  # tokenizers decode a part of a character to this
_CONTEXT_TOKENS = 4  # last tokens before a token, decoded together with it
_INCOMPLETE_BYTES = 3  # of UTF-8, at most: a character has four
_HELD_TOKENS = 16  # more tokens than this are no incomplete character

Decode = Callable[[list[int]], str]


def byte_tokens(vocabulary: Mapping[str, int], decode: Decode) -> dict[int, int]:
    """The tokens that stand for one byte each, in a tokenizer with byte fallback: token id -> byte.

    Args:
        vocabulary: token -> id, as from a tokenizer's `get_vocab()`.
        decode: the tokenizer's function from token ids to text.

    Returns:
        an empty dictionary if the tokenizer has no byte fallback.
    """
    found = {vocabulary[name]: byte for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary}
    above_ascii = next((token for token, byte in found.items() if byte >= 0x80), None)
    return found if above_ascii is not None and decode([above_ascii]) == _INVALID else {}


class TextStream:
    """The text of one answer.

    An incomplete character is held back until it is complete, or until it is clear that it is invalid. Text that
    may be the beginning of a stop string is held back until it is clear that it is not.

    If the prompt ends inside a character, the answer begins with that character if its tokens complete it. Otherwise
    the answer begins with the text after it.

    Args:
        decode: any tokenizer's function from token ids to text.
        prompt_ids: the prompt's tokens, which the answer continues.
        stops: strings that end the answer. They are not part of it.
        byte_of: see `byte_tokens`.

    Attributes:
        stopped: a stop string was found. The answer is complete.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int],
        stops: Sequence[str] = (),
        byte_of: Mapping[int, int] | None = None,
    ):
        context = _context(decode, prompt_ids)
        self._characters = _ByteFallback(decode, context, byte_of) if byte_of else _Window(decode, context)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, which may be empty.

        If `stopped` is true afterwards, the answer is what was returned so far.
        """
        new = self._characters.push(token)
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

    def flush(self) -> str:
        """Return the text held back at the end of an answer. An incomplete character is left out."""
        text, self._held = self._held, ""
        return text


def _context(decode: Decode, prompt_ids: Sequence[int]) -> list[int]:
    """The prompt's last tokens: a few, or more if those have no text, for instance special tokens."""
    count = _CONTEXT_TOKENS
    while count < len(prompt_ids) and not decode(list(prompt_ids[-count:])):
        count *= 4
    return list(prompt_ids[-count:])


class _Window:
    """Characters of any tokenizer, by its decoding of a few tokens before the new one and the new one.

    The tokens before are those since the last position where all characters were complete.
    """

    def __init__(self, decode: Decode, context: list[int]):
        self._decode, self._ids = decode, context
        self._known_tokens = len(context)  # first tokens of `_ids`, whose characters were complete before
        self._known = decode(context) if context else ""  # text of `_ids` that was returned or is the prompt's

    def push(self, token: int) -> str:
        """Add a token; return the characters that it completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        complete = _complete(text)
        # The text known before differs from the new text where the token completes a character of the prompt.
        new = complete[_common_length(self._known, complete) :]
        if new:
            self._known = complete
        if new and complete == text:
            self._ids = self._ids[self._known_tokens :]
            self._known_tokens, self._known = len(self._ids), self._decode(self._ids)
        elif len(self._ids) > self._known_tokens + _HELD_TOKENS:
            self._ids = self._ids[-_HELD_TOKENS // 2 :]
            self._known_tokens, self._known = len(self._ids), _complete(self._decode(self._ids))
        return new


def _complete(text: str) -> str:
    """Without what may be an incomplete character at the end. Tokenizers write one U+FFFD for it, or one per byte."""
    held = len(text) - len(text.rstrip(_INVALID))
    return text[: len(text) - min(held, _INCOMPLETE_BYTES)]


class _ByteFallback:
    """Characters of a tokenizer with byte fallback.

    A run of byte tokens goes through a UTF-8 decoder. Every other token has whole characters.
    """

    def __init__(self, decode: Decode, context: list[int], byte_of: Mapping[int, int]):
        self._decode, self._byte_of = decode, byte_of
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._prompt_is_cut = False  # the prompt ends inside a character
        self._set_context([])
        for token in context:
            self.push(token)
        self._prompt_is_cut = bool(self._bytes.getstate()[0])

    def _set_context(self, ids: list[int]) -> None:
        self._context, self._context_length = ids, len(self._decode(ids)) if ids else 0

    def push(self, token: int) -> str:
        """Add a token; return the characters that it completes."""
        if token in self._byte_of:
            new = self._bytes.decode(bytes([self._byte_of[token]]))
        else:
            new = self._decode([*self._context, token])[self._context_length :]
            if not new:  # a special token, which does not end a character; or a space that begins the text
                if not self._context_length:
                    self._set_context([*self._context, token])
                return ""
            new = self._bytes.decode(b"", True) + new
        self._set_context([*self._context, token][-_CONTEXT_TOKENS:])
        if new and self._prompt_is_cut:  # U+FFFD stands for the character that the prompt began
            new, self._prompt_is_cut = new.removeprefix(_INVALID), False
        return new


def _common_length(first: str, second: str) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
