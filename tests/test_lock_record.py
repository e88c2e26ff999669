"""What verify and audits read of a lock's record."""

from __future__ import annotations

import pytest

from lockkit.errors import UsageError
from lockkit.files import LOCK_RECORD, write_json
from lockkit.models.lock_record import LockRecord, read_lock_record


def of(**recipe) -> LockRecord:
    return LockRecord({"recipe": recipe})


def test_the_source_of_a_lock(tmp_path, monkeypatch):
    for record in (LockRecord({}), LockRecord({"recipe": None}), of(data="self"), of(data="auto"), of(data="stdlib")):
        assert record.source("MODEL") == "stdlib"
    assert of(data="self").distilled_on is None and of(data="stdlib").distilled_on == "stdlib"
    assert of(data="owner/dataset").source("MODEL") == "owner/dataset"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"MODEL was distilled on 'corpus.txt', which does not exist here: .* --data"):
        of(data="corpus.txt").source("MODEL")
    (tmp_path / "corpus.txt").touch()
    assert of(data="corpus.txt").source("MODEL") == "corpus.txt"


def test_the_record_of_a_folder(tmp_path):
    assert read_lock_record(tmp_path, "LOCKED") == LockRecord({}) and LockRecord({}).tokens == 0
    write_json(tmp_path / LOCK_RECORD, {"recipe": {"tokens": 20, "end_to_end_tokens": 3}})
    assert read_lock_record(tmp_path, "LOCKED").tokens == 23
    (tmp_path / LOCK_RECORD).write_text("[")
    with pytest.raises(UsageError, match="change LOCKED"):
        read_lock_record(tmp_path, "LOCKED")
