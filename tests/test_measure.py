"""The one measure: figures against independent references, and equal figures from all who measure."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny import VOCAB, tiny_model

from lockkit.attack.config import audit_config
from lockkit.attack.subjects import Subjects
from lockkit.export.config import ExportConfig
from lockkit.export.run import export_model
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.measure import totals
from lockkit.measure.metrics import LOGIT_FIGURES, Prediction, kl_divergence, nmse, top1_agreement
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.measure.totals import NMSE, Comparison, Outputs, TextFigures, perplexity
from lockkit.models.families import FAMILIES
from lockkit.models.layered import LayeredModel
from lockkit.verify import VerifyConfig, verify_export

EVERY_FAMILY = pytest.mark.parametrize("model_type", FAMILIES)


def rows_of(count: int, block: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, block), generator=torch.Generator().manual_seed(seed))


# --- each figure by its definition ---------------------------------------------------------------

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
    found = kl_divergence(torch.tensor(reference), torch.tensor(candidate))
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
    assert kl_divergence(logits, logits).max() == 0
    assert kl_divergence(logits, logits + shift).max() < 1e-12


def test_kl_divergence_of_a_coin():
    p, q = math.log(0.9 / 0.1), math.log(0.5 / 0.5)
    found = kl_divergence(torch.tensor([p, 0.0]), torch.tensor([q, 0.0])).item()
    assert found == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)


def test_kl_divergence_of_tokens_ruled_out():
    out = -math.inf
    one = torch.tensor([0.0, 0.0, out])
    assert kl_divergence(one, one).item() == 0
    assert kl_divergence(one, torch.tensor([0.0, out, 0.0])).item() == math.inf


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(0, 10_000))
def test_the_top_token_is_the_first_of_the_highest(vocab, seed):
    logits = torch.randint(-3, 3, (5, vocab), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(Prediction(logits).top_token, logits.argmax(-1))
    logits[2, seed % vocab] = math.nan
    assert Prediction(logits).top_token[2] == seed % vocab


def test_undefined_distributions_never_agree():
    for row in ([0.0, math.inf, 0.5], [-math.inf] * 3, [0.0, math.nan, 0.5]):
        logits = torch.tensor([row, [0.0, 1.0, 2.0]])
        assert top1_agreement(logits, logits).tolist() == [False, True]
        assert kl_divergence(logits, logits).isnan().tolist() == [True, False]


def test_comparison_sums_over_batches_and_keeps_nan(monkeypatch):
    monkeypatch.setattr(totals, "CHUNK_LOGITS", 25)  # chunks of two positions
    torch.manual_seed(0)
    reference, candidate = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    comparison = Comparison(LOGIT_FIGURES)
    comparison.add(reference[:1], candidate[:1])
    comparison.add(reference[1:], candidate[1:])
    difference = (reference - candidate).abs()
    found = comparison.figures()
    assert comparison.tokens == 10
    assert found["max_difference"] == pytest.approx(difference.max().item())
    assert found["mean_difference"] == pytest.approx(difference.mean().item())
    assert found["kl_divergence"] == pytest.approx(kl_divergence(reference, candidate).mean().item())
    assert found["top1_agreement"] == (reference.argmax(-1) == candidate.argmax(-1)).double().mean().item()

    broken = candidate.clone()
    broken[0, 1, 3] = math.nan
    for first, second in ((broken, candidate), (candidate, broken)):  # NaN early and NaN late
        comparison = Comparison(LOGIT_FIGURES)
        comparison.add(reference, first)
        comparison.add(reference, second)
        found = comparison.figures()
        assert all(math.isnan(found[name]) for name in ("max_difference", "mean_difference", "kl_divergence"))
    assert not top1_agreement(broken, broken)[0, 1]
    with pytest.raises(ValueError, match="shape"):
        comparison.add(reference, candidate[:1])
    assert math.isnan(Comparison().kl_divergence) and math.isnan(Comparison(LOGIT_FIGURES).figures()["max_difference"])


def by_hand(ids: np.ndarray, reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """All figures of a text, one position after the other, in extended precision."""
    kl, same, losses = [], [], {"reference": [], "candidate": []}
    for row, p_logits, q_logits in zip(
        ids, reference.astype(np.longdouble), candidate.astype(np.longdouble), strict=True
    ):
        for following, p_row, q_row in zip(row[1:], p_logits, q_logits, strict=False):
            p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p_row, q_row))
            kl.append((p * (np.log(p) - np.log(q))).sum())
            same.append(p.argmax() == q.argmax())
            losses["reference"].append(-np.log(p[following]))
            losses["candidate"].append(-np.log(q[following]))
    return {
        "tokens": len(kl),
        "kl_divergence": float(np.mean(kl)),
        "top1_agreement": float(np.mean(same)),
        "perplexity": float(np.exp(np.mean(losses["candidate"]))),
        "original_perplexity": float(np.exp(np.mean(losses["reference"]))),
        "perplexity_ratio": float(np.exp(np.mean(losses["candidate"]) - np.mean(losses["reference"]))),
    }


@pytest.mark.parametrize("chunk", [1, 150, 4_000_000])
def test_figures_of_a_text_are_those_computed_by_hand_whatever_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(totals, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    ids, states = torch.randint(0, 50, (5, 9)), torch.randn(5, 9, 6)
    weights = torch.randn(50, 6)
    moved = weights + 0.1 * torch.randn(50, 6)
    figures = TextFigures(["original", "locked"], [("original", "locked")])
    most = 0

    def head(matrix, hidden):
        nonlocal most
        most = max(most, hidden.shape[0] * matrix.shape[0])
        return hidden @ matrix.T

    for part in (slice(0, 2), slice(2, 5)):
        figures.add(
            ids[part],
            {
                "original": Outputs(states[part], lambda hidden: head(weights, hidden)),
                "locked": Outputs(states[part], lambda hidden: head(moved, hidden)),
            },
        )
    text = MeasuredText.of(ids, "stdlib", "evaluate")
    found = figures.fidelity(text)
    assert most <= max(chunk, 50)  # one position at least
    expected = by_hand(ids.numpy(), (states @ weights.T).numpy(), (states @ moved.T).numpy())
    assert found.tokens == 5 * 8
    assert found.model_dump(exclude={"text"}) == pytest.approx(expected, rel=1e-5)
    assert (
        found.text.token_sha256
        == hashlib.sha256(b"".join(int(i).to_bytes(8, "little") for i in ids.flatten())).hexdigest()
    )
    assert str(found.text) == "45 tokens of stdlib, split 'evaluate'"
    # Logits at hand give the same.
    whole = TextFigures(["original", "locked"], [("original", "locked")])
    whole.add(ids, {"original": Outputs(states @ weights.T), "locked": Outputs(states @ moved.T)})
    assert whole.fidelity(text).model_dump(exclude={"text"}) == pytest.approx(expected, rel=1e-5)


def test_figures_that_are_not_finite_are_written_as_null_and_read_back():
    ids = torch.randint(0, 7, (2, 4), generator=torch.Generator().manual_seed(0))
    broken = torch.zeros(2, 4, 7)
    broken[1, 1, 2] = math.nan
    figures = TextFigures(["original", "locked"], [("original", "locked")])
    figures.add(ids, {"original": Outputs(torch.zeros(2, 4, 7)), "locked": Outputs(broken)})
    found = figures.fidelity(MeasuredText.of(ids, "self", None))
    assert math.isnan(found.kl_divergence) and math.isnan(found.perplexity) and math.isnan(found.perplexity_ratio)
    assert found.original_perplexity == pytest.approx(7) and found.top1_agreement == 5 / 6
    written = json.loads(json.dumps(found.record(), allow_nan=False))
    assert written["kl_divergence"] is None and written["text"]["split"] is None
    assert math.isnan(Fidelity.model_validate(written).kl_divergence)
    assert str(found.text) == "8 tokens sampled from the original itself"


def test_a_last_position_predicts_nothing_of_its_row():
    ids, logits = rows_of(3, 1), torch.randn(3, 1, 7)
    figures = TextFigures(["model"])
    figures.add(ids, {"model": Outputs(logits)})
    assert figures.perplexity["model"].predictions == 0 and math.isnan(figures.perplexity["model"].value)


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
        assert perplexity(Bigram(table), rows, batch_rows) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(perplexity(Bigram(table * math.nan), rows))
    assert perplexity(Bigram(torch.tensor([[1e4, 0.0], [1e4, 0.0]])), torch.ones(2, 3).long()) == math.inf


def test_perplexity_is_transformers_own_loss():
    model, rows = tiny_model("llama"), rows_of(5, 32)
    with torch.no_grad():
        expected = math.exp(model(input_ids=rows, labels=rows).loss)
    assert perplexity(model, rows, batch_rows=2) == pytest.approx(expected, rel=1e-5)


def test_nmse_over_batches_is_nmse_of_all():
    torch.manual_seed(0)
    teacher = torch.randn(1000, 8) * 3 + torch.arange(8) * 50
    student = teacher + torch.randn(1000, 8)
    found = NMSE()
    for one, other in zip(student.split(300), teacher.split(300), strict=True):
        found.add(one, other)
    x, y = student.double().numpy(), teacher.double().numpy()
    assert found.value == pytest.approx(((x - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-9)
    assert nmse(student, teacher).item() == pytest.approx(found.value, rel=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (0.0, 0.0, 0),  # a copy
        (0.5, 0.0, 0.25),  # nothing to normalise by
        (0.3, 0.3, 0),  # a copy; in float32, the mean of 0.3 is not exactly 0.3
        (0.33, 0.3, 0.01),  # an error of a tenth
    ],
)
def test_nmse_of_constant_outputs_is_defined(student, teacher, expected):
    student, teacher = torch.full((1000, 7), student), torch.full((1000, 7), teacher)
    found = NMSE()
    found.add(student, teacher)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert nmse(student, teacher).item() == pytest.approx(expected, rel=1e-5)


# --- the output head -----------------------------------------------------------------------------


@EVERY_FAMILY
def test_any_part_of_the_hidden_states_gives_the_models_own_logits(model_type):
    model, ids = tiny_model(model_type), rows_of(3, 40)
    with torch.no_grad():
        expected = model(ids).logits
        layered = LayeredModel(model, "cpu")
        hidden = layered.hidden(ids)
        found = torch.cat([layered.head(part) for part in hidden.flatten(0, 1).split(7)])
        torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layered.head(hidden), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(ids).logits, expected)  # nothing of it stays in the model


@EVERY_FAMILY
def test_the_head_has_the_models_own_gradient(model_type):
    model, ids = tiny_model(model_type), rows_of(2, 12)
    outputs = []
    hook = model.model.layers[-1].register_forward_hook(lambda _module, _args, out: outputs.append(out))
    (expected,) = torch.autograd.grad(model(ids).logits.square().mean(), outputs[0])
    hook.remove()
    hidden = outputs[0].detach().requires_grad_(True)
    (found,) = torch.autograd.grad(LayeredModel(model, "cpu").head(hidden).square().mean(), hidden)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@EVERY_FAMILY
@pytest.mark.parametrize("positions_in_a_chunk", [1, 5, 24])
def test_the_loss_of_phase_2_is_autograds_whatever_the_chunk(monkeypatch, model_type, positions_in_a_chunk):
    monkeypatch.setattr(totals, "CHUNK_LOGITS", positions_in_a_chunk * VOCAB)
    layered, widest = LayeredModel(tiny_model(model_type), "cpu"), 0
    student, teacher = torch.randn(2, 2, 12, layered.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def head(hidden):
        nonlocal widest
        widest = max(widest, hidden[..., 0].numel())
        return layered.head(hidden)

    loss, gradient = totals.kl_loss_and_gradient(student, teacher, head)
    hidden = student.clone().requires_grad_(True)
    log_q, log_p = (layered.head(states).flatten(0, 1).log_softmax(-1) for states in (hidden, teacher))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    assert widest == positions_in_a_chunk
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * expected_gradient.abs().max().item())


# --- the three commands --------------------------------------------------------------------------


# In a narrower type, what the lock takes over from the original is rounded, too.
@pytest.fixture(scope="module", params=[("qwen3", "auto"), ("gemma2", "auto"), ("qwen3", "bfloat16")])
def one_lock(request, originals, tmp_path_factory):
    """A lock measured on two rows of 256 tokens, and its export."""
    model_type, dtype = request.param
    folder = tmp_path_factory.mktemp("measured")
    config = QUICK | {"block_tokens": 256, "validation_tokens": 512, "end_to_end_tokens": 0, "dtype": dtype}
    record = lock_model(str(originals(model_type)), folder / "locked", LockConfig(**config)).record
    export_model(str(folder / "locked"), folder / "onnx", ExportConfig())
    return originals(model_type), folder, record


def test_lock_verify_and_attack_give_the_same_figures(one_lock):
    original, folder, record = one_lock
    verified = verify_export(
        folder / "onnx",
        [str(original), str(folder / "locked")],
        VerifyConfig(data="stdlib", tokens=512, block_tokens=256, prompts=0),
    )
    bench = Subjects(
        str(folder / "locked"), str(original), audit_config("quick", evaluation_tokens=512, data="stdlib", device="cpu")
    )
    found = [Fidelity.model_validate(record["fidelity"]), verified.fidelity, bench.fidelity]
    assert found[0].text == found[1].text == found[2].text
    assert found[0].tokens == found[1].tokens == found[2].tokens == 2 * 255
    for name in ("kl_divergence", "perplexity", "original_perplexity", "perplexity_ratio"):
        values = [getattr(fidelity, name) for fidelity in found]
        assert values[1] == pytest.approx(values[0], rel=1e-5) and values[2] == pytest.approx(values[0], rel=1e-5), name
    same = [fidelity.top1_agreement for fidelity in found]
    assert max(same) - min(same) <= 1 / 510
    assert found[0].kl_divergence > 1e-4  # there is something to measure
    # What each command reports elsewhere is the same again.
    quality = bench.quality_of("locked")
    assert quality.kl_to_lock == 0 and quality.kl_to_original == found[2].kl_divergence
    assert quality.perplexity == found[2].perplexity
    assert verified.perplexity.locked == verified.fidelity.perplexity
    assert verified.perplexity.original == verified.fidelity.original_perplexity
    assert verified.perplexity.predictions == verified.fidelity.tokens
