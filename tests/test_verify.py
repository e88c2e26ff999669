"""Verification: its figures against independent references, and that its gates can fail."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from lockkit.errors import UsageError
from lockkit.export.config import ExportConfig
from lockkit.export.run import export_model
from lockkit.files import EXPORT_MANIFEST, LOCK_RECORD, sha256_of_file
from lockkit.measure import metrics
from lockkit.progress import NoProgress
from lockkit.runners import OnnxRunner, TorchRunner
from lockkit.verify import DEFAULT_GATES, VerifyConfig, VerifyResult, parity, verify_export
from lockkit.verify.run import judge, measure

SMALL = {"tokens": 512, "block_tokens": 64, "prompts": 2, "new_tokens": 8}
OPTIONS = ["--tokens", 512, "--block-tokens", 64, "--prompts", 2, "--new-tokens", 8]
MODES = ["prefill", "cache_tokens", "cache_chunk", "padded_batch"]


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


# --- metrics -------------------------------------------------------------------------------------

logits_arrays = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.floats(-50, 50, width=32)
)


@settings(deadline=None, max_examples=60)
@given(logits_arrays, st.integers(0, 10_000))
def test_kl_divergence_is_the_definition(reference, seed):
    candidate = reference + np.random.default_rng(seed).normal(size=reference.shape).astype(np.float32)
    p = np.exp(reference.astype(np.longdouble))
    q = np.exp(candidate.astype(np.longdouble))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    expected = (p * np.log(p / q)).sum(-1).astype(np.float64)
    found = metrics.kl_divergence(torch.tensor(reference), torch.tensor(candidate))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    by_torch = torch.nn.functional.kl_div(
        torch.tensor(candidate).double().log_softmax(-1),
        torch.tensor(reference).double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    torch.testing.assert_close(found, by_torch.clamp_min(0), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(logits_arrays, st.floats(-20, 20, width=32))
def test_logits_shifted_as_a_whole_are_the_same_distribution(reference, shift):
    logits = torch.tensor(reference).double()
    assert metrics.kl_divergence(logits, logits).max() == 0
    assert metrics.kl_divergence(logits, logits + shift).max() < 1e-12


def test_kl_divergence_of_a_coin():
    p, q = math.log(0.9 / 0.1), math.log(0.5 / 0.5)
    found = metrics.kl_divergence(torch.tensor([p, 0.0]), torch.tensor([q, 0.0])).item()
    assert found == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)


def test_kl_divergence_of_tokens_ruled_out():
    out = -math.inf
    one = torch.tensor([0.0, 0.0, out])
    assert metrics.kl_divergence(one, one).item() == 0
    assert metrics.kl_divergence(one, torch.tensor([0.0, out, 0.0])).item() == math.inf


def test_comparison_sums_over_batches_and_keeps_nan(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", 25)  # pieces of two positions
    torch.manual_seed(0)
    reference, candidate = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    found = metrics.Comparison()
    found.add(reference[:1], candidate[:1])
    found.add(reference[1:], candidate[1:])
    assert found.tokens == 10
    difference = (reference - candidate).abs()
    assert found.max_difference == pytest.approx(difference.max().item())
    assert found.mean_difference == pytest.approx(difference.mean().item())
    assert found.kl_divergence == pytest.approx(metrics.kl_divergence(reference, candidate).mean().item())
    assert found.top1_agreement == (reference.argmax(-1) == candidate.argmax(-1)).float().mean().item()

    broken = candidate.clone()
    broken[0, 1, 3] = math.nan
    for first, second in ((broken, candidate), (candidate, broken)):  # NaN early and NaN late
        found = metrics.Comparison()
        found.add(reference, first)
        found.add(reference, second)
        assert math.isnan(found.max_difference) and math.isnan(found.mean_difference)
        assert math.isnan(found.kl_divergence)
    assert not metrics.top1_agreement(broken, broken)[0, 1]
    with pytest.raises(ValueError, match="shape"):
        found.add(reference, candidate[:1])


class Bigram(torch.nn.Module):
    """The next token depends on the last one alone, by a table of logits."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.table[input_ids]})


def test_perplexity_by_hand():
    # After 0 comes 1 with 3/4, after 1 comes 0 with 1/2.
    table = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    rows = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 1]])
    probabilities = [0.75, 0.5, 0.25, 0.75, 0.5, 0.5]
    expected = math.prod(probabilities) ** (-1 / 6)
    for batch_rows in (1, 2, 8):
        assert metrics.perplexity(Bigram(table), rows, batch_rows) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(metrics.perplexity(Bigram(table * math.nan), rows))


def test_perplexity_is_transformers_own_loss():
    model, rows = tiny_model("llama"), rows_of(5, 32)
    with torch.no_grad():
        expected = math.exp(model(input_ids=rows, labels=rows).loss)
    assert metrics.perplexity(model, rows, batch_rows=2) == pytest.approx(expected, rel=1e-5)


# --- comparisons, with PyTorch on both sides ------------------------------------------------------


