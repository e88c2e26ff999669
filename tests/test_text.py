"""Splits of text are disjoint, and the errors for unusable text are clear."""

from __future__ import annotations

import random
import struct
from collections import Counter
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from lockkit.attack.tasks import load_task
from lockkit.errors import UsageError
from lockkit.lock.config import LockConfig
from lockkit.lock.data import load_data
from lockkit.models.load import DEMO, load_tokenizer
from lockkit.text import (
    FILLED_CHARACTERS,
    HELD_OUT_PERCENT,
    SPLITS,
    Document,
    documents,
    documents_by_split,
    file_documents,
    rows_sha256,
    split_of,
    start_tokens,
    stdlib_documents,
    token_blocks,
    with_splits,
)

OWN_SPLITS = ("distill", *HELD_OUT_PERCENT)
WORDS = [f"word{number}" for number in range(500)]


def prose(characters: int, seed: int = 0) -> str:
    """Paragraphs of random words, of random lengths."""
    chance, parts, length = random.Random(seed), [], 0
    while length < characters:
        parts.append(" ".join(chance.choices(WORDS, k=chance.randint(5, 200))))
        length += len(parts[-1]) + 2
    return "\n\n".join(parts)[:characters]


def splits_of_names(found: list[Document]) -> dict[str, str]:
    return {document.name: split for split, document in with_splits(found)}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def test_splits_of_the_standard_library_are_disjoint_and_complete():
    names = {split: {d.name for d in documents("stdlib", split)} for split in SPLITS}
    everything = [name for split in names.values() for name in split]
    assert max(Counter(everything).values()) == 1
    assert {d.name for d in stdlib_documents()} <= set(everything)


def test_splits_never_change():
    # The bundled model was trained on `train`: a new rule would leak its text into evaluation.
    expected = {"json.decoder": "train", "argparse": "distill", "ast": "validate", "shutil": "evaluate"}
    found = {name: split_of(name) for name in expected}
    assert found == expected


def test_modules_of_tests_are_in_the_train_split_only():
    for split in set(SPLITS) - {"train"}:
        assert not [d.name for d in documents("stdlib", split) if d.name.startswith("test.")]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=3000), min_size=1)
)
def test_a_file_is_cut_into_documents_without_losing_text(tmp_path_factory, paragraphs):
    text = "\n\n".join(paragraphs)
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    if not text.strip():
        with pytest.raises(UsageError, match="holds no text"):
            list(file_documents(file))
        return
    found = "".join(d.text for d in file_documents(file))
    assert text.startswith(found) and not text[len(found) :].strip()


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_long_text_becomes_many_documents_with_any_separator(tmp_path, separator):
    (tmp_path / "a.txt").write_text(separator.join(f"sentence number {i}" for i in range(5_000)))
    found = list(file_documents(tmp_path / "a.txt"))
    assert len(found) > 20
    assert {split_of(document.name) for document in found} >= {"train", "distill", "evaluate"}


def test_a_passage_keeps_its_name_in_another_file(tmp_path):
    text = "\n\n".join(f"paragraph {i} " * 50 for i in range(100))
    (tmp_path / "folder").mkdir()
    (tmp_path / "corpus.txt").write_text(text)
    (tmp_path / "folder" / "renamed.txt").write_text(text)
    assert list(file_documents(tmp_path / "corpus.txt")) == list(file_documents(tmp_path / "folder"))


