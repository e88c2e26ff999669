"""Text in pieces: together they are the whole text, with tokenizers of every kind."""

from __future__ import annotations

import codecs
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import ByT5Tokenizer

from lockkit.models.load import DEMO
from lockkit.text_stream import TextStream, byte_tokens

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
    tokenizer.add_special_tokens(["<pad>"])
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


BYTE_OF = byte_tokens(SENTENCE_PIECES.get_vocab(), SENTENCE_PIECES.decode)
PAD = SENTENCE_PIECES.token_to_id("<pad>")
INVALID = "\N{REPLACEMENT CHARACTER}"


def pieces_of(decode, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(decode, prompt, byte_of=BYTE_OF if decode == SENTENCE_PIECES.decode else None)
    return [*(stream.push(token) for token in ids), stream.flush()]


def answer(before: str, whole: str) -> str:
    """The text after the prompt's. If the answer completes a character of the prompt, it begins with that."""
    return next(whole[end:] for end in range(len(before), -1, -1) if whole.startswith(before[:end]))


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
    assert not any(INVALID in piece for piece in pieces)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 4095), min_size=1, max_size=40))
def test_broken_characters_are_shown_once_it_is_clear_that_they_are_broken(ids):
    """Random tokens, most of which are no whole characters."""
    prompt = BYTE_LEVEL.encode("def").ids
    whole = BYTE_LEVEL.decode(prompt + ids).removeprefix("def")
    found = "".join(pieces_of(BYTE_LEVEL.decode, prompt, ids))
    assert whole.startswith(found) and whole[len(found) :] in (INVALID * count for count in range(4))


@settings(deadline=None, max_examples=100)
@given(text=st.text("ab☃ß👋🏽", min_size=1, max_size=12), kind=st.sampled_from(["byte level", "sentence pieces"]))
def test_an_answer_begins_after_a_prompt_that_ends_inside_a_character(kind, text):
    """Every position between two tokens, with the text continued, or with another text after the cut character."""
    encode, decode = ENCODINGS[kind]
    ids, other = encode("a" + text), encode("a")[-1]
    for cut in range(len(encode("a")), len(ids)):
        found = "".join(pieces_of(decode, ids[:cut], ids[cut:]))
        assert found == text[-len(found) :] and found
        assert "".join(pieces_of(decode, ids[:cut], [other, other])) == "aa"
        before = decode(ids[:cut])
        if not before.endswith(INVALID):
            assert before + found == "a" + text


@pytest.mark.parametrize("strips", [True, False])
def test_bytes_that_are_no_valid_utf8_become_replacement_characters(strips):
    """Random byte tokens of a tokenizer with byte fallback, against Python's UTF-8 decoder.

    Llama 2's decoder removes the space that its normalizer adds, Gemma's has none to remove.
    """
    chance, tokenizer = random.Random(5), sentence_pieces()
    if not strips:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = {token: bytes([byte]) for token, byte in BYTE_OF.items()}
    texts |= {SENTENCE_PIECES.token_to_id(token): token.encode() for token in ("a", "b", "ß")} | {PAD: b""}
    starts = [bytes([byte]) for byte in (0xC3, 0xE2, 0xF0, 0xED, 0xFF)]
    common = [token for token, content in texts.items() if content in (*starts, b"\x98", b"\x83", b"\x9f", b"a", b"")]

    def draw(longest: int) -> list[int]:
        population = common if chance.random() < 0.7 else [token for token in texts if texts[token] != b" "]
        return chance.choices(population, k=chance.randint(0, longest))

    def as_utf8(ids: list[int]) -> str:
        return b"".join(texts[token] for token in ids).decode("utf-8", "replace")

    for _ in range(2000):
        prompt, ids = [SENTENCE_PIECES.token_to_id("a"), *draw(3)], draw(12)
        incomplete = codecs.getincrementaldecoder("utf-8")("replace")
        incomplete.decode(b"".join(texts[token] for token in prompt + ids))
        whole = as_utf8(prompt + ids)
        expected = answer(as_utf8(prompt), whole[: -1 if incomplete.getstate()[0] else None])
        stream = TextStream(tokenizer.decode, prompt, byte_of=byte_tokens(tokenizer.get_vocab(), tokenizer.decode))
        assert "".join(map(stream.push, ids)) + stream.flush() == expected, (prompt, ids)


def test_a_complete_character_does_not_wait_for_the_end_of_its_run_of_bytes():
    ids = SENTENCE_PIECES.encode("☃☃").ids[1:]
    pieces = pieces_of(SENTENCE_PIECES.decode, SENTENCE_PIECES.encode("a").ids, ids)
    assert pieces == ["", "", "☃", "", "", "☃", ""]


def test_only_tokens_that_decode_to_bytes_are_byte_tokens():
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert byte_tokens(BYTE_LEVEL.get_vocab(), BYTE_LEVEL.decode) == {}
    plain = sentence_pieces()
    plain.decoder = decoders.Fuse()  # "<0xFF>" is text
    assert byte_tokens(plain.get_vocab(), plain.decode) == {}


def test_a_prompt_that_ends_in_special_tokens_is_not_the_start_of_the_text():
    """Sentence pieces lose the space before the first word of a text. The answer's first word is not that."""
    prompt, word = [*SENTENCE_PIECES.encode("a").ids, *[PAD] * 6], SENTENCE_PIECES.encode("b").ids
    assert "".join(pieces_of(SENTENCE_PIECES.decode, prompt, [PAD, *word])) == " b"


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_part_of_a_character_at_the_end_is_left_out(kind):
    encode, decode = ENCODINGS[kind]
    before, ids = encode("a"), encode("a b☃")
    for cut in (1, 2):
        assert "".join(pieces_of(decode, before, ids[len(before) : -cut])) == " b"


@pytest.mark.parametrize("kind", ["characters", "parts of characters"])
def test_the_work_for_a_token_does_not_grow_with_the_text(kind):
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTE_LEVEL.decode(ids)

    ids, expected = BYTE_LEVEL.encode("größe ☃ " * 200).ids, "größe ☃ " * 200
    if kind == "parts of characters":
        ids, expected = BYTE_LEVEL.encode("🏽").ids[:2] * 200, INVALID * 197  # the last ones may be incomplete
        assert BYTE_LEVEL.decode(ids) == INVALID * 200
    assert "".join(pieces_of(decode, BYTE_LEVEL.encode("def f").ids, ids)) == expected
    assert longest < 32