class FakeSession:
    """An export session that is a PyTorch model; right-padded batches, as real sessions take them."""

    def __init__(self, model, fault: str = ""):
        self.model, self.fault = model, fault

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
        seen = np.zeros((len(ids), past + ids.shape[1]))
        return output.logits.float().numpy(), (output.past_key_values, seen)


def measured_with(session, model):
    torch.manual_seed(0)
    rows, config = rows_of(6, 48), VerifyConfig(**SMALL)
    runners = {"original": TorchRunner(model)}
    found = measure(OnnxRunner(session), runners, "original", rows, config, NoProgress())
    return found, judge(config.gates("fp32"), found)


def test_the_same_model_has_no_divergence():
    model = tiny_model("qwen3")
    found, outcomes = measured_with(FakeSession(model), model)
    assert [mode.mode for mode in found.parity] == MODES
    for mode in found.parity:
        assert mode.kl_divergence < 1e-10 and mode.top1_agreement == 1 and mode.max_difference < 1e-3
    assert found.parity[0].kl_divergence == 0 and found.parity[0].max_difference == 0
    assert found.continuations.identical == found.continuations.identical_or_tied == 1
    assert found.perplexity.onnx_over_original == 1 and found.perplexity.locked is None
    assert found.perplexity.predictions == 6 * 47
    assert all(outcome.passed for outcome in outcomes)
    assert [mode.tokens for mode in found.parity[:3]] == [6 * 48, 4 * 24, 4 * 24]


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("forgets the cache", {"cache_tokens", "cache_chunk", "padded_batch"}),
        ("positions restart", {"cache_tokens", "cache_chunk", "padded_batch"}),
        ("chunks are wrong", {"cache_chunk"}),
        ("ignores the mask", {"padded_batch"}),
    ],
)
def test_a_fault_in_one_way_of_running_is_caught_there(fault, caught_by):
    model = tiny_model("qwen3")
    found, outcomes = measured_with(FakeSession(model, fault), model)
    failed = {outcome.figure for outcome in outcomes if not outcome.passed}
    assert failed & set(MODES) == caught_by
    assert found.parity[0].kl_divergence == 0  # prefill alone would not have seen it


def test_nan_fails_every_gate():
    model = tiny_model("qwen3")
    broken = tiny_model("qwen3")
    torch.nn.init.constant_(broken.lm_head.weight[7:8], math.nan)
    _, outcomes = measured_with(FakeSession(broken), model)
    assert not any(outcome.passed for outcome in outcomes if outcome.gate != "min_continuations")
    with_no_limit = VerifyConfig(max_kl=math.inf, max_perplexity_ratio=math.inf).gates("int4")
    found, _ = measured_with(FakeSession(broken), model)
    outcomes = judge(with_no_limit, found)
    assert not any(outcome.passed for outcome in outcomes if outcome.gate.startswith("max"))


def test_partings_and_ties():
    model = tiny_model("qwen3")
    other = tiny_model("qwen3")
    with torch.no_grad():
        other.lm_head.weight[100] = 3 * other.lm_head.weight[100]
    prompts = rows_of(6, 10)
    reference, candidate = TorchRunner(model), TorchRunner(other)
    for tolerance in (0.0, 1e9):
        found = parity.compare_continuations(reference, candidate, prompts, 6, tolerance, 4, NoProgress())
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
        "--max-perplexity-ratio", 100,
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
    assert result.fidelity.tokens == 512 and result.fidelity.kl_divergence > 1e-4


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


def test_a_damaged_export_is_refused_before_it_runs(originals, onnx_of, cli, tmp_path):
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


def test_auto_takes_the_source_of_the_lock(locks, onnx_of, tmp_path, monkeypatch):
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


def test_gates_by_precision_and_by_option():
    assert VerifyConfig().gates("fp32") == DEFAULT_GATES["fp32"]
    assert VerifyConfig(max_kl=0.5).gates("int4").max_kl == 0.5
    assert VerifyConfig(max_kl=0.5).gates("int4").min_top1 == DEFAULT_GATES["int4"].min_top1
    limits = [gates.max_kl for gates in DEFAULT_GATES.values()]
    assert limits[0] == 1e-6 and limits[0] < min(limits[1:]) and max(limits) == DEFAULT_GATES["int4"].max_kl


def test_the_schema_describes_every_field():
    schema = VerifyResult.model_json_schema()
    for name, part in {"VerifyResult": schema, **schema["$defs"]}.items():
        for field, entry in part["properties"].items():
            assert entry.get("description") or "$ref" in str(entry), f"{name}.{field} is not described"


def test_ci_example(originals, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "ci" / "check.sh"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(originals("qwen3")),
        "OUT": str(tmp_path / "build"),
        "LOCK_OPTIONS": "--depth 5 --data stdlib --tokens 1024 --end-to-end-tokens 1024",
        "VERIFY_OPTIONS": "--tokens 512",
        "MAX_PERPLEXITY_RATIO": "100",
    }
    done = subprocess.run(["sh", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert VerifyResult.model_validate_json((tmp_path / "build" / "verify.json").read_text()).passed
