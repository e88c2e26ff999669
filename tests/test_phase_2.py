"""Phase 2: it never makes a lock worse, and its gradients are those of plain autograd."""

from __future__ import annotations

import pytest
import torch
from conftest import QUICK
from tiny import empty_chain

from lockkit.lock.config import LockConfig
from lockkit.lock.initialise import start_from_teacher
from lockkit.lock.run import lock_model
from lockkit.models.families import decoder_layers, mlp_weights
from lockkit.models.load import load_config, load_model
from lockkit.progress import NoProgress


def quick(**changes) -> LockConfig:
    return LockConfig(**(QUICK | changes))


def test_phase_2_improves_on_phase_1(originals, tmp_path):
    """With the learning rate that it finds."""
    config = quick(coupling=1, end_to_end_tokens=16_384)
    record = lock_model(str(originals("llama")), tmp_path / "out", config).record
    assert record["end_to_end"]["best_step"] > 0
    assert record["end_to_end"]["kl_divergence_after"] < 0.95 * record["end_to_end"]["kl_divergence_before"]


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_phase_2_never_ends_worse_than_phase_1(originals, tmp_path, offload):
    # A learning rate that is too high for any model.
    config = quick(end_to_end_learning_rate=0.5, offload=offload)
    record = lock_model(str(originals("llama")), tmp_path / "out", config).record
    assert record["end_to_end"]["best_step"] == 0
    assert record["fidelity"]["kl_divergence"] == pytest.approx(record["after_phase_1"]["kl_divergence"], rel=1e-4)


def test_phase_2_ends_after_its_trials_if_none_is_better(originals, tmp_path, monkeypatch):
    monkeypatch.setattr("lockkit.lock.end_to_end.TRIAL_RATES", (0.5, 1.0))  # too high for any model
    record = lock_model(str(originals("llama")), tmp_path / "out", quick()).record
    phase_2 = record["end_to_end"]
    assert (phase_2["steps"], phase_2["tokens"], phase_2["learning_rate"], phase_2["best_step"]) == (0, 0, 0, 0)
    assert phase_2["kl_divergence_after"] == phase_2["kl_divergence_before"]
    assert record["fidelity"]["kl_divergence"] == pytest.approx(record["after_phase_1"]["kl_divergence"], rel=1e-4)


def test_phase_2_has_the_gradients_of_plain_autograd(originals, tmp_path):
    """Backward passes layer by layer give the same gradients as one through the whole model."""
    from lockkit.lock.end_to_end import EndToEnd
    from lockkit.lock.stack import ChainStack
    from lockkit.models.layered import StreamedModel
    from lockkit.workers import Workers

    folder = originals("gemma2")
    model, family = load_model(folder, torch.float32)
    config = quick()
    inputs = torch.randn(50, 32)

    def start(index):
        mlp = decoder_layers(teacher)[index].mlp
        chain = empty_chain(mlp_weights(mlp, family).shape, 5, 0.3, mlp.act_fn).requires_grad_(False)
        start_from_teacher(chain, mlp_weights(mlp, family), inputs)
        return chain

    teacher, _ = load_model(folder, torch.float32)
    rows = torch.randint(1, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    stream = StreamedModel(folder, load_config(folder), family, "cpu")
    stack = ChainStack(stream, start, config)
    gradients = []
    for index in range(len(stream)):
        _, optimiser = stack._take(index)
        optimiser.optimiser.register_step_pre_hook(
            lambda optimiser, *_: gradients.append([p.grad.clone() for p in optimiser.param_groups[0]["params"]])
        )
    expected = ChainStack(stream, start, config)
    with torch.no_grad():
        target = model(rows).logits
    for index, layer in enumerate(decoder_layers(model)):
        layer.requires_grad_(False).mlp = expected.chain(index)
    log_student, log_teacher = (logits.flatten(0, 1).log_softmax(-1) for logits in (model(rows).logits, target))
    torch.nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True).backward()
    EndToEnd(stream, stack, rows, None, config, None, Workers(), NoProgress())._step(torch.arange(3), 0)
    for index, found in enumerate(reversed(gradients)):
        for one, other in zip(expected.chain(index).parameters(), found, strict=True):
            torch.testing.assert_close(other, one.grad, rtol=1e-3, atol=1e-4 * one.grad.abs().max().item())