def test_blocks_hold_the_documents_tokens_in_order(tokenizer):
    found = list(documents("stdlib", "validate"))[:3]
    blocks = token_blocks(tokenizer, iter(found), 32, None)
    ids = []
    for document in found:
        ids += [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
    assert blocks.flatten().tolist() == ids[: len(ids) // 32 * 32]


@pytest.fixture
def tokenizer_with_start():
    """The bundled tokenizer, changed to put `<bos>` before every text and `<end>` after it."""
    tokenizer = load_tokenizer(DEMO)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bos>", "<end>"]})
    bos, end = tokenizer.convert_tokens_to_ids(["<bos>", "<end>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <end>", special_tokens=[("<bos>", bos), ("<end>", end)]
    )
    return tokenizer


@pytest.mark.parametrize("block", [8, 32, 100])
def test_every_row_and_every_document_starts_as_the_tokenizer_starts_a_text(tokenizer_with_start, block):
    tokenizer = tokenizer_with_start
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    found = [Document(f"{i}", f"def function_{i}(x):\n    return x + {i}\n" * (i % 4 + 1)) for i in range(40)]
    rows = token_blocks(tokenizer, iter(found), block, None)
    assert rows.shape[0] > 5 and (rows[:, 0] == bos).all()
    assert not ((rows[:, 1:] == bos) & (rows[:, :-1] == bos)).any()
    text = tokenizer.decode(rows.flatten()).replace("<bos>", "").split(tokenizer.eos_token)
    assert text[:-1] == [document.text for document in found][: len(text) - 1]
    every_start = sum(tokenizer.decode(row).count("<bos>def function") for row in rows)
    assert every_start >= len(text) - 1


def test_a_tokenizer_without_start_tokens_has_none(tokenizer):
    assert start_tokens(tokenizer) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"  \n\n ", "holds no text"), (b"\xff\xfe\x00", "not UTF-16"), (b"caf\xe9", "not UTF-8")],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(file_documents(file))


def test_the_error_for_too_short_text_says_how_much_is_needed(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("three short words")
    with pytest.raises(UsageError, match=r"only \d+ tokens in 1 document, at least 64 are needed"):
        token_blocks(tokenizer, file_documents(tmp_path / "a.txt"), 64, None)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no text file"):
        list(file_documents(tmp_path))


def test_held_out_shares_of_user_text_are_3_10_and_10_percent():
    assert HELD_OUT_PERCENT == {"validate": 3, "evaluate": 10, "finetune": 10}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9_000)), min_size=1, max_size=150))
def test_splits_of_user_text_are_disjoint_and_have_their_shares(drawn):
    """For documents of any number and length, some of them twice."""
    found = [Document(f"{number} {length}", "x" * length) for number, length in drawn]
    assigned = list(with_splits(found))
    assert [document for _, document in assigned] == found
    splits = {document.name: split for split, document in assigned}
    assert {(document.name, split) for split, document in assigned} == set(splits.items())
    assert set(splits.values()) <= set(OWN_SPLITS)
    for name, split in splits.items():  # documents held out by their hash do not move
        assert split_of(name) == split or split_of(name) in ("train", "distill")
    shuffled = random.Random(1).sample(found, len(found))
    assert splits_of_names(shuffled) == splits

    total = sum(len(document.text) for document in found)
    enough = sum(split == "distill" for split in splits.values()) > 1
    for held_out, percent in HELD_OUT_PERCENT.items():
        has = sum(len(document.text) for split, document in assigned if split == held_out)
        moved = [name for name, split in splits.items() if split == held_out and split_of(name) != held_out]
        if enough:
            assert 100 * has >= percent * total
        if moved:
            largest = max(sum(len(d.text) for d in found if d.name == name) for name in moved)
            assert 100 * (has - largest) < percent * total


@settings(deadline=None, max_examples=10)
@given(st.integers(40_000, 400_000), st.integers(0, 1000))
def test_every_command_finds_the_same_splits_of_a_file(tmp_path_factory, characters, seed):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text(prose(characters, seed))
    names = {split: [d.name for d in documents(str(file), split)] for split in OWN_SPLITS}
    assert Counter(name for split in names.values() for name in split) == Counter(d.name for d in file_documents(file))
    total = sum(len(document.text) for document in file_documents(file))
    for split, percent in HELD_OUT_PERCENT.items():
        assert 100 * sum(len(d.text) for d in documents(str(file), split)) >= percent * total


