"""Verification: figures compared with independent references, and gates that fail when they should."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import add_token, save_tiny, tiny_model

from lockkit.errors import UsageError
from lockkit.export.config import ExportConfig
from lockkit.export.run import export_model
from lockkit.files import EXPORT_MANIFEST, LOCK_RECORD, sha256_of_file
from lockkit.measure.records import MeasuredText
from lockkit.progress import NoProgress
from lockkit.runners import OnnxRunner, TorchRunner
from lockkit.targets import LOCK_GATES, Precision
from lockkit.verify import VerifyConfig, VerifyResult, parity, verify_export
from lockkit.verify.figures import GATES, Gates, judge
from lockkit.verify.run import score, with_generation

SMALL = {"tokens": 512, "block_tokens": 64, "prompts": 2, "new_tokens": 8}
OPTIONS = ["--tokens", 512, "--block-tokens", 64, "--prompts", 2, "--new-tokens", 8]
# For the locks of the fixtures, which are not trained to be faithful.
LOCK_GATES_OFF = ["--max-perplexity-ratio", 100, "--max-lock-kl", "inf", "--min-lock-top1", 0]
MODES = ["prefill", "cache_tokens", "cache_chunk", "padded_batch", "last_position"]


@pytest.fixture(scope="module")
def onnx_of(tmp_path_factory):
    """A function from a model folder to the folder of its fp32 export."""
    made: dict[Path, Path] = {}

    def export(model: Path) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp("export") / "onnx"
            export_model(str(model), made[model], ExportConfig())
        return made[model]

    return export


def rows_of(count: int, block: int, vocab: int = 4096, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (count, block), generator=torch.Generator().manual_seed(seed))


# --- comparisons, with PyTorch on both sides ------------------------------------------------------


class FakeSession:
    """A PyTorch model with the interface of an export session, and with one fault. Batches are padded on the right."""

    def __init__(self, model, fault: str = "", last_only: bool = False):
        self.model, self.fault, self.last_only = model, fault, last_only
        self.steps_in_place = False

    @torch.no_grad()
    def forward(self, ids, mask=None, cache=None):
        past = 0 if cache is None else cache[1].shape[1]
        if mask is None or self.fault == "ignores the mask":
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
        values = None if cache is None else cache[0]
        if self.fault == "forgets the cache" and past:
            values, mask = None, mask[:, past:]
        if self.fault == "positions restart" and past:
            positions = positions - past
        output = self.model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            past_key_values=values,
            use_cache=True,
        )
        if self.fault == "chunks are wrong" and past and ids.shape[1] > 1:
            output.logits[:, 0] += 1e-2 * torch.arange(output.logits.shape[-1]) / 100
        seen, logits = np.zeros((len(ids), past + ids.shape[1])), output.logits.float().numpy()
        if self.last_only:
            last = mask[:, -ids.shape[1] :].sum(1) - 1
            last = last * 0 - 1 if self.fault == "takes the last column" else last
            logits = logits[np.arange(len(ids)), last][:, None]
        return logits, (output.past_key_values, seen)


def measured_with(other, model, fault: str = ""):
    torch.manual_seed(0)
    rows, config, progress = rows_of(6, 48), VerifyConfig(**SMALL), NoProgress()
    reference, text = TorchRunner(model), MeasuredText.of(rows, "random", "evaluate")
    candidate, generating = (OnnxRunner(FakeSession(other, fault, last_only)) for last_only in (False, True))
    scored = score(candidate, {"original": reference}, "original", rows, config, progress)
    found = with_generation(scored, generating, reference, rows, text, config, progress)
    return found, judge(config.limits(Precision.fp32), found)


def test_the_same_model_has_no_divergence():
    model = tiny_model("qwen3")
    found, outcomes = measured_with(model, model)
    assert [mode.mode for mode in found.parity] == MODES
    for mode in found.parity:
        assert mode.kl_divergence < 1e-10 and mode.top1_agreement == 1 and mode.max_difference < 1e-3
    assert found.continuations.identical == found.continuations.identical_or_tied == 1
    assert found.perplexity.onnx_over_original == pytest.approx(1, abs=1e-6) and found.perplexity.locked is None
    assert found.perplexity.predictions == 6 * 47
    assert all(outcome.passed for outcome in outcomes)
    assert [mode.tokens for mode in found.parity[:3]] == [6 * 47, 4 * 24, 4 * 24]
    assert found.parity[4].tokens == 6 * 2


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("forgets the cache", {"cache_tokens", "cache_chunk", "padded_batch", "last_position"}),
        ("positions restart", {"cache_tokens", "cache_chunk", "padded_batch", "last_position"}),
        ("chunks are wrong", {"cache_chunk"}),
        ("ignores the mask", {"padded_batch", "last_position"}),
        ("takes the last column", {"last_position"}),
    ],
)
def test_a_fault_in_one_mode_is_detected_in_that_mode(fault, caught_by):
    model = tiny_model("qwen3")
    found, outcomes = measured_with(model, model, fault)
    failed = {outcome.figure for outcome in outcomes if not outcome.passed}
    assert failed & set(MODES) == caught_by
    assert found.parity[0].kl_divergence < 1e-10  # prefill alone does not detect it


def test_a_large_vocabulary_leaves_two_rows_to_check(monkeypatch):
    monkeypatch.setattr(parity, "_BATCH_LOGITS", 48 * 4096)  # of one row
    model = tiny_model("qwen3")
    found, outcomes = measured_with(model, model, "ignores the mask")
    assert [mode.tokens for mode in found.parity[:3]] == [6 * 47, 2 * 12, 2 * 12]
    failed = {outcome.figure for outcome in outcomes if not outcome.passed}
    assert failed & set(MODES) == {"padded_batch", "last_position"}


def test_nan_fails_every_gate():
    model = tiny_model("qwen3")
    broken = tiny_model("qwen3")
    torch.nn.init.constant_(broken.lm_head.weight[7:8], math.nan)
    _, outcomes = measured_with(broken, model)
    assert not any(outcome.passed for outcome in outcomes if outcome.gate != "min_continuations")
    with_no_limit = VerifyConfig(max_kl=math.inf, max_perplexity_ratio=math.inf).limits(Precision.int4)
    found, _ = measured_with(broken, model)
    outcomes = judge(with_no_limit, found)
    assert not any(outcome.passed for outcome in outcomes if outcome.gate.startswith("max"))


def test_differences_and_ties_of_continuations():
    model = tiny_model("qwen3")
    other = tiny_model("qwen3")
    with torch.no_grad():
        other.lm_head.weight[100] = 3 * other.lm_head.weight[100]
    prompts = rows_of(6, 10)
    reference, candidate = TorchRunner(model), TorchRunner(other)
    for tolerance in (0.0, 1e9):
        found = parity.compare_continuations(reference, candidate, prompts, 6, tolerance, NoProgress())
        expected = model.generate(prompts, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 10:]
        by_hand = other.generate(prompts, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 10:]
        positions = {
            i: int((expected[i] != by_hand[i]).nonzero()[0]) for i in range(6) if not expected[i].equal(by_hand[i])
        }
        assert positions and {parting.prompt: parting.position for parting in found.partings} == positions
        assert all(parting.gap >= 0 and parting.tied == (tolerance > 0) for parting in found.partings)
        assert found.identical == pytest.approx(1 - len(positions) / 6)
        assert found.identical_or_tied == (1 if tolerance else found.identical)


# --- whole exports -------------------------------------------------------------------------------


def test_a_locked_export_passes(locks, originals, onnx_of, cli, tmp_path):
    original, locked, export = originals("qwen3"), locks("qwen3"), onnx_of(locks("qwen3"))
    file = tmp_path / "verify.json"
    outcome = cli(
        "verify", export, "--reference", original, "--reference", locked, "--json", file, *OPTIONS,
        *LOCK_GATES_OFF,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert all(len(line) <= 80 for line in outcome.out.splitlines()[1:] if "/" not in line)
    assert "pass" in outcome.out and "FAIL" not in outcome.out
    raw = json.loads(file.read_text())
    assert raw["schema"] == "lockkit-verify/1" and raw["passed"] is True
    assert list(tmp_path.iterdir()) == [file]  # no temporary file left
    result = VerifyResult.model_validate(raw)
    assert set(raw) == {field.alias or name for name, field in VerifyResult.model_fields.items()}
    assert result.compared_with == "locked" and result.same_weights
    assert (result.original, result.locked) == (str(original), str(locked))
    assert result.text.source == "stdlib" and result.text.split == "evaluate" and result.text.rows == 8
    assert result.manifest_sha256 == sha256_of_file(export / EXPORT_MANIFEST)
    assert all(0 < mode.max_difference < 1e-2 for mode in result.parity)
    figures = result.perplexity
    assert figures.onnx_over_original == pytest.approx(figures.onnx / figures.original)
    assert figures.locked_over_original == pytest.approx(figures.locked / figures.original)
    assert figures.onnx_over_locked == pytest.approx(1, abs=1e-5)
    assert result.fidelity.tokens == 8 * 63 == figures.predictions and result.fidelity.kl_divergence > 1e-4
    assert result.fidelity.text == result.text
    assert "512 tokens of stdlib, split 'evaluate'" in outcome.out


def test_an_unlocked_export_and_its_python_api(originals, onnx_of):
    result = verify_export(onnx_of(originals("gemma2")), [originals("gemma2")], VerifyConfig(**SMALL))
    assert result.passed and not result.failed_gates
    assert result.compared_with == "original" and result.locked is None and result.fidelity is None


def test_a_changed_weight_fails_with_exit_code_1(originals, onnx_of, cli, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(originals("qwen3"), changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3] *= 1.2
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    file = tmp_path / "verify.json"
    outcome = cli("verify", onnx_of(originals("qwen3")), "--reference", changed, "--json", file, *OPTIONS)
    assert outcome.code == 1
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("lockkit: ") and "gates failed" in last and "max_kl (prefill)" in last and "1.00e-06" in last
    assert "FAIL" in outcome.out and "not, byte for byte, those that were exported" in outcome.out
    result = VerifyResult.model_validate_json(file.read_text())
    assert not result.passed and not result.same_weights
    assert {gate.figure for gate in result.failed_gates if gate.gate == "max_kl"} == set(MODES)


def test_a_lock_of_another_model_fails_with_exit_code_1(locks, onnx_of, cli, tmp_path):
    another, locked = save_tiny("qwen3", tmp_path / "another", seed=7), locks("qwen3")
    references = ["--reference", another, "--reference", locked, "--json", tmp_path / "verify.json"]
    outcome = cli("verify", onnx_of(locked), *references, *OPTIONS, "--max-perplexity-ratio", 100)
    last = outcome.err.strip().splitlines()[-1]
    assert outcome.code == 1 and last.startswith("lockkit: 2 of ")
    assert "max_lock_kl (locked_to_original)" in last and "min_lock_top1 (locked_to_original)" in last
    assert "--max-lock-kl" in outcome.out and "locked to original" in outcome.out
    result = VerifyResult.model_validate_json((tmp_path / "verify.json").read_text())
    assert {gate.gate: gate.value for gate in result.failed_gates} == {
        "max_lock_kl": result.fidelity.kl_divergence,
        "min_lock_top1": result.fidelity.top1_agreement,
    }


def test_a_damaged_export_is_refused(originals, onnx_of, cli, tmp_path):
    damaged = tmp_path / "onnx"
    shutil.copytree(onnx_of(originals("qwen3")), damaged)
    data = bytearray((damaged / "model.onnx_data").read_bytes())
    data[1000] ^= 1
    (damaged / "model.onnx_data").write_bytes(data)
    outcome = cli("verify", damaged, "--reference", originals("qwen3"), *OPTIONS)
    assert outcome.code == 2 and "model.onnx_data" in outcome.err


def test_bad_use_is_one_line_and_exit_code_2(originals, locks, onnx_of, cli, tmp_path):
    original, locked, export = originals("qwen3"), locks("qwen3"), onnx_of(originals("qwen3"))
    (tmp_path / "corpus.txt").write_text("too short")
    other_tokenizer = tmp_path / "other"
    shutil.copytree(original, other_tokenizer)
    tokenizer = json.loads((other_tokenizer / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:500]
    (other_tokenizer / "tokenizer.json").write_text(json.dumps(tokenizer))
    for arguments, expected in [
        ([tmp_path / "none", "--reference", original], "EXPORT"),
        ([original, "--reference", original], "not an export"),
        ([export], "add --reference"),
        ([export, "--reference", tmp_path / "none"], "--reference"),
        ([export, "--reference", locked], "add --reference"),
        ([onnx_of(locked), "--reference", original], "add --reference"),
        ([export, "--reference", original, "--reference", original], "both original"),
        ([export, "--reference", other_tokenizer], "tokenizer"),
        ([export, "--reference", original, "--data", tmp_path / "corpus.txt"], "--data"),
        ([export, "--reference", original, "--tokens", 0], "--tokens"),
        ([export, "--reference", original, "--min-top1", "nan"], "--min-top1"),
        ([export, "--reference", original, "--new-tokens", 1000], "--new-tokens"),
        ([export, "--reference", original, "--provider", "tpu"], "--provider"),
        ([export, "--reference", original, "--json", tmp_path / "none" / "x.json"], "--json"),
    ]:
        outcome = cli("verify", *arguments)
        last = outcome.err.strip().splitlines()[-1]
        assert outcome.code == 2 and last.startswith("lockkit: ") and expected in last, (arguments, outcome)
        assert "Traceback" not in outcome.err


def test_another_vocabulary_is_refused(originals, onnx_of, tmp_path):
    other = tmp_path / "other"
    tiny_model("qwen3", vocab_size=4100).save_pretrained(other)
    shutil.copyfile(originals("qwen3") / "tokenizer.json", other / "tokenizer.json")
    with pytest.raises(UsageError, match="vocabulary of 4100 tokens"):
        verify_export(onnx_of(originals("qwen3")), [str(other)], VerifyConfig(**SMALL))


def test_auto_uses_the_text_source_of_the_lock(locks, onnx_of, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    shutil.copytree(locks("qwen3"), locked)
    record = json.loads((locked / LOCK_RECORD).read_text())
    record["recipe"]["data"] = "corpus.txt"
    (locked / LOCK_RECORD).write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    export, config = onnx_of(locks("qwen3")), VerifyConfig(**SMALL, max_perplexity_ratio=100)
    with pytest.raises(UsageError, match="--data"):
        verify_export(export, [str(locked)], config)
    words = np.random.default_rng(0).integers(0, 10**6, 40_000)
    Path("corpus.txt").write_text("\n\n".join(" ".join(map(str, words[i : i + 40])) for i in range(0, 40_000, 40)))
    result = verify_export(export, [str(locked)], config)
    assert result.text.source == "corpus.txt" and result.passed
    assert result.perplexity.original is None
    assert [gate.figure for gate in result.gates if gate.gate == "max_perplexity_ratio"] == ["onnx_over_locked"]


def test_held_out_text_from_rows(originals, onnx_of, cli, tmp_path):
    export, original, file = onnx_of(originals("qwen3")), originals("qwen3"), tmp_path / "corpus.jsonl"
    rows = [json.dumps({"body": " ".join(f"word{number + 7 * i}" for i in range(99))}) for number in range(40)]
    file.write_text("\n".join(rows))
    command = ["verify", export, "--reference", original, "--data", file, *OPTIONS, "--tokens", 10_000]
    assert "its columns: 'body': name one with --data-column" in cli(*command).err
    outcome = cli(*command, "--data-column", "body")
    assert outcome.code == 0, outcome.err
    assert "corpus.jsonl has only " in outcome.err and "held-out tokens, fewer than --tokens 10,000" in outcome.err


def test_a_file_that_is_not_part_of_the_export_is_named(originals, onnx_of, cli, tmp_path):
    shutil.copytree(onnx_of(originals("qwen3")), tmp_path / "onnx")
    (tmp_path / "onnx" / "notes.txt").write_text("mine")
    (tmp_path / "onnx" / "model.sig").write_text("{}")  # a signature is written later
    done = cli("verify", tmp_path / "onnx", "--reference", originals("qwen3"), *OPTIONS)
    assert done.code == 0 and "not part of the export, and not read: notes.txt in " in done.err


def test_a_token_beyond_the_embeddings_is_named(originals, tmp_path):
    model, file = tmp_path / "model", tmp_path / "corpus.txt"
    shutil.copytree(originals("qwen3"), model)
    add_token(model, "<extra>")
    export_model(str(model), tmp_path / "onnx", ExportConfig())
    file.write_text("\n\n".join("<extra> " * 800 for _ in range(60)))
    with pytest.raises(UsageError, match=r"corpus\.txt cannot be read: the token '<extra>' has the id 4096"):
        verify_export(tmp_path / "onnx", [str(model)], VerifyConfig(**SMALL, data=str(file)))


def test_gates_by_precision_and_by_option():
    rows = {precision: LOCK_GATES | precision.row.gates for precision in Precision}
    assert VerifyConfig().limits(Precision.fp32) == rows[Precision.fp32]
    assert VerifyConfig(max_kl=0.5).limits(Precision.int4) == rows[Precision.int4] | {"max_kl": 0.5}
    assert VerifyConfig(min_lock_top1=0).limits(Precision.int4) == rows[Precision.int4] | {"min_lock_top1": 0}
    limits = [row["max_kl"] for row in rows.values()]
    assert limits[0] == 1e-6 and limits[0] < min(limits[1:]) and max(limits) == rows[Precision.int4]["max_kl"]
    # A gate without a limit is off, so a limit under a wrong name would be ignored.
    assert all(set(row) <= set(GATES) for row in rows.values())
    assert set(GATES) == set(Gates.model_fields) <= set(VerifyConfig.model_fields)
    for name in GATES:
        assert "0.8 int4" in VerifyConfig.model_fields["min_top1"].description
        by_precision = all(str(precision) in VerifyConfig.model_fields[name].description for precision in Precision)
        assert by_precision != (name in LOCK_GATES)


def test_the_schema_describes_every_field():
    schema = VerifyResult.model_json_schema()
    for name, part in {"VerifyResult": schema, **schema["$defs"]}.items():
        for field, entry in part.get("properties", {}).items():
            assert entry.get("description") or "$ref" in str(entry), f"{name}.{field} is not described"


def test_the_ci_example_passes(originals, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "ci" / "check.sh"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(originals("qwen3")),
        "OUT": str(tmp_path / "build"),
        "LOCK_OPTIONS": "--depth 5 --data stdlib --tokens 1024 --end-to-end-tokens 1024",
        "VERIFY_OPTIONS": "--tokens 512 --max-lock-kl inf --min-lock-top1 0",
        "MAX_PERPLEXITY_RATIO": "100",
    }
    done = subprocess.run(["sh", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert VerifyResult.model_validate_json((tmp_path / "build" / "verify.json").read_text()).passed
