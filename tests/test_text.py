"""Text never serves two purposes, and bad text is refused in words a user understands."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockkit.errors import UsageError
from lockkit.models.load import DEMO, load_tokenizer
from lockkit.text import SPLITS, documents, file_documents, split_of, stdlib_documents, token_blocks


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


def test_tests_are_never_used_to_measure():
    for split in set(SPLITS) - {"train"}:
        assert not [d.name for d in documents("stdlib", split) if d.name.startswith("test.")]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=3000), min_size=1))
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
def test_long_text_becomes_many_documents_however_it_is_laid_out(tmp_path, separator):
    (tmp_path / "a.txt").write_text(separator.join(f"sentence number {i}" for i in range(5_000)))
    found = list(file_documents(tmp_path / "a.txt"))
    assert len(found) > 20
    assert {split_of(document.name) for document in found} >= {"train", "distill", "evaluate"}


def test_a_passage_keeps_its_split_under_another_name(tmp_path):
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


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"  \n\n ", "holds no text"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(file_documents(file))


def test_too_short_a_text_says_how_much_is_needed(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("three short words")
    with pytest.raises(UsageError, match=r"only \d+ tokens, at least 64 are needed"):
        token_blocks(tokenizer, file_documents(tmp_path / "a.txt"), 64, None)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no text file"):
        list(file_documents(tmp_path))
