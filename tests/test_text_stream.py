"""Text in pieces: together they are the whole text, with tokenizers of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import ByT5Tokenizer

from lockkit.models.load import DEMO
from lockkit.text_stream import TextStream

ALPHABET = "ab☃ß👋🏽 "


def sentence_pieces() -> Tokenizer:
    """As Llama 2 has it: a space before the first word, and bytes for what is not in the vocabulary."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ß"]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL, SENTENCE_PIECES, IN_PYTHON = (
    Tokenizer.from_file(str(DEMO / "tokenizer.json")),
    sentence_pieces(),
    ByT5Tokenizer(),
)
ENCODINGS = {
    "byte level": (lambda text: BYTE_LEVEL.encode(text).ids, BYTE_LEVEL.decode),
    "sentence pieces": (lambda text: SENTENCE_PIECES.encode(text).ids, SENTENCE_PIECES.decode),
    "in Python, no Rust": (lambda text: IN_PYTHON(text, add_special_tokens=False)["input_ids"], IN_PYTHON.decode),
}


def pieces_of(decode, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(decode, prompt)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("kind", ENCODINGS)
@settings(deadline=None, max_examples=150)
@given(prompt=st.text("ab ", max_size=6), text=st.text(ALPHABET, max_size=20))
def test_pieces_make_up_the_text(kind, prompt, text):
    encode, decode = ENCODINGS[kind]
    before, ids = encode(prompt), encode(prompt + text)
    if ids[: len(before)] != before:  # the text changes how the prompt is cut
        return
    pieces = pieces_of(decode, before, ids[len(before) :])
    assert "".join(pieces) == decode(ids)[len(decode(before)) :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 4095), min_size=1, max_size=40))
def test_broken_characters_are_shown_once_it_is_clear_that_they_are_broken(ids):
    """Random tokens, most of which are no whole characters."""
    prompt = BYTE_LEVEL.encode("def").ids
    whole = BYTE_LEVEL.decode(prompt + ids).removeprefix("def")
    assert "".join(pieces_of(BYTE_LEVEL.decode, prompt, ids)) == whole.rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_part_of_a_character_at_the_end_is_left_out(kind):
    encode, decode = ENCODINGS[kind]
    before, ids = encode("a"), encode("a b☃")
    for cut in (1, 2):
        assert "".join(pieces_of(decode, before, ids[len(before) : -cut])) == " b"


def test_the_work_for_a_token_does_not_grow_with_the_text():
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTE_LEVEL.decode(ids)

    ids = BYTE_LEVEL.encode("größe ☃ " * 200).ids
    assert "".join(pieces_of(decode, BYTE_LEVEL.encode("def f").ids, ids)) == "größe ☃ " * 200
    assert longest < 10