@pytest.mark.parametrize("passages", [30, 100, 250, 1000])
def test_a_longer_text_moves_few_passages(passages):
    """If the text grows by a tenth, at most a twentieth of the passages change their split."""
    found = [Document(f"passage {number}", "x" * 4_000) for number in range(passages + passages // 10)]
    before, after = splits_of_names(found[:passages]), splits_of_names(found)
    assert sum(after[name] != split for name, split in before.items()) <= passages // 20


def test_only_the_start_of_a_long_source_is_read_before_its_first_document():
    read = 0

    def rows():
        nonlocal read
        for number in range(1_000):
            read += 1
            yield Document(f"row {number}", "x" * 100_000)

    found = with_splits(rows())
    next(found)
    assert read == FILLED_CHARACTERS // 100_000
    later = [(split, document.name) for split, document in found][read:]
    assert all(split == split_of(name) or split == "distill" for split, name in later)
    assert all(split_of(name) in ("train", "distill") for split, name in later if split == "distill")


@pytest.mark.parametrize("characters", [230_000, 1_100_000])
def test_a_short_text_is_enough_for_a_small_lock(tokenizer, tmp_path, characters):
    file = tmp_path / "corpus.txt"
    file.write_text(prose(characters))
    small = LockConfig(depth=4, tokens=2_048, end_to_end_tokens=0, block_tokens=64, validation_tokens=256)
    data = load_data(small, str(file), SimpleNamespace(max_position_embeddings=256, vocab_size=4096), tokenizer)
    assert [rows.shape for rows in (data.train, data.validation, data.evaluation)] == [(32, 64), (4, 64), (4, 64)]
    task = load_task(
        str(file), tokenizer, block_tokens=64, train_tokens=256, held_out_tokens=128, distilled_on=str(file)
    )
    assert task.left_out == 0 and len(task.train) == 4 and len(task.held_out) == 2


def test_the_error_for_too_short_text_says_what_each_split_has_and_needs(tokenizer, tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text(prose(60_000))
    has = {}
    for split in ("distill", "validate", "evaluate"):
        has[split] = sum(len(tokenizer(d.text)["input_ids"]) + 1 for d in documents(str(file), split))
    config = LockConfig(tokens=160_000, end_to_end_tokens=0)
    with pytest.raises(UsageError) as refused:
        load_data(config, str(file), SimpleNamespace(max_position_embeddings=256, vocab_size=4096), tokenizer)
    assert str(refused.value) == (
        f"{file} is too short: distill has {has['distill']:,} tokens and needs 10,000 (--tokens 160,000 in 16 "
        f"passes), validate has {has['validate']:,} and needs 8,192, evaluate has {has['evaluate']:,} and needs 8,192; "
        f"it has {len(list(file_documents(file)))} documents (passages or rows), each in one split: "
        "give more text with --data, or lower --validation-tokens"
    )
    with pytest.raises(UsageError, match=r"distill has 4,096 or more tokens and needs 256"):
        small = LockConfig(tokens=4_096, end_to_end_tokens=0)
        load_data(small, str(file), SimpleNamespace(max_position_embeddings=256, vocab_size=4096), tokenizer)
    with pytest.raises(UsageError, match=r"give more text with --data, or lower --tokens and --validation-tokens$"):
        load_data(
            LockConfig(tokens=10**7),
            str(file),
            SimpleNamespace(max_position_embeddings=256, vocab_size=4096),
            tokenizer,
        )


def test_reading_all_splits_at_once_gives_the_same_rows(tokenizer):
    config = LockConfig(tokens=4_096, end_to_end_tokens=0, validation_tokens=1_000, block_tokens=128)
    data = load_data(config, "stdlib", SimpleNamespace(max_position_embeddings=256, vocab_size=4096), tokenizer)
    for rows, split, tokens in (
        (data.train, "distill", 4_096),
        (data.validation, "validate", 1_000),
        (data.evaluation, "evaluate", 1_000),
    ):
        assert torch.equal(rows, token_blocks(tokenizer, documents("stdlib", split), 128, tokens))


def test_the_hash_of_rows_is_over_little_endian_integers():
    rows = torch.tensor([[1, 2], [3, 70_000]])
    expected = sha256(struct.pack("<4q", 1, 2, 3, 70_000)).hexdigest()
    assert rows_sha256(rows) == rows_sha256(rows.int()) == rows_sha256(rows[:1], rows[1:]) == expected


def test_user_text_has_no_train_split(tmp_path):
    (tmp_path / "a.txt").write_text(prose(50_000))
    assert not list(documents(str(tmp_path / "a.txt"), "train"))
    assert {split for split, _ in documents_by_split(str(tmp_path / "a.txt"))} == set(OWN_SPLITS)
